"""Baselines that ignore the image, and the untrained model."""

import copy
import json

import numpy as np
import pytest
import torch
from data_files import numbered_shards
from hypothesis import given
from hypothesis import strategies as st
from mask_folders import QUADRANTS, KnownGroups, make_folder
from PIL import Image

from pgseg_hf import SegmentationOptions
from pgseg_hf.data.augmentation import AugmentationOptions
from pgseg_hf.evaluation import MaskFolder, MaskOptions, baselines
from pgseg_hf.evaluation.baselines import (
    best_label,
    everywhere,
    measure_baselines,
    position_prior,
    untrained,
)

WHOLE = AugmentationOptions(image_size=16, min_scale=1.0, min_ratio=1.0, max_ratio=1.0, horizontal_flip=0.0)


@pytest.fixture(autouse=True, scope="module")
def few_crops():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "_CROPS", 200)
        yield


OPTIONS = MaskOptions(SegmentationOptions())


class Untrained(KnownGroups):
    """Predicts the first label everywhere, and is its own untrained model."""

    def __init__(self):
        super().__init__([[1.0, 0.0, 0.0]] * 4)


def test_rows_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "untrained", lambda segmenter: segmenter)
    unknown = QUADRANTS.copy()
    unknown[0, :4] = 255
    wide = np.repeat(np.repeat(QUADRANTS, 3, axis=1), 2, axis=0)
    folder = MaskFolder(make_folder(tmp_path / "a", [unknown, wide, np.full((6, 10), 1)]))
    rows = measure_baselines(Untrained(), folder, OPTIONS, prior_map=np.array([[0, 1], [2, 2]]))
    # 12 + 96 pixels are sky, 16 + 96 + 60 are road, 32 + 192 are tree.
    pixels = np.array([108, 172, 224])
    shares = pixels / pixels.sum()
    assert list(rows) == [
        "untrained model",
        "oracle: groups of the untrained model, named by the masks",
        "tree everywhere, the best single label",
        "position prior of the training tags",
    ]
    assert rows["untrained model"]["pixel_accuracy"] == shares[0]
    best = rows["tree everywhere, the best single label"]
    # The two other labels are in the masks but never predicted.
    assert (best["pixel_accuracy"], best["mean_iou"]) == (shares[2], pytest.approx(shares[2] / 3))
    prior = rows["position prior of the training tags"]
    assert prior["pixel_accuracy"] == pytest.approx((60 + 4 - 4 + 16 * 24 + 15) / pixels.sum())
    folder.background = 1
    rows = measure_baselines(Untrained(), folder, OPTIONS)
    assert rows["road everywhere"]["pixel_accuracy"] == shares[1] and len(rows) == 4
    folder.background = 2
    assert list(measure_baselines(Untrained(), folder, OPTIONS))[2:] == ["tree everywhere"]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any))
def test_the_best_label_is_the_one_of_largest_mean_iou(pixels):
    pixels = np.array(pixels)
    best = [everywhere(label, pixels).mean_iou() for label in range(len(pixels))]
    assert best[best_label(pixels)] == pytest.approx(max(best))


def write_training_folder(folder, rows):
    """Writes images of 60 x 60 pixels with these tags or masks."""
    folder.mkdir()
    lines = []
    for number, row in enumerate(rows):
        row = dict(row)
        Image.new("RGB", (60, 60)).save(folder / f"{number}.png")
        if (mask := row.pop("mask", None)) is not None:
            Image.fromarray(np.asarray(mask, np.uint8)).save(folder / f"m{number}.png")
            row["mask_file_name"] = f"m{number}.png"
        lines.append(json.dumps({"file_name": f"{number}.png", **row}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_prior_of_whole_images_is_the_most_frequent_tag(tmp_path):
    rows = [{"tags": ["road"]}, {"tags": ["tree", "road"]}, {"tags": ["tree", "road", "moon"]}]
    path = write_training_folder(tmp_path / "a", rows)
    for labels, expected in ((["sky", "road", "tree"], 1), (["tree", "sky"], 0)):
        prior = position_prior(path, labels, WHOLE)
        assert prior.shape == (24, 32) and (prior == expected).all()


def test_prior_of_masks_knows_the_places(tmp_path):
    top, left = np.full((60, 60), 2), np.full((60, 60), 255)
    top[30:] = 1
    left[:, :2] = 2
    options = AugmentationOptions(image_size=16, crop_sides=(40, 60), short_side=192, horizontal_flip=0.0)
    rows = [{"tags": ["x"], "mask": top}]
    path = write_training_folder(tmp_path / "a", rows)
    prior = position_prior(path, ["sky", "road", "tree"], options)
    assert (prior[2:8, 4:-4] == 2).all() and (prior[-8:-2, 4:-4] == 1).all()
    again = position_prior(path, ["sky", "road", "tree"], options)
    np.testing.assert_array_equal(prior, again)
    # Labels that cover less than 2 % of a crop are not tags of it, and neither are unknown pixels.
    alone = write_training_folder(tmp_path / "b", [{"tags": ["x"], "mask": np.where(left == 2, 2, 255)}])
    whole = position_prior(alone, ["sky", "road", "tree"], WHOLE)
    assert (whole == 2).all()
    left[:, 1:] = 255
    Image.fromarray(left.astype(np.uint8)).save(tmp_path / "b" / "m0.png")
    assert (position_prior(alone, ["sky", "road", "tree"], WHOLE) == 0).all(), "1 of 60 columns"


def test_streams_have_no_prior(tmp_path):
    with pytest.raises(ValueError, match=r"is a stream"):
        position_prior(numbered_shards(tmp_path / "shards", [2]), ["sky"], WHOLE)


def test_an_untrained_model_by_seed(tiny_segmenter, photo):
    before = copy.deepcopy(tiny_segmenter.model.state_dict())
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(untrained(tiny_segmenter))
    states = [each.model.state_dict() for each in (*models, tiny_segmenter)]
    name = next(key for key, value in states[0].items() if value.ndim == 2)
    first, same, other, trained = (state[name] for state in states)
    assert torch.equal(first, same) and not torch.equal(first, other) and not torch.equal(first, trained)
    assert all(torch.equal(before[key], value) for key, value in tiny_segmenter.model.state_dict().items())
    maps = [each(photo, ["cat", "dog"]).label_map for each in models[:2]]
    np.testing.assert_array_equal(*maps)
    assert models[0].options == tiny_segmenter.options and not models[0].model.training
