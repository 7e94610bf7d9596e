"""Numbers and lists of NumPy, pandas, `datasets` and torch work like Python's own."""

from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch
from tiny_models import make_photo

from pgseg_hf import PGSegProcessor, SegmentationOptions, load_segmenter
from pgseg_hf.data.sources import SourceSpec
from pgseg_hf.images import load_label_map
from pgseg_hf.prompts import validate_labels, validate_templates
from pgseg_hf.values import are_images, is_list, is_whole, share

WORDS = ["cat", "{} and"]
LISTS = {
    "tuple": tuple,
    "array": np.array,
    "object array": lambda words: np.array(words, dtype=object),
    "series": pandas.Series,
    "index": pandas.Index,
    "column": lambda words: datasets.Dataset.from_dict({"words": words})["words"],
    "NumPy strings": lambda words: [np.str_(word) for word in words],
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists(kind):
    words = LISTS[kind](WORDS)
    assert is_list(words)
    assert validate_labels(words) == WORDS
    assert validate_templates(words[1:]) == WORDS[1:]
    assert {type(word) for word in validate_labels(words)} == {str}


@pytest.mark.parametrize(
    "value", ["cat", b"cat", {"cat": 1}, {"cat"}, iter(["cat"]), np.array("cat"), None, 3]
)
def test_what_is_no_list(value):
    assert not is_list(value)


def test_numbers():
    for value in (np.int64(32), np.uint8(32), np.array(32), torch.tensor(32)):
        options = SegmentationOptions(window_size=value, batch_size=value)
        assert (options.window_size, options.batch_size) == (32, 32) and type(options.window_size) is int
    for value in (np.float64(0.5), np.float32(0.5), torch.tensor(0.5)):
        options = SegmentationOptions(background_threshold=value, patch_weight=value)
        assert options == SegmentationOptions(background_threshold=0.5, patch_weight=0.5)
        assert type(options.background_threshold) is float


@pytest.mark.parametrize("value", [True, np.True_, np.array(True), torch.tensor(True)])
def test_true_is_no_number(value):
    for name in ("window_size", "patch_weight"):
        with pytest.raises(ValueError, match=rf"{name} is .*, expected"):
            SegmentationOptions(**{name: value})
    assert not is_whole(value)


@pytest.mark.parametrize("value", [float("nan"), "0.5", 2, -1, None, np.array([0.5, 0.5])])
def test_what_is_no_share(value):
    with pytest.raises(ValueError, match=r"weight is .* expected a number from 0 to 1"):
        share(value, "weight")


def test_processor_options_are_pythons_own(tiny_segmenter, tmp_path):
    parts = (tiny_segmenter.processor.image_processor, tiny_segmenter.processor.tokenizer)
    processor = PGSegProcessor(
        *parts, top_k=np.int64(3), window_size=np.int32(64), window_stride=np.uint8(32)
    )
    processor.save_pretrained(tmp_path)
    assert PGSegProcessor.from_pretrained(tmp_path).top_k == 3
    with pytest.raises(ValueError, match="top_k is True"):
        PGSegProcessor(*parts, top_k=True)


def test_images_and_labels_of_any_library(tiny_folder, tmp_path):
    photos = [make_photo(40, 30, seed=seed) for seed in range(2)]
    for number, photo in enumerate(photos):
        photo.save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    column = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())["image"]
    segmenter = load_segmenter(Path(tiny_folder))
    expected = [result.label_map.tolist() for result in segmenter(photos, ["cat", "dog"])]
    for images in (column, pandas.Series(paths), np.array(paths), [Path(path) for path in paths]):
        found = segmenter(images, np.array(["cat", "dog"]))
        assert [result.label_map.tolist() for result in found] == expected
        pixels = segmenter.processor(images=images, return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, segmenter.processor(images=photos, return_tensors="pt")["pixel_values"])
    assert segmenter(np.asarray(photos[0]), ("cat", "dog")).label_map.tolist() == expected[0]


def test_captions_and_tags_of_any_library(tiny_segmenter):
    processor = tiny_segmenter.processor
    expected = processor(text=["a cat", "a dog"], tags=[["cat"], []])
    for make in LISTS.values():
        found = processor(text=make(["a cat", "a dog"]), tags=[make(["cat"]), np.array([])])
        assert dict(found) == dict(expected)


def test_one_image_or_several():
    assert not are_images(np.zeros((2, 2, 3), np.uint8))
    assert not are_images(torch.zeros(3, 2, 2))
    assert are_images(np.array(["a.png", "b.png"]))
    assert load_label_map(torch.tensor([[0, 1]])).tolist() == [[0, 1]]


def test_paths_of_sources(tmp_path):
    assert SourceSpec(tmp_path).path == str(tmp_path)
