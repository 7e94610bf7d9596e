"""The panel that says which colour is which label."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from .text import FAINT_INK, INK, PAPER, drawable, fitted, font_of, letter_size

_MAX_LEGEND_COLUMNS = 3
_MIN_LEGEND_ROWS = 8
_MAX_LABEL_WIDTH = 14  # in letter heights: about 30 letters


class _Entry(NamedTuple):
    """One line of a legend; the line that stands for all that found no room has no colour."""

    text: str
    share: float | None = None
    colour: tuple[int, ...] | None = None


def legend_entries(
    names: list[str], colours: npt.NDArray[np.uint8], counts: npt.NDArray[np.intp], total: int
) -> list[_Entry]:
    """The labels that are there, the largest first."""
    order = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
    texts = drawable(names, "label")
    entries = [_Entry(texts[i], counts[i] / total, tuple(colours[i].tolist())) for i in order]
    return entries or [_Entry("nothing found")]


def with_legend(image: Image.Image, entries: list[_Entry]) -> Image.Image:
    """The image with a panel that lists the entries: to the right of a tall image, under a wide one."""
    font = font_of(letter_size(image))
    layout = _Layout.of(entries, font)
    count = len(entries)
    beside = image.width <= 1.25 * image.height
    if beside:
        fitting = max(_MIN_LEGEND_ROWS, (image.height - 2 * layout.pad) // layout.row)
        columns = min(_MAX_LEGEND_COLUMNS, math.ceil(count / fitting))
        rows = min(fitting, math.ceil(count / columns)) if columns > 1 else count
    else:
        columns = min(count, max(1, (image.width - layout.pad) // (layout.column + 2 * layout.pad)))
        rows = min(_MIN_LEGEND_ROWS, math.ceil(count / columns))

    if count > rows * columns:
        kept = rows * columns - 1
        entries = [
            *entries[:kept],
            _Entry(f"{count - kept:,} more", sum(e.share or 0 for e in entries[kept:])),
        ]
    panel = _draw_legend(entries, rows, columns, layout, font)
    if beside:
        canvas = Image.new("RGB", (image.width + panel.width, max(image.height, panel.height)), PAPER)
        canvas.paste(panel, (image.width, 0))
    else:
        canvas = Image.new("RGB", (max(image.width, panel.width), image.height + panel.height), PAPER)
        canvas.paste(panel, (0, image.height))
    canvas.paste(image, (0, 0))
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
    panel = Image.new("RGB", (columns * (column + 2 * pad), 2 * pad + rows * row), PAPER)
    draw = ImageDraw.Draw(panel)
    for i, entry in enumerate(entries):
        x, y = pad + (i // rows) * (column + 2 * pad), pad + (i % rows) * row + row // 2
        if entry.colour is not None:
            draw.rectangle(
                (x, y - swatch // 2, x + swatch - 1, y - swatch // 2 + swatch - 1), fill=entry.colour
            )
        ink = INK if entry.colour is not None else FAINT_INK
        text = fitted(entry.text, font, text_width)
        draw.text((x + swatch + swatch // 2, y), text, fill=ink, font=font, anchor="lm")
        if entry.share is not None:
            draw.text((x + column, y), _percent(entry.share), fill=FAINT_INK, font=font, anchor="rm")
    return panel


def _percent(share: float) -> str:
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
