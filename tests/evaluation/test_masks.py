"""Scores computed by hand, with known groups."""

import json
from dataclasses import replace

import numpy as np
import pytest
from benchmark_layouts import quarters, write_benchmark, write_mask, write_noise
from mask_folders import LABELS, QUADRANTS, KnownGroups, make_folder, one_hot
from PIL import Image

from pgseg_hf import SegmentationOptions
from pgseg_hf.evaluation import ConfusionMatrix, MaskFolder, MaskOptions, evaluate_masks
from pgseg_hf.evaluation.benchmarks.catalogue import open_benchmark
from pgseg_hf.images import load_label_map


def test_scores_by_hand(tmp_path):
    truth = QUADRANTS.copy()
    truth[0, :4] = 255
    folder = MaskFolder(make_folder(tmp_path / "a", [truth, np.zeros((8, 8))], {"labels": [*"abcd"]}))
    segmenter = KnownGroups(one_hot(0, 1, 1, 2, count=4))
    result = evaluate_masks(segmenter, folder, MaskOptions(oracle=True))
    scores = result.to_dict()
    assert segmenter.seen == [["a", "b", "c", "d"]]
    # First image: 12 of 12 pixels of a, 16 of 16 of b, the lower left of c is b. Second: 16 a, 32 b, 16 c; all truly a.
    assert result.confusion.counts.tolist() == [[28, 32, 16, 0], [0, 16, 0, 0], [0, 16, 16, 0], [0, 0, 0, 0]]
    assert scores["iou"] == {"a": 28 / 76, "b": 16 / 64, "c": 16 / 48, "d": None}
    assert scores["mean_iou"] == pytest.approx((28 / 76 + 16 / 64 + 16 / 48) / 3)
    assert scores["pixel_accuracy"] == 60 / 124
    assert scores["oracle_mean_iou"] == scores["oracle_pixel_accuracy"] == 1
    assert scores["images"] == 2 and scores["seconds"] > 0
    json.dumps(scores, allow_nan=False)
    assert "oracle_mean_iou" not in evaluate_masks(segmenter, folder).to_dict()


def test_background_by_threshold_or_as_a_label(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", [QUADRANTS], {**LABELS, "background": 1}))
    assert folder.labels == ["sky", "road", "tree"]
    # The second quarter matches neither sky nor tree.
    segmenter = KnownGroups([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    options = SegmentationOptions(background_threshold=0.5)
    assert evaluate_masks(segmenter, folder, MaskOptions(options)).to_dict()["mean_iou"] == 1
    assert segmenter.seen.pop() == ["sky", "tree"]
    segmenter.options = options
    assert evaluate_masks(segmenter, folder).to_dict()["mean_iou"] == 1
    assert segmenter.seen.pop() == ["sky", "tree"]
    segmenter = KnownGroups(one_hot(1, 0, 2, 2))
    ordinary = evaluate_masks(segmenter, folder, MaskOptions(SegmentationOptions())).to_dict()
    assert segmenter.seen.pop() == ["sky", "road", "tree"]
    assert ordinary["iou"] == {"sky": 0.0, "road": 0.0, "tree": 1.0}


def test_binary_masks_are_no_plausible_figures(tmp_path):
    binary = np.kron(np.array([[0, 255], [255, 255]]), np.ones((4, 4), int))
    path = make_folder(tmp_path / "a", [binary], {"labels": ["background", "sky"]})
    segmenter = KnownGroups(one_hot(0, 1, 1, 1, count=2))
    scores = evaluate_masks(segmenter, MaskFolder(path))
    assert scores.to_dict()["ignored_share"] == 0.75
    unknown, absent, binary = scores.doubts(MaskFolder(path))
    assert "48 of the masks' 64 pixels (75.0%)" in unknown
    assert "1 of 2 labels" in absent and ": sky." in absent
    assert "48 pixels (75.0%)" in binary and "--mask-values 0=background,255=sky" in binary
    said = MaskFolder(path, mask_values={"0": "background", "255": "sky"})
    scores = evaluate_masks(segmenter, said)
    assert (scores.confusion.mean_iou(), scores.confusion.ignored, scores.doubts(said)) == (1, 0, [])


@pytest.mark.parametrize("threshold", [None, 0.05])
def test_the_segmenters_own_maps_are_what_is_counted(tiny_segmenter, tmp_path, threshold):
    rng = np.random.default_rng(0)
    sizes = [(90, 120), (120, 90), (70, 200)]
    content = {"labels": ["cat", "grass", "sky", "other"], "background": 3}
    folder = MaskFolder(make_folder(tmp_path / "a", [rng.integers(0, 4, size) for size in sizes], content))
    options = SegmentationOptions(background_threshold=threshold)
    expected = ConfusionMatrix(4)
    for path, mask in ((each.image, each.mask) for each in folder.images):
        if threshold is None:
            label_map = tiny_segmenter(path, folder.labels, options).label_map
        else:
            label_map = np.array([3, 0, 1, 2])[tiny_segmenter(path, folder.labels[:3], options).label_map]
        expected.add(load_label_map(mask), label_map)
    result = evaluate_masks(tiny_segmenter, folder, MaskOptions(options, oracle=True))
    assert result.confusion.counts.tolist() == expected.counts.tolist()
    assert (expected.counts.sum(0) > 0).sum() > 1, "the test needs several labels"
    assert result.oracle.pixel_accuracy() >= result.confusion.pixel_accuracy()


def test_masks_of_another_size(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", [QUADRANTS]))
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(folder.images[0].mask)
    with pytest.raises(ValueError, match=r"000.png has \(8, 9\) pixels .*000.jpg \(8, 8\)"):
        evaluate_masks(KnownGroups(one_hot(0, 0, 0, 0)), folder)


# Synonyms and thresholds

SYNONYMS = {"labels": ["sky", "road", "tree"], "synonyms": {"sky": ["cloud"], "tree": ["bush", "wood"]}}
# Columns: sky, cloud, road, tree, bush, wood.
SCORES = [
    [0.0, 0.9, 0.8, 0.0, 0.0, 0.0],  # merged: sky; its average is 0.64, less than road
    [0.6, 0.9, 1.0, 0.0, 0.0, 0.0],  # merged: road; the average of sky is 1.06, more than road
    [0.0, 0.0, 0.5, 0.1, 0.2, 0.6],  # merged: tree; its average is 0.52
    [0.3, 0.0, 0.2, 0.0, 0.0, 0.1],  # sky in both cases
]


@pytest.mark.parametrize(("rule", "expected"), [("merge", [0, 1, 2, 0]), ("average", [1, 0, 2, 0])])
@pytest.mark.parametrize("threshold", [None, 0.15])
def test_synonyms_by_hand(tmp_path, rule, expected, threshold):
    content = dict(SYNONYMS)
    if threshold is not None:
        content |= {"labels": ["sky", "none", "road", "tree"], "background": 1}
        expected = [[0, 2, 3][label] for label in expected]
    folder = MaskFolder(make_folder(tmp_path / "a", [quarters(expected, (8, 8))], content))
    segmenter = KnownGroups(SCORES)
    options = MaskOptions(SegmentationOptions(background_threshold=threshold), synonyms=rule)
    scores = evaluate_masks(segmenter, folder, options)
    assert segmenter.seen == [["sky", "cloud", "road", "tree", "bush", "wood"]]
    assert scores.to_dict()["pixel_accuracy"] == 1
    with_background = KnownGroups([*SCORES[:3], [0.0] * 6])
    if threshold is not None:
        counts = evaluate_masks(with_background, folder, options).confusion.counts
        assert counts[0, 1] == 16


def test_without_synonyms_only_labels_are_asked_for(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", [np.zeros((8, 8))], SYNONYMS))
    segmenter = KnownGroups([[1.0, 0.0, 0.0]] * 4)
    evaluate_masks(segmenter, folder)
    assert segmenter.seen == [["sky", "road", "tree"]]
    with pytest.raises(ValueError, match="synonyms is 'all'"):
        MaskOptions(synonyms="all")


def test_thresholds_in_one_pass_are_those_of_runs_of_their_own(tiny_segmenter, tmp_path):
    miniature = write_benchmark("voc", tmp_path)
    dataset = open_benchmark("voc", tmp_path)
    rng = np.random.default_rng(0)
    for number, (image, mask) in enumerate(zip(miniature.images, miniature.masks)):
        write_noise(image, (80, 96), seed=number)
        write_mask(mask, rng.integers(0, 21, (80, 96)), "palette")
    options = SegmentationOptions(background_threshold=0.02)
    thresholds = (0.0, 0.02, 0.05, 0.1, 1.0)
    swept = evaluate_masks(tiny_segmenter, dataset, MaskOptions(options, thresholds=thresholds))
    background = []
    for threshold in thresholds:
        alone = evaluate_masks(
            tiny_segmenter, dataset, MaskOptions(replace(options, background_threshold=threshold))
        )
        assert swept.by_threshold[threshold].counts.tolist() == alone.confusion.counts.tolist()
        assert swept.to_dict()["thresholds"][str(threshold)]["mean_iou"] == alone.confusion.mean_iou()
        background.append(int(alone.confusion.counts[:, 0].sum()))
    assert swept.confusion.counts.tolist() == swept.by_threshold[0.02].counts.tolist()
    assert background == sorted(background) and background[0] == 0
    assert len(set(background)) >= 3, "the test needs thresholds that matter"
    best = swept.best_threshold()
    assert swept.by_threshold[best].mean_iou() == max(each.mean_iou() for each in swept.by_threshold.values())


def test_thresholds_need_a_background(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", [QUADRANTS]))
    segmentation = SegmentationOptions(background_threshold=0.5)
    with pytest.raises(ValueError, match=r"background_threshold is 0.5, but .* has no background"):
        evaluate_masks(KnownGroups(one_hot(0)), folder, MaskOptions(segmentation))
    with pytest.raises(ValueError, match=r"thresholds are \[0.5\]"):
        evaluate_masks(KnownGroups(one_hot(0)), folder, MaskOptions(thresholds=(0.5,)))
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        MaskOptions(thresholds=(0.5, 1.5))
