"""Background decided by the words that a checkpoint knows."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from pgseg_hf import PGSegProcessor, SegmentationOptions, Segmenter, segmentation
from pgseg_hf.scoring import WindowScores, add_background, chance_of_labels
from pgseg_hf.segmentation import NEUTRAL_WORDS
from pgseg_hf.suggestions import MIN_AREA, everyday_words

HORSES = Path(__file__).parent.parent / "examples" / "images" / "horses.jpg"
WORDS = ["cat", "dog", "sky", "road", "tree"]


@pytest.fixture
def knowing(tiny_segmenter):
    """The tiny segmenter with a vocabulary."""
    old = tiny_segmenter.processor
    processor = PGSegProcessor(
        old.image_processor, old.tokenizer, window_size=64, window_stride=32, vocabulary=WORDS
    )
    return Segmenter(tiny_segmenter.model, processor)


def test_the_chance_of_labels_is_their_share_of_one_softmax():
    logits = torch.randn(7, 5, dtype=torch.float64)
    expected = logits.softmax(1)[:, :2].sum(1)
    torch.testing.assert_close(chance_of_labels(logits[:, :2], logits[:, 2:], 1), expected)


def test_background_is_where_labels_are_unlikely():
    scores, known = torch.rand(4, 3), torch.tensor([0.1, 0.5, 0.49, 0.9])
    with_background = add_background(scores, 0.5, known)
    assert with_background[:, 0].tolist() == [1, 0, 1, 0]
    assert torch.equal(with_background[:, 1:], scores)
    patches = torch.rand(3, 2, 2)
    window = WindowScores(
        torch.zeros(4, 4, dtype=torch.uint8), scores, 0, 0, patches, 0.5, known, torch.zeros(2, 2)
    ).with_background(0.5)
    assert window.patch_scores.shape == (4, 2, 2) and bool((window.patch_scores[0] == 1).all())


@pytest.fixture
def different(monkeypatch):
    """With random weights all words are nearly equal."""
    monkeypatch.setattr(segmentation, "SAME_MEANING", 2.0)


def test_one_label_need_not_cover_the_image(knowing, photo, different):
    everywhere = knowing(photo, ["elephant"])
    assert set(np.unique(everywhere.label_map)) == {0}
    share = {}
    for threshold in (0.0, 0.2, 1.0):
        found = knowing(photo, ["elephant"], SegmentationOptions(background_threshold=threshold))
        share[threshold] = (found.label_map == 1).mean()
    assert share[0.0] == 1 and share[1.0] == 0
    assert share[0.0] >= share[0.2] >= share[1.0]


def test_one_label_without_a_vocabulary_is_compared_with_a_neutral_word(tiny_segmenter, photo):
    embeds = tiny_segmenter.class_embeddings(["elephant"])
    neutral = normalize(tiny_segmenter.class_embeddings(NEUTRAL_WORDS).mean(0, keepdim=True), dim=-1)
    torch.testing.assert_close(tiny_segmenter._other_words(embeds, SegmentationOptions()), neutral)
    assert (
        tiny_segmenter._other_words(tiny_segmenter.class_embeddings(["a", "b"]), SegmentationOptions())
        is None
    )
    (encoded,) = tiny_segmenter.encode([photo])
    scored = tiny_segmenter.score(encoded, embeds)
    for window, features in zip(scored.windows, encoded.windows, strict=True):
        logits = tiny_segmenter.model.get_logits(features.features, torch.cat([embeds, neutral]))[1][0]
        torch.testing.assert_close(window.scores, logits.softmax(1)[:, :1])
    everywhere = tiny_segmenter(photo, ["elephant"])
    assert set(np.unique(everywhere.label_map)) == {0} and everywhere.scores.max() < 1
    middle = float(np.median(everywhere.scores))
    for threshold, expected in ((0.0, 1), (middle, None), (1.0, 0)):
        options = SegmentationOptions(background_threshold=threshold)
        share = (tiny_segmenter(photo, ["elephant"], options).label_map == 1).mean()
        assert share == expected if expected is not None else 0 < share < 1


def test_one_label_that_covers_the_image_is_remarked_on(tiny_segmenter, photo, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pgseg_hf"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        tiny_segmenter(photo, ["stoat", "weasel"])
        tiny_segmenter(photo, ["stoat"], SegmentationOptions(background_threshold=0.5))
        assert not caplog.records
        tiny_segmenter(photo, ["stoat"])
        assert "'stoat' is the only label and there is no background threshold" in caplog.text
        with torch.no_grad():
            inputs = tiny_segmenter.processor(photo, labels=["stoat"], return_tensors="pt")
            outputs = tiny_segmenter.model(**inputs)
        tiny_segmenter.processor.post_process_semantic_segmentation(outputs, background_threshold=0.51)
    assert "background_threshold is 0.51" in caplog.text


def test_labels_far_from_all_that_was_learned_are_remarked_on(knowing, monkeypatch, photo, caplog):
    # Unit vectors in a plane by their angle: the words are 10 degrees apart, so that each is cos(10) from its nearest.
    angles = {word: 10.0 * place for place, word in enumerate(WORDS)}
    angles |= {"feline": 5.0, "pagoda": 80.0, "Cat": 180.0}

    def class_embeddings(labels, options=None):
        rad = torch.tensor([angles[label] for label in labels]).deg2rad()
        return torch.stack([rad.cos(), rad.sin()], dim=1)

    monkeypatch.setattr(knowing, "class_embeddings", class_embeddings)

    def remarks(*labels):
        return knowing.remarks_on_far_labels(labels, class_embeddings(labels))

    assert remarks("Cat", "dog") == [] and remarks("feline", "tree") == []
    (remark,) = remarks("feline", "pagoda")
    assert "'pagoda' is far from the 5 words" in remark and "the nearest is 'tree'" in remark
    monkeypatch.setattr(knowing, "score", lambda *args: (_ for _ in ()).throw(StopAsyncIteration))
    monkeypatch.setattr(logging.getLogger("pgseg_hf"), "propagate", True)
    with caplog.at_level(logging.WARNING), pytest.raises(StopAsyncIteration):
        knowing(photo, ["pagoda", "dog"])
    assert remark in caplog.text
    monkeypatch.setattr(knowing.processor, "vocabulary", None)
    assert remarks("feline", "pagoda") == []


def test_the_shipped_checkpoint_knows_what_it_does_not_know(shipped_segmenter):
    def remarks(*labels):
        return shipped_segmenter.remarks_on_far_labels(labels, shipped_segmenter.class_embeddings(labels))

    assert remarks("couch", "automobile", "kitten", "jeans", "tree", "woman", "pagoda") == []
    for word in ("democracy", "thursday", "asdfgh"):
        assert len(remarks(word, "dog")) == 1, word


def test_words_of_the_same_meaning_do_not_compete(knowing):
    embeds = knowing.class_embeddings(["cat", "sky"])
    others = knowing._other_words(embeds, SegmentationOptions())
    assert others is None or (others @ embeds.T).max() < 0.5
    assert knowing._other_words(knowing.class_embeddings(WORDS), SegmentationOptions()) is None


def test_scores_for_a_later_threshold_are_those_of_the_threshold(knowing, photo, different):
    embeds = knowing.class_embeddings(["elephant", "boat"])
    (encoded,) = knowing.encode([photo])
    options = SegmentationOptions(background_threshold=0.3)
    at_once = knowing.score(encoded, embeds, options).label_map()[0]
    later = knowing.score(encoded, embeds, SegmentationOptions(), may_have_background=True)
    assert torch.equal(later.with_background(0.3).label_map()[0], at_once)


def test_the_vocabulary_is_saved(knowing, tmp_path):
    knowing.processor.save_pretrained(tmp_path)
    assert PGSegProcessor.from_pretrained(tmp_path).vocabulary == WORDS
    with pytest.raises(ValueError, match="repeats"):
        PGSegProcessor(knowing.processor.image_processor, knowing.processor.tokenizer, vocabulary=["a", "A"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_far_labels_are_remarked_on_in_16_bits(shipped_segmenter, dtype, monkeypatch):
    labels = ["democracy", "couch", "asdfgh"]

    def remarks(dtype):
        embeddings = shipped_segmenter.class_embeddings
        with monkeypatch.context() as patch:
            patch.setattr(shipped_segmenter, "class_embeddings", lambda *asked: embeddings(*asked).to(dtype))
            return shipped_segmenter.remarks_on_far_labels(labels, shipped_segmenter.class_embeddings(labels))

    assert remarks(dtype) == remarks(torch.float32) and len(remarks(dtype)) == 2


def seen(segmenter, encoded, words, min_area=MIN_AREA):
    embeds = segmenter.class_embeddings(words)
    return [words[index] for index in segmenter.largest(encoded, embeds, min_area)]


def test_what_is_in_an_image_is_found_without_words(shipped_segmenter):
    words = ["pizza", "horse", "beach", "shore", "sea", "computer"]
    (encoded,) = shipped_segmenter.encode([HORSES])
    found = seen(shipped_segmenter, encoded, words)
    assert found[0] in ("beach", "shore") and "horse" in found
    assert len({"beach", "shore"} & set(found)) == 1, "two words of one meaning"
    assert not {"pizza", "computer"} & set(found)
    assert seen(shipped_segmenter, encoded, words, min_area=1) == found[:1]
    with pytest.raises(ValueError, match="min_area is 2"):
        SegmentationOptions(min_area=2)


def test_the_words_that_ship_are_those_that_the_checkpoint_was_trained_with():
    table = json.loads((HORSES.parents[1] / "everyday_words.json").read_text(encoding="utf-8"))
    assert everyday_words() == list(table["names"])


def test_labels_as_a_vocabulary(shipped_segmenter):
    """Values refer to the whole vocabulary, so that they have the same meaning in all images."""
    words = ["pizza", "horse", "beach", "shore", "sea", "computer"]
    (encoded,) = shipped_segmenter.encode([HORSES])
    found = seen(shipped_segmenter, encoded, words, 0.03)
    plain = shipped_segmenter(HORSES, sorted(found, key=words.index))
    for threshold in (None, 0.0):
        options = SegmentationOptions(min_area=0.03, background_threshold=threshold)
        result = shipped_segmenter(HORSES, words, options)
        assert result.labels == words and result.background == (threshold is not None)
        names = np.array(words)[result.label_map - result.background]
        assert np.array_equal(names, np.array(plain.labels)[plain.label_map])
        small = result.without_absent()
        assert set(small.labels) == set(found) and small.segments()[0].label == small.labels[0]
        assert np.array_equal(np.array(small.labels)[small.label_map - small.background], names)
    nothing = shipped_segmenter(HORSES, words, SegmentationOptions(min_area=0.03, background_threshold=1))
    assert nothing.without_absent().labels == words[:1] and not nothing.without_absent().label_map.any()
