"""Legend of an image."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from .text import FAINT_INK, INK, PAPER, drawable, fitted, font_of, letter_size

_MAX_LEGEND_COLUMNS = 3
_MIN_LEGEND_ROWS = 8
_MAX_LABEL_WIDTH = 14  # in letter heights: about 30 letters


class _Entry(NamedTuple):
    """One line of a legend. The line that summarizes omitted labels has no colour."""

    text: str
    share: float | None = None
    colour: tuple[int, ...] | None = None


def legend_entries(
    names: list[str], colours: npt.NDArray[np.uint8], counts: npt.NDArray[np.intp], total: int
) -> list[_Entry]:
    """Entries of the labels present, the largest first."""
    order = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
    texts = drawable(names, "label")
    entries = [_Entry(texts[i], counts[i] / total, tuple(colours[i].tolist())) for i in order]
    return entries or [_Entry("nothing found")]


def with_legend(image: Image.Image, entries: list[_Entry]) -> Image.Image:
    """Adds a panel with the entries to an image: to the right of a tall image, below a wide one."""
    font = font_of(letter_size(image))
    # In pixels: margin and side of a swatch, height of a line, width of a text and of a column.
    pad, row = round(font.size), round(1.7 * round(font.size))
    longest = max(math.ceil(font.getlength(text)) for text in ["9,999 more", *(e.text for e in entries)])
    text_width = min(_MAX_LABEL_WIDTH * pad, longest)
    column = 3 * pad + text_width + math.ceil(font.getlength("100.0 %"))
    count = len(entries)
    beside = image.width <= 1.25 * image.height
    if beside:
        fitting = max(_MIN_LEGEND_ROWS, (image.height - 2 * pad) // row)
        columns = min(_MAX_LEGEND_COLUMNS, math.ceil(count / fitting))
        rows = min(fitting, math.ceil(count / columns)) if columns > 1 else count
    else:
        columns = min(count, max(1, (image.width - pad) // (column + 2 * pad)))
        rows = min(_MIN_LEGEND_ROWS, math.ceil(count / columns))
    if count > rows * columns:
        kept, left_out = entries[: rows * columns - 1], entries[rows * columns - 1 :]
        entries = [*kept, _Entry(f"{len(left_out):,} more", sum(e.share or 0 for e in left_out))]

    size = (columns * (column + 2 * pad), 2 * pad + rows * row)
    x0, y0 = (image.width, 0) if beside else (0, image.height)
    canvas = Image.new("RGB", (max(image.width, x0 + size[0]), max(image.height, y0 + size[1])), PAPER)
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, entry in enumerate(entries):
        x, y = x0 + pad + (i // rows) * (column + 2 * pad), y0 + pad + (i % rows) * row + row // 2
        if entry.colour is not None:
            top = y - pad // 2
            draw.rectangle((x, top, x + pad - 1, top + pad - 1), fill=entry.colour)
        ink = INK if entry.colour is not None else FAINT_INK
        text = fitted(entry.text, font, text_width)
        draw.text((x + pad + pad // 2, y), text, fill=ink, font=font, anchor="lm")
        if entry.share is not None:
            draw.text((x + column, y), _percent(entry.share), fill=FAINT_INK, font=font, anchor="rm")
    return canvas


def _percent(share: float) -> str:
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
