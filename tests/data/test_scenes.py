"""Synthetic scenes: reproducible, with exact masks and correct texts."""

import pickle
import re
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgseg_hf.data.scenes import (
    COLORS,
    GROUNDS,
    MATERIALS,
    SHAPES,
    SPLITS,
    SceneObject,
    SceneOptions,
    SceneSource,
    _surface,
    is_novel,
)
from pgseg_hf.data.sources import SourceSpec, open_source
from pgseg_hf.images import load_image, load_label_map

SCENES = SceneSource(SceneOptions(length=200))


def as_arrays(record):
    return np.asarray(record.image), np.asarray(record.mask)


def is_same(one, other):
    images = all(np.array_equal(*pair) for pair in zip(as_arrays(one), as_arrays(other)))
    return images and (one.captions, one.tags) == (other.captions, other.tags)


def test_a_scene_is_the_same_for_its_seed_and_index():
    again = pickle.loads(pickle.dumps(SceneSource(SceneOptions(length=5))))
    assert is_same(again[3], SCENES[3])
    assert not is_same(SCENES[4], SCENES[3])
    assert not is_same(SceneSource(SceneOptions(seed=1))[3], SCENES[3])


def test_it_is_a_sequence_with_an_end():
    short = SceneSource(SceneOptions(length=3))
    assert len(short) == len(list(short)) == 3
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
    colored = SceneSource(SceneOptions(colored_labels=True, length=100))
    lengths = set()
    for index in range(100):
        record = colored[index]
        tags = record.tags
        for caption in record.captions:
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)
            words = re.findall(r"[a-z]+", caption)
            shapes = [word for word in words if word in SHAPES]
            assert all(any(tag.endswith(shape) for tag in tags) for shape in shapes)
            for first, second in pairwise(words):
                if first in COLORS:
                    assert f"{first} {second}" in tags
            for ground in set(words) & set(GROUNDS):
                assert ground in tags
            assert shapes or set(words) & set(GROUNDS)
            lengths.add(len(shapes))
        materials = {thing.material for thing in colored.scene(index).objects}
        named = {word for caption in record.captions for word in caption.split()} & set(MATERIALS)
        assert named <= materials
    assert lengths == {0, 1, 2, 3}


def test_pixels_of_an_object_have_its_colour():
    source = SceneSource(SceneOptions(colored_labels=True, max_objects=2, length=60))
    for record in source:
        pixels, mask = as_arrays(record)
        for value in np.unique(mask):
            label = source.labels[value]
            color = GROUNDS[label].color if label in GROUNDS else COLORS[label.split()[0]]
            # Light scales the colour by 0.5 to 1.4, the tint differs by at most 15, half of the pixels may be half as
            # bright, and half of a black object may be grey.
            brightest = np.array(color) * 1.4 + (90 if label.startswith("black") else 30)
            darkest = np.array(color) * (0.5 if label in GROUNDS else 0.37) - 25
            assert (pixels[mask == value].mean(0) <= np.minimum(brightest, 256)).all()
            assert (pixels[mask == value].mean(0) >= darkest).all()


@pytest.mark.parametrize("color", ["red", "white", "black"])
@pytest.mark.parametrize("size", [64, 256])
def test_materials_have_two_tones_in_their_pattern(color, size):
    """On a large square: the share of the second tone, and how often the tone changes across it."""
    shares, changes = {}, {}
    for material in MATERIALS:
        rng = np.random.default_rng(3)
        thing = SceneObject(color, material, "square", 0.25)
        region = np.ones((size, size), dtype=bool)
        gray = _surface(thing, region, rng).mean(1).reshape(size, size)
        is_dark = gray < (gray.max() + gray.min()) / 2 if material != "plain" else np.zeros_like(region)
        shares[material] = (~is_dark if color == "black" and material != "plain" else is_dark).mean()
        changes[material] = sum((each[1:] != each[:-1]).sum(0).mean() for each in (is_dark, is_dark.T))
        if material == "plain":
            assert gray.std() < 10
    assert shares["plain"] == 0 and shares["dotted"] == pytest.approx(0.28, abs=0.05)
    assert shares["striped"] == pytest.approx(0.5, abs=0.05) == shares["checked"]
    # A period is 0.6 of the radius or 0.15 of the side. Along both sides together there are 6.7 to 6.7 * 2**.5 periods
    # of stripes, each with two changes.
    assert 13 <= changes["striped"] <= 19 and 20 < changes["checked"] < 38 and 10 < changes["dotted"] < 20


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
    small, large = areas.values()
    assert min(len(small), len(large)) > 20
    assert max(small) < np.mean(large) and np.mean(small) < min(large)


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


# Splits


def test_a_fifth_of_the_pairs_is_novel_and_no_word_is():
    pairs = {
        "color": {(c, s) for c, s in product(COLORS, SHAPES) if all(is_novel(c, m, s) for m in MATERIALS)},
        "material": {(m, s) for m, s in product(MATERIALS, SHAPES) if all(is_novel(c, m, s) for c in COLORS)},
    }
    assert len(pairs["color"]) == 14 == len(COLORS) * len(SHAPES) / 5
    assert len(pairs["material"]) == 5
    for color, material, shape in product(COLORS, MATERIALS, SHAPES):
        expected = (color, shape) in pairs["color"] or (material, shape) in pairs["material"]
        assert is_novel(color, material, shape) == expected
    known = [kind for kind in product(COLORS, MATERIALS, SHAPES) if not is_novel(*kind)]
    assert [set(words) for words in zip(*known)] == [set(COLORS), set(MATERIALS), set(SHAPES)]
    assert ("red", "plain", "circle") not in known  # must not change, because published results depend on it


@pytest.mark.parametrize(
    ("split", "novel"), [("all", {True, False}), ("train", {False}), ("test", {False}), ("novel", {True})]
)
def test_splits_draw_novel_combinations_or_not(split, novel):
    source = SceneSource(SceneOptions(split=split, length=100, max_objects=5, num_captions=0))
    things = [thing for index in range(100) for thing in source.scene(index).objects]
    assert {is_novel(thing.color, thing.material, thing.shape) for thing in things} == novel
    assert {thing.shape for thing in things} == set(SHAPES) and {t.color for t in things} == set(COLORS)


def test_no_scene_is_in_two_splits():
    images = [
        record.image.tobytes()
        for split in SPLITS
        for record in SceneSource(SceneOptions(split=split, length=60, size=32))
    ]
    assert len(set(images)) == len(images) == 60 * len(SPLITS)


# Descriptions


def test_a_scene_is_described_in_full_and_agrees_with_its_record():
    source = SceneSource(SceneOptions(length=60))
    for index in range(60):
        scene, text = source.scene(index), source.describe(index)
        words = text.replace(",", "").split()
        things = [(thing.material, thing.color, thing.shape) for thing in scene.objects]
        at = [number for number, word in enumerate(words) if word in SHAPES]
        assert [tuple(words[number - 2 : number + 1]) for number in at] == things
        assert text.endswith(f" on {scene.ground}")
        for thing, size in zip(scene.objects, [words[number - 3] for number in at]):
            expected = "small" if thing.radius < 0.14 else "large" if thing.radius > 0.22 else None
            assert size == expected or (expected is None and size in ("a", "an"))
        pixels, mask = as_arrays(source[index])
        assert np.array_equal(scene.pixels, pixels)
        names = {-1: scene.ground, **{number: thing.shape for number, thing in enumerate(scene.objects)}}
        for owner, name in names.items():
            assert (mask[scene.owners == owner] == source.labels.index(name)).all()


# Options


def test_kept_scenes_are_made_once_and_tags_and_captions_may_be_left_out():
    kept, made = (SceneSource(SceneOptions(length=3, keep=keep)) for keep in (True, False))
    assert kept[2] is kept[2] and made[2] is not made[2]
    assert is_same(kept[2], made[2])
    bare = SceneSource(SceneOptions(with_tags=False, num_captions=0))[0]
    assert (bare.tags, bare.captions) == ([], [])


def test_options_in_the_path_of_a_source():
    assert SceneOptions.parse("") == SceneOptions()
    expected = SceneOptions(split="novel", size=96, length=20, keep=True, with_tags=False)
    assert SceneOptions.parse("novel,size=96,length=20,keep=1,with_tags=0") == expected
    source = open_source(SourceSpec("synthetic:train,size=32,length=7"))
    assert isinstance(source, SceneSource) and len(source) == 7
    assert source.options.split == "train" and source[0].image.size == (32, 32)
    assert open_source(SourceSpec("synthetic")).options == SceneOptions()


@pytest.mark.parametrize(
    "part", ["training", "sides=3", "size=big", "size", "split=train", "size=-5", "train=1"]
)
def test_options_in_a_path_that_make_no_sense(part):
    with pytest.raises(ValueError, match=f"option '{part}'"):
        SceneOptions.parse(f"length=5,{part}")


@pytest.mark.parametrize(
    "options",
    [{"size": 8}, {"length": 0}, {"max_objects": 0}, {"num_captions": -1}, {"seed": -1}, {"split": "val"}],
)
def test_options_that_make_no_sense(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        SceneOptions(**options)
