"""Confusion matrices against loops and scikit-learn, examples by hand, and rules for absent labels."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, jaccard_score

from pgseg_hf.evaluation import ConfusionMatrix


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=40)
@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.sampled_from([255, -1, None]))
@example(0, 1, None)
def test_counts_and_iou_of_scikit_learn(seed, num_labels, ignore_index):
    rng = np.random.default_rng(seed)
    # Some labels do not occur in any map.
    present = [rng.choice(num_labels, rng.integers(1, num_labels + 1), replace=False) for _ in range(2)]
    truths, predictions = (rng.choice(each, (3, 4, 5)).astype(np.int16) for each in present)
    if ignore_index is not None:
        truths[rng.random(truths.shape) < 0.3] = ignore_index
    first, second = (ConfusionMatrix(num_labels, ignore_index) for _ in range(2))
    for matrix, truth, predicted in zip((first, first, second), truths, predictions, strict=True):
        matrix.add(truth, predicted)
    first.merge(second)
    known = truths != (math.nan if ignore_index is None else ignore_index)
    truth, predicted, labels = truths[known], predictions[known], list(range(num_labels))
    assert (first.counts.dtype, first.ignored) == (np.int64, (~known).sum())
    if not len(truth):
        return
    assert first.counts.tolist() == confusion_matrix(truth, predicted, labels=labels).tolist()
    each = jaccard_score(truth, predicted, labels=labels, average=None, zero_division=0)
    np.testing.assert_array_equal(np.isnan(first.iou()), ~np.isin(labels, [*truth, *predicted]))
    np.testing.assert_allclose(np.nan_to_num(first.iou()), each, rtol=1e-12)
    assert first.mean_iou() == pytest.approx(each[np.isin(labels, [*truth, *predicted])].mean(), rel=1e-12)
    assert first.mean_iou("zero") == pytest.approx(each.mean(), rel=1e-12)
    assert first.pixel_accuracy() == pytest.approx((truth == predicted).mean())


def test_counts_by_hand():
    matrix = ConfusionMatrix(4)
    matrix.add(np.array([[0, 0, 1, 255]], np.uint8), np.array([[0, 1, 1, 3]]))
    assert matrix.counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert (matrix.ignored, matrix.ignored_share()) == (1, 0.25)
    assert matrix.sum_over_processes() is matrix and matrix.counts.sum() == 3
    large = ConfusionMatrix(2)
    large.counts[:] = [[2**40, 2**31], [1, 2**33]]
    large.merge(large)
    np.testing.assert_allclose(large.iou()[0], 2**40 / (2**40 + 2**31 + 1), rtol=1e-14)


def test_all_figures_by_hand():
    matrix = ConfusionMatrix(4)
    # Label 2 is only predicted, label 3 is absent.
    matrix.counts[:3, :3] = [[6, 1, 1], [0, 2, 0], [0, 0, 0]]
    np.testing.assert_array_equal(matrix.iou(), [6 / 8, 2 / 3, 0, np.nan])
    np.testing.assert_array_equal(matrix.accuracy(), [6 / 8, 1, np.nan, np.nan])
    assert matrix.figures() == pytest.approx(
        {
            "mean_iou": (6 / 8 + 2 / 3) / 3,
            "pixel_accuracy": 8 / 10,
            "mean_accuracy": (6 / 8 + 1) / 2,
            "frequency_weighted_iou": 0.8 * 6 / 8 + 0.2 * 2 / 3,
        }
    )
    assert matrix.mean_iou(absent="zero") == pytest.approx((6 / 8 + 2 / 3) / 4)
    assert matrix.mean_accuracy(absent="zero") == pytest.approx((6 / 8 + 1) / 4)


def test_nothing_counted_gives_nan():
    matrix = ConfusionMatrix(2)
    matrix.add(np.full((2, 2), 255), np.zeros((2, 2), int))
    assert all(map(math.isnan, [*matrix.figures().values(), matrix.mean_iou("zero")]))
    assert np.isnan(matrix.iou()).all() and np.isnan(matrix.accuracy()).all()


def test_many_unknown_pixels_are_told():
    matrix = ConfusionMatrix(2)
    matrix.add(np.array([0, 1, 1, 255]), np.zeros(4, int))
    assert matrix.doubts(["a", "b"]) == []
    matrix.add(np.array([255]), np.zeros(1, int))
    assert matrix.doubts(["a", "b"]) == ["2 of the masks' 5 pixels (40.0%) are unknown and ignored."]


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        ([0, 1], [0], r"\(2,\).*\(1,\)"),
        ([0, 7], [0, 1], "truth has values from 0 to 7, expected 0 to 1 and 255"),
        ([0, 1], [-1, 1], "prediction has values from -1 to 1"),
    ],
)
def test_pixels_that_are_no_labels(truth, predicted, message):
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(2).add(np.array(truth), np.array(predicted))


def test_values_that_make_no_sense():
    for figure in (ConfusionMatrix(2).mean_iou, ConfusionMatrix(2).mean_accuracy):
        with pytest.raises(ValueError, match="absent is 'none'"):
            figure(absent="none")
    with pytest.raises(ValueError, match="num_labels is 0"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match="ignore_index is 1"):
        ConfusionMatrix(2, ignore_index=1)
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match=r"\(3, 3\), expected \(2, 2\)"):
        matrix.merge(ConfusionMatrix(3))
    assert not matrix.counts.any()
