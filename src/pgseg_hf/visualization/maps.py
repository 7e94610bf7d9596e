"""Label maps over a picture, beside one another, and as files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from .colours import group_palette, label_colours, palette
from .legend import legend_entries, with_legend
from .text import INK, PAPER, drawable, fitted, font_of, letter_size

# Pixels that are painted at a time.
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
    """Colour a picture by its label map.

    Under its colour the photograph fades to grey, so that the hues are those of the legend.

    Args:
        image: the picture, W x H.
        label_map: integers [H, W] (array or tensor); values index `labels`, or 0 is background and label i is i + 1.
        labels: the names, as given for the segmentation.
        background: whether 0 is background; it stays uncoloured.
        alpha: weight of the colour over the picture, from 0 (picture alone) to 1 (colour alone).
        legend: whether to add a panel with the labels present, the largest first, each with its share of the pixels.
            It stands to the right of a tall picture and under a wide one. Labels in letters that the font lacks have
            their number, from 1.
        contours: whether to draw a light line between regions.
        colours: "#rrggbb" of labels that are not to have the palette's, by name.

    Returns:
        An RGB picture: W x H, or larger by the legend.

    Raises:
        ValueError: sizes disagree, a value has no label, there are no labels, or `alpha` is out of range.
    """
    names = _checked_labels(labels)
    picture = _rgb(image)
    values = _checked_map(label_map, len(names) + background)
    if values.shape != (picture.height, picture.width):
        raise ValueError(
            f"The label map is {values.shape[1]} x {values.shape[0]} (width x height), "
            f"the image {picture.width} x {picture.height}: they must be of one size."
        )
    return _painted(
        picture, values, names, label_colours(names, colours), background, alpha, legend, contours
    )


def draw_groups(
    image: Image.Image,
    group_index: Any,
    num_groups: int | None = None,
    alpha: float = 0.7,
    legend: bool = True,
) -> Image.Image:
    """Colour a picture by the group that each of its places belongs to, in other colours than labels have.

    Args:
        image: the picture, W x H.
        group_index: integers (array or tensor), [H, W] or any coarser grid, such as that of the patches, which is
            stretched over the picture.
        num_groups: how many groups there are (eight in the last stage of the paper's model); the largest index + 1
            where not given.
        alpha: weight of the colour over the picture.
        legend: whether to list the groups and their shares.

    Raises:
        ValueError: as `overlay`.
    """
    values = _checked_map(group_index, num_groups)
    count = num_groups or int(values.max()) + 1
    rows = (np.arange(image.height) * values.shape[0]) // image.height
    columns = (np.arange(image.width) * values.shape[1]) // image.width
    names = [f"group {i + 1}" for i in range(count)]
    values = values[rows][:, columns]
    return _painted(_rgb(image), values, names, group_palette(count), False, alpha, legend, True)


def draw_contours(
    image: Image.Image,
    label_map: Any,
    labels: Sequence[str],
    background: bool = False,
    legend: bool = True,
    colours: Mapping[str, str] | None = None,
) -> Image.Image:
    """Draw only the borders of the regions, each in the colour of its label, over the picture as it is.

    Args:
        image: the picture, W x H.
        label_map: as for `overlay`.
        labels: the names, as given for the segmentation.
        background: whether 0 is background, whose side of a border stays free.
        legend, colours: as for `overlay`.

    Raises:
        ValueError: as `overlay`.
    """
    picture = _rgb(image)
    plain = overlay(picture, label_map, labels, background, alpha=0, legend=False)
    values = _checked_map(label_map)
    width = max(1, round(min(picture.size) / 500))
    band = find_contours(values, 5 * width) & ~find_contours(values, width) & (values >= background)
    rows = label_colours(list(labels), colours)
    drawn = np.array(plain)
    drawn[band] = rows[values[band] - background]
    if not legend:
        return Image.fromarray(drawn)
    counts = np.bincount(values.ravel(), minlength=len(labels) + background)[int(background) :]
    return with_legend(Image.fromarray(drawn), legend_entries(list(labels), rows, counts, values.size))


def find_contours(label_map: Any, width: int = 1) -> npt.NDArray[np.bool_]:
    """Where one region ends and the next begins, as a mask [H, W] of lines about `width` pixels wide.

    Raises:
        ValueError: the map is no integer [H, W], or `width` is below 1.
    """
    values = _checked_map(label_map)
    if width < 1:
        raise ValueError(f"A contour's width must be at least 1 pixel, got {width}.")
    lines = np.zeros(values.shape, dtype=bool)
    lines[:, :-1] |= values[:, :-1] != values[:, 1:]
    lines[:-1, :] |= values[:-1, :] != values[1:, :]
    for step in range(width - 1):
        # Grow towards the other side each time, so that the line stays on the border.
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
    """Pictures in a row on white, aligned at the top, each under its title.

    Raises:
        ValueError: no images, or another number of titles than of images.
    """
    if not images:
        raise ValueError("side_by_side needs at least one image, got none.")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"Expected one title for each of the {len(images)} images, got {len(titles)}.")
    pictures = [_rgb(image) for image in images]
    font = font_of(letter_size(max(pictures, key=lambda picture: min(picture.size))))
    gap = round(font.size)
    top = round(1.9 * font.size) if titles is not None else 0
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, top + max(picture.height for picture in pictures)), PAPER)
    draw = ImageDraw.Draw(canvas)
    texts = drawable(titles or (), "image")
    x = 0
    for i, picture in enumerate(pictures):
        if titles is not None:
            title = fitted(texts[i], font, picture.width)
            draw.text((x, top // 2), title, fill=INK, font=font, anchor="lm")
        canvas.paste(picture, (x, top))
        x += picture.width + gap
    return canvas


def indexed_png(
    label_map: Any,
    num_labels: int | None = None,
    background: bool = False,
    colours: npt.NDArray[np.uint8] | None = None,
) -> Image.Image:
    """A label map as a picture whose pixel values are the map's own values: what is saved as a mask.

    Args:
        label_map: integers [H, W] (array or tensor).
        num_labels: how many labels there are, so that all masks of a run get one format; judged by the largest value
            where not given.
        background: whether 0 is background; it is black in the palette.
        colours: of the labels, uint8 [N, 3], from `label_colours`; by default the palette's.

    Returns:
        A palette image (mode `P`) in the labels' colours for up to 256 values, else a 16-bit one (mode `I;16`).

    Raises:
        ValueError: a value is negative, has no label, or exceeds 65,535.
    """
    values = _checked_map(label_map, None if num_labels is None else num_labels + background)
    count = int(values.max()) + 1 if num_labels is None else num_labels + background
    if count > 2**16:
        raise ValueError(f"A mask holds values up to 65,535, got {count - 1:,}.")
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
    if isinstance(labels, str):
        raise ValueError(f"Labels must be a list of strings, got the string {labels!r}.")
    names = list(labels)
    if not names:
        raise ValueError("There must be at least one label, got none.")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"Labels must be strings, got {name!r}.")
    return names


def _checked_map(label_map: Any, num_values: int | None = None) -> npt.NDArray[np.int64]:
    """A map of integers [H, W] in 0..num_values-1, from an array, a nested list or a tensor on any device."""
    if hasattr(label_map, "detach"):
        label_map = label_map.detach().cpu()
    values = np.asarray(label_map)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"A label map has the shape (height, width), got {values.shape}.")
    if values.dtype.kind not in "iub":
        raise ValueError(f"A label map holds integers, got {values.dtype}.")
    low, high = int(values.min()), int(values.max())
    if low < 0:
        raise ValueError(f"A label map's values start at 0, got {low}.")
    if num_values is not None and high >= num_values:
        raise ValueError(f"The label map holds the value {high}, but values go up to {num_values - 1}.")
    return values.astype(np.int64, copy=False)


def _rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, transparent places over white."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"Expected a PIL image, got {type(image).__name__}.")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*PAPER, 255)), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _painted(
    picture: Image.Image,
    values: npt.NDArray[np.int64],
    names: list[str],
    colours: npt.NDArray[np.uint8],
    background: bool,
    alpha: float,
    legend: bool,
    contours: bool,
) -> Image.Image:
    """The picture under its colours, with a legend or without; see `overlay`."""
    drawn = _paint(picture, values, colours, background, alpha, contours)
    if not legend:
        return drawn
    counts = np.bincount(values.ravel(), minlength=len(names) + background)[int(background) :]
    return with_legend(drawn, legend_entries(names, colours, counts, values.size))


def _paint(
    picture: Image.Image,
    values: npt.NDArray[np.int64],
    colours: npt.NDArray[np.uint8],
    background: bool,
    alpha: float,
    contours: bool,
) -> Image.Image:
    """The picture under its colours, see `overlay`; strip by strip, each with what lines from beside it need."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}.")
    if background:
        colours = np.vstack([np.zeros((1, 3), dtype=np.uint8), colours])
    line = max(1, round(min(picture.size) / 500)) if contours else 0
    (width, height), painted = picture.size, Image.new("RGB", picture.size)
    step = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        first, last = max(top - line, 0), min(bottom + line, height)
        strip = picture.crop((0, first, width, last))
        strip = _paint_strip(strip, values[first:last], colours, background, alpha, line)
        painted.paste(strip.crop((0, top - first, width, bottom - first)), (0, top))
    return painted


def _paint_strip(
    picture: Image.Image,
    values: npt.NDArray[np.int64],
    colours: npt.NDArray[np.uint8],
    background: bool,
    alpha: float,
    line: int,
) -> Image.Image:
    # Grey, and its shadows lifted: over black every colour would be black.
    grey = picture.convert("L").point([round(80 + 0.65 * level) for level in range(256)]).convert("RGB")
    faded = Image.blend(picture, grey, alpha)
    painted = Image.blend(faded, Image.fromarray(colours[values]), alpha)
    if background:
        painted = Image.composite(painted, picture, Image.fromarray(values > 0))
    if line:
        lines = np.where(find_contours(values, line), np.uint8(210), np.uint8(0))
        painted.paste(PAPER, mask=Image.fromarray(lines))
    return painted
