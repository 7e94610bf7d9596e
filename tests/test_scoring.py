from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import dense

from pgseg_hf.scoring import (
    WindowScores,
    best_labels,
    dense_probabilities,
    first_largest,
    group_map,
    group_scores,
    merge_windows,
    window_starts,
)


def test_group_scores_by_hand():
    segments = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    image = torch.tensor([1.0, 2.0, 0.0])
    scores = group_scores(segments, image, top_k=2)
    for row, logits in enumerate(np.asarray(segments)):
        full = np.exp(logits) / np.exp(logits).sum()
        kept = np.exp(logits[:2]) / np.exp(logits[:2]).sum()
        np.testing.assert_allclose(scores[row], [kept[0] * full[0], kept[1] * full[1], 0.0], rtol=1e-6)


def test_background_is_where_the_best_score_is_low_and_keeps_class_scores():
    segments = torch.tensor([[9.0, 0.0], [0.1, 0.0]])
    plain = group_scores(segments, torch.zeros(2))
    scores = group_scores(segments, torch.zeros(2), background_threshold=0.9)
    assert scores[:, 0].tolist() == [0.0, 1.0]
    torch.testing.assert_close(scores[:, 1:], plain)


def test_the_best_group_is_never_background():
    segments = torch.tensor([[0.2, 0.0], [0.1, 0.0]])
    scores = group_scores(segments, torch.zeros(2), background_threshold=0.99)
    assert scores[:, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_background_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match="background_threshold"):
        group_scores(torch.zeros(2, 2), torch.zeros(2), background_threshold=threshold)


def test_only_the_top_labels_of_the_image_score():
    generator = torch.Generator().manual_seed(0)
    segments, image = torch.randn(8, 50, generator=generator), torch.randn(50, generator=generator)
    scores = group_scores(segments, image)
    assert set((scores > 0).any(0).nonzero()[:, 0].tolist()) == set(image.topk(5).indices.tolist())


def test_group_map_has_the_input_size_and_the_nearest_patches_group():
    grouping = torch.zeros(3, 2, 2)
    grouping[
        torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 1], [0, 1]])
    ] = 1
    groups = group_map(grouping, (7, 9))
    assert groups.shape == (7, 9)
    assert [groups[0, 0], groups[0, -1], groups[-1, 0], groups[-1, -1]] == [0, 1, 2, 0]
    assert group_map(torch.eye(257)[:, None], (1, 257))[0].tolist() == list(range(257))


@given(st.integers(1, 500), st.integers(1, 200), st.integers(1, 200))
def test_windows_cover_the_side_and_stay_inside(length, window, stride):
    if stride > window:
        with pytest.raises(ValueError, match="stride"):
            window_starts(length, window, stride)
        return
    starts = window_starts(length, window, stride)
    covered = {pixel for start in starts for pixel in range(start, min(start + window, length))}
    assert covered == set(range(length))
    assert all(start + window <= length for start in starts) or length < window
    assert len(starts) == max(length - window + stride - 1, 0) // stride + 1


def test_released_windows_of_a_photo():
    assert window_starts(448, 448, 224) == [0]
    assert window_starts(597, 448, 224) == [0, 149]
    assert window_starts(900, 448, 224) == [0, 224, 448, 452]


def random_windows(seed: int, size=(20, 30), window=12, stride=7, labels=9, background=True):
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for top in window_starts(size[0], window, stride):
        for left in window_starts(size[1], window, stride):
            groups = torch.randint(0, 4, (window, window), generator=generator).to(torch.uint8)
            scores = group_scores(
                torch.randn(4, labels, generator=generator) * 3,
                torch.randn(labels, generator=generator),
                0.4 if background else None,
                top_k=3,
            )
            windows.append(WindowScores(groups, scores, top, left))
    return windows


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([(20, 30), (31, 17), (61, 80)]))
def test_label_maps_equal_the_dense_computation(seed, background, target):
    size = (20, 30)
    windows = random_windows(seed, background=background)
    total, covered = 0, torch.zeros(size)
    for window in windows:
        padded = torch.zeros(window.scores.shape[1], *size)
        rows, columns = slice(window.top, window.top + 12), slice(window.left, window.left + 12)
        padded[:, rows, columns] = dense(window)
        total = total + padded
        covered[rows, columns] += 1
    mean = (total / covered)[None]
    expected = torch.nn.functional.interpolate(mean, target, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(dense_probabilities(windows, size, target), expected.softmax(0))
    scores, channels, count = merge_windows(windows, size)
    labels, best = best_labels(scores, channels, count, target)
    torch.testing.assert_close(best, expected.amax(0))
    torch.testing.assert_close(labels, expected.softmax(0).argmax(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [[0, 1, 2], [3, 5, 8], [8], []])
def test_label_maps_are_the_argmax_of_the_softmax_in_every_precision(dtype, channels):
    generator = torch.Generator().manual_seed(len(channels))
    scores = torch.rand(len(channels), 11, 13, generator=generator, dtype=torch.float64)
    steps = torch.finfo(dtype).eps / 4 * torch.randint(0, 40, scores.shape, generator=generator)
    near = torch.rand(11, 13, generator=generator) < 0.5  # where all scores differ by a few rounding steps
    scores = torch.where(near, 0.25 + steps, scores).to(dtype)
    scores[:, :2] = 0.0
    for count in (max(channels, default=0) + 1, 300):
        dense = scores.new_zeros(count, 11, 13)
        dense[channels] = scores
        labels, best = best_labels(scores, channels, count)
        probabilities = dense.softmax(dim=0)
        if dtype in (torch.float64, torch.float32):
            assert torch.equal(labels, probabilities.argmax(dim=0))
        else:  # in 16 bits the rounding of torch's softmax depends on the layout
            found = probabilities.gather(0, labels[None])[0].double()
            assert (found >= probabilities.amax(dim=0).double() * (1 - torch.finfo(dtype).eps)).all()
        assert torch.equal(best, dense.amax(dim=0))


def test_chunks_do_not_change_label_maps(monkeypatch):
    scores, channels, count = merge_windows(random_windows(3), (20, 30))
    whole = best_labels(scores, channels, count, (50, 40))
    for name, entries in (
        ("_CACHED_ENTRIES", count * 40 * 7),
        ("_CHUNK_ENTRIES", 1),
    ):  # seven rows, one channel
        monkeypatch.setattr(f"pgseg_hf.scoring.{name}", entries)
        in_parts = best_labels(scores, channels, count, (50, 40))
        assert torch.equal(whole[0], in_parts[0])
        torch.testing.assert_close(whole[1], in_parts[1])


@pytest.mark.parametrize("channels", [1, 2, 255, 256, 300])
def test_first_largest_is_argmax(channels):
    maps = torch.randint(0, 5, (channels, 6, 7), generator=torch.Generator().manual_seed(channels)).float()
    maps[-1, :2] = 9.0
    assert torch.equal(first_largest(maps), maps.argmax(dim=0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(value):
    windows = random_windows(2)
    windows[1].scores[0, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite, expected finite"):
        merge_windows(windows, (20, 30))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([3.0, 12.0, 30.0]))
def test_scores_that_the_softmax_cannot_tell_apart_go_to_the_first_label(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for left in (0, 10):
        groups = torch.randint(0, 4, (12, 12), generator=generator).to(torch.uint8)
        segments, image = torch.randn(4, 30, generator=generator), torch.randn(30, generator=generator)
        windows.append(WindowScores(groups, group_scores(segments * spread, image * spread), 0, left))
    scores, channels, count = merge_windows(windows, (12, 22))
    labels, _ = best_labels(scores, channels, count, (30, 41))
    probabilities = dense_probabilities(windows, (12, 22), (30, 41))
    assert torch.equal(labels, probabilities.argmax(0))
    with mock.patch("pgseg_hf.scoring._CHUNK_ENTRIES", 5 * 30 * 41):
        in_chunks, _ = best_labels(scores, channels, count, (30, 41))
    assert (in_chunks == labels).float().mean() > 0.8
    torch.testing.assert_close(probabilities.gather(0, in_chunks[None]), probabilities.amax(0, keepdim=True))
