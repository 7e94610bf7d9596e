"""PGSeg's image processor on torchvision, or on Pillow where torchvision is not installed."""

from typing import Any

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict
from transformers.utils import is_torchvision_available, logging

from .image_processing_pil_pgseg import PGSegImageInputs, PGSegImageProcessorPil

logger = logging.get_logger(__name__)


if is_torchvision_available():

    class PGSegImageProcessor(PGSegImageInputs, TorchvisionBackend):
        """PGSeg's image processor on torchvision: same as [`PGSegImageProcessorPil`], but batched and on any device.

        Tensors stay on their device or move to the given `device`. Results are on average within 1/255 of Pillow's.
        """

        def resize(
            self,
            image: torch.Tensor,
            size: SizeDict,
            resample: Any = None,
            antialias: bool = True,
            **kwargs: Any,
        ) -> torch.Tensor:
            """Resizes an image or a batch [..., C, H, W] to `size`."""
            height, width = self._target_size(image, size)
            return super().resize(image, SizeDict(height=height, width=width), resample, antialias, **kwargs)

else:

    class PGSegImageProcessor(PGSegImageProcessorPil):  # type: ignore[no-redef]
        """[`PGSegImageProcessorPil`] under the name that checkpoints are saved with."""

        def __init__(self, **kwargs: Any) -> None:
            # transformers falls back to its own Pillow processors in the same way.
            logger.warning_once("torchvision is not installed: PGSegImageProcessor uses Pillow instead.")
            super().__init__(**kwargs)


__all__ = ["PGSegImageProcessor"]
