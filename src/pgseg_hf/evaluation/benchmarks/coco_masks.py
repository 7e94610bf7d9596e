"""Decodes masks in COCO's annotation formats: polygons and run lengths, plain or compressed.

Polygons are drawn by pycocotools (`pgseg-hf[formats]`). Run lengths are decoded here, because pycocotools reads past
the end of a broken string and leaves pixels undefined that no run covers.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_COORDINATE = 100_000.0
"""Largest accepted polygon coordinate in pixels; larger values cannot belong to an image."""


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Decodes the mask of a `segmentation` entry in COCO's format.

    Args:
        segmentation: polygons `[[x, y, x, y, ...], ...]` in pixels, whose union is the mask, or run lengths
            `{"size": [height, width], "counts": ...}` with a list of counts or COCO's compressed string.
        height, width: size of the image in pixels.

    Returns:
        bool [height, width].

    Raises:
        ValueError: the entry has another format or does not match the image, or pycocotools is missing.
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
            f"the run lengths are {_shortened(counts)}, expected a list of non-negative integers."
        )
    if sum(counts) != height * width:
        raise ValueError(
            f"the run lengths add up to {sum(counts)} pixels, expected {height} x {width} = {height * width}."
        )
    # Runs of 0 and 1 alternate, starting with 0, in column-major order.
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def decompress_run_lengths(text: str) -> list[int]:
    """Decodes the run lengths of COCO's compressed string.

    Each character, counted from ASCII 48, encodes 5 bits of a number, lowest first, and a continuation bit. Numbers are
    signed. From the fourth on, they are stored as the difference from the number two places before.

    Raises:
        ValueError: the string has an invalid character or ends within a number.
    """
    if not re.fullmatch("([P-o]{0,6}[0-O])*", text):
        raise ValueError(f"the compressed run lengths are {_shortened(text)}, expected COCO's format.")
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
            # `not <=` also rejects NaN.
            or any(type(value) not in (int, float) or not abs(value) <= MAX_COORDINATE for value in polygon)
        ):
            raise ValueError(
                f"a polygon is {_shortened(polygon)}, expected alternating x and y of at least 3 corners, up to "
                f"{MAX_COORDINATE:,.0f} pixels each."
            )
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ValueError("pycocotools is not installed; run pip install 'pgseg-hf[formats]'.") from error
    return mask.decode(mask.merge(mask.frPyObjects(polygons, height, width))).astype(bool)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
