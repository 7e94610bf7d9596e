"""Loading a model with its processor."""

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

# Of the options of `PGSegModel.from_pretrained` those that say where the files are.
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
    """A [`Segmenter`] with the model and processor of a folder or Hub name. No code of a folder is executed unless
    `trust_remote_code` says so.

    Args:
        name_or_path: of the checkpoint.
        options: defaults of the segmenter's calls.
        device: of the model.
        dtype: of the model; `"int8"`, on a CPU, makes it smaller and its blocks faster (see `quantization.py`). A
            checkpoint that was saved in int8 is loaded so in any case.
        kwargs: of `PGSegModel.from_pretrained`; where the files are (`revision`, `token` ...) holds for the processor
            too.

    Raises:
        ValueError: there is no such checkpoint, or it is none of PGSeg.
    """
    name_or_path = os.fspath(name_or_path)
    refuse_missing_folder(name_or_path)
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from error
    if dtype in ("int8", torch.int8):
        kwargs["quantization_config"], dtype = PGSegInt8Config(), torch.float32
    # Else transformers asks on the terminal whether to run the code that a folder names.
    kwargs = {"trust_remote_code": False, **kwargs}
    try:
        model = PGSegModel.from_pretrained(name_or_path, dtype=dtype, **kwargs)
        places = {name: kwargs[name] for name in _OF_ALL_FILES if name in kwargs}
        processor = PGSegProcessor.from_pretrained(name_or_path, **places)
        size = processor.image_processor.size
    except MemoryError:
        raise
    except Exception as error:  # on broken files, transformers and its libraries raise nearly anything
        raise ValueError(
            f"{name_or_path} is no PGSeg checkpoint: {type(error).__name__}: {error} Expected a folder made by "
            "save_pretrained or `pgseg convert`, or a name on the Hub."
        ) from error
    refuse_bad_weights(model, name_or_path)
    if size is None:
        raise ValueError(f"{name_or_path} has an image processor without a size; its files are another's.")
    refuse_other_tokenizer(model.config, processor.tokenizer, name_or_path)
    if device.type != "cpu" and getattr(model, "is_quantized", False):
        raise ValueError(f"device is {str(device)!r}, expected 'cpu', where models in int8 run.")
    return Segmenter(model.to(device), processor, options)
