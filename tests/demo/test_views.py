"""Images, tables and files of a study."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import views
from PIL import Image
from studies import Choices, read_labels, read_upload

from pgseg_hf import Segmentation, SegmentationOptions
from pgseg_hf.visualization import palette

LABELS = ["cat", "dog", "wall"]


def result(background: bool = True) -> Segmentation:
    """A quarter background or cat, a quarter dog, half the next label; scores of 0.5."""
    label_map = np.repeat([0, 1, 2, 2], 10)[:, None] * np.ones(20, int)
    return Segmentation(label_map, np.full(label_map.shape, 0.5), LABELS, background)


@pytest.fixture(scope="module")
def studied(laboratory, street_file):
    upload = read_upload(street_file, 10**6)
    labels = read_labels("building, road, pavement, tree, sky, car, `pedestrian`")
    return upload, laboratory.study(upload, labels, Choices("pgseg-small-everyday"))


def test_masks_are_in_the_labels_own_colours_the_largest_first():
    shown = views.annotated(Image.new("RGB", (20, 40)), result())
    image, masks = shown["value"]
    assert image.size == (20, 40)
    assert [name for _, name in masks] == ["dog 0.50", "cat 0.50"]
    assert masks[0][0].sum() == 400 and masks[0][0].max() == 1
    assert shown["color_map"]["cat 0.50"] == "#{:02x}{:02x}{:02x}".format(*palette(1)[0])
    chosen = views.annotated(Image.new("RGB", (20, 40)), replace(result(), colours={"cat": "#ff0000"}))
    assert chosen["color_map"]["cat 0.50"] == "#ff0000"


def test_large_images_are_shown_smaller():
    large = Segmentation(np.zeros((3000, 1500), int), np.zeros((3000, 1500)), ["cat"], False)
    image, masks = views.annotated(Image.new("RGB", (1500, 3000)), large)["value"]
    assert image.size == (512, 1024) and masks[0][0].shape == (1024, 512)


def test_the_table_has_absent_labels_last():
    assert views.table(result()) == [
        ["dog", "50.0%", "0.500"],
        ["background", "25.0%", "–"],
        ["cat", "25.0%", "0.500"],
        ["wall", "0.0%", "–"],
    ]


@pytest.mark.parametrize("background", [False, True])
def test_the_mask_and_its_explanation_agree(studied, background):
    mask = Image.open(io.BytesIO(views.mask_file(result(background))))
    np.testing.assert_array_equal(np.asarray(mask), result(background).label_map)
    explained = json.loads(json.dumps(views.report(result(background), studied[1], 0.3)))
    assert [entry["value"] for entry in explained["labels"]] == list(range(3 + background))
    colours = np.array(mask.getpalette()[: 3 * len(explained["labels"])]).reshape(-1, 3)
    assert [entry["colour"] for entry in explained["labels"]] == [
        "#{:02x}{:02x}{:02x}".format(*c) for c in colours
    ]
    assert explained["options"] == {
        **{"window": "sliding", "short_side": None, "background_threshold": 0.3},
        **{"min_area": None, "synonyms": "average", "templates": None},
    }


def test_groups_say_which_label_they_became(studied):
    upload, study = studied
    drawn, heat, words = views.group_views(upload.image, study, None, 0)
    groups = study.encoded.windows[0].groups
    largest = groups.flatten().bincount().argmax()
    label = study.labels[study.scored.windows[0].scores[largest].argmax()]
    share = (groups == largest).float().mean()
    assert f"{largest + 1} ({share:.0%}) → `{label}`" in words
    assert min(drawn.size) >= 300 and heat.width > 400
    assert "`" + "`pedestrian" not in words  # backticks of visitors do not end the code span


def test_below_the_threshold_a_group_became_background(studied):
    upload, study = studied
    assert "background" in views.group_views(upload.image, study, 1.0, 0)[2]


def test_many_labels_do_not_make_a_heat_map_of_all(studied, laboratory):
    upload, _ = studied
    labels = read_labels("\n".join(f"word {i}" for i in range(200)))
    study = laboratory.study(
        upload, labels, Choices("pgseg-small-everyday", SegmentationOptions(window_size=None))
    )
    _, heat, words = views.group_views(upload.image, study, None)
    assert f"The {views.MAX_HEAT_MAP_ROWS} best of 200 labels" in words
    assert heat.height < 1200


def test_prototypes_have_an_image_for_each_stage(studied):
    stages = ((np.array([[0, 5], [5, 5]]), 32), (np.array([[1]]), 8))
    (first, caption), (_, other) = views.prototype_views(studied[0].image, stages)
    assert caption == "stage 1: 2 of 32 prototypes in use" and other == "stage 2: 1 of 8 prototypes in use"
    assert first.size == studied[0].image.size
