"""Access to Transformers' own common testers, which are in its sdist but not in its wheel.

`TRANSFORMERS_TESTS` is the root of the unpacked sdist of the installed version (the folder that contains `tests/`):

    pip download --no-deps --no-binary :all: --no-build-isolation transformers==<version>

If it is not set, modules that import this one are skipped.
"""

import importlib
import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import transformers

ROOT = os.environ.get("TRANSFORMERS_TESTS")
if not ROOT:
    pytest.skip("TRANSFORMERS_TESTS does not name an unpacked sdist of transformers", allow_module_level=True)


def _require_same_version(root: Path) -> None:
    if not (root / "tests" / "test_modeling_common.py").is_file():
        raise ValueError(
            f"TRANSFORMERS_TESTS is {str(root)!r}, expected a folder with tests/test_modeling_common.py"
        )
    version = next(
        line.removeprefix("Version: ").strip()
        for line in (root / "PKG-INFO").read_text(encoding="utf-8").splitlines()
        if line.startswith("Version: ")
    )
    if version != transformers.__version__:
        raise ValueError(
            f"TRANSFORMERS_TESTS holds transformers {version}, but {transformers.__version__} is installed"
        )


def _stub(name: str, **attributes: object) -> None:
    """Replaces a helper of the testers in a sub-folder that the sdist leaves out."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(("tests.", "fetch_hub_objects")) and error.name != name:
            raise
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules[name] = module


_require_same_version(Path(ROOT))
sys.path.insert(0, ROOT)
# Export has its own tests, and these models do not generate text.
_stub("tests.exporters", __path__=[])
_stub("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
_stub("tests.generation", __path__=[])
_stub("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
# Fields that every configuration accepts, with values other than their defaults.
_stub("tests.utils", __path__=[])
_stub(
    "tests.utils.test_configuration_utils",
    config_common_kwargs={
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 5,
        "architectures": ["PGSegModel"],
        "id2label": {0: "label"},
        "label2id": {"label": "0"},
        "problem_type": "regression",
        "bos_token_id": 6,
        "pad_token_id": 7,
        "eos_token_id": 8,
    },
)
# Maps the URLs of the testers' photographs to local files; one of our images is enough.
_PHOTO = Path(__file__).parents[2] / "examples" / "images" / "blue-sweater.jpg"
_stub(
    "fetch_hub_objects_for_ci",
    url_to_local_path=lambda url: str(_PHOTO) if url.endswith((".jpg", ".png")) else url,
)

# The configuration tester imports transformers by the path of a file that the sdist leaves out.
with mock.patch("transformers.utils.direct_transformers_import", lambda *args, **kwargs: transformers):
    from tests.test_configuration_common import ConfigTester
from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin  # noqa: E402
from tests.test_modeling_common import (  # noqa: E402
    ModelTesterMixin,
    floats_tensor,
    ids_tensor,
    random_attention_mask,
)
from tests.test_processing_common import ProcessorTesterMixin  # noqa: E402

__all__ = [
    "ConfigTester",
    "ImageProcessingTestMixin",
    "ImageProcessingTester",
    "ModelTesterMixin",
    "ProcessorTesterMixin",
    "floats_tensor",
    "ids_tensor",
    "random_attention_mask",
]
