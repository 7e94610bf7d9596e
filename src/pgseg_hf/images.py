"""Reads images of any mode safely and computes the size to which they are resized."""

import base64
import binascii
import http.client
import os
import re
import string
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
from PIL import ExifTags, Image, ImageOps
from transformers.utils import logging

from .files import is_web_address

logger = logging.get_logger(__name__)

# Formats that Pillow decodes without other programs. EPS would start a Ghostscript process, and decoders without a
# signature (TGA, raw dumps) accept any bytes.
IMAGE_FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
}

IMAGE_EXTENSIONS: tuple[str, ...] = tuple(name for names in IMAGE_FORMATS.values() for name in names)
"""File name endings, in lower case, of the formats that `load_image` reads."""

MAX_IMAGE_PIXELS = 500_000_000
"""Largest image that is read or created, in pixels; decoded to RGB it takes about 2 GB."""

MIN_SIDE = 16
"""Smallest side of a resized image in pixels: one patch of the paper's model."""

# Lossless formats for masks that Pillow decodes without other programs.
_LABEL_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM")

_SIGNATURE_BYTES = 16
_URL_TIMEOUT_SECONDS = 30


class NoLabelMap(ValueError):
    """Raised for a readable image that is not a mask: it has several channels or values that are not integers."""


ImageSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray


def load_image(source: ImageSource, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Reads an image and converts it to RGB with [`to_rgb`].

    Args:
        source: a path, `http(s)://` URL, `data:image/...;base64,` string, binary file object (read from its start),
            the bytes of an image file, a PIL image, or a uint8 array or tensor [H, W], [H, W, 3] or [H, W, 4]; a
            tensor may also be channels-first.
        max_pixels: images with more pixels are refused before they are decoded. Pillow's own limit and
            warning for large images do not apply, and its global state is not changed.

    Returns:
        An upright PIL image of mode RGB, 8 bits per channel. For an animated or multi-page file it is the first
        frame, with a logged warning.

    Raises:
        ValueError: the source is missing, empty, corrupt, truncated, too large or not an image.
    """
    if hasattr(source, "numpy"):  # a tensor
        array: np.ndarray = source.numpy(force=True)
        is_channels_first = array.ndim == 3 and array.shape[0] in (3, 4) and array.shape[2] not in (3, 4)
        source = np.moveaxis(array, 0, 2) if is_channels_first else array
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if isinstance(source, Image.Image):
        return to_rgb(source)
    data, name = _read_bytes(source)
    if not data:
        raise ValueError(f"{name} is empty (0 bytes), expected an image file")

    with BytesIO(data) as stream:
        image = _open_image(stream, data[:_SIGNATURE_BYTES], name)
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(
                f"{name} has {width} x {height} = {width * height:,} pixels, more than the {max_pixels:,} "
                "allowed: resize it first, or raise max_pixels (--max-pixels)"
            )
        return to_rgb(image, name)


def _from_array(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not is_image or array.size == 0:
        raise ValueError(
            f"an array of shape {array.shape} and type {array.dtype} is not an image, expected uint8 [H, W], "
            "[H, W, 3] or [H, W, 4]"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def to_rgb(image: Image.Image, name: str | None = None) -> Image.Image:
    """Converts a PIL image to RGB: applies its EXIF rotation, puts transparency over white and scales 16 bits to 8.

    Args:
        image: a PIL image of any mode except floating point; of an animated one, its current frame.
        name: what error messages call the image, by default its file name.

    Returns:
        A PIL image of mode RGB; the same object if there is nothing to change.

    Raises:
        ValueError: the pixels cannot be decoded, or they are floating-point values of unknown range.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"expected a PIL image, got {type(image).__name__}")
    name = name or _image_name(image)
    try:
        image.load()
        # An MPO photo has a second view or a gain map and is not an animation.
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name} is corrupt or truncated, its pixels cannot be decoded: {error}") from error
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: its size is {image.size[0]} x {image.size[1]}")
    if is_animated:
        logger.warning(f"{name} is animated or has several pages: only frame number {image.tell()} is used")
        # A copy has no frames: it avoids a second warning and seeking in a closed file.
        image = image.copy()

    image = _apply_exif_rotation(image, name)
    if image.mode == "F":
        raise ValueError(_describe_float_image(image, name))
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _sixteen_to_eight_bit(image, name)

    if image.has_transparency_data:
        if image.mode == "La":  # Pillow cannot convert premultiplied grey directly to RGBA
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode == "RGB":
        return image
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(
            f"{name} has mode {image.mode}, which cannot be converted to RGB: {error}"
        ) from error


def load_label_map(source: ImageSource, weights: Sequence[int] | None = None) -> np.ndarray:
    """Reads a mask whose pixel values are label numbers.

    Args:
        source: a path, a binary file object or its bytes (the lossless formats PNG, TIFF, BMP, GIF or PPM), a PIL image
            (an indexed one gives its indices), or an integer array or tensor [H, W].
        weights: for a colour mask, the weights of red, green and blue in a pixel's number.

    Returns:
        An int64 array [H, W].

    Raises:
        ValueError: the mask cannot be read, has several channels or values that are not integers, or, for a colour
            mask, transparent pixels.
    """
    name = "the mask"
    try:
        if isinstance(source, (Image.Image, np.ndarray)) or hasattr(source, "numpy"):  # a tensor
            values = _mask_values(source, weights, name)
        else:
            data, name = _read_bytes(source)
            with _open_image(BytesIO(data), data[:_SIGNATURE_BYTES], name, _LABEL_FORMATS) as image:
                values = _mask_values(image, weights, name)
    except (MemoryError, NoLabelMap):
        raise
    except Exception as error:  # decoders raise many types of errors for broken files
        formats = ", ".join(_LABEL_FORMATS)
        raise ValueError(
            f"{name} is not a mask that can be read, expected one of {formats}: {error}"
        ) from error
    if values.ndim != 2 or values.dtype.kind not in "bui" or values.size == 0:
        raise NoLabelMap(
            f"{name} has the shape {values.shape} and type {values.dtype}, expected one integer per pixel, [H, W]."
        )
    return values.astype(np.int64)


def _mask_values(source: Any, weights: Sequence[int] | None, name: str) -> np.ndarray:
    if weights is None:
        return np.asarray(source)
    image = source if isinstance(source, Image.Image) else _from_array(np.asarray(source))
    *colours, opacity = np.moveaxis(np.asarray(image.convert("RGBA")), -1, 0)
    if (opacity < 255).any():
        raise NoLabelMap(f"{name} has transparent pixels, expected an opaque colour for each pixel.")
    return sum(weight * channel.astype(np.int64) for weight, channel in zip(weights, colours, strict=True))


def find_images(folder: Path, leave_out: Path | None = None) -> list[Path]:
    """Lists the images in a folder and its subfolders, sorted, without hidden files and the folder `leave_out`.

    Raises:
        ValueError: the folder does not exist or has no images.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    inside = [leave_out.resolve()] if leave_out is not None else []
    images = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix.lower() in IMAGE_EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not any(path.resolve().is_relative_to(place) for place in inside)
    )
    if not images:
        raise ValueError(
            f"{folder} contains no images; expected the endings {', '.join(sorted(IMAGE_EXTENSIONS))}."
        )
    return images


def images_apart_from(folder: Path, output: Path) -> list[Path]:
    """Lists the images of a folder without the results in `output`, which may be inside or above the folder.

    Raises:
        ValueError: results would be written among the images.
    """
    here, there = folder.resolve(), output.resolve()
    if here == there or any(here.is_relative_to(there / kind) for kind in ("masks", "overlays")):
        raise ValueError(
            f"results in {output} would be mixed with the images of {folder}; choose another output folder."
        )
    return find_images(folder, leave_out=output if there.is_relative_to(here) else None)


def resized_size(
    height: int, width: int, shortest_edge: int = 448, longest_edge: int | None = 2048
) -> tuple[int, int]:
    """The size at which an image's short side is `shortest_edge`, with the same aspect ratio.

    If the long side would exceed `longest_edge`, it gets that length instead. No side is shorter than `MIN_SIDE` (or
    `shortest_edge`), so that even very thin images have patches.

    Args:
        height, width: size of the original image in pixels.
        shortest_edge, longest_edge: target lengths in pixels. The defaults are those of the released evaluation.

    Returns:
        (height, width) in pixels, rounded half up.

    Raises:
        ValueError: a length is below 1, or the result has more than `MAX_IMAGE_PIXELS` pixels.
    """
    for label, value in (
        ("height", height),
        ("width", width),
        ("shortest_edge", shortest_edge),
        ("longest_edge", longest_edge),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{label} must be at least 1 pixel, got {value}")
    factor = shortest_edge / min(height, width)
    if longest_edge is not None:
        factor = min(factor, longest_edge / max(height, width))
    least = min(MIN_SIDE, shortest_edge, longest_edge or shortest_edge)
    new_height, new_width = (max(least, int(side * factor + 0.5)) for side in (height, width))
    if new_height * new_width > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"an image of {height} x {width} (height x width) would become {new_height} x {new_width}, "
            f"more than {MAX_IMAGE_PIXELS:,} pixels: set longest_edge in size"
        )
    return new_height, new_width


def _read_bytes(source: Any) -> tuple[bytes, str]:
    """The bytes of a source and its name for error messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source), f"the image given as {len(source)} bytes"
    if hasattr(source, "read"):
        name = repr(getattr(source, "name", None) or source)
        if source.seekable():
            source.seek(0)
        data = source.read()
        if not isinstance(data, bytes):
            raise ValueError(f"{name} returns text, expected bytes: open image files in binary mode ('rb')")
        return data, name
    if isinstance(source, str) and source.startswith("data:image/"):
        name = repr(source[:40] + "...")
        try:
            return base64.b64decode(source.partition(",")[2], validate=True), name
        except binascii.Error as error:
            raise ValueError(f"{name} is not valid base64: {error}") from error
    if isinstance(source, str) and is_web_address(source):
        return _fetched(source), repr(source)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        try:
            return path.read_bytes(), repr(str(path))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            if re.match("https?:/", str(path)):
                reason = "a URL must be a string, because a path drops one of its slashes"
            raise ValueError(f"{str(path)!r} cannot be read as an image file: {reason}") from error
    raise ValueError(
        "an image must be a path, an http(s) URL, a binary file object, bytes or a PIL image, "
        f"got {type(source).__name__}: {source!r}"
    )


def _fetched(address: str) -> bytes:
    try:
        # Non-ASCII letters are quoted as in browsers; some servers refuse Python's default user agent.
        request = Request(quote(address, safe=string.punctuation), headers={"User-Agent": "pgseg_hf"})
        with urlopen(request, timeout=_URL_TIMEOUT_SECONDS) as response:
            data, kind = response.read(), response.headers.get_content_type()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"{address!r} cannot be fetched: {error}; download it and pass the file") from error
    if kind == "text/html":
        raise ValueError(f"{address!r} is a web page, not an image: pass the URL of the image itself")
    return data


def _open_image(
    stream: BinaryIO, signature: bytes, name: str, formats: Iterable[str] = tuple(IMAGE_FORMATS)
) -> Image.Image:
    """Reads the header with the first of Pillow's decoders that accepts the bytes.

    `PIL.Image.open` is not used: its limit, global to the process, warns above 89 megapixels and refuses above 179.
    """
    Image.init()
    reason = f"its first bytes are {signature!r}"
    for image_format in formats:
        if image_format not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[image_format]
        try:
            if accept is None or accept(signature) is True:
                stream.seek(0)
                return factory(stream, "")
        except MemoryError:
            raise
        except Exception as error:  # decoders raise many types of errors for broken files
            reason = f"{type(error).__name__}: {error}"
    expected = ", ".join(formats)
    raise ValueError(f"{name} is not an image, or is corrupt ({reason}); expected one of {expected}")


def _image_name(image: Image.Image) -> str:
    filename = getattr(image, "filename", "")
    return repr(str(filename)) if filename else f"the {image.mode} image of {image.size[0]} x {image.size[1]}"


def _apply_exif_rotation(image: Image.Image, name: str) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image
    except Exception as error:  # an image with damaged metadata is still readable
        logger.warning(f"{name} has unreadable EXIF data; its orientation is ignored: {error}")
        return image


def _describe_float_image(image: Image.Image, name: str) -> str:
    values = np.asarray(image)
    if not np.isfinite(values).all():
        return f"{name} has NaN or infinite pixel values"
    return (
        f"{name} has floating-point pixels (from {values.min():g} to {values.max():g}) of unknown range: "
        "scale them to 8 bits first"
    )


def _sixteen_to_eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Scales [0, 65535] to [0, 255], rounded; a transparent grey value becomes an alpha channel."""
    values = np.asarray(image)
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise ValueError(
            f"{name} has integer pixels from {values.min()} to {values.max()}, "
            "expected 16-bit values (0 to 65535)"
        )
    grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    transparent_value = image.info.get("transparency")
    if isinstance(transparent_value, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent_value, 0, 255).astype(np.uint8)))
    return grey
