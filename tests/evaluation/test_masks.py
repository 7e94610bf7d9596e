"""Scores by hand with known groups."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mask_folders import LABELS, QUADRANTS, KnownGroups, make_folder, one_hot
from PIL import Image

from pgseg_hf import SegmentationOptions
from pgseg_hf.evaluation import ConfusionMatrix, MaskFolder, MaskOptions, evaluate_masks
from pgseg_hf.images import load_label_map


def test_scores_by_hand(tmp_path):
    truth = QUADRANTS.copy()
    truth[0, :4] = 255
    folder = MaskFolder(make_folder(tmp_path / "a", [truth, np.zeros((8, 8))], {"labels": [*"abcd"]}))
    segmenter = KnownGroups(one_hot(0, 1, 1, 2, count=4))
    result = evaluate_masks(segmenter, folder, MaskOptions(oracle=True))
    scores = result.to_dict()
    assert segmenter.seen == [["a", "b", "c", "d"]]
    # First picture: a 12 of 12, b 16 of 16, the lower left of c is b. Second: a 16, b 32 and c 16, all truly a.
    assert result.confusion.counts.tolist() == [[28, 32, 16, 0], [0, 16, 0, 0], [0, 16, 16, 0], [0, 0, 0, 0]]
    assert scores["iou"] == {"a": 28 / 76, "b": 16 / 64, "c": 16 / 48, "d": None}
    assert scores["mean_iou"] == pytest.approx((28 / 76 + 16 / 64 + 16 / 48) / 3)
    assert scores["pixel_accuracy"] == 60 / 124
    assert scores["oracle_mean_iou"] == scores["oracle_pixel_accuracy"] == 1
    assert scores["pictures"] == 2 and scores["seconds"] > 0
    json.dumps(scores, allow_nan=False)
    assert "oracle_mean_iou" not in evaluate_masks(segmenter, folder).to_dict()


def test_background_by_threshold_or_as_a_label(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", [QUADRANTS], {**LABELS, "background": 1}))
    assert folder.labels == ["sky", "road", "tree"]
    # The second quarter fits neither sky nor tree.
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
    assert unknown == "48 of the masks' 64 pixels (75.0%) are unknown and do not count."
    assert absent == "1 of 2 labels are in none of the masks: sky."
    assert "48 pixels (75.0%) do not count" in binary and "--mask_values 0=background,255=sky" in binary
    said = MaskFolder(path, mask_values={"0": "background", "255": "sky"})
    scores = evaluate_masks(segmenter, said)
    assert (scores.confusion.mean_iou(), scores.confusion.ignored, scores.doubts(said)) == (1, 0, [])


def test_what_does_not_count_is_kept_with_the_counts(tmp_path):
    truth = QUADRANTS.copy()
    truth[0, :4] = 255
    folder = MaskFolder(make_folder(tmp_path / "a", [truth]))
    scores = evaluate_masks(KnownGroups(one_hot(0, 1, 1, 2)), folder, MaskOptions(oracle=True))
    read = type(scores).empty(folder, MaskOptions(oracle=True))
    read.add_arrays(scores.to_arrays())
    read.merge(scores)
    assert [matrix.ignored for matrix in read._matrices()] == [8, 8]
    assert read.confusion.ignored_share() == 4 / 64 and read.doubts(folder) == []


def test_a_threshold_needs_a_background(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", [QUADRANTS]))
    with pytest.raises(ValueError, match=r"background_threshold is 0.5, but .* has no background"):
        evaluate_masks(
            KnownGroups(one_hot(0)), folder, MaskOptions(SegmentationOptions(background_threshold=0.5))
        )


def test_pictures_and_masks_that_do_not_fit(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", [QUADRANTS]))
    segmenter = KnownGroups(one_hot(0, 0, 0, 0))
    mask = folder.pictures[0].mask
    Image.fromarray(np.full((8, 8), 3, np.uint8)).save(mask)
    with pytest.raises(ValueError, match=r"000.png has the value 3, expected one of 0 to 2, 255"):
        evaluate_masks(segmenter, folder)
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(mask)
    with pytest.raises(ValueError, match=r"000.png has \(8, 9\) pixels .*000.jpg \(8, 8\)"):
        evaluate_masks(segmenter, folder)


@pytest.mark.parametrize("threshold", [None, 0.05])
def test_the_segmenters_own_maps_are_what_is_counted(tiny_segmenter, tmp_path, threshold):
    rng = np.random.default_rng(0)
    sizes = [(90, 120), (120, 90), (70, 200)]
    content = {"labels": ["cat", "grass", "sky", "other"], "background": 3}
    folder = MaskFolder(make_folder(tmp_path / "a", [rng.integers(0, 4, size) for size in sizes], content))
    options = SegmentationOptions(background_threshold=threshold)
    expected = ConfusionMatrix(4)
    for path, mask in ((each.image, each.mask) for each in folder.pictures):
        if threshold is None:
            label_map = tiny_segmenter(path, folder.labels, options).label_map
        else:
            label_map = np.array([3, 0, 1, 2])[tiny_segmenter(path, folder.labels[:3], options).label_map]
        expected.add(load_label_map(mask), label_map)
    result = evaluate_masks(tiny_segmenter, folder, MaskOptions(options, oracle=True))
    assert result.confusion.counts.tolist() == expected.counts.tolist()
    assert (expected.counts.sum(0) > 0).sum() > 1, "the test needs several labels"
    assert result.oracle.pixel_accuracy() >= result.confusion.pixel_accuracy()


def one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    part = MaskFolder(f"{folder}/data").part(rank, 2)
    result = evaluate_masks(KnownGroups(one_hot(0, 1, 1, 2)), part, MaskOptions(oracle=True))
    own = result.pictures
    scores = result.sum_over_processes().to_dict()
    Path(f"{folder}/{rank}.json").write_text(json.dumps({"own": own, "scores": scores}))
    dist.destroy_process_group()


def test_two_processes_score_as_one(tmp_path):
    masks = [QUADRANTS, np.zeros((8, 8)), 2 - QUADRANTS]
    folder = MaskFolder(make_folder(tmp_path / "data", masks))
    mp.spawn(one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    alone = evaluate_masks(KnownGroups(one_hot(0, 1, 1, 2)), folder, MaskOptions(oracle=True)).to_dict()
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [result["own"] for result in results] == [2, 1]
    for result in results:
        del result["scores"]["seconds"]
        assert result["scores"].items() <= alone.items()
