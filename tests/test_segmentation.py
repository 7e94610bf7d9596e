from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CLIP_TEXT, make_photo, tiny_model

from pgseg_hf import (
    PGSegProcessor,
    Segmentation,
    SegmentationOptions,
    Segmenter,
    load_segmenter,
    segmentation,
)
from pgseg_hf.poolings import POOLINGS

STREET = ["building", "road", "pavement", "tree", "sky", "car", "pedestrian"]
LABELS = ["cat", "dog", "grass", "sky", "road", "tree", "car"]


def test_whole_image_equals_model_and_post_processing(shipped_segmenter, street_photo):
    result = shipped_segmenter(street_photo, STREET, SegmentationOptions(window_size=None))
    processor, model = shipped_segmenter.processor, shipped_segmenter.model
    with torch.no_grad():
        outputs = model(**processor(images=street_photo, labels=STREET, return_tensors="pt"))
    (label_map,) = processor.post_process_semantic_segmentation(outputs, [(146, 96)])
    assert label_map.shape == (146, 96)
    np.testing.assert_array_equal(result.label_map, label_map)
    assert len(np.unique(label_map)) > 1, "the test needs a model that finds several labels"


@pytest.mark.parametrize("pooling", POOLINGS)
def test_labels_are_picked_by_the_configured_pooling(shipped_segmenter, street_photo, pooling, monkeypatch):
    """Two of seven labels are kept, by the model's own logits of the whole image."""
    processor, model = shipped_segmenter.processor, shipped_segmenter.model
    monkeypatch.setattr(model.config, "contrastive_pooling", pooling)
    with torch.no_grad():
        outputs = model(**processor(images=street_photo, labels=STREET, return_tensors="pt"))
    weight = 0.5 if pooling == "patches" else 0.0
    options = SegmentationOptions(window_size=None, top_k=2, patch_weight=weight)
    result = shipped_segmenter(street_photo, STREET, options)
    (label_map,) = processor.post_process_semantic_segmentation(
        outputs, [(146, 96)], top_k=2, patch_weight=weight
    )
    np.testing.assert_array_equal(result.label_map, label_map)
    assert set(np.unique(label_map)) <= set(outputs.logits_per_image[0].topk(2).indices.tolist())


def test_post_processing_with_background(shipped_segmenter, street_photo, monkeypatch):
    processor, model = shipped_segmenter.processor, shipped_segmenter.model
    monkeypatch.setattr(processor, "vocabulary", None)  # model outputs do not include other words
    with torch.no_grad():
        outputs = model(**processor(images=street_photo, labels=STREET, return_tensors="pt"))
    scores = shipped_segmenter(street_photo, STREET, SegmentationOptions(window_size=None)).scores
    threshold = float(scores.min() + scores.max()) / 2
    options = SegmentationOptions(window_size=None, background_threshold=threshold)
    result = shipped_segmenter(street_photo, STREET, options)
    (label_map,) = processor.post_process_semantic_segmentation(
        outputs, torch.tensor([[146, 96]]), background_threshold=threshold
    )
    np.testing.assert_array_equal(result.label_map, label_map)
    assert (label_map == 0).any() and (label_map > 0).any()
    (at_input,) = processor.post_process_semantic_segmentation(outputs)
    assert tuple(at_input.shape) == tuple(outputs.image_sizes[0].tolist())


def test_label_scores_are_means_over_the_labels_pixels(shipped_segmenter, street_photo):
    processor, model = shipped_segmenter.processor, shipped_segmenter.model
    with torch.no_grad():
        outputs = model(**processor(images=street_photo, labels=STREET, return_tensors="pt"))
    scores = processor.get_label_scores(outputs)
    (label_map,) = processor.post_process_semantic_segmentation(outputs)
    assert scores.shape == (1, len(STREET))
    assert (scores[0] > 0).nonzero()[:, 0].tolist() == label_map.unique().tolist()
    assert scores.max() <= 1
    with pytest.raises(ValueError, match="target_sizes for 2 images"):
        processor.post_process_semantic_segmentation(outputs, [(1, 1), (2, 2)])


@pytest.mark.parametrize("background_threshold", [None, 0.5])
def test_batch_size_and_company_change_nothing(tiny_segmenter, background_threshold):
    photos = [make_photo(120, 90, 0), make_photo(90, 120, 1), make_photo(120, 90, 2), make_photo(200, 64, 3)]
    options = SegmentationOptions(background_threshold=background_threshold, batch_size=1)
    alone = [tiny_segmenter(photo, LABELS, options) for photo in photos]
    for batch_size in (2, 3, 16):
        together = tiny_segmenter(photos, LABELS, replace(options, batch_size=batch_size))
        for one, other in zip(alone, together, strict=True):
            assert (one.label_map != other.label_map).mean() < 0.002
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


def test_stream_reads_no_more_than_a_batch_ahead(tiny_segmenter):
    read = []

    def photos():
        for index in range(7):
            read.append(index)
            yield make_photo(seed=index)

    stream = tiny_segmenter.stream(photos(), LABELS, SegmentationOptions(batch_size=2))
    next(stream)
    assert read == [0, 1]
    assert sum(1 for _ in stream) == 6


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 200), (64, 64)])
def test_odd_sizes(tiny_segmenter, size):
    result = tiny_segmenter(Image.new("RGB", size, (90, 20, 200)), LABELS)
    assert result.label_map.shape == size[::-1]
    assert np.isfinite(result.scores).all()


def test_arrays(tiny_segmenter, photo):
    array = np.asarray(photo)
    np.testing.assert_array_equal(
        tiny_segmenter(array, LABELS).label_map, tiny_segmenter(photo, LABELS).label_map
    )
    for tensor in (torch.tensor(array), torch.tensor(array).permute(2, 0, 1)):
        (found,) = tiny_segmenter([tensor], LABELS)
        np.testing.assert_array_equal(found.label_map, tiny_segmenter(photo, LABELS).label_map)
        np.testing.assert_array_equal(tiny_segmenter(tensor, LABELS).label_map, found.label_map)
    for bad in (torch.tensor(array) / 255, array[..., :2], np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="is not an image"):
            tiny_segmenter(bad, LABELS)


def test_segments_cover_the_image_once(tiny_segmenter, photo):
    result = tiny_segmenter(photo, LABELS, SegmentationOptions(background_threshold=0.2))
    segments = result.segments()
    assert (
        sum(result.mask(segment).astype(int) for segment in segments).tolist() == np.ones((90, 120)).tolist()
    )
    assert [segment.area for segment in segments] == sorted(
        (segment.area for segment in segments), reverse=True
    )
    every = result.segments(include_absent=True)
    assert [segment.label for segment in every] == ["background", *LABELS]
    for segment in segments:
        assert segment.score == pytest.approx(result.scores[result.mask(segment)].mean(), abs=1e-6)


def test_there_is_one_background(tiny_segmenter, photo):
    labels = ["cat", " Background "]
    assert tiny_segmenter(photo, labels).segments(include_absent=True)[1].label == "Background"
    options = SegmentationOptions(background_threshold=0.2)
    message = "labels contain 'Background', but a threshold creates a background"
    with pytest.raises(ValueError, match=message):
        tiny_segmenter(photo, labels, options)
    with pytest.raises(ValueError, match=message):
        Segmentation(np.zeros((2, 2), int), np.zeros((2, 2)), ["cat", "Background"], True)


def test_bf16_inference(tiny_folder, photo):
    segmenter = load_segmenter(tiny_folder, dtype=torch.bfloat16)
    result = segmenter(photo, LABELS)
    assert np.isfinite(result.scores).all()


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc for a process's peak memory"
)
def test_a_thousand_labels_on_twelve_megapixels_take_less_than_one_and_a_half_gigabytes(tiny_folder):
    import subprocess
    import sys

    # A process inherits `ru_maxrss` from its parent, so the peak is read from /proc.
    code = f"""
import re, numpy as np
from PIL import Image
import pgseg_hf
photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)).resize((4000, 3000))
result = pgseg_hf.load_segmenter({tiny_folder!r})(photo, [f"label {{i}}" for i in range(1000)])
assert result.label_map.shape == (3000, 4000)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) < 1.5 * 1024**2


@pytest.fixture
def counted(tiny_segmenter, monkeypatch) -> tuple[Segmenter, list[int]]:
    """A segmenter with its own model, and the number of labels embedded in each call of its processor."""
    counts: list[int] = []
    embed = PGSegProcessor.get_class_embeddings
    monkeypatch.setattr(
        PGSegProcessor,
        "get_class_embeddings",
        lambda self, model, labels, *args: counts.append(len(labels)) or embed(self, model, labels, *args),
    )
    return Segmenter(tiny_model(text_config=CLIP_TEXT), tiny_segmenter.processor), counts


def test_labels_are_embedded_once(counted, monkeypatch):
    segmenter, counts = counted
    with torch.inference_mode():
        first = segmenter.class_embeddings(LABELS)
    again = segmenter.class_embeddings(LABELS)
    assert counts == [len(LABELS)] and torch.equal(first, again)
    (again * torch.ones(8, requires_grad=True)).sum().backward()  # usable outside of inference mode
    again.zero_()
    assert torch.equal(segmenter.class_embeddings(LABELS), first) and counts == [len(LABELS)]
    other = segmenter.class_embeddings(LABELS, SegmentationOptions(templates=("no {}",)))
    assert counts == [len(LABELS)] * 2 and not torch.equal(other, first)
    monkeypatch.setattr(segmentation, "_KEPT_EMBEDDINGS", 2)
    segmenter.class_embeddings(["cat"])
    assert len(segmenter._known_embeds) == 1


def change_in_place(model):
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight[320] += 1


def change_by_optimizer(model):
    optimizer = torch.optim.AdamW(model.text_projection.parameters(), lr=0.5)
    for parameter in model.text_projection.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def change_by_state_dict(model):
    model.load_state_dict({key: value * 2 + 1 for key, value in model.state_dict().items()}, strict=False)


def change_statistics(model):
    next(
        buffer for name, buffer in model.text_projection.named_buffers() if name.endswith("running_mean")
    ).add_(3)


def change_dtype(model):
    model.double()


@pytest.mark.parametrize(
    "change", [change_in_place, change_by_optimizer, change_by_state_dict, change_statistics, change_dtype]
)
def test_changed_weights_make_new_embeddings(counted, change):
    segmenter, counts = counted
    before = segmenter.class_embeddings(["cat", "dog"])
    change(segmenter.model)
    after = segmenter.class_embeddings(["cat", "dog"])
    assert counts == [2, 2] and (before.dtype != after.dtype or not torch.equal(before, after))


def test_weights_that_count_no_versions_are_not_trusted(counted, tiny_segmenter):
    _, counts = counted
    with torch.inference_mode():
        segmenter = Segmenter(tiny_model(text_config=CLIP_TEXT), tiny_segmenter.processor)
    for _ in range(2):
        segmenter.class_embeddings(["cat"])
    assert counts == [1, 1]


def test_synonyms_are_averaged(tiny_segmenter, photo):
    cat, kitten, dog = tiny_segmenter.class_embeddings(["cat", "kitten", "dog"])
    embeds = tiny_segmenter.class_embeddings(["cat | kitten", "dog"])
    torch.testing.assert_close(embeds[0], torch.nn.functional.normalize(cat + kitten, dim=0))
    torch.testing.assert_close(embeds[1], dog)
    result = tiny_segmenter(photo, ["cat|kitten", "dog"])
    assert result.labels == ["cat", "dog"]
    assert not np.allclose(result.scores, tiny_segmenter(photo, ["cat", "dog"]).scores)
    with pytest.raises(ValueError, match="repeats"):
        tiny_segmenter(photo, ["cat|kitten", "kitten"])


@pytest.mark.parametrize("background", [False, True])
def test_a_label_with_a_low_score_is_background(background):
    label_map = np.array([[0, 1, 2], [2, 1, 0]])
    scores = np.array([[0.1, 0.3, 0.2], [0.25, 0.25, 0.8]])
    labels = ["cat", "dog", "car"][: 2 if background else 3]
    before = Segmentation(label_map, scores, labels, background)
    after = before.with_thresholds({"cat": 0.25})
    cat = int(background)
    expected = np.where((label_map == cat) & (scores < 0.25), 0, label_map + (not background))
    assert np.array_equal(after.label_map, expected) and after.background
    assert (after.scores[after.label_map != 0] == scores[after.label_map != 0]).all()
    assert before.with_thresholds({}) is before and before.with_thresholds(None) is before


def test_thresholds_and_colours_of_labels(shipped_segmenter, street_photo):
    plain = shipped_segmenter(street_photo, STREET)
    name = plain.segments()[0].label
    before = plain.label_map == STREET.index(name)
    least = float(np.median(plain.scores[before]))
    options = SegmentationOptions(thresholds={name: least}, colours={name: "red"})
    result = shipped_segmenter(street_photo, STREET, options)
    assert result.background and result.colours == {name: "#ff0000"}
    kept = result.label_map == STREET.index(name) + 1
    assert 0 < kept.sum() < before.sum() and result.scores[kept].min() >= least
    assert np.array_equal(kept | (result.label_map == 0), before)
    anything = shipped_segmenter(street_photo, STREET, replace(options, thresholds={name: 0}))
    assert np.array_equal(anything.label_map, plain.label_map + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": {"horse": 0.5}}, "thresholds has 'horse', which is not one of the labels"),
        ({"colours": {"horse": "red"}}, "colours has 'horse'"),
        ({"thresholds": {"cat": 2}}, r"thresholds\['cat'\] is 2"),
        ({"thresholds": 0.5}, "thresholds is 0.5, expected None or a dictionary"),
        ({"colours": {"cat": "redd"}}, r"colours\['cat'\] is 'redd', expected a colour such as"),
        ({"colours": {"cat": 3}}, r"colours\['cat'\] is 3"),
        ({"synonyms": "merge"}, "synonyms is 'merge', expected 'average' or 'best'"),
        ({"min_area": -1}, "min_area is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"background_threshold": "0.3"}, "background_threshold is '0.3'"),
        ({"window_size": 0}, "window_size is 0"),
        ({"window_stride": "big"}, "window_stride is 'big'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"window_size": 32, "window_stride": 40}, "stride is 40"),
        ({"window_stride": 80}, "stride is 80, expected at most the window size, 64"),
    ],
)
def test_wrong_options(tiny_segmenter, photo, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_segmenter(photo, LABELS, SegmentationOptions(**options))


@pytest.mark.parametrize("patch_weight", [0.0, 0.5])
@pytest.mark.parametrize("background_threshold", [None, 0.5])
def test_the_best_of_synonyms(shipped_segmenter, street_photo, patch_weight, background_threshold):
    """At each position a label has the score of its best word."""
    words = ["building|house|wall", "road|pavement", "tree", "sky"]
    how = {"background_threshold": background_threshold, "top_k": 100, "window_size": None}
    options = SegmentationOptions(synonyms="best", patch_weight=patch_weight, **how)
    embeds = shipped_segmenter.class_embeddings(words, options)
    assert embeds.shape[:2] == (4, 3)
    (encoded,) = shipped_segmenter.encode([street_photo], options)
    features = encoded.windows[0].features
    flat = shipped_segmenter.class_embeddings(
        ["building", "house", "wall", "road", "pavement", "tree", "sky"]
    )
    logits = shipped_segmenter.model.get_logits(features, flat)[1][0]
    best = torch.stack([logits[:, part].amax(1) for part in ([0, 1, 2], [3, 4], [5], [6])], dim=1)
    scored = shipped_segmenter.score(encoded, embeds, replace(options, background_threshold=None))
    torch.testing.assert_close(scored.windows[0].scores, best.softmax(1) ** 2)
    result = shipped_segmenter(street_photo, words, options)
    assert result.labels == ["building", "road", "tree", "sky"]
    one_each = ["building", "road", "tree", "sky"]
    plain = shipped_segmenter(street_photo, one_each, replace(options, synonyms="average"))
    assert np.array_equal(shipped_segmenter(street_photo, one_each, options).label_map, plain.label_map)
    averaged = shipped_segmenter(street_photo, words, replace(options, synonyms="average"))
    assert (averaged.scores != result.scores).any()
    assert shipped_segmenter.remarks_on_far_labels(result.labels, embeds) == []


def test_a_single_label_of_several_words(shipped_segmenter, street_photo):
    options = SegmentationOptions(synonyms="best", thresholds={"street": 0.5})
    result = shipped_segmenter(street_photo, ["street|road"], options)
    assert result.background and set(np.unique(result.label_map)) <= {0, 1} and result.scores.max() <= 1
