"""`Preparation`: errors for broken records, and the tags of crops read from masks."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import make_photo

from pgseg_hf.data.augmentation import AugmentationOptions
from pgseg_hf.data.records import Record, UnusableRecord
from pgseg_hf.training.batches.preparation import CROP_TRIES, Example, Preparation
from pgseg_hf.training.batches.texts import TextOptions

SEEDS = st.integers(0, 2**31 - 1)
SMALL = AugmentationOptions(image_size=16)
PLAIN = TextOptions(templates=["{}"], label_templates=["{}"])
# Each pixel of the image becomes one pixel of the crop, so that shares can be counted.
WHOLE = AugmentationOptions(image_size=20, min_scale=1.0, min_ratio=1.0, max_ratio=1.0)


def prepare(record, seed=0, augmentation=SMALL, **kwargs):
    return Preparation(augmentation, **kwargs)(record, np.random.default_rng(seed))


def reason_of(record, **kwargs):
    with pytest.raises(UnusableRecord) as caught:
        prepare(record, **kwargs)
    return caught.value.reason, str(caught.value)


def mask_of(**pixels):
    """A 20 x 20 mask with `v0` pixels of the value 0, then `v1` pixels of the value 1, and so on; the rest is 255."""
    values = np.full(400, 255)
    start = 0
    for name, count in pixels.items():
        values[start : start + count] = int(name[1:])
        start += count
    return Image.fromarray(values.reshape(20, 20).astype(np.uint8))


def tags_of_whole(mask, seed=0, labels=("sky", "road", ""), **kwargs):
    record = Record(Image.new("RGB", (20, 20)), tags=["of the photo"], mask=mask)
    return sorted(prepare(record, seed, WHOLE, texts=PLAIN, mask_labels=labels, **kwargs).labels)


def test_an_example_of_a_file(photo_file):
    example = prepare(Record(photo_file, captions=["a box"], tags=["box", "noise"]))
    assert isinstance(example, Example)
    assert example.pixel_values.shape == (3, 16, 16) and example.pixel_values.dtype == np.float32
    assert example.caption == "a box"
    assert sorted(example.labels) == ["a photo of a box.", "a photo of a noise."]


def test_repeats_with_the_generator_in_every_process(photo_file):
    preparation = Preparation(SMALL, PLAIN)
    copy = pickle.loads(pickle.dumps(preparation))
    record = Record(photo_file, tags=list("abcdef"))
    first, again, other = (
        which(record, np.random.default_rng(seed)) for which, seed in ((preparation, 1), (copy, 1), (copy, 2))
    )
    assert (first.caption, first.labels) == (again.caption, again.labels)
    assert np.array_equal(first.pixel_values, again.pixel_values)
    assert not np.array_equal(first.pixel_values, other.pixel_values)


@pytest.mark.parametrize("content", [b"", b"no image", None, "truncated"])
def test_a_broken_image_is_unusable(content, tmp_path):
    path = tmp_path / "broken.jpg"
    if content == "truncated":
        make_photo(200, 200).save(path)
        content = path.read_bytes()[:2000]
    if content is not None:
        path.write_bytes(content)
    reason, message = reason_of(Record(str(path), captions=["a dog"], name="line 3"))
    assert reason == "broken image"
    assert message.startswith("line 3: ") and "broken.jpg" in message


# Tags of crops


def test_labels_count_above_their_share_of_the_crop():
    # 2 % of 400 pixels is 8.
    assert tags_of_whole(mask_of(v0=9, v1=8)) == ["sky"]
    assert tags_of_whole(mask_of(v0=9, v1=9)) == ["road", "sky"]
    assert tags_of_whole(mask_of(v0=9, v1=9, v2=300)) == ["road", "sky"]  # value 2 has no name
    assert tags_of_whole(mask_of(v0=100, v1=101), crop_tag_share=0.25) == ["road"]


def test_without_names_for_its_values_a_mask_is_not_looked_at():
    assert tags_of_whole("no such file.png", labels=None) == ["of the photo"]


@given(SEEDS)
def test_tags_are_those_of_the_very_crop(seed):
    labels = np.repeat(np.arange(4, dtype=np.uint8), 20)[None].repeat(60, axis=0)
    image = Image.fromarray((labels * 60)[:, :, None].repeat(3, axis=2))
    record = Record(image, mask=Image.fromarray(labels))
    raw = AugmentationOptions(
        image_size=32, interpolation="nearest", image_mean=(0, 0, 0), image_std=(1 / 255,) * 3
    )
    example = prepare(record, seed, raw, texts=PLAIN, mask_labels=["0", "1", "2", "3"])
    values, counts = np.unique(np.rint(example.pixel_values[0] / 60), return_counts=True)
    assert sorted(example.labels) == [str(int(v)) for v, n in zip(values, counts) if n > 0.02 * 32 * 32]


def test_a_crop_without_a_label_is_drawn_again():
    values = np.zeros((100, 100), dtype=np.uint8)
    values[:50] = 1
    record = Record(make_photo(100, 100), mask=Image.fromarray(values))
    crops = AugmentationOptions(image_size=16, crop_sides=(20, 24), short_side=100)
    used = sum(
        prepare(record, seed, crops, texts=PLAIN, mask_labels=["", "sky"]).labels == ["sky"]
        for seed in range(30)
    )
    assert used == 30  # a single try would succeed for about half of them


def test_where_no_crop_has_a_label_there_is_no_text(monkeypatch):
    record = Record(make_photo(20, 20), tags=["of the photo"], mask=mask_of(v0=4))
    tries = []
    monkeypatch.setattr(Preparation, "_tags", lambda self, labels: tries.append(1) or [])
    assert reason_of(record, mask_labels=["sky"])[0] == "no text"
    assert len(tries) == CROP_TRIES
    example = prepare(Record(make_photo(20, 20), captions=["sky"], mask=mask_of(v0=4)), mask_labels=["sky"])
    assert (example.caption, example.labels) == ("sky", [])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (20, 10)), "20 x 10 pixels"),
        (Image.new("RGB", (20, 20)), r"the shape \(20, 20, 3\)"),
        (Image.new("F", (20, 20)), "type float32"),
        (np.full((20, 20), 300), "values from 300 to 300"),
        (np.full((20, 20), 7), "value 7, .*mask_labels names 2 values"),
        (b"no mask", "mask .*expected one of PNG"),
        ("no such file.png", "no such file.png"),
    ],
)
def test_a_broken_mask_is_unusable(mask, message):
    record = Record(Image.new("RGB", (20, 20)), captions=["a dog"], mask=mask, name="line 3")
    with pytest.raises(UnusableRecord, match=message) as caught:
        prepare(record, augmentation=WHOLE, mask_labels=["sky", "road"])
    assert caught.value.reason == "broken mask" and str(caught.value).startswith("line 3: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_tag_share": 1.0}, r"crop_tag_share is 1\.0"),
        ({"mask_labels": [str(i) for i in range(256)]}, "mask_labels has 256 names"),
        ({"patch_stride": 0}, "patch_stride is 0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Preparation(**settings)


def test_a_noun_model_that_is_missing_is_noticed_at_once():
    pytest.importorskip("spacy")
    with pytest.raises(ValueError, match="en_none_sm"):
        Preparation(texts=TextOptions(num_nouns=1, noun_model="en_none_sm"))
