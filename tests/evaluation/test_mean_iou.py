"""The `evaluate` metric: its inputs, and its agreement with the confusion matrix."""

import math
import socket

import evaluate
import numpy as np
import pytest
import torch

from pgseg_hf.evaluation import ConfusionMatrix
from pgseg_hf.evaluation.metrics.mean_iou import MeanIoU


def test_figures_are_those_of_the_counts():
    rng = np.random.default_rng(0)
    truths, predictions = rng.integers(0, 4, (2, 3, 5, 6))
    counted = ConfusionMatrix(5)
    counted.add(truths, predictions)
    for absent in ("skip", "zero"):
        metric = MeanIoU(5, absent=absent)
        metric.add_batch(predictions=predictions[:2], references=truths[:2])
        found = metric.compute(predictions=predictions[2:], references=truths[2:])
        np.testing.assert_array_equal(found.pop("per_category_iou"), counted.iou())
        np.testing.assert_array_equal(found.pop("per_category_accuracy"), counted.accuracy())
        assert found == {
            "mean_iou": counted.mean_iou(absent),
            "mean_accuracy": counted.mean_accuracy(absent),
            "overall_accuracy": counted.pixel_accuracy(),
            "frequency_weighted_iou": counted.frequency_weighted_iou(),
        }


@pytest.mark.parametrize("ignored", [255, -100])
def test_reduced_labels_by_hand(ignored):
    metric = MeanIoU(3, ignored, reduce_labels=True)
    # 0 and the ignored value are unknown; 1 to 3 are labels 0 to 2.
    reference = np.array([[0, 1, 2], [3, ignored, 1]])
    before = reference.copy()
    metric.add(reference=reference, prediction=[[0, 0, 1], [0, 2, 0]])
    assert metric.confusion.counts.tolist() == [[2, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert (reference == before).all()
    with pytest.raises(ValueError, match="got None"):
        MeanIoU(3, ignore_index=None, reduce_labels=True)


@pytest.mark.parametrize(
    "kind",
    [
        lambda maps: maps.astype(np.uint8),
        torch.from_numpy,
        lambda maps: torch.from_numpy(maps).to(torch.uint8),
        lambda maps: maps.tolist(),
        list,
        iter,
    ],
    ids=["numpy", "torch", "torch uint8", "lists", "list of arrays", "generator"],
)
def test_arrays_tensors_and_lists(kind):
    truth, predicted = np.random.default_rng(0).integers(0, 3, (2, 4, 5, 6))
    metric = MeanIoU(3)
    metric.add_batch(predictions=kind(predicted), references=kind(truth))
    expected = ConfusionMatrix(3)
    expected.add(truth, predicted)
    assert metric.confusion.counts.tolist() == expected.counts.tolist()


def test_compute_starts_afresh():
    metric = MeanIoU(2)
    metric.add(prediction=[[0, 1]], reference=[[0, 0]])
    assert metric.compute()["overall_accuracy"] == 0.5
    assert math.isnan(metric.compute()["mean_iou"])


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ([[0.0, 1.0]], [[0, 1]], "float64"),
        ([0, 1], [0, 1], r"\(2,\)"),
        (None, [[0, 1]], "expected integers"),
    ],
)
def test_maps_that_make_no_sense(prediction, reference, message):
    metric = MeanIoU(2)
    with pytest.raises(ValueError, match=message):
        metric.add(prediction=prediction, reference=reference)
    assert not metric.confusion.counts.any()


def test_arguments_that_make_no_sense():
    metric = MeanIoU(2)
    with pytest.raises(ValueError, match="num_labels"):
        metric.compute(predictions=[[[0]]], references=[[[0]]], num_labels=2)
    for given_maps in ({"predictions": [[[0]]]}, {"references": [[[0]]]}):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            metric.compute(**given_maps)


def test_a_metric_of_evaluate_without_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    metric = MeanIoU(2)
    assert isinstance(metric, evaluate.Metric)
    assert set(metric.features) == {"predictions", "references"} and "mmsegmentation" in metric.description
    assert metric.compute(predictions=[[[0, 1]]], references=[[[0, 1]]])["mean_iou"] == 1
