"""Random crops and colour changes of training images, using only Pillow and NumPy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

INTERPOLATIONS = {resampling.name.lower(): resampling for resampling in Image.Resampling}

# Longest side of a whole image in pixels.
LONGEST_SIDE = 2048
CROP_TRIES = 10
# The usual settings of random erasing: share of the image, and width over height.
ERASED_SCALE = (0.02, 0.33)
ERASED_RATIO = (0.3, 3.3)
# Radius of the blur in pixels of a 224-pixel image (SimCLR).
BLUR_RADIUS = (0.1, 2.0)
GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass
class AugmentationOptions:
    """How training images are augmented. By default as in the paper: random crops of 224 pixels and horizontal flips.

    Args:
        image_size: side of the output in pixels.
        min_scale, max_scale: share of the image that a crop covers, see `random_resized_box`.
        min_ratio, max_ratio: width over height of a crop.
        crop_sides: if given, crops are square instead. Their side is drawn uniformly between these two lengths, in
            pixels of the image scaled to `short_side`.
        short_side: short side in pixels that `crop_sides` refers to. Segmentation should use images of this size.
        horizontal_flip: probability of a horizontal flip.
        color_jitter: maximum deviation from 1 of the factors for brightness, contrast and saturation.
        grayscale, blur, erasing: probabilities of removing all colour, of a Gaussian blur, and of overwriting a
            rectangle with the mean colour.
        interpolation: name of a resampling filter of Pillow.
        image_mean, image_std: mean and standard deviation per channel, for pixels between 0 and 1.

    Raises:
        ValueError: if a field is invalid; the message names it.
    """

    image_size: int = 224
    min_scale: float = 0.08
    max_scale: float = 1.0
    min_ratio: float = 3 / 4
    max_ratio: float = 4 / 3
    crop_sides: tuple[float, float] | None = None
    short_side: int = 192
    horizontal_flip: float = 0.5
    color_jitter: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    erasing: float = 0.0
    interpolation: str = "bilinear"
    image_mean: Sequence[float] = tuple(IMAGENET_DEFAULT_MEAN)
    image_std: Sequence[float] = tuple(IMAGENET_DEFAULT_STD)

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}, expected at least 1 pixel.")
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise ValueError(
                f"min_scale and max_scale are {self.min_scale} and {self.max_scale}, expected shares of the image "
                "with 0 < min_scale <= max_scale <= 1."
            )
        if not 0 < self.min_ratio <= self.max_ratio:
            raise ValueError(
                f"min_ratio and max_ratio are {self.min_ratio} and {self.max_ratio}, expected "
                "0 < min_ratio <= max_ratio (width over height)."
            )
        sides = self.crop_sides
        if sides is not None and not (len(sides) == 2 and 0 < sides[0] <= min(sides[1], self.short_side)):
            raise ValueError(
                f"crop_sides is {sides}, expected a smallest and a largest side in pixels, with the smallest at most "
                f"short_side ({self.short_side})."
            )
        for name in ("horizontal_flip", "color_jitter", "grayscale", "blur", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number between 0 and 1.")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation is {self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}."
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"image_mean and image_std are {self.image_mean} and {self.image_std}, expected three numbers each, "
                "with image_std above 0."
            )


@dataclass(frozen=True)
class Crop:
    """A crop: `box` within an image of `size` (width, height), mirrored if `flip` is set."""

    size: tuple[int, int]
    box: Box
    flip: bool


class Augmentation:
    """Random crops and colour changes as in `AugmentationOptions`; all randomness comes from the given generators."""

    def __init__(self, options: AugmentationOptions | None = None):
        self.options = options = options or AugmentationOptions()
        self._resample = INTERPOLATIONS[options.interpolation]
        std = np.array(options.image_std, dtype=np.float32)[:, None, None]
        self._scale = 1 / (255 * std)
        self._shift = -np.array(options.image_mean, dtype=np.float32)[:, None, None] / std

    def draw_crop(self, size: tuple[int, int], rng: np.random.Generator) -> Crop:
        """A random crop of an image of `size` (width, height)."""
        options = self.options
        box: Box
        if options.crop_sides is None:
            scale, ratio = (options.min_scale, options.max_scale), (options.min_ratio, options.max_ratio)
            box = random_resized_box(size, scale, ratio, rng)
        else:
            box = random_square_box(size, options.crop_sides, options.short_side, rng)
        return Crop(size, box, bool(rng.random() < options.horizontal_flip))

    def crop_pixels(self, image: Image.Image, crop: Crop, rng: np.random.Generator) -> np.ndarray:
        """The crop of an RGB image with random colour changes, normalised: float32 [3, S, S].

        Raises:
            ValueError: if the crop was drawn for an image of another size.
        """
        options = self.options
        cut = self._cut(image, crop, self._resample)
        if options.blur and rng.random() < options.blur:
            radius = rng.uniform(*BLUR_RADIUS) * options.image_size / 224
            cut = cut.filter(ImageFilter.GaussianBlur(radius))
        pixels = np.empty((3, options.image_size, options.image_size), dtype=np.float32)
        pixels[...] = np.asarray(cut).transpose(2, 0, 1)
        if options.color_jitter or options.grayscale:
            self._vary_colors(pixels, rng)
        pixels *= self._scale
        pixels += self._shift
        if options.erasing and rng.random() < options.erasing:
            left, top, right, bottom = random_resized_box(cut.size, ERASED_SCALE, ERASED_RATIO, rng)
            pixels[:, top:bottom, left:right] = 0
        return pixels

    def whole_pixels(self, image: Image.Image) -> np.ndarray:
        """An RGB image resized to `short_side` (long side at most `LONGEST_SIDE`), normalised: float32 [3, H, W]."""
        short_side = self.options.short_side
        scale = min(short_side / min(image.size), max(LONGEST_SIDE, short_side) / max(image.size))
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        pixels = np.asarray(image.resize(size, self._resample, reducing_gap=2.0), np.float32)
        return pixels.transpose(2, 0, 1) * self._scale + self._shift

    def crop_mask(self, mask: Image.Image, crop: Crop) -> np.ndarray:
        """The same crop of a label map (mode L): uint8 [S, S]. Erased pixels keep their label.

        Raises:
            ValueError: if the crop was drawn for an image of another size.
        """
        return np.array(self._cut(mask, crop, Image.Resampling.NEAREST))

    def _cut(self, image: Image.Image, crop: Crop, resample: Image.Resampling) -> Image.Image:
        if image.size != crop.size:
            raise ValueError(
                f"the image or mask has {image.size[0]} x {image.size[1]} pixels, but the crop is for "
                f"{crop.size[0]} x {crop.size[1]}; a mask must have the size of its image."
            )
        side = self.options.image_size
        cut = image.resize((side, side), resample, box=crop.box, reducing_gap=2.0)
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else cut

    def _vary_colors(self, pixels: np.ndarray, rng: np.random.Generator) -> None:
        """Changes pixels [3, S, S] (0 to 255) in place: brightness, contrast around the mean grey, and saturation."""
        brightness, contrast, saturation = (1 + self.options.color_jitter * rng.uniform(-1, 1, 3)).tolist()
        if rng.random() < self.options.grayscale:
            saturation = 0.0
        grey = np.tensordot(GREY_WEIGHTS, pixels, axes=1)
        gain = brightness * contrast
        offset = brightness * (1 - contrast) * float(grey.mean())
        pixels *= gain * saturation
        pixels += gain * (1 - saturation) * grey + offset
        np.clip(pixels, 0, 255, out=pixels)


def random_resized_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box of random area, aspect ratio and position, as in torchvision's `RandomResizedCrop`.

    The share of the area is uniform in `scale`, the logarithm of the aspect ratio (width over height) is uniform in the
    range of `ratio`, and both sides are rounded to pixels. If the box does not fit, up to ten boxes are drawn; then the
    largest centred box with an aspect ratio within `ratio` is used. A box that fits has a uniform random position.

    Args:
        size: (width, height) of the image, each at least 1.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width over height.

    Returns:
        (left, top, right, bottom) in pixels, with left < right <= width and top < bottom <= height.
    """
    full_width, full_height = size
    for _ in range(CROP_TRIES):
        area = full_width * full_height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < width <= full_width and 0 < height <= full_height:
            left = int(rng.integers(full_width - width + 1))
            top = int(rng.integers(full_height - height + 1))
            return left, top, left + width, top + height
    width = min(full_width, max(1, round(full_height * ratio[1])))
    height = min(full_height, max(1, round(full_width / ratio[0])))
    left, top = (full_width - width) // 2, (full_height - height) // 2
    return left, top, left + width, top + height


def random_square_box(
    size: tuple[int, int], sides: tuple[float, float], short_side: float, rng: np.random.Generator
) -> Box:
    """A square box at a random position, with a side drawn uniformly from `sides`, in pixels of the image scaled to
    `short_side`. In the original image, the side is at least one pixel and at most the short side."""
    width, height = size
    largest = min(width, height)
    side = rng.uniform(sides[0], min(sides[1], short_side)) * largest / short_side
    side = min(max(side, 1.0), largest)
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    return left, top, min(left + side, width), min(top + side, height)
