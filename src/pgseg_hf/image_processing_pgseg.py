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
        """PGSeg's image processor: as `PGSegImageProcessorPil`, but batched and on any device.

        Tensors stay on their device, or go to the `device` given in the call. The result is within 1/255 of
        the PIL processor's on average.
        """

        def resize(
            self,
            image: torch.Tensor,
            size: SizeDict,
            resample: Any = None,
            antialias: bool = True,
            **kwargs: Any,
        ) -> torch.Tensor:
            """Resize an image or a stack [..., C, H, W] to `size`."""
            height, width = self._target_size(image, size)
            return super().resize(image, SizeDict(height=height, width=width), resample, antialias, **kwargs)

else:

    class PGSegImageProcessor(PGSegImageProcessorPil):  # type: ignore[no-redef]
        """`PGSegImageProcessorPil` under the name that checkpoints are saved with."""

        def __init__(self, **kwargs: Any) -> None:
            # transformers falls back to its own PIL processors in the same way.
            logger.warning_once(
                "torchvision is not installed: PGSegImageProcessor works through Pillow instead."
            )
            super().__init__(**kwargs)


__all__ = ["PGSegImageProcessor"]
