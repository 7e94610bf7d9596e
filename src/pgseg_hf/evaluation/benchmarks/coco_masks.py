"""Masks from the ways that COCO's annotations store them: polygons and run lengths, plain or compressed.

Polygons are drawn by pycocotools, of `pgseg-hf[formats]`. Run lengths are read here: pycocotools reads past the end of
a broken string, and leaves pixels undefined that no run covers.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_COORDINATE = 100_000.0
"""Largest polygon coordinate that is read, in pixels; anything beyond is no annotation of an image."""


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask of a `segmentation` entry in COCO's format.

    Args:
        segmentation: polygons `[[x, y, x, y, ...], ...]` in pixels, of which the union counts, or run lengths
            `{"size": [height, width], "counts": ...}` with a list of counts or COCO's compressed string.
        height, width: pixels of the image.

    Returns:
        bool [height, width].

    Raises:
        ValueError: it is none of these, or does not fit the image, or pycocotools is missing.
    """
    if isinstance(segmentation, list):
        return _draw_polygons(segmentation, height, width)
    if not isinstance(segmentation, Mapping) or segmentation.get("size") != [height, width]:
        raise ValueError(
            f"the segmentation is {_shortened(segmentation)}, expected a list of polygons, or run lengths with the "
            f"image's size [{height}, {width}] and counts."
        )
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = decompress_run_lengths(counts)
    if not isinstance(counts, list) or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(
            f"the run lengths are {_shortened(counts)}, expected a list of whole numbers from 0 on."
        )
    if sum(counts) != height * width:
        raise ValueError(
            f"the run lengths add up to {sum(counts)} pixels, expected {height} x {width} = {height * width}."
        )
    # Runs of 0 and 1 in turn, 0 first, down the columns.
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def decompress_run_lengths(text: str) -> list[int]:
    """The run lengths of COCO's compressed string.

    Every character stands for 6 bits, from ASCII 48 on: 5 bits of a number, lowest first, and one that says that more
    follow. Numbers are signed; from the fourth on they are the difference to the one two before.

    Raises:
        ValueError: a character that does not occur in such strings, or a number that does not end.
    """
    if not re.fullmatch("([P-o]{0,6}[0-O])*", text):
        raise ValueError(f"the compressed run lengths are {_shortened(text)}, which is no string of COCO's.")
    counts: list[int] = []
    for characters in re.findall("[P-o]*[0-O]", text):
        digits = [ord(character) - 48 for character in characters]
        number = sum((digit % 32) << (5 * place) for place, digit in enumerate(digits))
        if digits[-1] >= 16:
            number -= 1 << (5 * len(digits))
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
    return counts


def _draw_polygons(polygons: list, height: int, width: int) -> np.ndarray:
    for polygon in polygons or [None]:
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
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ValueError("pycocotools is not installed, expected pip install 'pgseg-hf[formats]'.") from error
    return mask.decode(mask.merge(mask.frPyObjects(polygons, height, width))).astype(bool)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
