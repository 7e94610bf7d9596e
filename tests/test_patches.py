"""Names on patches: the logits by hand, the two losses, and inference that combines patches and groups."""

import json

import numpy as np
import pytest
import torch
from tiny_models import (
    CLIP_TEXT,
    dense,
    make_photo,
    tiny_images,
    tiny_model,
    tiny_texts,
    with_fixed_statistics,
)
from torch.nn.functional import interpolate, normalize

from pgseg_hf import PGSegImageProcessorPil, PGSegProcessor, SegmentationOptions, Segmenter, default_tokenizer
from pgseg_hf.features import POOLED
from pgseg_hf.poolings import CONTRASTIVE_LOSSES, POOLINGS, PoolingSettings
from pgseg_hf.scoring import WindowScores, best_labels, group_map, merge_windows, window_starts

LABELS = ["cat", "dog", "grass", "sky", "road", "tree", "car"]
# Lies between the scores of the tiny model's groups.
THRESHOLD = 0.09
PATCHES_SIGMOID = {"contrastive_pooling": "patches", "contrastive_loss": "sigmoid"}


def embeddings_of(model, ids, pixels):
    """Unit vectors of the model's patches [B, L, D] and texts [N, D], and the factor on their cosines."""
    patches = normalize(model.get_image_features(pixels).patch_embeds, dim=-1)
    texts = normalize(model.get_text_features(ids).pooler_output, dim=-1)
    return patches, texts, min(float(model.logit_scale.exp()), model.config.max_logit_scale)


# Training


@pytest.mark.parametrize("loss", CONTRASTIVE_LOSSES)
def test_a_pooling_of_ones_own(loss, monkeypatch):
    """A custom pooling with one entry and one function: the mean of a text's two largest cosines over the patches."""

    def best_two(images, texts, scale, config):
        return (scale * (images.patches @ texts.T)).topk(2, dim=1).values.mean(1)

    monkeypatch.setitem(POOLINGS, "best two", PoolingSettings("patches"))
    monkeypatch.setitem(POOLED, "best two", best_two)
    model = tiny_model(contrastive_pooling="best two", contrastive_loss=loss)
    ids, pixels = tiny_texts(3), tiny_images(3)
    with torch.no_grad():
        patches, texts, scale = embeddings_of(model, ids, pixels)
        largest = (scale * (patches @ texts.T)).sort(dim=1, descending=True).values
        actual = model(ids, pixels).logits_per_image
        torch.testing.assert_close(actual, (largest[:, 0] + largest[:, 1]) / 2, rtol=1e-4, atol=1e-4)
    assert (model.logit_bias is None) == (loss != "sigmoid")
    model.train()(ids, pixels, return_loss=True).loss.backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    named = tiny_model(contrastive_pooling="best two", text_config=CLIP_TEXT)
    assert segmenter_of(named, patch_weight=0.5)(make_photo(), LABELS).label_map.shape == (90, 120)


@torch.no_grad()
def test_patches_are_those_that_the_first_stage_groups():
    model, grouped = tiny_model(contrastive_pooling="patches"), []
    first = model.vision_model.encoder.stages[0].downsample
    first.register_forward_pre_hook(lambda module, inputs: grouped.append(inputs[0]))
    output = model.get_image_features(tiny_images(2, 20, 16))
    hidden = model.vision_model.layernorm(grouped[0])
    torch.testing.assert_close(output.patch_hidden_state, hidden)
    torch.testing.assert_close(output.patch_embeds, model.visual_projection(hidden))
    assert output.patch_embeds.shape == (2, 5 * 4, 8)
    assert tiny_model().get_image_features(tiny_images(2)).patch_embeds is None


def seen(cosines_LN):
    """Log odds that a text is seen in three looks at the patches."""
    chances = np.exp(cosines_LN) / np.exp(cosines_LN).sum(axis=1, keepdims=True)
    share = 1 - (1 - chances.mean(axis=0)) ** 3
    return np.log(share / (1 - share))


def weighted_by_softmax(cosines_LN):
    weights = np.exp(cosines_LN) / np.exp(cosines_LN).sum(axis=0)
    return (weights * cosines_LN).sum(axis=0)


@pytest.mark.parametrize(
    ("loss", "pooled"),
    [("sigmoid", seen), ("info_nce", weighted_by_softmax), ("multi_positive", weighted_by_softmax)],
)
@torch.no_grad()
def test_logits_pool_the_patches(loss, pooled):
    model = tiny_model(mixture_looks=3.0, contrastive_pooling="patches", contrastive_loss=loss).double()
    ids, pixels = tiny_texts(4), tiny_images(3, 20, 16).double()
    patches, texts, scale = (np.asarray(value) for value in embeddings_of(model, ids, pixels))
    expected = np.stack([pooled(scale * of_image @ texts.T) for of_image in patches])
    np.testing.assert_allclose(model(ids, pixels).logits_per_image, expected, rtol=1e-6, atol=1e-9)
    assert np.ptp(expected, axis=0).min() > 1e-3, "the test needs images that differ"


@torch.no_grad()
def test_patch_logits_are_scaled_cosines_on_the_grid():
    model = tiny_model(contrastive_pooling="patches").double()
    ids, pixels = tiny_texts(4), tiny_images(3, 20, 16).double()
    patches, texts, scale = embeddings_of(model, ids, pixels)
    output = model(ids, pixels)
    assert output.patch_logits.shape == (3, 4, 5, 4)
    for row, column in ((0, 0), (0, 3), (4, 1)):
        expected = scale * patches[:, row * 4 + column] @ texts.T
        torch.testing.assert_close(output.patch_logits[:, :, row, column], expected)
    assert model(ids[:3], pixels, return_loss=True).patch_logits is None
    assert tiny_model()(ids, pixels.float()).patch_logits is None


@pytest.mark.parametrize("fields", [PATCHES_SIGMOID, {"contrastive_pooling": "patches"}])
def test_the_loss_reaches_the_patches_alone_where_there_are_no_prototypes(fields):
    model = with_fixed_statistics(tiny_model(npr_variant="none", **fields))
    output = model(tiny_texts(4), tiny_images(4), return_loss=True)
    output.loss.backward()
    stages = model.vision_model.encoder.stages
    assert stages[0].layers[0].mlp.fc1.weight.grad.any()
    assert model.visual_projection[3].weight.grad.any()
    # Groups only learn from the prototype losses.
    assert not any(
        parameter.grad is not None and parameter.grad.any() for parameter in stages[1].parameters()
    )


# Inference


def segmenter_of(model, **fields):
    image_processor = PGSegImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 256})
    fields = {"window_size": 48, "window_stride": 24, "top_k": 4} | fields
    return Segmenter(model, PGSegProcessor(image_processor, default_tokenizer(), **fields))


@pytest.fixture(scope="module")
def segmenter():
    """A segmenter whose model finds several labels in one image."""
    model = tiny_model(seed=5, text_config=CLIP_TEXT, contrastive_pooling="patches").double()
    with torch.no_grad():
        model.logit_scale.fill_(3.5)
    return segmenter_of(model)


@pytest.fixture(scope="module")
def plain_segmenter():
    return segmenter_of(tiny_model(text_config=CLIP_TEXT))


def softmax(values, axis):
    exponentials = np.exp(values - values.max(axis=axis, keepdims=True))
    return exponentials / exponentials.sum(axis=axis, keepdims=True)


def scores_by_hand(segmenter, pixels, weight, threshold=None):
    """Scores [N, H, W] or [1 + N, H, W] of one window's pixels, from the model's logits."""
    model, processor = segmenter.model, segmenter.processor
    embeds = processor.get_class_embeddings(model, LABELS)
    with torch.no_grad():
        features = model.get_image_features(pixels)
        (image,), (segments,) = model.get_logits(features, embeds)
        (patches,) = model.get_patch_logits(features, embeds)
    kept = np.isin(np.arange(len(LABELS)), image.topk(processor.top_k).indices)

    def scores(rows):
        values = softmax(rows, 1) * softmax(np.where(kept, rows, -np.inf), 1)
        if threshold is None:
            return values
        best = values.max(axis=1)
        background = best < min(threshold, best.max())
        return np.concatenate([background[:, None], values], axis=1)

    size = tuple(pixels.shape[-2:])
    of_groups = torch.from_numpy(scores(segments.numpy()))[group_map(features.grouping[0], size).long()]
    of_patches = torch.from_numpy(scores(patches.flatten(1).T.numpy())).T.unflatten(1, patches.shape[1:])
    stretched = interpolate(of_patches[None], size=size, mode="bilinear", align_corners=False)[0]
    return (1 - weight) * of_groups.permute(2, 0, 1) + weight * stretched


@pytest.mark.parametrize(("weight", "threshold"), [(0, None), (0.4, THRESHOLD), (1, THRESHOLD)])
def test_a_pixels_scores_mix_its_groups_and_its_patches(segmenter, weight, threshold):
    # A tall image, which is processed some rows at a time.
    photo = make_photo(70, 170)
    options = SegmentationOptions(window_size=None, patch_weight=weight, background_threshold=threshold)
    (image,) = segmenter.encode([photo], options)
    pixels = segmenter._pixel_values(photo, options)
    assert pixels.shape[2] > 2 * 64
    embeds = segmenter.class_embeddings(LABELS, options)
    scored = segmenter.score(image, embeds, options)
    expected = scores_by_hand(segmenter, pixels, weight, threshold)
    torch.testing.assert_close(dense(scored.windows[0]), expected, rtol=1e-9, atol=1e-12)
    shown = interpolate(expected[None], size=(170, 70), mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(segmenter(photo, LABELS, options).scores, shown.amax(0), rtol=1e-9, atol=1e-12)
    if threshold is not None:
        assert 0 < expected[0].mean() < 1, "the test needs some background"
        later = segmenter.score(image, embeds, SegmentationOptions(window_size=None, patch_weight=weight))
        again = later.with_background(threshold)
        assert all(torch.equal(one, other) for one, other in zip(again.label_map(), scored.label_map()))


@pytest.mark.parametrize(("weight", "threshold"), [(0, None), (0.4, None), (1, THRESHOLD)])
def test_segmenter_and_processor_agree(segmenter, weight, threshold):
    photo, processor = make_photo(90, 70), segmenter.processor
    with torch.no_grad():
        outputs = segmenter.model(**processor(images=photo, labels=LABELS, return_tensors="pt"))
    options = SegmentationOptions(window_size=None, patch_weight=weight, background_threshold=threshold)
    result = segmenter(photo, LABELS, options)
    how = {"background_threshold": threshold, "patch_weight": weight}
    (label_map,) = processor.post_process_semantic_segmentation(outputs, [(70, 90)], **how)
    np.testing.assert_array_equal(result.label_map, label_map)
    scores = processor.get_label_scores(outputs, **how)
    assert scores.shape == (1, len(LABELS) + (threshold is not None))
    saved = segmenter_of(segmenter.model, patch_weight=weight)
    (by_default,) = saved.processor.post_process_semantic_segmentation(
        outputs, [(70, 90)], background_threshold=threshold
    )
    assert torch.equal(by_default, label_map)
    own = saved(photo, LABELS, SegmentationOptions(window_size=None, background_threshold=threshold))
    assert threshold or len(np.unique(own.label_map)) > 1, "the test needs a model that shows several labels"
    np.testing.assert_array_equal(own.label_map, result.label_map)


@pytest.mark.parametrize(("weight", "threshold"), [(0.4, None), (0.4, THRESHOLD)])
def test_sliding_windows_average_the_mixed_scores(segmenter, weight, threshold):
    photo = make_photo(120, 90)
    options = SegmentationOptions(patch_weight=weight, background_threshold=threshold, batch_size=3)
    pixels = segmenter._pixel_values(photo, options)
    height, width = pixels.shape[-2:]
    total = torch.zeros(len(LABELS) + (threshold is not None), height, width, dtype=torch.float64)
    count, windows = torch.zeros(height, width), 0
    for top in window_starts(height, 48, 24):
        for left in window_starts(width, 48, 24):
            place = (slice(top, top + 48), slice(left, left + 48))
            total[:, *place] += scores_by_hand(segmenter, pixels[..., *place], weight, threshold)
            count[place] += 1
            windows += 1
    assert windows > 4
    mean = interpolate((total / count)[None], size=(90, 120), mode="bilinear", align_corners=False)[0]
    result = segmenter(photo, LABELS, options)
    np.testing.assert_allclose(result.scores, mean.amax(0), rtol=1e-9, atol=1e-12)
    # Rounding decides between equally likely labels.
    first, second = mean.topk(2, dim=0).values
    clear = first - second > 1e-9
    np.testing.assert_array_equal(result.label_map[clear], mean.argmax(0)[clear])
    assert clear.double().mean() > 0.9


def test_background_that_only_patches_have_is_shown():
    patches = torch.tensor([[[0.9, 0.1], [0.2, 0.0]], [[0.0, 0.8], [0.1, 0.0]]])
    window = WindowScores(
        torch.zeros(2, 2, dtype=torch.uint8),
        torch.tensor([[0.7, 0.6]]),
        patch_scores=patches,
        patch_weight=1.0,
    ).with_background(0.5)
    assert not window.scores[:, 0].any()
    labels, scores = best_labels(*merge_windows([window], (2, 2)))
    assert labels.tolist() == [[1, 2], [0, 0]]
    assert scores[1].tolist() == [1.0, 1.0]


# Rejected values, and saving


def test_models_that_do_not_name_patches_have_no_weight(plain_segmenter):
    photo = make_photo(64, 64)
    with pytest.raises(ValueError, match=r"patch_weight is 0\.5, .* contrastive_pooling 'mean'"):
        plain_segmenter(photo, LABELS, SegmentationOptions(patch_weight=0.5))
    saved = segmenter_of(plain_segmenter.model, patch_weight=0.5)
    with pytest.raises(ValueError, match=r"patch_weight is 0\.5"):
        saved(photo, LABELS)
    assert saved(photo, LABELS, SegmentationOptions(patch_weight=0)).label_map.shape == (64, 64)
    with torch.no_grad():
        inputs = saved.processor(images=photo, labels=LABELS, return_tensors="pt")
        outputs = saved.model(**inputs)
    with pytest.raises(ValueError, match=r"patch_weight is 0\.5, but the outputs have no patch_logits"):
        saved.processor.post_process_semantic_segmentation(outputs)
    assert len(saved.processor.post_process_semantic_segmentation(outputs, patch_weight=0)) == 1


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_weights_out_of_range_are_refused(weight):
    for door in (SegmentationOptions, lambda **fields: segmenter_of(tiny_model(), **fields)):
        with pytest.raises(ValueError, match="patch_weight is"):
            door(patch_weight=weight)


def test_the_processor_saves_how_to_segment(segmenter, tmp_path):
    segmenter_of(segmenter.model, patch_weight=0.25, top_k=3).processor.save_pretrained(tmp_path)
    loaded = PGSegProcessor.from_pretrained(tmp_path)
    assert (loaded.top_k, loaded.patch_weight) == (3, 0.25)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    assert (stored["top_k"], stored["patch_weight"]) == (3, 0.25)
    overridden = PGSegProcessor.from_pretrained(tmp_path, patch_weight=0.5)
    assert (overridden.top_k, overridden.patch_weight) == (3, 0.5)
    # Processors saved before these fields existed still work.
    for name in ("top_k", "patch_weight"):
        stored.pop(name)
    (tmp_path / "processor_config.json").write_text(json.dumps(stored))
    old = PGSegProcessor.from_pretrained(tmp_path)
    assert (old.top_k, old.patch_weight) == (5, 0.0)
