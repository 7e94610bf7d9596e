"""Names of a package that are imported when they are first asked for (PEP 562), so that the package imports at once."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and lazy names of a package: what it imports from its modules under `if
    TYPE_CHECKING:`, where mypy and editors see it. All of its modules can be reached as attributes too.

    Args:
        package: its `__name__`.
        file: its `__file__`.
    """
    blocks = [node for node in ast.parse(Path(file).read_bytes()).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    module_of = {alias.name: str(node.module) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name in module_of:
            value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        elif not name.startswith("__") and find_spec(f"{package}.{name}"):
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        modules = (module.partition(".")[0] for module in module_of.values())
        return sorted({*vars(sys.modules[package]), *modules, *module_of})

    return get, list_names, list(module_of)
