"""Windows cut from a backbone's features of the whole image, in training and in segmentation."""

import json

import numpy as np
import pytest
import torch
from data_files import numbered_folder
from PIL import Image
from tiny_backbones import tiny_backbone_model
from tiny_models import make_photo

from pgseg_hf import PGSegImageProcessorPil, PGSegProcessor, SegmentationOptions, Segmenter, default_tokenizer
from pgseg_hf.data.augmentation import Augmentation, AugmentationOptions, Crop
from pgseg_hf.data.sources import SourceSpec, open_source
from pgseg_hf.training.batches.feature_cache import CacheOptions, _cut, cache_features
from pgseg_hf.training.batches.mixing import Draw, seeded
from pgseg_hf.training.batches.preparation import Preparation

SIDE, STEP = 64, 8  # the tiny EfficientNet-Lite has a feature for every 8 pixels
LABELS = ["cat", "dog", "grass"]


@pytest.fixture(scope="module")
def segmenter():
    ids = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    model = tiny_backbone_model(text_config=ids | {"max_position_embeddings": 16}).eval()
    processor = PGSegProcessor(
        PGSegImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": 2048}),
        default_tokenizer(16),
        window_size=32,
        window_stride=16,
        window_features=True,
    )
    return Segmenter(model, processor)


@pytest.mark.parametrize("size", [(80, 64), (64, 64), (97, 130)])
def test_windows_are_parts_of_the_whole_images_features(segmenter, size):
    image = make_photo(*size)
    (encoded,) = segmenter.encode([image])
    pixels = segmenter.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    features = segmenter.model.vision_model.embeddings.features(pixels)
    height, width = features.shape[-2:]
    assert encoded.resized == (height * STEP, width * STEP)
    tops, lefts = ({window.top for window in encoded.windows}, {window.left for window in encoded.windows})
    assert len(encoded.windows) == len(tops) * len(lefts) and max(tops) == height * STEP - 32
    for window in encoded.windows:
        row, column = window.top // STEP, window.left // STEP
        part = features[:, :, row : row + 4, column : column + 4]
        expected = segmenter.model.get_image_features(backbone_features=part)
        torch.testing.assert_close(
            window.features.segment_embeds[0], expected.segment_embeds[0], rtol=1e-4, atol=1e-5
        )
        assert window.groups.shape == (32, 32)


def test_the_whole_image_at_once_is_as_without(segmenter):
    image, whole = make_photo(80, 64), SegmentationOptions(window_size=None)
    found = segmenter(image, LABELS, whole)
    segmenter.processor.window_features = False
    try:
        plain = segmenter(image, LABELS, whole)
    finally:
        segmenter.processor.window_features = True
    np.testing.assert_array_equal(found.label_map, plain.label_map)
    assert segmenter(image, LABELS).label_map.shape == found.label_map.shape


@pytest.mark.parametrize("options", [{"window_size": 36}, {"window_stride": 12}])
def test_windows_that_are_no_whole_patches_are_refused(segmenter, options):
    with pytest.raises(ValueError, match=f"{next(iter(options.values()))}.*multiples of {STEP}"):
        segmenter(make_photo(80, 64), LABELS, SegmentationOptions(**options))


def test_gaps_between_windows_are_told_in_pixels(segmenter):
    size, stride = segmenter.processor.window_size, 4 * segmenter.processor.window_size
    with pytest.raises(
        ValueError, match=f"window_stride is {stride}, expected at most the window size, {size},"
    ):
        segmenter(make_photo(80, 64), LABELS, SegmentationOptions(window_stride=stride))


def test_the_choice_is_saved(segmenter, tmp_path):
    segmenter.processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["window_features"] is True
    assert PGSegProcessor.from_pretrained(tmp_path).window_features


# Training


@pytest.mark.parametrize("flip", [False, True])
def test_a_cut_on_the_grid_is_a_part_of_the_features(flip):
    features = torch.randn(1, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    crop = Crop(size=(80, 60), box=(20, 10, 60, 40), flip=flip)  # ten pixels per feature
    expected = features[0, :, 1:4, 2:6].numpy()
    cut = _cut(features, crop, (3, 4))
    np.testing.assert_allclose(cut, expected[..., ::-1] if flip else expected, atol=1e-5)
    finer = _cut(features, crop, (6, 8))
    assert finer.shape == (5, 6, 8) and finer.std() < expected.std()


def test_views_are_cut_from_the_features_of_a_whole_image(tmp_path):
    source = open_source(SourceSpec(path=numbered_folder(tmp_path / "data", 3)))
    options = AugmentationOptions(image_size=32, short_side=SIDE, crop_sides=(32, 64), color_jitter=0.5)
    prepare, model = Preparation(options), tiny_backbone_model().eval()
    cache = CacheOptions(str(tmp_path / "cache"), views=2, whole_images=True)
    (cached,) = cache_features([source], prepare, model, cache)
    for index in range(3):
        for view, features in enumerate(cached[index].views):
            image, crop, _ = prepare.draw(source[index], seeded(Draw.VIEW, 0, 0, index, view))
            pixels = torch.from_numpy(Augmentation(options).whole_pixels(image))[None]
            with torch.no_grad():
                whole = model.vision_model.embeddings.features(pixels)
            np.testing.assert_allclose(features, _cut(whole, crop, features.shape[-2:]), rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="whole_images"):
        cache_features([source], prepare, model, CacheOptions(cache.folder, views=2))


def test_pixels_of_a_whole_image_have_the_short_side():
    augmentation = Augmentation(AugmentationOptions(short_side=30, image_size=8))
    pixels = augmentation.whole_pixels(Image.new("RGB", (60, 40), (255, 0, 0)))
    assert pixels.shape == (3, 30, 45) and pixels.dtype == np.float32
    np.testing.assert_array_equal(np.ptp(pixels, axis=(1, 2)), 0)


def test_a_long_image_is_no_larger_than_in_segmentation():
    augmentation = Augmentation(AugmentationOptions(short_side=576, image_size=8))
    assert augmentation.whole_pixels(Image.new("RGB", (10, 700))).shape == (3, 2048, 29)
    larger = Augmentation(AugmentationOptions(short_side=2100, image_size=8))
    assert larger.whole_pixels(Image.new("RGB", (8, 8))).shape == (3, 2100, 2100)
