"""Folders with masks: what is found, what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from mask_folders import LABELS, make_folder

from pgseg_hf.evaluation import ConfusionMatrix, MaskFolder
from pgseg_hf.images import load_label_map

SHARED = Path(__file__).parents[3] / "shared" / "data"

MASKS = [np.full((6, 8), number % 3) for number in range(7)]


def test_folders_with_metadata_and_with_equal_names(tmp_path):
    listed = MaskFolder(make_folder(tmp_path / "a", MASKS))
    named = MaskFolder(str(make_folder(tmp_path / "b", MASKS, metadata=False)))
    assert len(listed) == len(named) == 7
    for name, folder in (("a", listed), ("b", named)):
        assert (folder.labels, folder.ignore_index, folder.background) == (LABELS["labels"], 255, None)
        for number, (image, mask) in enumerate((each.image, each.mask) for each in folder.pictures):
            assert image == tmp_path / name / "images" / f"{number:03d}.jpg"
            assert load_label_map(mask).tolist() == MASKS[number].tolist()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_folders_with_metadata_and_labels_of_spreadsheets_and_editors(tmp_path, encoding):
    folder = make_folder(tmp_path / "a", MASKS, {"labels": ["Himmel\u2028", "Straße", "Baum"]})
    labels = (folder / "labels.json").read_text()
    (folder / "labels.json").write_bytes(json.dumps(json.loads(labels), ensure_ascii=False).encode(encoding))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").unlink()
    lines = [";file_name;mask_file_name", *(f"{n};" + ";".join(row.values()) for n, row in enumerate(rows))]
    (folder / "metadata.csv").write_bytes("\r\n".join([*lines, ";;", ""]).encode(encoding))
    found = MaskFolder(folder)
    assert (found.labels, len(found)) == (["Himmel", "Straße", "Baum"], 7)
    assert found.truth(found.pictures[4]).tolist() == MASKS[4].tolist()


def test_labels_may_be_in_the_folder_above(tmp_path):
    folder = make_folder(tmp_path / "val", MASKS[:1], {**LABELS, "ignore_index": None, "background": 0})
    (folder / "labels.json").rename(tmp_path / "labels.json")
    masks = MaskFolder(folder)
    assert (masks.labels, masks.ignore_index, masks.background) == (LABELS["labels"], None, 0)


def test_parts_of_a_folder(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", MASKS))
    numbers = {pair.name: number for number, pair in enumerate(folder.pictures)}

    def which(part):
        return [numbers[pair.name] for pair in part.pictures]

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
    with pytest.raises(ValueError, match="has no records"):
        MaskFolder(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "masks" / "001.png").unlink()
    with pytest.raises(ValueError, match=r"1 pictures or masks .* are missing, the first is .*001.png"):
        MaskFolder(folder)
    (folder / "masks").rename(folder / "annotations")
    with pytest.raises(ValueError, match=r"neither metadata.jsonl nor the folders"):
        MaskFolder(folder)


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
    for picture in folder.spread(5).pictures:
        truth = folder.truth(picture)
        matrix.add(truth, np.minimum(truth, len(folder.labels) - 1))
    assert matrix.mean_iou() == 1
