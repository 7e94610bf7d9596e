"""Images with masks in local datasets of the Hub's formats."""

import re

import datasets
import numpy as np
import pytest
from benchmark_layouts import quarters
from mask_folders import KnownGroups, one_hot
from PIL import Image
from tiny_models import make_photo

from pgseg_hf.evaluation import MaskDataset, MaskOptions, evaluate_masks
from pgseg_hf.evaluation.benchmarks.catalogue import BENCHMARKS
from pgseg_hf.evaluation.benchmarks.hub_masks import hub_images

SIZES = [(8, 8), (10, 12), (9, 11)]
TRUTHS = [quarters(np.roll([0, 1, 2, 255], number), size) for number, size in enumerate(SIZES)]
LABELS = ["sky", "road", "tree"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_table(image="image", mask="mask", encode=lambda values: Image.fromarray(values.astype(np.uint8))):
    rows = {
        image: [make_photo(width, height, number) for number, (height, width) in enumerate(SIZES)],
        mask: [encode(truth) for truth in TRUTHS],
    }
    features = datasets.Features({image: datasets.Image(), mask: datasets.Image()})
    return datasets.Dataset.from_dict(rows, features=features)


def save(table, folder, kind):
    """Writes a table and returns the path that opens it."""
    if kind == "saved":
        table.save_to_disk(folder)
    elif kind == "saved with splits":
        datasets.DatasetDict({"validation": table, "train": table.select([0])}).save_to_disk(folder)
    else:
        (folder / "data").mkdir(parents=True)
        table.to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize("kind", ["saved", "saved with splits", "parquet"])
def test_images_decode_right(tmp_path, kind):
    table = make_table()
    images = hub_images(save(table, tmp_path / "table", kind))[0]
    assert [image.name for image in images] == ["0", "1", "2"]
    dataset = MaskDataset("table", LABELS, images)
    for image, truth, (height, width), number in zip(images, TRUTHS, SIZES, range(3)):
        np.testing.assert_array_equal(dataset.truth(image), truth)
        np.testing.assert_array_equal(np.asarray(image.read()), np.asarray(make_photo(width, height, number)))
    if kind == "saved with splits":
        assert len(hub_images(str(tmp_path / "table"), "train")[0]) == 1


def test_values_as_a_benchmark_has_them(tmp_path):
    def in_colours(values):
        raw = np.where(values == 255, 1000, values)
        return Image.fromarray(np.stack([raw % 256, raw // 256, 0 * raw], axis=-1).astype(np.uint8))

    benchmark = BENCHMARKS["imagenet_s50"]
    path = save(make_table(encode=in_colours), tmp_path / "table", "parquet")
    dataset = benchmark.over(hub_images(path)[0], "imagenet_s50 of a table")
    for image, truth in zip(dataset.images, TRUTHS):
        np.testing.assert_array_equal(dataset.truth(image), np.where(truth == 255, 1000, truth))
    assert dataset.labels == benchmark.labels


def test_other_columns(tmp_path):
    path = save(make_table("photo", "annotation"), tmp_path / "table", "saved")
    for image, mask, message in (
        (None, "annotation", r"no image column .*columns are photo, annotation"),
        ("photo", "mask", r"has no column 'mask'; its columns are photo, annotation"),
        ("image", "annotation", "has no column 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            hub_images(path, image_column=image, mask_column=mask)
    images = hub_images(path, image_column="photo", mask_column="annotation")[0]
    assert MaskDataset("table", LABELS, images).truth(images[2]).tolist() == TRUTHS[2].tolist()


def test_tables_that_are_not_there(tmp_path):
    path = save(make_table(), tmp_path / "table", "saved with splits")
    with pytest.raises(ValueError, match=r"has no split 'test'; its splits are validation, train"):
        hub_images(path, "test")
    with pytest.raises(ValueError, match="cannot be loaded"):
        hub_images(str(tmp_path / "absent"))


def test_cells_that_are_empty_or_broken(tmp_path):
    rows = make_table().to_list()
    rows[0]["image"], rows[1]["mask"] = None, None
    rows[2]["mask"]["bytes"] = rows[2]["mask"]["bytes"][:40]
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    rows.append(make_table().to_list()[0])
    path = save(datasets.Dataset.from_list(rows, features=features), tmp_path / "table", "saved")
    dataset = MaskDataset("table", LABELS, hub_images(path)[0])
    scores = evaluate_masks(KnownGroups(one_hot(0, 1, 2, 0)), dataset, MaskOptions(skip_broken=True))
    messages = ("image 0: .*its image is empty", "the mask of 1: row 1 of .* has no mask", "the mask of 2")
    assert list(scores.broken) == ["0", "1", "2"] and scores.to_dict()["mean_iou"] == 1
    for message, found in zip(messages, scores.broken.values(), strict=True):
        assert re.search(message, found)
