"""Heat maps of tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .colours import BASE_COLOURS
from .text import INK, PAPER, drawable, fitted, font_of

# From low to high: a single hue that gets darker, which colour-blind readers can order too.
RAMP = np.array([(247, 251, 255), (86, 180, 233), (0, 52, 96)], dtype=float)
NOTHING = (225, 225, 225)
CHOSEN = BASE_COLOURS[6]
_HEAT_MAP_LETTERS = 22  # pixels, so that a heat map of eight columns is readable at half its size


def heat_map(
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    chosen: Sequence[int] | None = None,
    row_colours: Any = None,
    column_colours: Any = None,
) -> Image.Image:
    """Draws a table of numbers as a heat map, with darker cells for larger values.

    Args:
        values: [R, C], for instance the cosine similarities of R labels and C groups; NaN cells are grey.
        rows: names of the R rows.
        columns: short names of the C columns.
        chosen: for each column the index of the row that is framed, or -1.
        row_colours: uint8 [R, 3], such as the labels' `palette`, for a swatch beside each row.
        column_colours: uint8 [C, 3], for a swatch above each column.

    Raises:
        ValueError: the numbers of names, colours and values do not match, or there are no values.
    """
    table = np.asarray(values.detach().float().cpu() if hasattr(values, "detach") else values, dtype=float)
    if table.ndim != 2 or table.size == 0 or table.shape != (len(rows), len(columns)):
        raise ValueError(
            f"values have shape {table.shape}, expected {(len(rows), len(columns))}, the numbers of rows and columns, "
            "and at least one of each."
        )
    for kind, given, count in (
        ("chosen", chosen, len(columns)),
        ("row_colours", row_colours, len(rows)),
        ("column_colours", column_colours, len(columns)),
    ):
        if given is not None and len(given) != count:
            raise ValueError(f"{kind} has {len(given)} entries, expected {count}.")
    size, font = _HEAT_MAP_LETTERS, font_of(_HEAT_MAP_LETTERS)
    pad = size // 2
    names = [fitted(row, font, 12 * size) for row in drawable(rows, "row")]
    heads = drawable(columns, "")
    left, top = round(max(map(font.getlength, names))) + 3 * size, round(2.6 * size)
    wide, high = round(max(3.2 * size, *(font.getlength(head) + size for head in heads))), 2 * size
    canvas = Image.new("RGB", (left + len(heads) * wide + pad, top + len(names) * high + pad), PAPER)
    draw = ImageDraw.Draw(canvas)
    for j, head in enumerate(heads):
        x = left + j * wide
        draw.text((x + wide / 2, size), head, fill=INK, font=font, anchor="mm")
        if column_colours is not None:
            draw.rectangle((x, top - 0.7 * size, x + wide - 2, top - 3), fill=_rgb_tuple(column_colours[j]))
    for i, name in enumerate(names):
        y = top + i * high + high // 2
        if row_colours is not None:
            draw.rectangle((pad, y - pad, pad + size - 1, y + pad - 1), fill=_rgb_tuple(row_colours[i]))
        draw.text((left - pad, y), name, fill=INK, font=font, anchor="rm")

    counted = table[np.isfinite(table)]
    low, span = (counted.min(), np.ptp(counted)) if counted.size else (0.0, 0.0)
    for (i, j), value in np.ndenumerate(table):
        x, y = left + j * wide, top + i * high
        share = (value - low) / span if span > 0 else 0.0
        # Leave a line between cells.
        draw.rectangle(
            (x, y, x + wide - 2, y + high - 2), fill=ramp(share) if np.isfinite(value) else NOTHING
        )
        if np.isfinite(value):
            middle = (x + (wide - 2) / 2, y + (high - 2) / 2)
            ink = PAPER if share > 0.55 else INK
            draw.text(middle, f"{value:.2f}", fill=ink, font=font, anchor="mm")
    for j, i in enumerate(chosen if chosen is not None else ()):
        if i >= 0:
            x, y = left + j * wide, top + i * high
            draw.rectangle((x, y, x + wide - 2, y + high - 2), outline=PAPER, width=5)
            draw.rectangle((x - 1, y - 1, x + wide - 1, y + high - 1), outline=CHOSEN, width=4)
    return canvas


def ramp(share: float) -> tuple[int, ...]:
    """The colour for a value from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    below = min(int(place), len(RAMP) - 2)
    mixed = RAMP[below] + (place - below) * (RAMP[below + 1] - RAMP[below])
    return _rgb_tuple(mixed.round())


def _rgb_tuple(colour: Any) -> tuple[int, ...]:
    return tuple(int(channel) for channel in colour)
