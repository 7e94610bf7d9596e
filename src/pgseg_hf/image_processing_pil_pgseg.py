"""PGSeg's image processor on Pillow and NumPy, and the parts it shares with the torchvision one."""

import os
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    is_torch_tensor,
    is_valid_image,
)
from transformers.utils import logging

from .images import load_image, resized_size, to_rgb
from .values import are_images

logger = logging.get_logger(__name__)


class PGSegImageInputs:
    """Defaults and input checks of both image processors; a mixin to put before a Transformers backend.

    Defaults of the released evaluation: short side 448, long side at most 2048, bilinear, no crop, ImageNet mean and
    std.
    """

    # Saved with its code, for trust_remote_code=True where this package is not installed.
    _auto_class = "AutoImageProcessor"

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size: ClassVar[dict[str, int]] = {"shortest_edge": 448, "longest_edge": 2048}
    default_to_square = False
    crop_size: ClassVar[dict[str, int]] = {"height": 448, "width": 448}
    do_resize = True
    do_center_crop = False
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Reads paths, URLs and bytes, also in nested lists, and returns other images unchanged. 2-D arrays are
        greyscale."""
        source = image_url_or_urls
        if are_images(source):
            return [self.fetch_images(item) for item in source]
        if is_valid_image(source):
            return _greyscale_to_pil(source) if getattr(source, "ndim", 3) == 2 else source
        if isinstance(source, (str, os.PathLike, bytes)) or hasattr(source, "read"):
            return load_image(source)
        raise ValueError(
            "images must be PIL images, arrays, tensors, paths or URLs, or lists of them, "
            f"got {type(source).__name__}: {source!r}"
        )

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        images = super()._prepare_images_structure(images, expected_ndims=expected_ndims)  # type: ignore[misc]
        if len(images) == 0:
            raise ValueError("no images: give at least one")
        return images

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: Any = None,
        device: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Converts a PIL image, array or tensor to channels first, and to RGB if `do_convert_rgb` is set.

        Raises:
            ValueError: for NaN, infinite or no pixels, integers outside 0 to 255, and other dtypes; see also `to_rgb`.
        """
        if not isinstance(image, Image.Image):
            image = _checked_pixels(image, will_be_rescaled=bool(kwargs.get("do_rescale")))
            if (
                input_data_format is None
                and image.ndim == 3
                and image.shape[0] == 1
                and image.shape[2] in (3, 4)
            ):
                # A thin colour image, which transformers would treat as a grey one of width 3 or 4.
                input_data_format = ChannelDimension.LAST
        elif do_convert_rgb:
            image, do_convert_rgb = to_rgb(image), False
        return super().process_image(  # type: ignore[misc]
            image,
            do_convert_rgb=do_convert_rgb,
            input_data_format=input_data_format,
            device=device,
            **kwargs,
        )

    def _target_size(self, image: Any, size: SizeDict) -> tuple[int, int]:
        """(height, width) to resize an image or batch (channels first) to."""
        if size.height and size.width and min(size.height, size.width) >= 1:
            return size.height, size.width
        if size.shortest_edge:
            height, width = image.shape[-2:]
            return resized_size(height, width, size.shortest_edge, size.longest_edge)
        raise ValueError(
            "size must have 'height' and 'width', or 'shortest_edge' with or without 'longest_edge', "
            f"all at least 1, got {dict(size)}"
        )

    def _preprocess(
        self, images: list[Any], *args: Any, return_tensors: Any = None, **kwargs: Any
    ) -> BatchFeature:
        features = super()._preprocess(images, *args, return_tensors=None, **kwargs)  # type: ignore[misc]
        if return_tensors is not None:
            sizes = [tuple(image.shape[-2:]) for image in features["pixel_values"]]
            if len(set(sizes)) > 1:
                raise ValueError(
                    "images of different sizes cannot be batched, the (height, width) after resizing are "
                    f"{sizes}: pass size={{'height': ..., 'width': ...}}, or process them one by one"
                )
        return BatchFeature(data=dict(features), tensor_type=return_tensors)


class PGSegImageProcessorPil(PGSegImageInputs, PilBackend):
    """PGSeg's image processor without torchvision: converts images to `pixel_values` [B, 3, H, W], normalised float32.

    Accepts PIL images, arrays, tensors, paths, URLs or bytes, one or a list. PIL images and files are rotated by their
    EXIF data, composited over white if transparent, and scaled if 16-bit (`to_rgb`). Arrays and tensors must have
    values from 0 to 255, whatever their dtype, channels first or last.

    Calls raise `ValueError` for unreadable images, NaN or infinite pixels, and, with `return_tensors`, different sizes
    after resizing.
    """

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """Converts tensors of any device and dtype to arrays, then processes them as the backend does."""
        if is_torch_tensor(image):
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        return super().process_image(image, *args, **kwargs)

    def resize(
        self,
        image: np.ndarray,
        size: SizeDict,
        resample: Any = None,
        reducing_gap: int | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Resizes an image [C, H, W] to `size`; floating-point images stay floating point."""
        height, width = self._target_size(image, size)
        if image.dtype == np.uint8:
            return super().resize(
                image, SizeDict(height=height, width=width), resample, reducing_gap, **kwargs
            )
        # transformers would round floats to 8 bits or reject them; Pillow can resize single float channels.
        resample = PILImageResampling.BILINEAR if resample is None else resample
        channels = [Image.fromarray(np.ascontiguousarray(channel, dtype=np.float32)) for channel in image]
        return np.stack([np.asarray(channel.resize((width, height), resample)) for channel in channels])


def _greyscale_to_pil(values: Any) -> Image.Image:
    """Converts a 2-D array or tensor of 8 or 16 bits to a PIL image."""
    array = values.detach().cpu().numpy() if is_torch_tensor(values) else values
    if array.dtype not in (np.uint8, np.uint16) or 0 in array.shape:
        raise ValueError(
            "a 2-D image must be a non-empty uint8 or uint16 array, "
            f"got {array.dtype} of shape {tuple(array.shape)}"
        )
    return Image.fromarray(array)


def _checked_pixels(image: Any, will_be_rescaled: bool) -> Any:
    """Checks the values of an array or tensor; returns floating-point input as it is and integers as uint8."""
    is_tensor = is_torch_tensor(image)
    what = f"an image of shape {tuple(image.shape)} and type {image.dtype}"
    if 0 in image.shape:
        raise ValueError(f"{what} has no pixels")

    if image.is_floating_point() if is_tensor else np.issubdtype(image.dtype, np.floating):
        finite = torch.isfinite(image) if is_tensor else np.isfinite(image)
        if not finite.all():
            raise ValueError(f"{what} has {int((~finite).sum())} NaN or infinite pixel values")
        if will_be_rescaled and 0 < image.max() <= 1:
            logger.warning_once(
                "A floating-point image has no values above 1 and will be divided by 255: "
                "pass do_rescale=False if it is already scaled."
            )
        return image

    is_integer = (
        image.dtype not in (torch.bool, torch.complex64, torch.complex128)
        if is_tensor
        else (np.issubdtype(image.dtype, np.integer))
    )
    if not is_integer:
        raise ValueError(f"{what} cannot be read: pixels must be integers from 0 to 255 or floating point")
    if image.dtype in (torch.uint8, np.uint8):
        return image
    values = image.to(torch.int64) if is_tensor else image
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        raise ValueError(f"{what} has values from {low} to {high}: scale them to 0 to 255 first")
    return values.to(torch.uint8) if is_tensor else values.astype(np.uint8)


__all__ = ["PGSegImageProcessorPil"]
