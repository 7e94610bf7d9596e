"""Masks from the ways that COCO's annotation format stores them: polygons and run lengths, plain or compressed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...images import MAX_IMAGE_PIXELS

try:
    from pycocotools import mask as _official  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:
    _official = None  # type: ignore[assignment, unused-ignore]

POLYGON_SCALE = 5
"""Steps of a pixel that COCO rounds polygon corners to (cocoapi, `common/maskApi.c`)."""

MAX_COORDINATE = 100_000.0
"""Largest polygon coordinate that is read, in pixels; anything beyond is no annotation of a picture."""

# A run length of a picture within MAX_IMAGE_PIXELS, and its sign, fit into so many groups of 5 bits.
_MAX_GROUPS = 7


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask of a `segmentation` entry in COCO's format.

    Polygons are drawn by `pycocotools` where it is installed. Without it an own scan-line fill is used, which differs
    in a few boundary pixels: on random polygons of up to 40 corners in pictures of up to 640 x 480, in less than
    0.03 % of the boundary's pixels.

    Args:
        segmentation: polygons `[[x, y, x, y, ...], ...]` in pixels, of which the union counts, or run lengths
            `{"size": [height, width], "counts": ...}` with a list of counts or COCO's compressed string.
        height, width: pixels of the picture.

    Returns:
        bool [height, width].

    Raises:
        ValueError: it is none of these, or does not fit the picture.
    """
    if height < 1 or width < 1 or height * width > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"a picture of {height} x {width} (height x width) cannot be drawn, expected 1 to "
            f"{MAX_IMAGE_PIXELS:,} pixels."
        )
    if isinstance(segmentation, list):
        return _draw_polygons(segmentation, height, width)
    if not isinstance(segmentation, Mapping):
        raise ValueError(
            f"the segmentation is {_shortened(segmentation)}, expected a list of polygons or run lengths with "
            "size and counts."
        )
    if segmentation.get("size") != [height, width]:
        raise ValueError(
            f"the run lengths have the size {_shortened(segmentation.get('size'))}, expected that of the picture, "
            f"[{height}, {width}]."
        )
    counts = segmentation.get("counts")
    return expand_run_lengths(
        decompress_run_lengths(counts) if isinstance(counts, str) else counts, height, width
    )


def decompress_run_lengths(text: str) -> list[int]:
    """The run lengths of COCO's compressed string.

    Every character stands for 6 bits, from ASCII 48 on: 5 bits of a number, lowest first, and one that says that more
    follow. Numbers are signed; from the fourth on they are the difference to the one two before.

    Raises:
        ValueError: a character that does not occur in such strings, or a number that does not end.
    """
    counts: list[int] = []
    number = groups = 0
    for position, character in enumerate(text):
        digit = ord(character) - 48
        if not 0 <= digit < 64 or groups == _MAX_GROUPS:
            raise ValueError(f"the compressed run lengths are broken at character {position}: {character!r}.")
        number += (digit % 32) << (5 * groups)
        groups += 1
        if digit >= 32:
            continue
        if digit >= 16:
            number -= 1 << (5 * groups)
        counts.append(number + (counts[-2] if len(counts) >= 3 else 0))
        number = groups = 0
    if groups:
        raise ValueError("the compressed run lengths end in the middle of a number.")
    return counts


def expand_run_lengths(counts: Any, height: int, width: int) -> np.ndarray:
    """bool [height, width] from the lengths of runs of 0 and 1 in turn, 0 first, down the columns.

    Raises:
        ValueError: no list of whole numbers from 0 on, or they do not add up to the picture's pixels.
    """
    if not isinstance(counts, Sequence) or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(
            f"the run lengths are {_shortened(counts)}, expected a list of whole numbers from 0 on."
        )
    if sum(counts) != height * width:
        raise ValueError(
            f"the run lengths add up to {sum(counts)} pixels, expected {height} x {width} = {height * width}."
        )
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def fill_polygon(polygon: Sequence[float], height: int, width: int) -> np.ndarray:
    """A polygon filled by the even-odd rule on COCO's grid, without `pycocotools`.

    A corner (x, y) lies x pixels from the picture's left edge, so that integer corners lie between pixels. They are
    rounded to 1/5 pixel; a pixel counts if the middle of its grid cells is inside. Where a sloped edge passes the
    middle of a column, the upper of the two neighbouring grid points counts.

    Args:
        polygon: x and y in turn, in pixels.

    Returns:
        bool [height, width].
    """
    half = POLYGON_SCALE / 2
    corners = np.trunc(POLYGON_SCALE * np.asarray(polygon, dtype=np.float64).reshape(-1, 2) + 0.5)
    following = np.roll(corners, -1, axis=0)
    is_leftward = (corners[:, 0] > following[:, 0])[:, None]
    left, right = np.where(is_leftward, following, corners), np.where(is_leftward, corners, following)

    # Columns whose middle an edge passes: from `first` up to, not including, `last`.
    first, last = (
        np.clip(np.ceil((ends[:, 0] - half) / POLYGON_SCALE), 0, width).astype(int) for ends in (left, right)
    )
    passed = last - first
    edge = np.repeat(np.arange(len(corners)), passed)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(passed) - passed, passed) + first[edge]
    run, rise = (right - left)[edge].T
    slope = rise / run
    crossing = left[edge, 1] + (POLYGON_SCALE * column + half - left[edge, 0]) * slope
    crossing = np.floor(crossing - np.minimum(np.abs(slope), 1) / 2 + 0.5)
    row = np.clip(np.ceil((crossing - half + 0.5) / POLYGON_SCALE), 0, height).astype(int)

    mask = np.zeros((height, width), dtype=bool)
    if len(edge):
        start, stop = column.min(), column.max() + 1
        toggles = np.zeros((height + 1, stop - start), dtype=bool)
        np.logical_xor.at(toggles, (row, column - start), True)
        mask[:, start:stop] = np.logical_xor.accumulate(toggles[:height], axis=0)
    return mask


def _draw_polygons(polygons: list, height: int, width: int) -> np.ndarray:
    checked = [_checked_polygon(polygon) for polygon in polygons]
    if not checked:
        raise ValueError("the segmentation has no polygons, expected at least one.")
    if _official is not None:
        return _official.decode(_official.merge(_official.frPyObjects(checked, height, width))).astype(bool)
    return np.logical_or.reduce([fill_polygon(polygon, height, width) for polygon in checked])


def _checked_polygon(polygon: Any) -> list[float]:
    if (
        not isinstance(polygon, list)
        or len(polygon) < 6
        or len(polygon) % 2
        # The comparison turns away NaN too.
        or any(type(value) not in (int, float) or not abs(value) <= MAX_COORDINATE for value in polygon)
    ):
        raise ValueError(
            f"a polygon is {_shortened(polygon)}, expected x and y in turn of at least 3 corners, numbers up to "
            f"{MAX_COORDINATE:,.0f} pixels."
        )
    return [float(value) for value in polygon]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
