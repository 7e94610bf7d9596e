"""The metric of `evaluate` against scikit-learn and loops."""

import json
import math
import socket
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, jaccard_score

from pgseg_hf.evaluation.metrics.mean_iou import MeanIoU

FIGURES = {
    "mean_iou",
    "mean_accuracy",
    "overall_accuracy",
    "frequency_weighted_iou",
    "per_category_iou",
    "per_category_accuracy",
}


def random_maps(rng, num_labels, ignore_index=255, count=3):
    """Label maps of different sizes; some labels are in none of them, some pixels are unknown."""
    pairs = []
    labels = [rng.choice(num_labels, rng.integers(1, num_labels + 1), replace=False) for _ in range(2)]
    for _ in range(count):
        size = rng.integers(1, 7, 2)
        truth, predicted = (rng.choice(each, size) for each in labels)
        if ignore_index is not None:
            truth[rng.random(size) < 0.3] = ignore_index
        pairs.append((truth, predicted))
    return pairs


def known_pixels(pairs, ignore_index=255):
    """All pixels that count, one after the other."""
    truth, predicted = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    known = np.full(truth.shape, True) if ignore_index is None else truth != ignore_index
    return truth[known], predicted[known]


def figures_by_loops(truth, predicted, num_labels, absent):
    pixels = list(zip(truth.tolist(), predicted.tolist(), strict=True))
    ious, accuracies, weighted = [], [], 0.0
    for label in range(num_labels):
        hits = sum(pixel == (label, label) for pixel in pixels)
        true = sum(pixel[0] == label for pixel in pixels)
        either = sum(label in pixel for pixel in pixels)
        ious.append(hits / either if either else math.nan)
        accuracies.append(hits / true if true else math.nan)
        weighted += true / len(pixels) * hits / either if either else 0

    def mean(values):
        present = [value for value in values if not math.isnan(value)]
        return sum(present) / (len(present) if absent == "skip" else num_labels)

    return {
        "mean_iou": mean(ious),
        "mean_accuracy": mean(accuracies),
        "overall_accuracy": sum(true == guess for true, guess in pixels) / len(pixels),
        "frequency_weighted_iou": weighted,
        "per_category_iou": ious,
        "per_category_accuracy": accuracies,
    }


def assert_equal(found, expected):
    assert set(found) == set(expected) == FIGURES
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


@settings(max_examples=40)
@given(
    st.integers(0, 2**31 - 1),
    st.integers(1, 6),
    st.sampled_from([255, -1, None]),
    st.sampled_from(["skip", "zero"]),
)
def test_figures_against_loops(seed, num_labels, ignore_index, absent):
    pairs = random_maps(np.random.default_rng(seed), num_labels, ignore_index)
    metric = MeanIoU(num_labels, ignore_index, absent)
    truth, predicted = known_pixels(pairs, ignore_index)
    for reference, prediction in pairs:
        metric.add(prediction=prediction, reference=reference)
    found = metric.compute()
    if len(truth):
        assert_equal(found, figures_by_loops(truth, predicted, num_labels, absent))
    else:
        assert all(np.isnan(value).all() for value in found.values())


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=40)
@given(st.integers(0, 2**31 - 1), st.integers(2, 6), st.booleans())
@example(0, 2, True)
def test_counts_and_iou_of_scikit_learn(seed, num_labels, with_background):
    """Without a background, its pixels are unknown and nothing is predicted there."""
    rng = np.random.default_rng(seed)
    pairs = random_maps(rng, num_labels)
    metric = MeanIoU(num_labels if with_background else num_labels - 1, reduce_labels=not with_background)
    for truth, predicted in pairs:
        if not with_background:
            predicted = np.maximum(predicted, 1) - 1
        metric.add(prediction=predicted, reference=truth)
    truth, predicted = known_pixels(pairs)
    if not with_background:
        predicted = np.maximum(predicted, 1)[truth > 0]
        truth = truth[truth > 0]
    if not len(truth):
        return
    labels = list(range(0 if with_background else 1, num_labels))
    assert metric.confusion.counts.tolist() == confusion_matrix(truth, predicted, labels=labels).tolist()
    found = metric.compute()
    each = jaccard_score(truth, predicted, labels=labels, average=None, zero_division=0)
    absent = ~np.isin(labels, [*truth, *predicted])
    np.testing.assert_array_equal(np.isnan(found["per_category_iou"]), absent)
    np.testing.assert_allclose(np.nan_to_num(found["per_category_iou"]), each, rtol=1e-12)
    # Labels that only one side has count with 0, those that neither has are left out.
    present = np.union1d(truth, predicted)
    average = jaccard_score(truth, predicted, labels=present, average="macro", zero_division=0)
    assert found["mean_iou"] == pytest.approx(average, rel=1e-12)


def test_reduced_labels_by_hand():
    metric = MeanIoU(3, reduce_labels=True)
    # Raw 0 and 255 are unknown, 1 to 3 are labels 0 to 2.
    metric.add(reference=np.array([[0, 1, 2], [3, 255, 1]], np.uint8), prediction=[[0, 0, 1], [0, 2, 0]])
    assert metric.confusion.counts.tolist() == [[2, 0, 0], [0, 1, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="reduce_labels needs an ignore_index"):
        MeanIoU(3, ignore_index=None, reduce_labels=True)


@pytest.mark.parametrize("ignored", [255, -100])
def test_the_reference_is_not_changed(ignored):
    reference = np.array([[0, 1, 2]])
    MeanIoU(2, ignored, reduce_labels=True).add(reference=reference, prediction=np.array([[0, 0, 1]]))
    assert reference.tolist() == [[0, 1, 2]]


def test_arrays_tensors_and_lists_of_one_or_many_maps():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 3, (2, 4, 5, 6))
    expected = figures_by_loops(truth.ravel(), predicted.ravel(), 3, "skip")
    kinds = {
        "numpy": lambda maps: maps.astype(np.uint8),
        "torch": lambda maps: torch.from_numpy(maps),
        "torch uint8": lambda maps: torch.from_numpy(maps).to(torch.uint8),
        "lists": lambda maps: maps.tolist(),
        "list of arrays": list,
        "generator": iter,
    }
    metric = MeanIoU(3)
    for name, kind in kinds.items():
        assert_equal(metric.compute(predictions=kind(predicted), references=kind(truth)), expected)
        metric.add_batch(predictions=kind(predicted[:3]), references=kind(truth[:3]))
        if name != "generator":
            metric.add(prediction=kind(predicted)[3], reference=kind(truth)[3])
        else:
            metric.add(prediction=predicted[3], reference=truth[3])
        assert_equal(metric.compute(), expected)
    metric.add_batch(predictions=predicted[:2], references=truth[:2])
    assert_equal(metric.compute(predictions=predicted[2:], references=truth[2:]), expected)


def test_compute_starts_afresh():
    metric = MeanIoU(2)
    metric.add(prediction=[[0, 1]], reference=[[0, 0]])
    assert metric.compute()["overall_accuracy"] == 0.5
    assert math.isnan(metric.compute()["mean_iou"])
    metric.add(prediction=[[1, 1]], reference=[[1, 1]])
    found = metric.compute()
    assert found["overall_accuracy"] == found["mean_iou"] == 1
    np.testing.assert_array_equal(found["per_category_iou"], [np.nan, 1])


def test_rules_for_absent_labels_by_hand():
    # Label 2 is nowhere, label 1 is only predicted: its IoU is 0 under both rules, and it has no accuracy.
    expected = {"skip": (0.25, 0.5), "zero": (0.5 / 3, 0.5 / 3)}
    for absent, (iou, accuracy) in expected.items():
        found = MeanIoU(3, absent=absent).compute(predictions=[[[0, 1]]], references=[[[0, 0]]])
        assert (found["mean_iou"], found["mean_accuracy"]) == pytest.approx((iou, accuracy))
    with pytest.raises(ValueError, match="absent is 'drop', expected 'skip' or 'zero'"):
        MeanIoU(3, absent="drop").compute(predictions=[[[0, 1]]], references=[[[0, 0]]])


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ([[0, 1]], [[0], [1]], r"truth has shape \(2, 1\) and the prediction \(1, 2\)"),
        ([[0, 2]], [[0, 1]], "prediction has values from 0 to 2, expected 0 to 1"),
        ([[0, 1]], [[0, 7]], "truth has values from 0 to 7"),
        ([[0.0, 1.0]], [[0, 1]], "type float64, expected integers"),
        ([0, 1], [0, 1], r"shape \(2,\)"),
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
    with pytest.raises(ValueError, match="unknown arguments num_labels"):
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
    assert isinstance(metric, evaluate.Metric) and isinstance(metric, evaluate.EvaluationModule)
    assert set(metric.features) == {"predictions", "references"} and "mmsegmentation" in metric.description
    assert metric.compute(predictions=[[[0, 1]]], references=[[[0, 1]]])["mean_iou"] == 1


def test_counts_beyond_32_bits():
    metric = MeanIoU(2)
    metric.confusion.counts[:] = [[2**40, 2**31], [1, 2**33]]
    metric.add(prediction=[[1, 1, 0]], reference=[[0, 1, 1]])
    assert metric.confusion.counts.tolist() == [[2**40, 2**31 + 1], [2, 2**33 + 1]]
    first = 2**40 / (2**40 + 2**31 + 3)
    np.testing.assert_allclose(metric.compute()["per_category_iou"][0], first, rtol=1e-14)


def one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rng = np.random.default_rng(0)
    results = []
    for count in range(4):
        metric = MeanIoU(5)
        metric.confusion.counts[1, 1] = 2**33 * rank
        # Process 0 has all maps but the last, so that 0 and 1 pictures leave one process without any.
        pairs = random_maps(rng, 5, count=count)
        own = pairs[:-1] if rank == 0 else pairs[-1:]
        found = metric.compute(predictions=[each[1] for each in own], references=[each[0] for each in own])
        results.append({name: np.asarray(value).tolist() for name, value in found.items()})
    Path(f"{folder}/{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_two_processes_with_uneven_numbers_of_maps(tmp_path):
    mp.spawn(one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    rng = np.random.default_rng(0)
    for count in range(4):
        metric = MeanIoU(5)
        metric.confusion.counts[1, 1] = 2**33
        for truth, predicted in random_maps(rng, 5, count=count):
            metric.add(prediction=predicted, reference=truth)
        expected = metric.compute()
        for rank in (0, 1):
            found = json.loads((tmp_path / f"{rank}.json").read_text())[count]
            assert set(found) == FIGURES
            for name, value in found.items():
                np.testing.assert_array_equal(value, expected[name])
