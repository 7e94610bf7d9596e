"""The checkpoint that ships with the package, and loading a model with its processor."""

from pathlib import Path
from typing import Any

import torch

from .modeling_pgseg import PGSegModel
from .segmentation import SegmentationOptions, Segmenter

# A `from_pretrained` name like any other: a folder inside the installed package.
DEFAULT_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "pgseg-small-ccp")


def load_segmenter(
    name_or_path: str = DEFAULT_CHECKPOINT,
    options: SegmentationOptions | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Segmenter:
    """A [`Segmenter`] with the model and processor of a folder or Hub name.

    Raises:
        ValueError: there is no such checkpoint, or it is none of PGSeg.
    """
    try:
        segmenter = Segmenter.from_pretrained(name_or_path, options, dtype=dtype, **kwargs)
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name_or_path} is no PGSeg checkpoint: {error} Expected a folder made by save_pretrained or "
            "`pgseg convert`, or a name on the Hub."
        ) from error
    if not isinstance(segmenter.model, PGSegModel):
        raise ValueError(f"{name_or_path} holds a {type(segmenter.model).__name__}, expected a PGSegModel.")
    segmenter.model.to(device)
    return segmenter
