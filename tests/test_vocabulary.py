"""A background by the words that a checkpoint knows."""

import numpy as np
import pytest
import torch

from pgseg_hf import PGSegProcessor, SegmentationOptions, Segmenter, segmentation
from pgseg_hf.scoring import WindowScores, add_background, chance_of_labels

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
    """All words of a model of random weights are nearly the same."""
    monkeypatch.setattr(segmentation, "SAME_MEANING", 2.0)


def test_one_label_need_not_cover_the_image(knowing, tiny_segmenter, photo, different):
    everywhere = knowing(photo, ["elephant"])
    assert set(np.unique(everywhere.label_map)) == {0}
    share = {}
    for threshold in (0.0, 0.2, 1.0):
        found = knowing(photo, ["elephant"], SegmentationOptions(background_threshold=threshold))
        share[threshold] = (found.label_map == 1).mean()
    assert share[0.0] == 1 and share[1.0] == 0
    assert share[0.0] >= share[0.2] >= share[1.0]
    # Without a vocabulary the one label wins against nothing.
    options = SegmentationOptions(background_threshold=1.0)
    assert (tiny_segmenter(photo, ["elephant"], options).label_map == 1).any()


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
