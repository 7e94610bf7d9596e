"""Synthetic scenes: always the same, their masks exact, their words true."""

import pickle
import re
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgseg_hf.data.scenes import COLORS, GROUNDS, SHAPES, SceneOptions, SceneSource
from pgseg_hf.images import load_image, load_label_map

SCENES = SceneSource(SceneOptions(length=200))


def as_arrays(record):
    return np.asarray(record.image), np.asarray(record.mask)


def is_same(one, other):
    pictures = all(np.array_equal(*pair) for pair in zip(as_arrays(one), as_arrays(other)))
    return pictures and (one.captions, one.tags) == (other.captions, other.tags)


def test_a_scene_is_the_same_for_its_seed_and_index():
    again = pickle.loads(pickle.dumps(SceneSource(SceneOptions(length=5))))
    assert is_same(again[3], SCENES[3])
    assert not is_same(SCENES[4], SCENES[3])
    assert not is_same(SceneSource(SceneOptions(seed=1))[3], SCENES[3])


def test_it_is_a_sequence_with_an_end():
    short = SceneSource(SceneOptions(length=3))
    assert len(short) == 3 and len(list(short)) == 3
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"scene {index} of 3"):
            short[index]


@given(st.integers(0, 199), st.sampled_from([16, 33, 64, 224]), st.integers(1, 5), st.booleans())
def test_records_are_whole(index, size, most, colored):
    source = SceneSource(SceneOptions(size=size, max_objects=most, colored_labels=colored, length=200))
    record = source[index]
    assert load_image(record.image) is record.image and record.image.size == (size, size)
    mask = load_label_map(record.mask)
    assert mask.shape == (size, size)
    assert {source.labels[value] for value in np.unique(mask)} == set(record.tags)
    assert len(set(record.tags)) == len(record.tags) <= 1 + most
    assert sum(tag in GROUNDS for tag in record.tags) <= 1
    assert len(record.captions) == 3 and all(record.captions)


def test_labels_name_shapes_and_grounds_or_coloured_shapes():
    assert SCENES.labels == [*GROUNDS, *SHAPES]
    colored = SceneSource(SceneOptions(colored_labels=True))
    assert len(colored.labels) == len(set(colored.labels)) == len(GROUNDS) + len(SHAPES) * len(COLORS) < 255
    tags = {tag for index in range(100) for tag in colored[index].tags}
    assert any(tag == "red circle" for tag in colored.labels) and tags <= set(colored.labels)


def test_captions_tell_the_truth_and_not_always_all_of_it():
    colored = SceneSource(SceneOptions(colored_labels=True, length=300))
    lengths = set()
    for index in range(300):
        record = colored[index]
        tags = record.tags
        for caption in record.captions:
            words = re.findall(r"[a-z]+", caption)
            shapes = [word for word in words if word in SHAPES]
            assert shapes and all(any(tag.endswith(shape) for tag in tags) for shape in shapes)
            for first, second in pairwise(words):
                if first in COLORS:
                    assert f"{first} {second}" in tags
            for ground in set(words) & set(GROUNDS):
                assert ground in tags
            lengths.add(len(shapes))
    assert lengths == {1, 2, 3}


def test_articles():
    captions = " ".join(caption for index in range(200) for caption in SCENES[index].captions)
    assert "an orange" in captions and "a orange" not in captions and not re.search(r"\ban [^o]", captions)


def test_pixels_of_an_object_have_its_colour():
    source = SceneSource(SceneOptions(colored_labels=True, max_objects=2, length=150))
    for record in source:
        pixels, mask = as_arrays(record)
        for value in np.unique(mask):
            label = source.labels[value]
            color = GROUNDS[label].color if label in GROUNDS else COLORS[label.split()[0]]
            # Light scales the colour by .5 to 1.4 and its tint differs by 15 at most.
            brightest = np.array(color) * 1.4 + 30
            assert (pixels[mask == value].mean(0) <= np.minimum(brightest, 256)).all()
            assert (pixels[mask == value].mean(0) >= np.array(color) * 0.5 - 25).all()


def test_masks_have_sharp_edges_where_the_picture_has_them():
    """A white object on dark ground: brightness alone gives the mask back."""
    source = SceneSource(SceneOptions(colored_labels=True, max_objects=1, length=600))
    agreement = []
    for record in source:
        if any(tag.startswith("white") for tag in record.tags) and "asphalt" in record.tags:
            pixels, mask = as_arrays(record)
            is_object = mask != source.labels.index("asphalt")
            bright = pixels.mean(2) > (pixels[is_object].mean() + pixels[~is_object].mean()) / 2
            agreement.append((bright == is_object).mean())
    assert len(agreement) >= 3 and min(agreement) > 0.99


def test_every_label_occurs_and_objects_overlap_but_stay_visible():
    tags = {tag for record in SCENES for tag in record.tags}
    assert tags == set(SCENES.labels)
    single = SceneSource(SceneOptions(size=128, max_objects=1, length=100))
    shares = [1 - np.bincount(as_arrays(record)[1].ravel()).max() / 128**2 for record in single]
    assert 0 < min(shares) < 0.05 < 0.1 < max(shares) < 0.5


def test_small_and_large_are_said_of_small_and_large_objects():
    areas = {"small": [], "large": []}
    for record in SceneSource(SceneOptions(max_objects=1, num_captions=6, length=150)):
        area = (as_arrays(record)[1] >= len(GROUNDS)).sum()
        for size, of_size in areas.items():
            of_size += [area] * any(size in caption for caption in record.captions)
    assert min(map(len, areas.values())) > 20
    assert np.max(areas["small"]) < np.mean(areas["large"]) and np.mean(areas["small"]) < np.min(
        areas["large"]
    )


def test_rings_have_a_hole():
    rings = 0
    for record in SceneSource(SceneOptions(max_objects=1, length=100)):
        if "ring" in record.tags:
            is_ring = as_arrays(record)[1] == SCENES.labels.index("ring")
            row, column = np.argwhere(is_ring).mean(0).round().astype(int)
            assert not is_ring[row, column]
            rings += 1
    assert rings > 5


def test_shapes_fit_into_the_unit_circle():
    for name, shape in SHAPES.items():
        radius = np.linalg.norm(shape.outline, axis=1).max()
        assert 0.8 < radius <= 1.0 + 1e-9, name


def test_hundreds_a_second():
    start = time.process_time()
    for index in range(50):
        SCENES[index]
    assert time.process_time() - start < 50 / 100


@pytest.mark.parametrize(
    "options", [{"size": 8}, {"length": 0}, {"max_objects": 0}, {"num_captions": -1}, {"seed": -1}]
)
def test_options_that_make_no_sense(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, expected at least"):
        SceneOptions(**options)
