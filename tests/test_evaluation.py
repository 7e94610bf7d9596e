"""Evaluation: counts against loops, folders with masks, scores by hand with known groups, zero-shot classification."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import make_photo

from pgseg_hf import SegmentationOptions
from pgseg_hf.evaluation import (
    ConfusionMatrix,
    MaskFolder,
    evaluate_masks,
    oracle_map,
    zero_shot_accuracy,
)
from pgseg_hf.images import load_label_map
from pgseg_hf.prompts import IMAGENET_TEMPLATES
from pgseg_hf.scoring import WindowScores
from pgseg_hf.segmentation import EncodedImage

SHARED = Path(__file__).parents[2] / "shared" / "data"


# Counts


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


# Folders

LABELS = {"labels": ["sky", "road", "tree"]}


def make_folder(folder, masks, labels=None, metadata=True):
    """Pictures with these masks, of their sizes."""
    rows = []
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number, mask in enumerate(masks):
        mask = np.asarray(mask, np.uint8)
        names = f"images/{number:03d}.jpg", f"masks/{number:03d}.png"
        make_photo(mask.shape[1], mask.shape[0], seed=number).save(folder / names[0])
        Image.fromarray(mask).save(folder / names[1])
        rows.append(json.dumps({"file_name": names[0], "mask_file_name": names[1]}))
    if metadata:
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "labels.json").write_text(json.dumps(labels or LABELS))
    return folder


MASKS = [np.full((6, 8), number % 3) for number in range(7)]


def test_folders_with_metadata_and_with_equal_names(tmp_path):
    listed = MaskFolder(make_folder(tmp_path / "a", MASKS))
    named = MaskFolder(str(make_folder(tmp_path / "b", MASKS, metadata=False)))
    assert len(listed) == len(named) == 7
    for folder in (listed, named):
        assert (folder.labels, folder.ignore_index, folder.background) == (LABELS["labels"], 255, None)
        for number, (image, mask) in enumerate(folder.pictures):
            assert image == folder.path / "images" / f"{number:03d}.jpg"
            assert load_label_map(mask).tolist() == MASKS[number].tolist()


def test_labels_may_be_in_the_folder_above(tmp_path):
    folder = make_folder(tmp_path / "val", MASKS[:1], {**LABELS, "ignore_index": None, "background": 0})
    (folder / "labels.json").rename(tmp_path / "labels.json")
    masks = MaskFolder(folder)
    assert (masks.labels, masks.ignore_index, masks.background) == (LABELS["labels"], None, 0)


def test_parts_of_a_folder(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", MASKS))
    numbers = {pair: number for number, pair in enumerate(folder.pictures)}

    def which(part):
        return [numbers[pair] for pair in part.pictures]

    assert which(folder.spread(3)) == [0, 2, 4]
    assert which(folder.spread(100)) == list(range(7))
    assert [which(folder.part(rank, 3)) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert len(folder.spread(1).part(1, 2)) == 0
    assert len(folder) == 7
    with pytest.raises(ValueError, match="count is 0"):
        folder.spread(0)
    with pytest.raises(ValueError, match="rank is 2 of world_size 2"):
        folder.part(2, 2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"names": []}, "labels.json cannot be read"),
        ([], "labels.json cannot be read"),
        ({"labels": []}, "no labels"),
        ({**LABELS, "ignore_index": 2}, "ignore_index 2 in .* is a label"),
        ({**LABELS, "ignore_index": "x"}, "ignore_index in .* is 'x'"),
        ({**LABELS, "background": 3}, "background 3 in .* is no label, expected 0 to 2"),
    ],
)
def test_labels_that_make_no_sense(tmp_path, labels, message):
    folder = make_folder(tmp_path / "a", MASKS[:1])
    (folder / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(ValueError, match=message):
        MaskFolder(folder)


def test_folders_that_make_no_sense(tmp_path):
    with pytest.raises(ValueError, match="absent is no folder"):
        MaskFolder(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"labels.json is missing"):
        MaskFolder(tmp_path)
    folder = make_folder(tmp_path / "a", MASKS[:3])
    for line, message in (
        ('{"file_name": "images/000.jpg"}', "line 2 of .*mask_file_name"),
        ("[1]", "line 2 of"),
        ("{", "line 2 of"),
        ('{"file_name": "images/9.jpg", "mask_file_name": "masks/000.png"}', "1 pictures or masks .*9.jpg"),
    ):
        (folder / "metadata.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(ValueError, match=message):
            MaskFolder(folder)
    (folder / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        MaskFolder(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "masks" / "001.png").unlink()
    with pytest.raises(ValueError, match=r"1 pictures or masks .* are missing, the first is .*001.png"):
        MaskFolder(folder)
    (folder / "masks").rename(folder / "annotations")
    with pytest.raises(ValueError, match=r"neither metadata.jsonl nor the folders"):
        MaskFolder(folder)


# Scores


class KnownGroups:
    """Stands in for a `Segmenter`: every picture is its mask's 2 x 2 blocks as groups, with these scores."""

    def __init__(self, scores):
        self.options = SegmentationOptions()
        self.scores = torch.tensor(scores)
        self.seen = []

    def encode(self, images, labels, options):
        self.seen.append(list(labels))
        for path in images:
            with Image.open(path) as picture:
                width, height = picture.size
            groups = torch.arange(height)[:, None] * 2 // height * 2 + torch.arange(width) * 2 // width
            yield EncodedImage((height, width), (height, width), [WindowScores(groups.int(), self.scores)])


QUADRANTS = np.kron(np.array([[0, 1], [2, 2]]), np.ones((4, 4), int))


def one_hot(*labels, count=3):
    return torch.eye(count)[list(labels)].tolist()


def test_scores_by_hand(tmp_path):
    truth = QUADRANTS.copy()
    truth[0, :4] = 255
    folder = MaskFolder(make_folder(tmp_path / "a", [truth, np.zeros((8, 8))], {"labels": [*"abcd"]}))
    segmenter = KnownGroups(one_hot(0, 1, 1, 2, count=4))
    result = evaluate_masks(segmenter, folder, oracle=True)
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
    # Channel 0 is the background, then sky and tree.
    segmenter = KnownGroups(one_hot(1, 0, 2, 2))
    options = SegmentationOptions(background_threshold=0.5)
    assert evaluate_masks(segmenter, folder, options).to_dict()["mean_iou"] == 1
    assert segmenter.seen.pop() == ["sky", "tree"]
    segmenter.options = options
    assert evaluate_masks(segmenter, folder).to_dict()["mean_iou"] == 1
    assert segmenter.seen.pop() == ["sky", "tree"]
    ordinary = evaluate_masks(segmenter, folder, SegmentationOptions()).to_dict()
    assert segmenter.seen.pop() == ["sky", "road", "tree"]
    assert ordinary["iou"] == {"sky": 0.0, "road": 0.0, "tree": 1.0}


def test_a_threshold_needs_a_background(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", MASKS[:1]))
    with pytest.raises(ValueError, match=r"background_threshold is 0.5, but .* has no background"):
        evaluate_masks(KnownGroups(one_hot(0)), folder, SegmentationOptions(background_threshold=0.5))


def test_pictures_and_masks_that_do_not_fit(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", [QUADRANTS]))
    segmenter = KnownGroups(one_hot(0, 0, 0, 0))
    mask = folder.pictures[0][1]
    Image.fromarray(np.full((8, 8), 3, np.uint8)).save(mask)
    with pytest.raises(ValueError, match=r"000.png: the truth has values from 3 to 3"):
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
    for path, mask in folder.pictures:
        if threshold is None:
            label_map = tiny_segmenter(path, folder.labels, options).label_map
        else:
            label_map = np.array([3, 0, 1, 2])[tiny_segmenter(path, folder.labels[:3], options).label_map]
        expected.add(load_label_map(mask), label_map)
    result = evaluate_masks(tiny_segmenter, folder, options, oracle=True)
    assert result.confusion.counts.tolist() == expected.counts.tolist()
    assert (expected.counts.sum(0) > 0).sum() > 1, "the test needs several labels"
    assert result.oracle.pixel_accuracy() >= result.confusion.pixel_accuracy()


# Oracle


def test_the_oracle_names_each_windows_groups_by_majority():
    # Two windows of 2 x 3 over 2 x 4 pixels; they share columns 1 and 2.
    truth = np.array([[0, 0, 1, 2], [0, 1, 1, 255]])
    left = WindowScores(torch.tensor([[0, 0, 1], [0, 0, 1]]), torch.rand(3, 5), 0, 0)
    right = WindowScores(torch.tensor([[0, 1, 1], [1, 1, 2]]), torch.rand(3, 5), 0, 1)
    image = EncodedImage((2, 4), (2, 4), [left, right])
    # left: group 0 is 0 (three to one), group 1 is 1. right: group 0 is 0, group 1 is 1 (three to one), group 2 has
    # unknown pixels only. At the pixel where the windows disagree the first label wins.
    expected = [[0, 0, 1, 1], [0, 0, 1, 0]]
    assert oracle_map(image, truth, 3).tolist() == expected


def test_the_oracle_counts_what_is_unknown_only_where_told():
    image = EncodedImage(
        (1, 4), (1, 4), [WindowScores(torch.zeros(1, 4, dtype=torch.uint8), torch.rand(1, 2))]
    )
    truth = np.array([[2, 2, 2, 1]])
    assert oracle_map(image, truth, 3, ignore_index=None).tolist() == [[2] * 4]
    assert oracle_map(image, truth, 2, ignore_index=2).tolist() == [[1] * 4]


def test_the_oracle_works_at_the_size_that_the_model_saw():
    groups = torch.arange(8).repeat_interleave(3).repeat(6, 1)
    image = EncodedImage((2, 8), (6, 24), [WindowScores(groups, torch.rand(8, 2))])
    truth = np.tile(np.arange(8) % 2 * 4, (2, 1))
    assert oracle_map(image, truth, 5).tolist() == truth.tolist()


# Two processes


def one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    part = MaskFolder(f"{folder}/data").part(rank, 2)
    result = evaluate_masks(KnownGroups(one_hot(0, 1, 1, 2)), part, oracle=True)
    own = result.pictures
    scores = result.sum_over_processes().to_dict()
    Path(f"{folder}/{rank}.json").write_text(json.dumps({"own": own, "scores": scores}))
    dist.destroy_process_group()


def test_two_processes_score_as_one(tmp_path):
    masks = [QUADRANTS, np.zeros((8, 8)), 2 - QUADRANTS]
    folder = MaskFolder(make_folder(tmp_path / "data", masks))
    mp.spawn(one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    alone = evaluate_masks(KnownGroups(one_hot(0, 1, 1, 2)), folder, oracle=True).to_dict()
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [result["own"] for result in results] == [2, 1]
    for result in results:
        del result["scores"]["seconds"]
        assert result["scores"].items() <= alone.items()


# Zero-shot classification


def test_zero_shot_accuracy_against_one_picture_at_a_time(tiny_segmenter):
    model, processor = tiny_segmenter.model, tiny_segmenter.processor
    labels = ["cat", "dog", "grass", "sky", "road", "tree", "car"]
    rng = np.random.default_rng(0)
    pictures = [
        (make_photo(*rng.integers(20, 90, 2).tolist(), seed=seed), labels[seed % 7]) for seed in range(9)
    ]
    classes = processor.get_class_embeddings(model, labels, IMAGENET_TEMPLATES)
    ranks = []
    for image, label in pictures:
        factor = 18 / min(image.size)  # 16 pixels * 256 / 224
        width, height = (int(side * factor + 0.5) for side in image.size)
        resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
        top, left = (height - 16) // 2, (width - 16) // 2
        pixels = (resized[top : top + 16, left : left + 16] - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            tensor = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
            embeds = torch.nn.functional.normalize(model.get_image_features(tensor).pooler_output, dim=-1)
        cosines = (embeds @ classes.T)[0]
        ranks.append(int((cosines > cosines[labels.index(label)]).sum()))
    expected = {"top1": ranks.count(0) / 9, "top5": sum(rank < 5 for rank in ranks) / 9, "pictures": 9}
    assert 0 < expected["top5"] < 1
    for batch_size in (1, 4, 64):
        assert zero_shot_accuracy(model, processor, pictures, labels, batch_size) == expected


def test_zero_shot_of_few_labels_and_odd_inputs(tiny_segmenter, photo):
    model, processor = tiny_segmenter.model, tiny_segmenter.processor
    scores = zero_shot_accuracy(model, processor, [(photo, "cat"), (photo, " dog ")], ["cat", "dog"])
    assert scores == {"top1": 0.5, "top5": 1.0, "pictures": 2}
    nothing = zero_shot_accuracy(model, processor, [], ["cat"])
    assert math.isnan(nothing["top1"]) and nothing["pictures"] == 0
    with pytest.raises(ValueError, match="label 'cow', which is not among the labels"):
        zero_shot_accuracy(model, processor, [(photo, "cow")], ["cat"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        zero_shot_accuracy(model, processor, [(photo, "cat")], ["cat"], batch_size=0)


# Real folders


@pytest.mark.parametrize(
    ("name", "size", "background"),
    [("camvid/val", 101, None), ("camvid/train", 367, None), ("ccp/test", 502, 0)],
)
def test_real_folders(name, size, background):
    if not os.path.isdir(SHARED / name):
        pytest.skip("the data are not here")
    folder = MaskFolder(SHARED / name)
    assert (len(folder), folder.background) == (size, background)
    matrix = ConfusionMatrix(len(folder.labels), folder.ignore_index)
    for _, mask in folder.spread(5).pictures:
        truth = load_label_map(mask)
        matrix.add(truth, np.minimum(truth, len(folder.labels) - 1))
    assert matrix.mean_iou() == 1
