"""Reads tensors from untrusted `.pth` files: no code in them is executed, and no more is allocated than they hold."""

import math
import os
import pickle
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .weights import what_is_wrong_with_file


class _Inert:
    """Replaces any object of a pickle that is not a tensor. It accepts every operation and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
        return self

    def __hash__(self) -> int:
        return id(self)

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore


class _Function:
    """A function that a pickle can call but, unlike a plain one, cannot set attributes of."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        pass


def _inert_class(*args: Any) -> type[_Inert]:
    return _Inert


_TENSOR_REBUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2")


def _checked(rebuild: Callable, storage: Any, offset: int, shape: tuple, *others: Any) -> Tensor:
    """Rebuilds a tensor whose bytes are all in the file; strides of 0 could make a huge tensor out of one number."""
    size, there = math.prod(shape) * storage.dtype.itemsize, storage._untyped_storage.nbytes()
    if size > there:
        raise ValueError(f"a tensor of shape {list(shape)} has {there:,} bytes, expected {size:,}")
    return rebuild(storage, offset, shape, *others)


# The pure Python unpickler: the one in C allocates memory for as many objects as the file claims to have.
class _TensorUnpickler(pickle._Unpickler):
    """Builds tensors and plain containers; every other class or function in the file becomes [`_Inert`]."""

    storage_bytes: Callable[[str], int]
    """Number of bytes that the file has for a storage."""

    def load(self) -> Any:
        read = getattr(self, "persistent_load", None)  # set by torch for this file

        def persistent_load(saved_id: tuple) -> Any:
            if saved_id[0] == "storage":
                _, kind, key, _, count, *_ = saved_id
                if not 0 <= count * kind.dtype.itemsize <= self.storage_bytes(key):
                    raise ValueError(f"a storage of {count} numbers is larger than the file")
            return read(saved_id) if read else None

        self.persistent_load = persistent_load  # type: ignore[assignment]
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in _TENSOR_REBUILDERS:
            return _Function(partial(_checked, getattr(torch._utils, name)))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Function(torch._utils._rebuild_parameter)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if name == "getattr":  # old pickles use it to name a nested class
            return _Function(_inert_class)
        return _Inert


def _safe_pickle(path: Path) -> types.SimpleNamespace:
    """The pickle module that `torch.load` needs, for one file.

    Raises:
        ValueError: the file is compressed, so its parts may be of any size.
    """
    size = path.stat().st_size
    records: dict[str, int] = {}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            records = {entry.filename.partition("/data/")[2]: entry.file_size for entry in archive.infolist()}
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise ValueError("its parts are larger than the file; expected a file written by torch.save")

    class Unpickler(_TensorUnpickler):
        def storage_bytes(self, key: str) -> int:
            return records.get(key, 0) if records else size

    return types.SimpleNamespace(
        Unpickler=Unpickler,
        load=lambda file, **options: Unpickler(file, **options).load(),
        __name__=__name__,
    )


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads the tensors of a `.pth` file, bare or under `model`, without executing code in the file. Everything else in
    it is ignored.

    Raises:
        ValueError: the file does not exist, is not a torch checkpoint, or does not contain a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a released checkpoint (.pth).")
    try:
        with warnings.catch_warnings():
            # torch.load only warns before it passes such a file to torch.jit.load, which runs code in the file.
            warnings.filterwarnings("error", message=".*TorchScript archive.*")
            if tarfile.is_tarfile(path):
                raise ValueError("it is a tar file, the format of torch before 0.2")
            content = torch.load(
                path, map_location="cpu", pickle_module=_safe_pickle(path), weights_only=False
            )
    except Exception as error:  # torch and pickle raise many types of errors for unknown files
        if reason := what_is_wrong_with_file(path):
            raise ValueError(f"{path} {reason}") from error
        raise ValueError(
            f"{path} cannot be read as a PyTorch checkpoint: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} contains a {type(content).__name__}, expected a dict with the key 'model'.")
    tensors = tensors_of(content)
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > path.stat().st_size:
        raise ValueError(
            f"{path} has only {path.stat().st_size:,} bytes for tensors of {size:,} bytes; expected tensors that do "
            "not share memory."
        )
    return tensors


def tensors_of(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors in the content of a `.pth` file, bare or under `model`, without a wrapper's prefix."""
    if isinstance(content.get("model"), Mapping):
        content = content["model"]
    return {
        name.removeprefix("module."): value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
