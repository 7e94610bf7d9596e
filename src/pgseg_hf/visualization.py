"""Colours and drawings for label maps: the one place where a mask becomes a picture.

A *label map* is an integer array [H, W]. Without a background its values index the given labels; with one, 0 is
background and label i has value i + 1. A label's colour depends on its index alone, so the same label has the same
colour in every picture of a run.
"""

import functools
import math
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito, "Color Universal Design" (2008), in an order that keeps neighbours apart. Their black hides on a
# photograph: a dark wine red stands in for it.
_BASE_COLOURS = (
    (230, 159, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (86, 180, 233),
    (213, 94, 0),
    (120, 20, 80),
)
_NUM_COLOURS = 1024  # distinct colours; after that they repeat

# What protanopes and deuteranopes see, in linear RGB: Machado et al., "A Physiologically-based Model for Simulation
# of Color Vision Deficiency" (2009), severity 1.
_PROTANOPIA = (
    (0.152286, 1.052583, -0.204868),
    (0.114503, 0.786281, 0.099216),
    (-0.003882, -0.048116, 1.051998),
)
_DEUTERANOPIA = (
    (0.367322, 0.860646, -0.227968),
    (0.280085, 0.672501, 0.047413),
    (-0.011820, 0.042940, 0.968881),
)

# Letters that Pillow's font lacks and Unicode does not decompose.
_PLAIN_LETTERS = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d"}
    | {"ð": "d", "þ": "th", "ı": "i", "×": "x", "–": "-", "—": "-"}
)

_PAPER = (255, 255, 255)
_INK = (32, 32, 32)
_FAINT_INK = (112, 112, 112)
_MAX_LEGEND_COLUMNS = 3
_MIN_LEGEND_ROWS = 8
_MAX_LABEL_WIDTH = 14  # in letter heights: about 30 letters

# From little to much: one hue that grows darker, which every kind of eyes can order.
_RAMP = np.array([(247, 251, 255), (86, 180, 233), (0, 52, 96)], dtype=float)
_NOTHING = (225, 225, 225)
_CHOSEN = _BASE_COLOURS[6]
_HEAT_MAP_LETTERS = 22  # pixels: a heat map of eight columns is readable at half its size


def palette(n: int) -> npt.NDArray[np.uint8]:
    """The first `n` label colours, uint8 [n, 3] (RGB).

    The first eight are made for colour-blind readers (Okabe-Ito); each further one is the colour that lies farthest
    from all before it, in the worst of normal, protanope and deuteranope vision. `palette(n)[:k]` equals
    `palette(k)`. The first 1,024 colours are distinct; then they repeat from the start.

    Raises:
        ValueError: `n` is negative.
    """
    if n < 0:
        raise ValueError(f"The number of colours must not be negative, got {n}.")
    if n <= len(_BASE_COLOURS):
        return np.array(_BASE_COLOURS, dtype=np.uint8)[:n]
    return _all_colours()[np.arange(n) % _NUM_COLOURS]


@functools.cache
def _all_colours() -> npt.NDArray[np.uint8]:
    """The base colours, then a greedy farthest-point sequence over a grid of colours, uint8 [_NUM_COLOURS, 3]."""
    base = np.array(_BASE_COLOURS, dtype=np.uint8)
    levels = np.linspace(0, 255, 16).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness, *opponents = _oklab(_linear(grid)).T
    # No near-black, near-white or grey: they read as the photograph itself.
    grid = grid[(lightness > 0.35) & (lightness < 0.93) & (np.hypot(*opponents) > 0.05)]

    # Whole numbers, so that every machine makes the same choices.
    candidates, chosen = _seen_colours(grid), _seen_colours(base)
    distance = np.min([_distance(candidates, colour) for colour in chosen], axis=0)
    colours = list(base)
    while len(colours) < _NUM_COLOURS:
        farthest = int(distance.argmax())
        colours.append(grid[farthest])
        distance = np.minimum(distance, _distance(candidates, candidates[farthest]))
    return np.array(colours, dtype=np.uint8)


def _linear(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """sRGB bytes [N, 3] to linear light in 0..1."""
    value = rgb / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _oklab(linear: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Linear RGB [N, 3] to Oklab [N, 3] (Björn Ottosson, "A perceptual color space for image processing", 2020)."""
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_lms.T) @ to_lab.T


def _seen_colours(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Colours [N, 3] as three kinds of eyes see them: Oklab in units of 1/1000, [N, 3 kinds, 3]."""
    linear = _linear(rgb)
    kinds = [linear, *(np.clip(linear @ np.array(m).T, 0, 1) for m in (_PROTANOPIA, _DEUTERANOPIA))]
    return np.stack([np.rint(_oklab(kind) * 1000) for kind in kinds], axis=1).astype(np.int32)


def _distance(colours: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Squared distance of each of [N, kinds, 3] to [kinds, 3] for the kind of eyes that tells them apart least."""
    return ((colours - other) ** 2).sum(axis=-1).min(axis=-1)


def overlay(
    image: Image.Image,
    label_map: Any,
    labels: Sequence[str],
    background: bool = False,
    alpha: float = 0.55,
    legend: bool = True,
    contours: bool = True,
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
            It stands to the right of a tall picture and under a wide one.
        contours: whether to draw a light line between regions.

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
    colours = palette(len(names))
    drawn = _paint(picture, values, colours, background, alpha, contours)
    if not legend:
        return drawn
    counts = np.bincount(values.ravel(), minlength=len(names) + background)[int(background) :]
    return _with_legend(drawn, _legend_entries(names, colours, counts, values.size))


def draw_groups(
    image: Image.Image,
    group_index: Any,
    num_groups: int | None = None,
    alpha: float = 0.7,
    legend: bool = True,
) -> Image.Image:
    """Colour a picture by the group that each of its places belongs to.

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
    return overlay(image, values[rows][:, columns], names, alpha=alpha, legend=legend)


def prototype_maps(output: Any, index: int = 0) -> list[npt.NDArray[np.int64]]:
    """Which prototype each patch of a picture belongs to, stage by stage: what `draw_groups` draws.

    The prototypes of a later stage describe the groups of the one before; a patch shares in them as it shares in these
    groups.

    Args:
        output: of [`PGSegVisionModel`] with `output_npr=True` and `output_attentions=True`.
        index: number of the picture in its batch.

    Returns:
        an int64 [h, w] for each grouping stage, on the grid of the patches.

    Raises:
        ValueError: the output holds no prototypes.
    """
    if not output.npr or output.attentions is None:
        raise ValueError(
            "the output has no prototypes, expected that of a model with npr_variant 'corrected' or 'released', "
            "called with output_npr=True and output_attentions=True."
        )
    maps, patches_KL = [], None
    for (_, _, responsibilities, _), attention in zip(output.npr, output.attentions):
        shares_LP = responsibilities[index].detach().double().cpu().numpy()
        assignment_KL = attention[index].detach().double().cpu().numpy()
        if patches_KL is not None:
            shares_LP, assignment_KL = patches_KL.T @ shares_LP, assignment_KL @ patches_KL
        patches_KL = assignment_KL
        maps.append(shares_LP.argmax(axis=1).reshape(output.grouping.shape[-2:]))
    return maps


def draw_contours(
    image: Image.Image,
    label_map: Any,
    labels: Sequence[str],
    background: bool = False,
    legend: bool = True,
) -> Image.Image:
    """Draw only the borders of the regions, each in the colour of its label, over the picture as it is.

    Args:
        image: the picture, W x H.
        label_map: as for `overlay`.
        labels: the names, as given for the segmentation.
        background: whether 0 is background, whose side of a border stays free.
        legend: as for `overlay`.

    Raises:
        ValueError: as `overlay`.
    """
    picture = _rgb(image)
    plain = overlay(picture, label_map, labels, background, alpha=0, legend=False)
    values = _checked_map(label_map)
    width = max(1, round(min(picture.size) / 500))
    band = find_contours(values, 5 * width) & ~find_contours(values, width) & (values >= background)
    colours = palette(len(labels))
    drawn = np.array(plain)
    drawn[band] = colours[values[band] - background]
    if not legend:
        return Image.fromarray(drawn)
    counts = np.bincount(values.ravel(), minlength=len(labels) + background)[int(background) :]
    return _with_legend(Image.fromarray(drawn), _legend_entries(list(labels), colours, counts, values.size))


def heat_map(
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    chosen: Sequence[int] | None = None,
    row_colours: Any = None,
    column_colours: Any = None,
) -> Image.Image:
    """A table of numbers, each on a ground that is the darker the larger it is.

    Args:
        values: [R, C], for instance the cosines of R labels and C groups; NaN for what does not count, which is grey.
        rows: R names.
        columns: C names, short ones.
        chosen: for each column the row that is framed, or -1.
        row_colours: uint8 [R, 3], such as the labels' `palette`, for a swatch beside each name.
        column_colours: uint8 [C, 3], the same over each column.

    Raises:
        ValueError: numbers of names, colours and values disagree, or there are no values.
    """
    table = np.asarray(values.detach().float().cpu() if hasattr(values, "detach") else values, dtype=float)
    if table.ndim != 2 or table.size == 0 or table.shape != (len(rows), len(columns)):
        raise ValueError(
            f"values have the shape {table.shape}, expected {(len(rows), len(columns))} as there are names, and at "
            "least one of each."
        )
    for kind, given, count in (
        ("chosen", chosen, len(columns)),
        ("row_colours", row_colours, len(rows)),
        ("column_colours", column_colours, len(columns)),
    ):
        if given is not None and len(given) != count:
            raise ValueError(f"{kind} has {len(given)} entries, expected {count}.")
    size, font = _HEAT_MAP_LETTERS, _font(_HEAT_MAP_LETTERS)
    names = [_fitted(_drawable(row, f"row {i + 1}"), font, 12 * size) for i, row in enumerate(rows)]
    heads = [_drawable(column, f"{i + 1}") for i, column in enumerate(columns)]
    grid = _Grid(
        left=round(max(map(font.getlength, names))) + 3 * size,
        top=round(2.6 * size),
        wide=round(max(3.2 * size, *(font.getlength(head) + size for head in heads))),
        high=2 * size,
    )
    right, bottom = grid.corner(len(names), len(heads))
    canvas = Image.new("RGB", (right + size // 2, bottom + size // 2), _PAPER)
    draw = ImageDraw.Draw(canvas)
    _draw_names(draw, names, heads, grid, row_colours, column_colours)
    _draw_cells(draw, table, grid, chosen)
    return canvas


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
    font = _font(_font_size(max(pictures, key=lambda picture: min(picture.size))))
    gap = round(font.size)
    top = round(1.9 * font.size) if titles is not None else 0
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, top + max(picture.height for picture in pictures)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    x = 0
    for i, picture in enumerate(pictures):
        if titles is not None:
            title = _fitted(_drawable(titles[i], f"image {i + 1}"), font, picture.width)
            draw.text((x, top // 2), title, fill=_INK, font=font, anchor="lm")
        canvas.paste(picture, (x, top))
        x += picture.width + gap
    return canvas


def indexed_png(label_map: Any, num_labels: int | None = None, background: bool = False) -> Image.Image:
    """A label map as a picture whose pixel values are the map's own values: what is saved as a mask.

    Args:
        label_map: integers [H, W] (array or tensor).
        num_labels: how many labels there are, so that all masks of a run get one format; judged by the largest value
            where not given.
        background: whether 0 is background; it is black in the palette.

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
    colours = palette(256 - background)
    if background:
        colours = np.vstack([np.zeros((1, 3), dtype=np.uint8), colours])
    mask.putpalette(colours.tobytes())
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
    return values.astype(np.int64)


def _rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, transparent places over white."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"Expected a PIL image, got {type(image).__name__}.")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*_PAPER, 255)), image).convert("RGB")
    return image.convert("RGB")


def _paint(
    picture: Image.Image,
    values: npt.NDArray[np.int64],
    colours: npt.NDArray[np.uint8],
    background: bool,
    alpha: float,
    contours: bool,
) -> Image.Image:
    """The picture under its colours; see `overlay`."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}.")
    if background:
        colours = np.vstack([np.zeros((1, 3), dtype=np.uint8), colours])
    # Grey, and its shadows lifted: over black every colour would be black.
    grey = picture.convert("L").point([round(80 + 0.65 * level) for level in range(256)]).convert("RGB")
    faded = Image.blend(picture, grey, alpha)
    painted = Image.blend(faded, Image.fromarray(colours[values]), alpha)
    if background:
        painted = Image.composite(painted, picture, Image.fromarray(values > 0))
    if contours:
        width = max(1, round(min(picture.size) / 500))
        line = np.where(find_contours(values, width), np.uint8(210), np.uint8(0))
        painted.paste(_PAPER, mask=Image.fromarray(line))
    return painted


class _Entry(NamedTuple):
    """One line of a legend; the line that stands for all that found no room has no colour."""

    text: str
    share: float | None = None
    colour: tuple[int, ...] | None = None


def _legend_entries(
    names: list[str], colours: npt.NDArray[np.uint8], counts: npt.NDArray[np.intp], total: int
) -> list[_Entry]:
    """The labels that are there, the largest first."""
    order = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
    entries = [
        _Entry(_drawable(names[i], f"label {i + 1}"), counts[i] / total, tuple(colours[i].tolist()))
        for i in order
    ]
    return entries or [_Entry("nothing found")]


def _with_legend(picture: Image.Image, entries: list[_Entry]) -> Image.Image:
    """The picture with a panel that lists the entries: to the right of a tall picture, under a wide one."""
    font = _font(_font_size(picture))
    layout = _Layout.of(entries, font)
    count = len(entries)
    beside = picture.width <= 1.25 * picture.height
    if beside:
        fitting = max(_MIN_LEGEND_ROWS, (picture.height - 2 * layout.pad) // layout.row)
        columns = min(_MAX_LEGEND_COLUMNS, math.ceil(count / fitting))
        rows = min(fitting, math.ceil(count / columns)) if columns > 1 else count
    else:
        columns = min(count, max(1, (picture.width - layout.pad) // (layout.column + 2 * layout.pad)))
        rows = min(_MIN_LEGEND_ROWS, math.ceil(count / columns))

    if count > rows * columns:
        kept = rows * columns - 1
        entries = [
            *entries[:kept],
            _Entry(f"{count - kept:,} more", sum(e.share or 0 for e in entries[kept:])),
        ]
    panel = _draw_legend(entries, rows, columns, layout, font)
    if beside:
        canvas = Image.new("RGB", (picture.width + panel.width, max(picture.height, panel.height)), _PAPER)
        canvas.paste(panel, (picture.width, 0))
    else:
        canvas = Image.new("RGB", (max(picture.width, panel.width), picture.height + panel.height), _PAPER)
        canvas.paste(panel, (0, picture.height))
    canvas.paste(picture, (0, 0))
    return canvas


class _Layout(NamedTuple):
    """Measures of a legend in pixels: margin, line height, side of a swatch, and the width of a column."""

    pad: int
    row: int
    swatch: int
    text: int
    column: int

    @classmethod
    def of(cls, entries: list[_Entry], font: ImageFont.FreeTypeFont) -> "_Layout":
        size = round(font.size)
        text = min(
            _MAX_LABEL_WIDTH * size,
            max(math.ceil(font.getlength(text)) for text in ["9,999 more", *(e.text for e in entries)]),
        )
        share = math.ceil(font.getlength("100.0 %"))
        return cls(pad=size, row=round(1.7 * size), swatch=size, text=text, column=3 * size + text + share)


def _draw_legend(
    entries: list[_Entry], rows: int, columns: int, layout: _Layout, font: ImageFont.FreeTypeFont
) -> Image.Image:
    """The panel with its entries, column by column."""
    pad, row, swatch, text_width, column = layout
    panel = Image.new("RGB", (columns * (column + 2 * pad), 2 * pad + rows * row), _PAPER)
    draw = ImageDraw.Draw(panel)
    for i, entry in enumerate(entries):
        x, y = pad + (i // rows) * (column + 2 * pad), pad + (i % rows) * row + row // 2
        if entry.colour is not None:
            draw.rectangle(
                (x, y - swatch // 2, x + swatch - 1, y - swatch // 2 + swatch - 1), fill=entry.colour
            )
        ink = _INK if entry.colour is not None else _FAINT_INK
        text = _fitted(entry.text, font, text_width)
        draw.text((x + swatch + swatch // 2, y), text, fill=ink, font=font, anchor="lm")
        if entry.share is not None:
            draw.text((x + column, y), _percent(entry.share), fill=_FAINT_INK, font=font, anchor="rm")
    return panel


class _Grid(NamedTuple):
    """Measures of a heat map in pixels: where the first cell lies, and the size of all."""

    left: int
    top: int
    wide: int
    high: int

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """x and y of a cell's first pixel."""
        return self.left + column * self.wide, self.top + row * self.high

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """A cell's first and last pixels; a line stays free between cells."""
        x, y = self.corner(row, column)
        return x, y, x + self.wide - 2, y + self.high - 2


def _draw_names(
    draw: ImageDraw.ImageDraw,
    names: list[str],
    heads: list[str],
    grid: _Grid,
    row_colours: Any,
    column_colours: Any,
) -> None:
    """The names of a heat map's rows and columns with their swatches."""
    size, font = _HEAT_MAP_LETTERS, _font(_HEAT_MAP_LETTERS)
    pad = size // 2
    for j, head in enumerate(heads):
        x, y = grid.corner(0, j)
        draw.text((x + grid.wide / 2, size), head, fill=_INK, font=font, anchor="mm")
        if column_colours is not None:
            draw.rectangle((x, y - 0.7 * size, x + grid.wide - 2, y - 3), fill=_rgb_tuple(column_colours[j]))
    for i, name in enumerate(names):
        y = grid.corner(i, 0)[1] + grid.high // 2
        if row_colours is not None:
            draw.rectangle((pad, y - pad, pad + size - 1, y + pad - 1), fill=_rgb_tuple(row_colours[i]))
        draw.text((grid.left - pad, y), name, fill=_INK, font=font, anchor="rm")


def _draw_cells(
    draw: ImageDraw.ImageDraw,
    table: npt.NDArray[np.float64],
    grid: _Grid,
    chosen: Sequence[int] | None,
) -> None:
    """The cells of a heat map."""
    font = _font(_HEAT_MAP_LETTERS)
    counted = table[np.isfinite(table)]
    low, span = (counted.min(), np.ptp(counted)) if counted.size else (0.0, 0.0)
    for (i, j), value in np.ndenumerate(table):
        left, top, right, bottom = grid.box(i, j)
        if not np.isfinite(value):
            draw.rectangle((left, top, right, bottom), fill=_NOTHING)
            continue
        share = (value - low) / span if span > 0 else 0.0
        draw.rectangle((left, top, right, bottom), fill=_ramp(share))
        ink = _PAPER if share > 0.55 else _INK
        middle = ((left + right) / 2, (top + bottom) / 2)
        draw.text(middle, f"{value:.2f}", fill=ink, font=font, anchor="mm")
    for j, i in enumerate(chosen if chosen is not None else ()):
        if i >= 0:
            left, top, right, bottom = grid.box(i, j)
            draw.rectangle((left, top, right, bottom), outline=_PAPER, width=5)
            draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_CHOSEN, width=4)


def _ramp(share: float) -> tuple[int, ...]:
    """The colour of a share from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    below = min(int(place), len(_RAMP) - 2)
    mixed = _RAMP[below] + (place - below) * (_RAMP[below + 1] - _RAMP[below])
    return _rgb_tuple(mixed.round())


def _rgb_tuple(colour: Any) -> tuple[int, ...]:
    return tuple(int(channel) for channel in colour)


def _percent(share: float) -> str:
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _font_size(picture: Image.Image) -> int:
    """Letters of a size that stays readable when the picture is shown on one screen."""
    return min(96, max(13, round(0.025 * min(picture.size))))


@functools.lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, so that a picture looks the same on every machine."""
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Text needs a Pillow that was built with FreeType: pip install --upgrade pillow.")
    return font


@functools.cache
def _has_glyph(character: str) -> bool:
    font = _font(16)
    return character == " " or bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffd"))


def _drawable(text: str, fallback: str) -> str:
    """The text on one line in letters that the font has: accents dropped, what has no likeness left out."""
    text = unicodedata.normalize("NFKD", text[:500].translate(_PLAIN_LETTERS))
    text = "".join(" " if c.isspace() or unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join("".join(filter(_has_glyph, text)).split()) or fallback


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, shortened to at most `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1].rstrip()
    return f"{text}…"
