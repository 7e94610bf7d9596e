"""Decoding of polygons and run lengths in COCO's formats."""

import sys

import numpy as np
import pytest
from benchmark_layouts import BLOCK_COUNTS, BLOCK_POLYGON, BLOCK_STRING, HEIGHT, WIDTH, box_polygon
from pycocotools import mask as official

from pgseg_hf.evaluation.benchmarks.coco_masks import decode_segmentation, decompress_run_lengths

BLOCK = np.zeros((HEIGHT, WIDTH), dtype=bool)
BLOCK[1:3, 1:3] = True


@pytest.mark.parametrize("segmentation", [BLOCK_POLYGON, BLOCK_COUNTS, BLOCK_STRING])
def test_the_same_block_in_every_encoding(segmentation):
    mask = decode_segmentation(segmentation, HEIGHT, WIDTH)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, BLOCK)


def test_polygons_are_united():
    assert (
        decode_segmentation(box_polygon(0, 0, 2, 2) + box_polygon(1, 1, 4, 3), HEIGHT, WIDTH).sum()
        == 4 + 6 - 1
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("`0", [16]),  # bit 4 alone would mean a negative number
        ("T3X13oN", [100, 40, 3, 7]),  # the last number is 7 - 40 = -33, in two characters
    ],
)
def test_compressed_numbers(text, expected):
    assert decompress_run_lengths(text) == expected


def test_compressed_run_lengths_of_pycocotools():
    random = np.random.default_rng(0)
    for share in (0.01, 0.5, 0.99) * 7:
        mask = random.random(random.integers(1, 90, size=2)) < share
        encoded = official.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": list(mask.shape), "counts": encoded["counts"].decode()}
        np.testing.assert_array_equal(decode_segmentation(segmentation, *mask.shape), mask)


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        (None, "None, expected a list of polygons"),
        ([], "a polygon is None"),
        ([[1, 1, 3, 1]], "at least 3 corners"),
        ([[1, 1, 3, 1, 3, 3, 1]], "at least 3 corners"),
        ([[1, 1, 3, 1, 3, float("nan")]], "nan"),
        ([[1, 1, 3, 1, 3, 1e9]], "100,000"),
        ([[1, 1, 3, 1, 3, "4"]], "'4'"),
        ([1, 1, 3, 1, 3, 3], "a polygon is 1"),
        ({"size": [5, 4], "counts": [20]}, r"image's size \[4, 5\]"),
        ({"size": [4, 5], "counts": [5, 2]}, "add up to 7 pixels, expected 4 x 5 = 20"),
        ({"size": [4, 5], "counts": [25, -5]}, "run lengths are"),
        ({"size": [4, 5], "counts": [20.0]}, "run lengths are"),
        ({"size": [4, 5]}, "None"),
        # Strings that pycocotools reads beyond the end, or accepts.
        *(({"size": [4, 5], "counts": text}, text) for text in ("5z", "5/", "5é", "T", "oooooooo0")),
    ],
)
def test_segmentations_that_make_no_sense(segmentation, words):
    with pytest.raises(ValueError, match=words):
        decode_segmentation(segmentation, HEIGHT, WIDTH)


def test_without_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    decode_segmentation(BLOCK_STRING, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"pycocotools .*pgseg-hf\[formats\]"):
        decode_segmentation(BLOCK_POLYGON, HEIGHT, WIDTH)
