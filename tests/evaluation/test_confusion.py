"""Counts of pixels against loops, scikit-learn's definition by hand, and other rules for absent labels."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgseg_hf.evaluation import ConfusionMatrix


@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.sampled_from([255, -1, None]))
def test_counts_against_loops(seed, num_labels, ignore_index):
    rng = np.random.default_rng(seed)
    truths, predictions = rng.integers(0, num_labels, (2, 3, 4, 5)).astype(np.int16)
    if ignore_index is not None:
        truths[rng.random(truths.shape) < 0.3] = ignore_index
    first, second = (ConfusionMatrix(num_labels, ignore_index) for _ in range(2))
    for matrix, truth, predicted in zip((first, first, second), truths, predictions, strict=True):
        matrix.add(truth, predicted)
    first.merge(second)
    pairs = list(zip(truths.ravel().tolist(), predictions.ravel().tolist(), strict=True))
    pairs = [(true, guess) for true, guess in pairs if true != ignore_index]
    expected = []
    for label in range(num_labels):
        both = sum(true == guess == label for true, guess in pairs)
        either = sum(label in pair for pair in pairs)
        expected.append(both / either if either else math.nan)
    np.testing.assert_allclose(first.iou(), expected)
    assert first.counts.dtype == np.int64 and first.counts.sum() == len(pairs)
    if pairs:
        assert first.mean_iou() == pytest.approx(np.nanmean(expected))
        assert first.pixel_accuracy() == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_counts_by_hand():
    matrix = ConfusionMatrix(4)
    matrix.add(np.array([[0, 0, 1, 255]], np.uint8), np.array([[0, 1, 1, 3]]))
    assert matrix.counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(matrix.iou(), [0.5, 0.5, np.nan, np.nan])
    assert (matrix.mean_iou(), matrix.pixel_accuracy()) == (0.5, 2 / 3)
    matrix.sum_over_processes()
    assert matrix.counts.sum() == 3 and matrix.counts.dtype == np.int64


def test_nothing_counted_gives_nan():
    matrix = ConfusionMatrix(2)
    matrix.add(np.full((2, 2), 255), np.zeros((2, 2), int))
    assert math.isnan(matrix.mean_iou()) and math.isnan(matrix.pixel_accuracy())


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        ([0, 1], [0], r"truth has shape \(2,\) and the prediction \(1,\)"),
        ([0, 7], [0, 1], "truth has values from 0 to 7, expected 0 to 1 and 255 for unknown"),
        ([0, 1], [-1, 1], "prediction has values from -1 to 1"),
    ],
)
def test_pixels_that_are_no_labels(truth, predicted, message):
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(2).add(np.array(truth), np.array(predicted))


def test_counts_of_other_labels_cannot_be_merged():
    with pytest.raises(ValueError, match="counts of 2 labels cannot take those of 3"):
        ConfusionMatrix(2).merge(ConfusionMatrix(3))


def test_all_figures_by_hand():
    matrix = ConfusionMatrix(4)
    # Label 2 is only predicted, label 3 is nowhere.
    matrix.counts[:3, :3] = [[6, 1, 1], [0, 2, 0], [0, 0, 0]]
    np.testing.assert_array_equal(matrix.iou(), [6 / 8, 2 / 3, 0, np.nan])
    np.testing.assert_array_equal(matrix.accuracy(), [6 / 8, 1, np.nan, np.nan])
    assert matrix.mean_iou() == pytest.approx((6 / 8 + 2 / 3) / 3)
    assert matrix.mean_iou(absent="zero") == pytest.approx((6 / 8 + 2 / 3) / 4)
    assert matrix.mean_accuracy() == pytest.approx((6 / 8 + 1) / 2)
    assert matrix.mean_accuracy(absent="zero") == pytest.approx((6 / 8 + 1) / 4)
    assert matrix.pixel_accuracy() == 8 / 10
    assert matrix.frequency_weighted_iou() == pytest.approx(0.8 * 6 / 8 + 0.2 * 2 / 3)


@given(st.integers(0, 2**31 - 1), st.integers(1, 5))
def test_relations_of_the_figures(seed, num_labels):
    rng = np.random.default_rng(seed)
    matrix = ConfusionMatrix(num_labels)
    matrix.counts[:] = rng.integers(0, 3, (num_labels, num_labels)) * rng.integers(0, 2**40)
    if not matrix.counts.any():
        return
    assert matrix.mean_iou("zero") <= matrix.mean_iou() <= matrix.mean_accuracy() + 1e-12
    assert 0 <= matrix.frequency_weighted_iou() <= matrix.pixel_accuracy() + 1e-12 <= 1 + 1e-12
    matrix.counts = np.diag(matrix.counts.sum(0))
    for figure in (matrix.mean_iou, matrix.mean_accuracy, matrix.pixel_accuracy):
        assert figure() == 1
    assert matrix.frequency_weighted_iou() == pytest.approx(1)


def test_nothing_counted_gives_nan_for_all_figures():
    matrix = ConfusionMatrix(2)
    figures = (matrix.mean_accuracy, matrix.frequency_weighted_iou, lambda: matrix.mean_iou("zero"))
    assert all(math.isnan(figure()) for figure in figures)
    assert np.isnan(matrix.iou()).all() and np.isnan(matrix.accuracy()).all()


def test_values_that_make_no_sense():
    for figure in (ConfusionMatrix(2).mean_iou, ConfusionMatrix(2).mean_accuracy):
        with pytest.raises(ValueError, match="absent is 'none', expected 'skip' or 'zero'"):
            figure(absent="none")
    with pytest.raises(ValueError, match="num_labels is 0, expected at least 1"):
        ConfusionMatrix(0)
