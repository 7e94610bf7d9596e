"""Draws label maps over images, side by side, and as indexed images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ..images import to_rgb
from .colours import group_palette, label_colours, palette
from .legend import legend_entries, with_legend
from .text import INK, PAPER, drawable, fitted, font_of, letter_size

# Pixels per strip, which limits the memory for large images.
_STRIP_PIXELS = 2**22


def overlay(
    image: Image.Image,
    label_map: Any,
    labels: Sequence[str],
    background: bool = False,
    alpha: float = 0.55,
    legend: bool = True,
    contours: bool = True,
    colours: Mapping[str, str] | None = None,
) -> Image.Image:
    """Colour an image by its label map. Coloured regions fade to grey, so that their hues match the legend.

    Args:
        image: image of W x H pixels.
        label_map: integers [H, W] (array or tensor) that index `labels`; with a background, 0 is background and label i
            has value i + 1.
        labels: label names, as given for the segmentation.
        background: whether 0 is background, which is not coloured.
        alpha: weight of the colours over the image, from 0 (only the image) to 1 (only the colours).
        legend: whether to add a panel with the labels present, the largest first, and their shares of the pixels. It
            is to the right of a tall image and below a wide one. Labels that the font cannot draw are replaced by
            their number, from 1.
        contours: whether to draw light lines between regions.
        colours: custom colours of labels, "#rrggbb" by name.

    Returns:
        An RGB image of W x H pixels, or larger with a legend.

    Raises:
        ValueError: sizes do not match, a value has no label, there are no labels, or `alpha` is out of range.
    """
    names = _checked_labels(labels)
    values = _checked_map(label_map, len(names) + background)
    image = to_rgb(image)
    if values.shape != (image.height, image.width):
        raise ValueError(
            f"The label map is {values.shape[1]} x {values.shape[0]} (width x height), "
            f"the image {image.width} x {image.height}; the sizes must be equal."
        )
    rows = label_colours(names, colours)
    drawn = _paint(image, values, rows, background, alpha, contours)
    return _with_legend(drawn, values, names, rows, background) if legend else drawn


def draw_groups(
    image: Image.Image,
    group_index: Any,
    num_groups: int | None = None,
    alpha: float = 0.7,
    legend: bool = True,
) -> Image.Image:
    """Colour an image by its groups, in colours that differ from those of labels.

    Args:
        image: image of W x H pixels.
        group_index: integers (array or tensor), [H, W] or any coarser grid, such as the patches, which is stretched
            over the image.
        num_groups: number of groups (eight in the last stage of the paper's model); defaults to the largest index + 1.
        alpha: weight of the colours over the image.
        legend: whether to add a panel with the groups and their shares of the pixels.

    Raises:
        ValueError: as for `overlay`.
    """
    values = _checked_map(group_index, num_groups)
    image = to_rgb(image)
    names = [f"group {i + 1}" for i in range(num_groups or int(values.max()) + 1)]
    rows = (np.arange(image.height) * values.shape[0]) // image.height
    columns = (np.arange(image.width) * values.shape[1]) // image.width
    values, colours = values[rows][:, columns], group_palette(len(names))
    drawn = _paint(image, values, colours, False, alpha, True)
    return _with_legend(drawn, values, names, colours, False) if legend else drawn


def draw_contours(
    image: Image.Image,
    label_map: Any,
    labels: Sequence[str],
    background: bool = False,
    legend: bool = True,
    colours: Mapping[str, str] | None = None,
) -> Image.Image:
    """Draw the borders of the regions over the unchanged image, each in the colour of its label.

    Args:
        image: image of W x H pixels.
        label_map: as for `overlay`.
        labels: label names, as given for the segmentation.
        background: whether 0 is background, which has no border of its own.
        legend, colours: as for `overlay`.

    Raises:
        ValueError: as for `overlay`.
    """
    drawn = np.array(overlay(image, label_map, labels, background, alpha=0, legend=False))
    values = _checked_map(label_map)
    width = _line_width(image)
    band = find_contours(values, 5 * width) & ~find_contours(values, width) & (values >= background)
    rows = label_colours(labels, colours)
    drawn[band] = rows[values[band] - background]
    found = Image.fromarray(drawn)
    return _with_legend(found, values, list(labels), rows, background) if legend else found


def find_contours(label_map: Any, width: int = 1) -> npt.NDArray[np.bool_]:
    """Borders between regions, as a bool mask [H, W] of lines about `width` pixels wide.

    Raises:
        ValueError: the map is not an integer array [H, W], or `width` is below 1.
    """
    values = _checked_map(label_map)
    if width < 1:
        raise ValueError(f"A contour's width must be at least 1 pixel, got {width}.")
    lines = np.zeros(values.shape, dtype=bool)
    lines[:, :-1] |= values[:, :-1] != values[:, 1:]
    lines[:-1, :] |= values[:-1, :] != values[1:, :]
    for step in range(width - 1):
        # Grow towards alternating sides, so that the line stays on the border.
        wider = lines.copy()
        if step % 2 == 0:
            wider[:, 1:] |= lines[:, :-1]
            wider[1:, :] |= lines[:-1, :]
        else:
            wider[:, :-1] |= lines[:, 1:]
            wider[:-1, :] |= lines[1:, :]
        lines = wider
    return lines


def side_by_side(images: Sequence[Image.Image], titles: Sequence[str] | None = None) -> Image.Image:
    """Place images in a row on white, aligned at the top, each below its title.

    Raises:
        ValueError: there are no images, or the numbers of images and titles differ.
    """
    if not images:
        raise ValueError("side_by_side needs at least one image, got none.")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"Expected one title for each of the {len(images)} images, got {len(titles)}.")
    images = [to_rgb(image) for image in images]
    font = font_of(letter_size(max(images, key=lambda image: min(image.size))))
    gap = round(font.size)
    top = round(1.9 * font.size) if titles is not None else 0
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    canvas = Image.new("RGB", (width, top + max(image.height for image in images)), PAPER)
    draw = ImageDraw.Draw(canvas)
    x = 0
    for image, title in zip(images, drawable(titles or [""] * len(images), "image")):
        if titles is not None:
            title = fitted(title, font, image.width)
            draw.text((x, top // 2), title, fill=INK, font=font, anchor="lm")
        canvas.paste(image, (x, top))
        x += image.width + gap
    return canvas


def indexed_png(
    label_map: Any,
    num_labels: int | None = None,
    background: bool = False,
    colours: npt.NDArray[np.uint8] | None = None,
) -> Image.Image:
    """Convert a label map to an indexed image with the same pixel values, to be saved as a mask.

    Args:
        label_map: integers [H, W] (array or tensor).
        num_labels: number of labels, so that all masks of a run have the same format; by default inferred from the
            largest value.
        background: whether 0 is background, which is black in the palette.
        colours: colours of the labels, uint8 [N, 3], from `label_colours`; defaults to the palette.

    Returns:
        A palette image (mode `P`) in the labels' colours for up to 256 values, otherwise a 16-bit image (mode `I;16`).

    Raises:
        ValueError: a value is negative, has no label, or exceeds 65,535.
    """
    values = _checked_map(label_map, None if num_labels is None else num_labels + background)
    count = int(values.max()) + 1 if num_labels is None else num_labels + background
    if count > 2**16:
        raise ValueError(f"A mask's values must be at most 65,535, got {count - 1:,}.")
    if count > 2**8:
        return Image.fromarray(values.astype(np.uint16))
    mask = Image.fromarray(values.astype(np.uint8)).convert("P")
    rows = palette(256 - background)
    if colours is not None:
        rows[: len(colours)] = colours
    if background:
        rows = np.vstack([np.zeros((1, 3), dtype=np.uint8), rows])
    mask.putpalette(rows.tobytes())
    return mask


def _checked_labels(labels: Sequence[str]) -> list[str]:
    if isinstance(labels, str) or not len(labels) or not all(isinstance(name, str) for name in labels):
        raise ValueError(f"labels are {labels!r}, expected a list of at least one string.")
    return list(labels)


def _checked_map(label_map: Any, num_values: int | None = None) -> npt.NDArray[np.int64]:
    """Checks a map of integers [H, W] from 0 to num_values - 1, given as an array, nested list or tensor."""
    if hasattr(label_map, "detach"):
        label_map = label_map.detach().cpu()
    values = np.asarray(label_map)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"A label map must have shape (height, width), got {values.shape}.")
    if values.dtype.kind not in "iub":
        raise ValueError(f"A label map must contain integers, got {values.dtype}.")
    low, high = int(values.min()), int(values.max())
    if low < 0:
        raise ValueError(f"A label map's values must not be negative, got {low}.")
    if num_values is not None and high >= num_values:
        raise ValueError(f"The label map contains the value {high}, expected at most {num_values - 1}.")
    return values.astype(np.int64, copy=False)


def _line_width(image: Image.Image) -> int:
    return max(1, round(min(image.size) / 500))


def _with_legend(
    drawn: Image.Image,
    values: npt.NDArray[np.int64],
    names: list[str],
    colours: npt.NDArray[np.uint8],
    background: bool,
) -> Image.Image:
    counts = np.bincount(values.ravel(), minlength=len(names) + background)[int(background) :]
    return with_legend(drawn, legend_entries(names, colours, counts, values.size))


def _paint(
    image: Image.Image,
    values: npt.NDArray[np.int64],
    colours: npt.NDArray[np.uint8],
    background: bool,
    alpha: float,
    contours: bool,
) -> Image.Image:
    """Colours an image in strips, see `overlay`. Each strip has a margin for lines that cross its border."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}.")
    if background:
        colours = np.vstack([np.zeros((1, 3), dtype=np.uint8), colours])
    line = _line_width(image) if contours else 0
    (width, height), painted = image.size, Image.new("RGB", image.size)
    step = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        first, last = max(top - line, 0), min(bottom + line, height)
        plain, part = image.crop((0, first, width, last)), values[first:last]
        # Brighten the shadows of the grey image: on black, all colours would look black.
        grey = plain.convert("L").point([round(80 + 0.65 * level) for level in range(256)]).convert("RGB")
        strip = Image.blend(Image.blend(plain, grey, alpha), Image.fromarray(colours[part]), alpha)
        if background:
            strip = Image.composite(strip, plain, Image.fromarray(part > 0))
        if line:
            lines = np.where(find_contours(part, line), np.uint8(210), np.uint8(0))
            strip.paste(PAPER, mask=Image.fromarray(lines))
        painted.paste(strip.crop((0, top - first, width, bottom - first)), (0, top))
    return painted
