"""Folders with masks: layouts and errors."""

import json

import numpy as np
import pytest
from mask_folders import LABELS, make_folder
from PIL import Image

from pgseg_hf.evaluation import MaskFolder
from pgseg_hf.evaluation.benchmarks.mask_dataset import parse_mask_values
from pgseg_hf.images import load_label_map

MASKS = [np.full((6, 8), number % 3) for number in range(7)]


def test_folders_with_metadata_and_with_equal_names(tmp_path):
    listed = MaskFolder(make_folder(tmp_path / "a", MASKS))
    named = MaskFolder(str(make_folder(tmp_path / "b", MASKS, metadata=False)))
    assert len(listed) == len(named) == 7
    for name, folder in (("a", listed), ("b", named)):
        assert (folder.labels, folder.ignore_index, folder.background) == (LABELS["labels"], 255, None)
        for number, (image, mask) in enumerate((each.image, each.mask) for each in folder.images):
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
    assert found.truth(found.images[4]).tolist() == MASKS[4].tolist()


def test_parts_of_a_folder(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", MASKS))
    numbers = {pair.name: number for number, pair in enumerate(folder.images)}

    def which(part):
        return [numbers[pair.name] for pair in part.images]

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
        ({"names": []}, "labels.json .*expected"),
        ([], "labels.json .*expected"),
        ({"labels": []}, "no labels"),
        ({**LABELS, "ignore_index": 2}, "labels.json.*ignore_index is 2, expected a value without a label"),
        ({**LABELS, "ignore_index": "x"}, "ignore_index is 'x'"),
        ({**LABELS, "background": 3}, "background is 3, expected .* 0 to 2"),
        ({**LABELS, "synonyms": {"sea": ["ocean"]}}, "synonyms has 'sea'"),
        ({**LABELS, "synonyms": {"sky": "air"}}, "synonyms of 'sky' are 'air'"),
        ({**LABELS, "synonyms": {"sky": ["road"]}}, "road"),
        ({**LABELS, "synonyms": ["air"]}, r"synonyms is \['air'\], expected an object"),
        ({**LABELS, "mask_values": 5}, "mask_values is 5, expected an object"),
    ],
)
def test_labels_that_make_no_sense(tmp_path, labels, message):
    folder = make_folder(tmp_path / "a", MASKS[:1])
    (folder / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(ValueError, match=message):
        MaskFolder(folder)


def test_labels_above_a_link(tmp_path):
    folder = make_folder(tmp_path / "data" / "test", MASKS[:1])
    (folder / "labels.json").rename(tmp_path / "data" / "labels.json")
    (tmp_path / "link").symlink_to(folder)
    assert MaskFolder(tmp_path / "link").labels == MaskFolder(folder).labels


def test_folders_that_make_no_sense(tmp_path):
    with pytest.raises(ValueError, match="absent is not a folder"):
        MaskFolder(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"has no labels.json"):
        MaskFolder(tmp_path)
    folder = make_folder(tmp_path / "a", MASKS[:3])
    for line, message in (
        ('{"file_name": "images/000.jpg"}', "line 2 of .*mask_file_name"),
        ("[1]", "line 1 of"),  # the first element of a list
        ("{", "line 2 of"),
        ('{"file_name": "images/9.jpg", "mask_file_name": "masks/000.png"}', "1 images or masks .*9.jpg"),
    ):
        (folder / "metadata.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(ValueError, match=message):
            MaskFolder(folder)
    (folder / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no records"):
        MaskFolder(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "masks" / "001.png").unlink()
    with pytest.raises(ValueError, match=r"1 images or masks .* are missing, the first is .*001.png"):
        MaskFolder(folder)
    (folder / "masks").rename(folder / "annotations")
    with pytest.raises(ValueError, match=r"neither metadata.jsonl nor the folders"):
        MaskFolder(folder)


BINARY = np.kron(np.array([[0, 255]]), np.ones((6, 4), int))


@pytest.mark.parametrize("given", ["argument", "labels.json", "without labels.json"])
def test_values_that_are_said(tmp_path, given):
    values = {"0": "background", "255": "sky"}
    labels = {"labels": ["sky", "background"]}
    written = labels if given == "argument" else {**labels, "mask_values": values}
    path = make_folder(tmp_path / "a", [BINARY], written)
    if given == "without labels.json":
        (path / "labels.json").unlink()
    folder = MaskFolder(path, mask_values=None if given == "labels.json" else values)
    expected = ["background", "sky"] if given == "without labels.json" else labels["labels"]
    assert folder.labels == expected
    truth = np.array(expected)[folder.truth(folder.images[0])]
    assert (truth[:, :4] == "background").all() and (truth[:, 4:] == "sky").all()


def test_colours_and_values_that_do_not_count(tmp_path):
    path = make_folder(tmp_path / "a", [BINARY], {"labels": ["sky", "road"], "ignore_index": None})
    colours = np.array([[(0, 0, 255), (255, 128, 0), (0, 0, 0)]], np.uint8).repeat(6, 0)
    for mask in (Image.fromarray(colours), Image.fromarray(colours).quantize(3)):
        mask.save(path / "masks" / "000.png")
        folder = MaskFolder(path, mask_values=parse_mask_values("#0000FF=road, #ff8000=sky,#000000="))
        truth = folder.truth(folder.images[0])
        assert (truth == [1, 0, folder.ignore_index]).all() and folder.ignore_index not in (0, 1)
    # Blended over white, as images are, transparent pixels would have a colour.
    for value in ("#ffffff=sky,#000000=", "#000000=sky"):
        Image.new("RGBA", (6, 6), (0, 0, 0, 0)).save(path / "masks" / "000.png")
        folder = MaskFolder(path, mask_values=parse_mask_values(value))
        with pytest.raises(ValueError, match=r"000.png.* has transparent pixels"):
            folder.truth(folder.images[0])
    Image.fromarray(colours).save(path / "masks" / "000.png")
    folder = MaskFolder(path, mask_values={"#0000ff": "road", "#ff8000": "sky"})
    with pytest.raises(ValueError, match=r"value #000000, expected one of #0000ff, #ff8000: .*--mask-values"):
        folder.truth(folder.images[0])
    plain = MaskFolder(make_folder(tmp_path / "b", [BINARY], {"labels": ["a", "b"], "ignore_index": None}))
    with pytest.raises(
        ValueError, match=r"value 255, expected one of 0 to 1: .*from 0 to 255.*--mask-values"
    ):
        plain.truth(plain.images[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"0": "moon"}, "'moon', .*sky, road, tree"),
        ({"0": "sky", "#ff0000": "road"}, "'#ff0000', expected"),
        ({"#ff00": "sky"}, "'#ff00', expected"),
        ({"-1": "sky"}, "'-1', expected"),
    ],
)
def test_values_that_make_no_sense(tmp_path, values, message):
    path = make_folder(tmp_path / "a", MASKS[:1])
    with pytest.raises(ValueError, match=message):
        MaskFolder(path, mask_values=values)
    (path / "labels.json").write_text(json.dumps({**LABELS, "mask_values": values}))
    with pytest.raises(ValueError, match=f"labels.json.*{message}"):
        MaskFolder(path)


@pytest.mark.parametrize("text", ["0", "0=a,0=b", "0:a", ""])
def test_texts_that_say_no_values(text):
    with pytest.raises(ValueError, match="0=background,255=sky"):
        parse_mask_values(text)
