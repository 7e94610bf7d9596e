"""Random crops: inside the image, within their limits, uniformly distributed, and equal for image and mask."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import make_photo

from pgseg_hf import PGSegImageProcessorPil
from pgseg_hf.data.augmentation import (
    Augmentation,
    AugmentationOptions,
    random_resized_box,
    random_square_box,
)

SEEDS = st.integers(0, 2**31 - 1)
# From single pixels to stripes too narrow for a usual crop.
SIDES = st.one_of(st.integers(1, 12), st.integers(1, 3000))
PAPER = ((0.08, 1.0), (3 / 4, 4 / 3))
WHOLE = {"min_scale": 1.0, "horizontal_flip": 0.0}


def augment(image, seed=0, mask=None, **options):
    augmentation = pickle.loads(pickle.dumps(Augmentation(AugmentationOptions(**options))))
    rng = np.random.default_rng(seed)
    crop = augmentation.draw_crop(image.size, rng)
    labels = None if mask is None else augmentation.crop_mask(mask, crop)
    return augmentation.crop_pixels(image, crop, rng), labels


def is_within_rounding(width, height, ratio):
    """Whether sides, before rounding to pixels, can have had an aspect ratio within `ratio`."""
    return (width + 0.5) / (height - 0.5) >= ratio[0] and (width - 0.5) / (height + 0.5) <= ratio[1]


@given(SEEDS, SIDES, SIDES)
def test_boxes_lie_inside_with_their_shape(seed, width, height):
    left, top, right, bottom = random_resized_box((width, height), *PAPER, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert is_within_rounding(right - left, bottom - top, PAPER[1])


@given(SEEDS, st.integers(20, 500), st.floats(0.5, 2), st.floats(0.1, 1), st.floats(0.1, 1))
def test_boxes_have_their_share_of_the_area(seed, height, shape, one, other):
    width, scale = round(height * shape), (min(one, other), max(one, other))
    left, top, right, bottom = random_resized_box((width, height), scale, (1, 1), np.random.default_rng(seed))
    side = right - left
    assume(side < min(width, height))  # otherwise the box may be the centred one
    assert side == bottom - top
    assert (side - 0.5) ** 2 <= scale[1] * width * height and (side + 0.5) ** 2 >= scale[0] * width * height


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 10), (43, 0, 56, 10)),  # 13 = 10 * 4 / 3 wide
        ((10, 100), (0, 43, 10, 56)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_where_no_box_fits_the_largest_centred_one_is_taken(size, box):
    assert random_resized_box(size, (1.0, 1.0), PAPER[1], np.random.default_rng(0)) == box


def test_scale_and_shape_are_drawn_evenly():
    rng = np.random.default_rng(0)
    # The boxes always fit, and the image is so large that rounding does not matter.
    boxes = np.array([random_resized_box((4000, 4000), (0.1, 0.5), (0.5, 2), rng) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    draws = {
        "scale": (width * height / 4000**2 - 0.1) / 0.4,
        "shape": np.log(width / height) / np.log(4) + 0.5,
        "left": boxes[:, 0] / (4000 - width),
        "top": boxes[:, 1] / (4000 - height),
    }
    for name, values in draws.items():
        # Kolmogorov-Smirnov test at the 1 % level.
        distance = np.abs(np.sort(values) - (np.arange(4000) + 0.5) / 4000).max()
        assert distance < 1.63 / math.sqrt(4000), name


@given(SEEDS, SIDES, SIDES)
def test_square_boxes_lie_inside(seed, width, height):
    left, top, right, bottom = random_square_box((width, height), (24, 96), 192, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    short = min(width, height)
    assert right - left == pytest.approx(bottom - top, abs=1e-6)
    assert min(max(1, short / 8), short) - 1e-6 <= right - left <= max(1, short / 2) + 1e-6


def test_sides_of_square_boxes_are_drawn_evenly_in_pixels_of_the_scaled_photo():
    rng = np.random.default_rng(0)
    boxes = np.array([random_square_box((640, 480), (24, 96), 192, rng) for _ in range(4000)])
    sides = np.sort((boxes[:, 2] - boxes[:, 0]) * 192 / 480)
    expected = 24 + 72 * (np.arange(4000) + 0.5) / 4000
    assert np.abs(sides - expected).max() < 72 * 1.63 / math.sqrt(4000)


@given(SEEDS, SIDES, SIDES, st.booleans())
def test_any_image_gives_finite_pixels_of_the_size_asked_for(seed, width, height, squares):
    assume(width * height < 200_000)
    options = {"crop_sides": (24, 96)} if squares else {}
    image, mask = Image.new("RGB", (width, height), "red"), Image.new("L", (width, height), 7)
    pixels, mask = augment(image, seed, mask, image_size=8, **options)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.float32 and pixels.flags["C_CONTIGUOUS"]
    assert mask.shape == (8, 8) and (mask == 7).all()
    red = (np.array([1, 0, 0]) - AugmentationOptions().image_mean) / AugmentationOptions().image_std
    assert np.allclose(pixels, red[:, None, None], atol=1e-5)


@given(SEEDS, st.booleans(), st.sampled_from([0.0, 1.0]))
def test_image_and_mask_get_the_same_crop(seed, squares, flip):
    labels = np.random.default_rng(seed).integers(0, 200, (40, 50)).astype(np.uint8)
    image = Image.fromarray(np.stack([labels, labels + 1, labels + 2], axis=2))
    options = {"crop_sides": (24, 96)} if squares else {}
    options |= {"image_size": 16, "horizontal_flip": flip, "interpolation": "nearest"}
    options |= {"image_mean": (0, 0, 0), "image_std": (1, 1, 1)}
    pixels, mask = augment(image, seed, Image.fromarray(labels), **options)
    assert np.array_equal(np.rint(pixels * 255), mask[None] + np.arange(3)[:, None, None])


def test_flip_mirrors():
    options = {"image_size": 40, "min_scale": 1.0, "min_ratio": 1, "max_ratio": 1}
    plain, mirrored = (augment(make_photo(40, 40), horizontal_flip=flip, **options)[0] for flip in (0, 1))
    assert np.array_equal(plain[:, :, ::-1], mirrored) and not np.array_equal(plain, mirrored)


def test_the_whole_of_a_photo_is_what_the_image_processor_gives():
    photo = make_photo(90, 90)
    pixels, _ = augment(photo, image_size=32, min_ratio=1, max_ratio=1, **WHOLE)
    processor = PGSegImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    expected = processor(photo, return_tensors="np")["pixel_values"][0]
    assert np.allclose(pixels, expected, atol=1e-5)


def test_pixels_do_not_change_the_image_and_repeat_with_the_generator():
    photo = make_photo()
    before = photo.tobytes()
    options = {"image_size": 24, "color_jitter": 0.4, "grayscale": 0.5, "blur": 0.5, "erasing": 0.5}
    first, again, other = (augment(photo, seed, **options)[0] for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert photo.tobytes() == before


RAW = {"image_size": 32, "image_mean": (0, 0, 0), "image_std": (1 / 255,) * 3}


def test_grayscale_takes_all_colour_and_keeps_the_brightness():
    photo = make_photo(32, 32)
    pixels, _ = augment(photo, grayscale=1.0, min_ratio=1, max_ratio=1, **RAW, **WHOLE)
    assert np.allclose(pixels[0], pixels[1], atol=1e-3) and np.allclose(pixels[0], pixels[2], atol=1e-3)
    assert np.allclose(pixels[0], np.asarray(photo.convert("L")), atol=1)


@given(SEEDS)
def test_color_jitter_of_a_grey_image_changes_its_brightness_only(seed):
    pixels, _ = augment(Image.new("RGB", (8, 8), (100, 100, 100)), seed, color_jitter=0.4, **RAW)
    assert np.allclose(pixels, pixels[0, 0, 0], atol=1e-3)
    assert 60 - 1e-3 <= pixels[0, 0, 0] <= 140 + 1e-3


def test_color_jitter_varies_contrast_and_saturation_and_stays_within_the_range():
    image = Image.fromarray(np.array([[[250, 30, 30], [20, 60, 200]]] * 2, dtype=np.uint8))
    options = {"interpolation": "nearest", "color_jitter": 1.0, "min_ratio": 1, "max_ratio": 1}
    results = np.array([augment(image, seed, **RAW, **WHOLE, **options)[0] for seed in range(200)])
    assert results.min() == 0 and results.max() == 255
    spread = results.max(axis=1) - results.min(axis=1)  # of the channels
    assert np.quantile(spread, 0.05) < 40 and np.quantile(spread, 0.95) > 200


def test_blur_smooths():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8))
    options = {"image_size": 224, "min_ratio": 1, "max_ratio": 1, **WHOLE}
    assert augment(noise, blur=1.0, **options)[0].std() < 0.7 * augment(noise, **options)[0].std()


def test_erasing_leaves_the_mean_colour_in_one_rectangle_and_the_mask_alone():
    photo, mask = Image.new("RGB", (50, 50), "white"), Image.new("L", (50, 50), 3)
    pixels, labels = augment(photo, 1, mask, image_size=40, erasing=1.0)
    erased = (pixels == 0).all(axis=0)
    rows, columns = np.flatnonzero(erased.any(1)), np.flatnonzero(erased.any(0))
    assert erased.sum() == len(rows) * len(columns)
    assert 0.02 * 1600 * 0.9 <= erased.sum() <= 0.33 * 1600 * 1.1
    assert (labels == 3).all()


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"20 x 10 pixels, .*crop .* 10 x 20"):
        augment(Image.new("RGB", (10, 20)), mask=Image.new("L", (20, 10)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"min_scale": 0.0}, "min_scale and max_scale are 0.0 and 1.0"),
        ({"max_scale": 1.5}, "0.08 and 1.5"),
        ({"min_ratio": 2.0}, "min_ratio and max_ratio are 2.0"),
        ({"crop_sides": (96, 24)}, r"crop_sides is \(96, 24\)"),
        ({"crop_sides": (200, 300)}, r"short_side \(192\)"),
        ({"color_jitter": -0.1}, "color_jitter is -0.1"),
        ({"horizontal_flip": 2}, "horizontal_flip is 2"),
        ({"interpolation": "fancy"}, "'fancy', expected one of nearest, "),
        ({"image_std": (1, 1, 0)}, "image_std"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        AugmentationOptions(**options)
