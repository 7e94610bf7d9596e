"""Loads a model together with its processor."""

import os
from typing import Any, Literal

import torch

from . import DEFAULT_CHECKPOINT
from .files import refuse_missing_folder
from .modeling_pgseg import PGSegModel
from .options import SegmentationOptions
from .processing_pgseg import PGSegProcessor
from .quantization import PGSegInt8Config
from .segmentation import Segmenter
from .weights import refuse_bad_weights, refuse_other_tokenizer

# The arguments of `PGSegModel.from_pretrained` that locate the files; the processor gets them too.
_OF_ALL_FILES = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    "trust_remote_code",
)


def load_segmenter(
    name_or_path: str | os.PathLike = DEFAULT_CHECKPOINT,
    options: SegmentationOptions | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["int8"] = torch.float32,
    **kwargs: Any,
) -> Segmenter:
    """Loads a checkpoint's model and processor as a [`Segmenter`]. No code in the checkpoint is executed unless
    `trust_remote_code=True`.

    Args:
        name_or_path (`str` or `os.PathLike`, *optional*, defaults to `DEFAULT_CHECKPOINT`): folder or Hub name.
        options (`SegmentationOptions`, *optional*): defaults for the segmenter's calls.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): device of the model.
        dtype (`torch.dtype` or `"int8"`, *optional*, defaults to `torch.float32`): dtype of the model. `"int8"`, on a
            CPU only, makes it smaller and its blocks faster (see `quantization.py`). A checkpoint saved in int8 always
            loads in int8.
        kwargs: arguments of `PGSegModel.from_pretrained`; `revision`, `token` etc. apply to the processor too.

    Raises:
        ValueError: the checkpoint does not exist or is not a PGSeg checkpoint.
    """
    name_or_path = os.fspath(name_or_path)
    refuse_missing_folder(name_or_path)
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from error
    if dtype in ("int8", torch.int8):
        kwargs["quantization_config"], dtype = PGSegInt8Config(), torch.float32
    # Without this, transformers asks on the terminal whether to run the code in a folder.
    kwargs = {"trust_remote_code": False, **kwargs}
    try:
        model = PGSegModel.from_pretrained(name_or_path, dtype=dtype, **kwargs)
        places = {name: kwargs[name] for name in _OF_ALL_FILES if name in kwargs}
        processor = PGSegProcessor.from_pretrained(name_or_path, **places)
        size = processor.image_processor.size
    except MemoryError:
        raise
    except Exception as error:  # transformers and its libraries raise many types for broken files
        raise ValueError(
            f"{name_or_path} is not a PGSeg checkpoint: {type(error).__name__}: {error} Expected a folder made by "
            "save_pretrained or `pgseg convert`, or a name on the Hub."
        ) from error
    refuse_bad_weights(model, name_or_path)
    if size is None:
        raise ValueError(f"{name_or_path} has an image processor without a size; expected a PGSeg processor.")
    refuse_other_tokenizer(model.config, processor.tokenizer, name_or_path)
    if device.type != "cpu" and getattr(model, "is_quantized", False):
        raise ValueError(f"device is {str(device)!r}, expected 'cpu': int8 models run on a CPU only.")
    return Segmenter(model.to(device), processor, options)
