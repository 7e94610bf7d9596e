"""Group statistics: examples computed by hand, a reference in plain loops, and sums over windows."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgseg_hf.evaluation import oracle_map
from pgseg_hf.evaluation.metrics.analysis import GroupStatistics
from pgseg_hf.scoring import WindowScores
from pgseg_hf.segmentation import ScoredImage

IGNORED = 255
HALVES = torch.tensor([[0, 0, 1, 1]] * 4)


def figures(groups, truth, segments=None, num_labels=3, grouping=None, ignore_index=IGNORED):
    statistics = GroupStatistics()
    segments = torch.eye(4) if segments is None else segments
    statistics.add(groups, segments, truth, num_labels, ignore_index, grouping)
    return statistics.to_dict()


# Computed by hand


def test_a_thing_in_two_groups_and_a_group_on_two_things():
    groups = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]])
    truth = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    result = figures(groups, truth)
    assert result["effective_groups"] == pytest.approx(2**1.5)  # areas of 1/4, 1/4 and 1/2
    assert result["purity"] == pytest.approx(14 / 16)
    assert result["coverage"] == pytest.approx((4 / 10 + 6 / 6) / 2)
    assert result["best_group_iou"] == pytest.approx((4 / 10 + 6 / 8) / 2)
    assert result["same_label_share"] == pytest.approx(1 / 3)  # groups 0 and 1, of three pairs


def test_unknown_pixels_count_for_areas_only():
    groups = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]])
    truth = torch.tensor([[0, 0, 0, IGNORED], [0, 0, 1, IGNORED], [IGNORED] * 4, [IGNORED] * 4])
    result = figures(groups, truth)
    assert result["groups_used"] == 3
    assert result["effective_groups"] == pytest.approx(2**1.5)
    assert result["purity"] == pytest.approx(5 / 6)  # group 1 has one pixel of each label
    assert result["coverage"] == pytest.approx((4 / 5 + 1) / 2)
    assert result["best_group_iou"] == pytest.approx((4 / 5 + 1 / 2) / 2)
    assert result["same_label_share"] == 1  # groups 0 and 1; group 2 has no known pixel


@pytest.mark.parametrize("ignore_index", [None, -1])
def test_without_a_value_that_is_ignored_every_pixel_counts(ignore_index):
    truth = torch.where(HALVES == 1, IGNORED, 0).to(torch.uint8)
    assert figures(HALVES, truth, num_labels=256, ignore_index=ignore_index)["best_group_iou"] == 1


def test_groups_of_one_percent():
    groups = torch.zeros(10, 20, dtype=torch.uint8)
    groups[0, :2], groups[1, 0] = 1, 2  # 2 of 200 pixels, and 1
    result = figures(groups, torch.zeros(10, 20, dtype=torch.long))
    assert (result["groups_used"], result["groups_used_1_percent"]) == (3, 2)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_identical_groups_are_redundant_at_any_scale(scale):
    segments = torch.tensor([[1.0, -2.0, 3.0]]).repeat(4, 1) * torch.tensor([[1.0], [5.0], [1.0], [1.0]])
    result = figures(HALVES, HALVES, segments * scale, grouping=torch.full((4, 2, 2), 0.25))
    assert result["redundancy"] == pytest.approx(1)
    assert result["overlap"] == pytest.approx(1)
    assert result["sharpness"] == 0.25


def test_nothing_known_and_one_group():
    assert GroupStatistics().to_dict()["windows"] == 0
    assert all(math.isnan(value) for name, value in GroupStatistics().to_dict().items() if name != "windows")
    nothing = torch.zeros(4, 4, dtype=torch.long)
    result = figures(nothing, nothing + IGNORED)
    assert (result["groups_used"], result["effective_groups"]) == (1, 1)
    for name in ("purity", "coverage", "best_group_iou", "redundancy", "same_label_share", "overlap"):
        assert math.isnan(result[name]), name


# Random windows


def window(draw):
    """A random window of 5 groups and 4 labels, with patches of 2 x 3."""
    numbers = np.random.default_rng(draw)
    height, width = numbers.integers(1, 7, size=2)
    groups = torch.from_numpy(numbers.integers(0, numbers.integers(1, 6), size=(height, width)))
    labels = np.array([0, 1, 2, 3, IGNORED])[: numbers.integers(1, 6)]
    truth = torch.from_numpy(numbers.choice(labels, size=(height, width)))
    segments = torch.from_numpy(numbers.normal(size=(5, 3)))
    grouping = torch.from_numpy(numbers.dirichlet(np.full(5, 0.5), size=(2, 3))).permute(2, 0, 1)
    return groups, segments, truth, grouping


def mean(values):
    return sum(values) / len(values) if values else float("nan")


def by_loops(windows):
    """Reference implementation in plain loops."""
    units = {name: [] for name in GroupStatistics().to_dict()}
    del units["windows"]
    for groups, segments, truth, grouping in windows:
        pixels = list(zip(groups.flatten().tolist(), truth.flatten().tolist()))
        used = sorted({group for group, _ in pixels})
        shares = [sum(group == other for other, _ in pixels) / len(pixels) for group in used]
        units["groups_used"].append(len(used))
        units["groups_used_1_percent"].append(sum(share >= 0.01 for share in shares))
        units["effective_groups"].append(math.prod(share**-share for share in shares))
        known = [pixel for pixel in pixels if pixel[1] != IGNORED]
        majority = {}
        for group in {group for group, _ in known}:
            labels = [label for other, label in known if other == group]
            majority[group] = max(sorted(set(labels)), key=labels.count)
        units["purity"] += [label == majority[group] for group, label in known]
        for label in {label for _, label in known}:
            own = {place for place, pixel in enumerate(known) if pixel[1] == label}
            parts = [{place for place, pixel in enumerate(known) if pixel[0] == group} for group in used]
            units["coverage"].append(max(len(own & part) / len(own) for part in parts))
            units["best_group_iou"].append(max(len(own & part) / len(own | part) for part in parts))
        for first, second in combinations(used, 2):
            a, b = segments[first], segments[second]
            units["redundancy"].append(float(a @ b / (a.norm() * b.norm())))
            a, b = grouping[first], grouping[second]
            units["overlap"].append(float(torch.minimum(a, b).sum() / torch.maximum(a, b).sum()))
        units["same_label_share"] += [majority[a] == majority[b] for a, b in combinations(majority, 2)]
        units["sharpness"] += grouping.amax(0).flatten().tolist()
    return {name: mean(values) for name, values in units.items()} | {"windows": len(windows)}


def summed(windows):
    statistics = GroupStatistics()
    for groups, segments, truth, grouping in windows:
        statistics.add(groups, segments, truth, 4, IGNORED, grouping)
    return statistics


@given(st.lists(st.integers(0, 10**6).map(window), min_size=1, max_size=4), st.integers(0, 4))
def test_equals_loops_over_pixels_and_pairs(windows, cut):
    statistics = summed(windows[:cut])
    statistics.merge(summed(windows[cut:]))
    assert statistics.to_dict() == pytest.approx(by_loops(windows), nan_ok=True)
    assert type(statistics.to_dict()["windows"]) is int


@given(st.integers(0, 10**6).map(window), st.permutations(range(5)))
def test_the_numbers_of_groups_do_not_matter(sample, order):
    groups, segments, truth, grouping = sample
    order = torch.tensor(order)
    renumbered = (order.argsort()[groups], segments[order], truth, grouping[order])
    assert summed([renumbered]).to_dict() == pytest.approx(summed([sample]).to_dict(), nan_ok=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"truth": HALVES[:3]}, r"\(4, 4\) .*truth \(3, 4\)"),
        ({"groups": HALVES[:0], "truth": HALVES[:0]}, r"\(0, 4\)"),
        ({"groups": HALVES + 3}, "groups has values from 3 to 4, expected 0 to 3"),
        ({"groups": HALVES - 1}, "groups has values from -1"),
        ({"truth": HALVES + 2}, "truth has values from 2 to 3, expected 0 to 2"),
    ],
)
def test_errors_count_nothing(changed, message):
    values = {"groups": HALVES, "segments": torch.eye(4), "truth": HALVES, "grouping": None} | changed
    statistics = GroupStatistics()
    with pytest.raises(ValueError, match=message):
        statistics.add(num_labels=3, ignore_index=IGNORED, **values)
    assert not statistics.sums.any()


# Oracle maps


def test_the_oracle_names_each_windows_groups_by_majority():
    # Two windows of 2 x 3 pixels on 2 x 4 pixels; they overlap in columns 1 and 2.
    truth = np.array([[0, 0, 1, 2], [0, 1, 1, 255]])
    left = WindowScores(torch.tensor([[0, 0, 1], [0, 0, 1]]), torch.rand(3, 5), 0, 0)
    right = WindowScores(torch.tensor([[0, 1, 1], [1, 1, 2]]), torch.rand(3, 5), 0, 1)
    image = ScoredImage((2, 4), (2, 4), [left, right])
    # Left: group 0 has label 0 (three to one), group 1 label 1. Right: group 0 has label 0, group 1 label 1 (three to
    # one), group 2 only unknown pixels. Where the windows disagree, the lower label wins.
    expected = [[0, 0, 1, 1], [0, 0, 1, 0]]
    assert oracle_map(image, truth, 3).tolist() == expected


def test_the_oracle_counts_what_is_unknown_only_where_told():
    image = ScoredImage(
        (1, 4), (1, 4), [WindowScores(torch.zeros(1, 4, dtype=torch.uint8), torch.rand(1, 2))]
    )
    truth = np.array([[2, 2, 2, 1]])
    assert oracle_map(image, truth, 3, ignore_index=None).tolist() == [[2] * 4]
    assert oracle_map(image, truth, 2, ignore_index=2).tolist() == [[1] * 4]


def test_the_oracle_works_at_the_size_that_the_model_saw():
    groups = torch.arange(8).repeat_interleave(3).repeat(6, 1)
    image = ScoredImage((2, 8), (6, 24), [WindowScores(groups, torch.rand(8, 2))])
    truth = np.tile(np.arange(8) % 2 * 4, (2, 1))
    assert oracle_map(image, truth, 5).tolist() == truth.tolist()
