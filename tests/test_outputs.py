"""Formats of `pgseg segment`, read back with the tools that use them."""

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_cli import run
from tiny_models import make_photo
from transformers.image_transforms import rgb_to_id
from transformers.models.detr.image_processing_pil_detr import prepare_coco_panoptic_annotation

from pgseg_hf.files import write_mask
from pgseg_hf.images import load_label_map
from pgseg_hf.options import FORMATS
from pgseg_hf.outputs import _WRITERS, MaskResult, write_formats
from pgseg_hf.visualization import indexed_png

LABELS = ["cat", 'dog/"puppy": 🐕', "absent"]


@pytest.fixture(params=[False, True], ids=["plain", "background"])
def result(request, tmp_path) -> MaskResult:
    """A cat around a dog with a hole, a second dog, and a single pixel."""
    label_map = np.zeros((80, 120), dtype=np.int64)
    label_map[10:60, 10:70] = 1
    label_map[20:40, 30:50] = 0
    label_map[50:75, 90:115] = 1
    label_map[2, 2] = 1
    background = request.param
    if background:
        label_map = np.pad(label_map + 1, ((0, 0), (0, 7)))
    photo = tmp_path / "photos" / "sub" / "a b.jpg"
    photo.parent.mkdir(parents=True)
    make_photo(label_map.shape[1], 80).save(photo)
    mask = tmp_path / "out" / "masks" / "sub" / "a b.png"
    scores = [1, 0.5, 0.75, None] if background else [0.5, 0.75, None]
    write_mask(indexed_png(label_map, 3, background), mask, "digest", scores)
    return MaskResult(photo, "sub/a b.jpg", Path("sub/a b.png"), mask, LABELS, background)


def written(result, name, tmp_path) -> Path:
    (place,) = write_formats([result], ["png", name, name], tmp_path / "out")
    return place


def truth(result, number):
    return result.read() == number + result.background


@pytest.mark.parametrize("name", ["coco", "coco-polygons"])
def test_coco_by_pycocotools(result, tmp_path, name):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    pytest.importorskip("cv2")
    coco = COCO(str(written(result, name, tmp_path)))
    assert [coco.cats[number]["name"] for number in (1, 2, 3)] == LABELS
    assert coco.loadImgs(1)[0]["file_name"] == "sub/a b.jpg" and len(coco.anns) == 2
    for annotation in coco.loadAnns(coco.getAnnIds(imgIds=1)):
        expected = truth(result, annotation["category_id"] - 1)
        assert np.array_equal(coco.annToMask(annotation), expected), "a hole, two parts and a speck too"
        assert annotation["area"] == expected.sum()
        assert annotation["score"] == {1: 0.5, 2: 0.75}[annotation["category_id"]]
    assert coco.loadRes([{**a} for a in coco.anns.values()]).getAnnIds(catIds=2), "they pass as results too"


@pytest.mark.parametrize("name", ["coco", "coco-polygons"])
def test_coco_by_supervision(result, tmp_path, name):
    sv = pytest.importorskip("supervision")
    place = written(result, name, tmp_path)
    data = sv.DetectionDataset.from_coco(str(tmp_path / "photos"), str(place), force_masks=True)
    check_supervision(data, result, 1 if name == "coco" else 0.85)  # it draws polygons half a pixel wider


def check_supervision(data, result, least):
    assert data.classes == LABELS
    ((_, image, found),) = data
    assert image.shape[:2] == result.read().shape
    for number in (0, 1):
        mask = found.mask[found.class_id == number].any(axis=0)
        assert intersection_over_union(mask, truth(result, number)) >= least
    assert not (found.class_id == 2).any()


def test_coco_panoptic_as_transformers_reads_it(result, tmp_path):
    """Also follows the conventions of panopticapi: 24-bit ids in RGB, with the same ids in the PNG and the list."""
    place = written(result, "coco-panoptic", tmp_path)
    content = json.loads((place / "panoptic.json").read_text(encoding="utf-8"))
    assert [category["name"] for category in content["categories"]] == LABELS
    assert {(category["isthing"], len(category["color"])) for category in content["categories"]} == {(0, 3)}
    (image,), (annotation,) = content["images"], content["annotations"]
    assert image["id"] == annotation["image_id"] and image["file_name"] == "sub/a b.jpg"
    file = place / "panoptic" / annotation["file_name"]
    ids = rgb_to_id(np.asarray(Image.open(file)))
    assert Image.open(file).mode == "RGB" and ids.shape == (image["height"], image["width"])
    assert set(np.unique(ids)) - {0} == {segment["id"] for segment in annotation["segments_info"]}
    for segment in annotation["segments_info"]:
        expected = truth(result, segment["category_id"] - 1)
        assert np.array_equal(ids == segment["id"], expected) and segment["area"] == expected.sum()
        rows, columns = np.nonzero(expected)
        left, top, width, height = segment["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())
    read = prepare_coco_panoptic_annotation(
        np.asarray(Image.open(result.image)), annotation, place / "panoptic", return_masks=True
    )
    assert read["class_labels"].tolist() == [1, 2]
    for number, mask in enumerate(read["masks"]):
        assert np.array_equal(mask, truth(result, number))


def test_panoptic_ids_above_a_byte(tmp_path):
    label_map = np.full((4, 5), 299)
    write_mask(indexed_png(label_map, 300), tmp_path / "m.png", "digest")
    labels = [f"label {number}" for number in range(300)]
    result = MaskResult(tmp_path / "p.png", "p.png", Path("p.png"), tmp_path / "m.png", labels, False)
    (place,) = write_formats([result], ["coco-panoptic"], tmp_path)
    assert (rgb_to_id(np.asarray(Image.open(place / "panoptic" / "p.png"))) == 300).all()


def test_label_masks(result, tmp_path):
    files = sorted((written(result, "masks", tmp_path) / "sub" / "a b").iterdir())
    first = int(result.background)
    assert [file.name for file in files] == [f"{first}-cat.png", f"{first + 1}-dog__puppy__ _.png"]
    for number, file in enumerate(files):
        assert np.array_equal(np.asarray(Image.open(file)), truth(result, number) * 255)


def test_yolo_as_its_documentation_says(result, tmp_path):
    """One line per polygon, the class and then normalised x and y; labels are next to images of the same name."""
    cv2 = pytest.importorskip("cv2")
    yaml = pytest.importorskip("yaml")
    place = written(result, "yolo", tmp_path)
    data = yaml.safe_load((place / "data.yaml").read_text())
    assert data["names"] == dict(enumerate(LABELS))
    (image,) = (path for path in (place / data["train"]).rglob("*") if path.is_file())
    assert Image.open(image).size == result.read().shape[::-1]
    label = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")
    masks = np.zeros((3, *result.read().shape), dtype=np.uint8)
    for line in label.read_text().splitlines():
        number, *values = line.split()
        points = np.array(values, dtype=float).reshape(-1, 2)
        assert len(points) >= 3 and (points > 0).all() and (points < 1).all()
        pixels = (points * masks.shape[:0:-1]).astype(np.int32)  # truncated as in ultralytics and supervision
        cv2.fillPoly(masks[int(number)], [pixels], 1)
    assert intersection_over_union(masks[0], truth(result, 0)) > 0.97
    assert intersection_over_union(masks[1], truth(result, 1)) > 0.97 and not masks[2].any()
    assert masks[1][2, 2] and not masks[1][:10, 3:].any(), "the single pixel, and nothing around it"


def test_yolo_by_supervision(result, tmp_path):
    sv = pytest.importorskip("supervision")
    place = written(result, "yolo", tmp_path)
    # It does not search subfolders.
    folders = [str(place / name / "sub") for name in ("images", "labels")]
    data = sv.DetectionDataset.from_yolo(*folders, str(place / "data.yaml"), force_masks=True)
    check_supervision(data, result, 0.97)


@pytest.mark.parametrize(
    "shape",
    [
        ((5, 7), (5, 8)),
        ((5, 7), (6, 8), (7, 9)),
        ((9, 3), (8, 4)),
        ((0, 0), (0, 1), (1, 0), (1, 1)),
        ((29, 39),),
    ],
    ids=str,
)
def test_the_smallest_regions_are_kept_in_every_format(tmp_path, shape):
    cv2 = pytest.importorskip("cv2")
    COCO = pytest.importorskip("pycocotools.coco").COCO
    label_map = np.zeros((30, 40), dtype=np.int64)
    label_map[tuple(np.transpose(shape))] = 1
    write_mask(indexed_png(label_map, 1, True), tmp_path / "m.png", "digest")
    make_photo(40, 30).save(tmp_path / "p.png")
    result = MaskResult(tmp_path / "p.png", "p.png", Path("p.png"), tmp_path / "m.png", ["cat"], True)
    coco, yolo, labelme = write_formats([result], ["coco-polygons", "yolo", "labelme"], tmp_path)
    coco = COCO(str(coco))
    assert np.array_equal(coco.annToMask(coco.anns[1]), label_map)
    (line,) = (yolo / "labels" / "p.txt").read_text().splitlines()
    points = np.array(line.split()[1:], dtype=float).reshape(-1, 2) * (40, 30)
    for pixels in (points, np.round(points)):
        drawn = cv2.fillPoly(np.zeros((30, 40), dtype=np.uint8), [pixels.astype(np.int32)], 1)
        assert np.array_equal(drawn, label_map)
    (shape,) = json.loads((labelme / "p.json").read_text())["shapes"]
    assert np.array_equal(drawn_by_labelme([shape], (40, 30)), label_map)


def test_labelme_by_the_way_it_draws(result, tmp_path):
    """`labelme.utils.shape_to_mask` fills polygons and their outlines with Pillow."""
    pytest.importorskip("cv2")
    path = written(result, "labelme", tmp_path) / "sub" / "a b.json"
    content = json.loads(path.read_text())
    size = Image.open(path.parent / content["imagePath"]).size
    assert size == (content["imageWidth"], content["imageHeight"]) == result.read().shape[::-1]
    for number, label in enumerate(LABELS[:2]):
        shapes = [shape for shape in content["shapes"] if shape["label"] == label]
        assert intersection_over_union(drawn_by_labelme(shapes, size), truth(result, number)) > 0.97


def drawn_by_labelme(shapes, size):
    mask = Image.new("L", size)
    for shape in shapes:
        assert shape["shape_type"] == "polygon"
        points = [tuple(point) for point in shape["points"]]
        ImageDraw.Draw(mask).polygon(points, outline=1, fill=1)
    return np.asarray(mask)


def intersection_over_union(one, other):
    one, other = one.astype(bool), other.astype(bool)
    return (one & other).sum() / (one | other).sum()


def test_csv(result, tmp_path):
    with open(written(result, "csv", tmp_path), newline="") as file:
        rows = list(csv.DictReader(file))
    names = [*(["background"] if result.background else []), *LABELS]
    assert [row["label"] for row in rows] == names
    assert sum(int(row["pixels"]) for row in rows) == result.read().size
    assert sum(float(row["area"]) for row in rows) == pytest.approx(1, abs=1e-5)
    scores = [row["score"] for row in rows]
    assert scores == [*([""] if result.background else []), "0.500000", "0.750000", ""], "none of background"
    assert {row["image"] for row in rows} == {"sub/a b.jpg"}


def test_several_images_patterns_and_formats(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("x/a.png", "x/b.png", "y/a.png", "z/c.jpg")):
        Path(name).parent.mkdir(exist_ok=True)
        make_photo(40, 30, seed=number).save(name)
    Path("y/broken.png").write_bytes(b"none")
    Path("x/notes.txt").write_text("no image")
    shutil.copytree("z", "x/not in the pattern")
    arguments = ["segment", "x/*", "y", "z/c.jpg", "--labels", "cat|kitten,dog", "--model", tiny_folder]
    arguments += ["--format", "csv", "--format", "masks", "--output", "out"]
    assert run(*arguments, "--json") == 1
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert [Path(found["image"]).name for found in content["images"]] == ["a.png", "b.png", "a.png", "c.jpg"]
    for found in content["images"]:
        label_map = load_label_map(found["mask"])
        assert Path(found["overlay"]).is_file() and label_map.shape == (found["height"], found["width"])
        for segment in found["segments"]:
            assert segment["area"] == pytest.approx((label_map == segment["value"]).mean())
            assert (segment["score"] is None) == (segment["pixels"] == 0)
        assert [segment["label"] for segment in found["segments"]] == ["cat", "dog"]
    assert list(content["broken"]) == [os.path.join("y", "broken.png")]
    assert content["files"] == [os.path.join("out", "segments.csv"), os.path.join("out", "label-masks")]
    before = Path("out/segments.csv").read_bytes()

    assert run(*arguments[:6], "--model", "no/such/model", *arguments[8:]) == 2
    assert "segments.csv already exists; use --overwrite" in capsys.readouterr().err
    Path("y/broken.png").unlink()
    assert run(*arguments, "--overwrite") == 0
    out = capsys.readouterr().out
    assert "0 images segmented, 4 done before" in out and "segments.csv" in out
    assert Path("out/segments.csv").read_bytes() == before, "masks and scores of an earlier run"


@pytest.mark.parametrize(
    ("name", "package"), [("coco", "pycocotools"), ("coco-polygons", "cv2"), ("yolo", "cv2")]
)
def test_a_missing_extra_is_told_before_a_model_is_loaded(photo_file, capsys, monkeypatch, name, package):
    for module in (package, f"{package}.mask"):
        monkeypatch.setitem(sys.modules, module, None)
    arguments = ["segment", photo_file, "--labels", "cat", "--model", "no/such/model", "--format", name]
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert f"needs {package}" in error and "pip install 'pgseg-hf[formats]'" in error


def test_standard_input_into_a_folder(tiny_folder, photo_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["segment", "-", "--labels", "cat", "--model", tiny_folder, "--quiet", "--format", "csv"]
    for data, code in ((Path(photo_file).read_bytes(), 0), (b"", 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert run(*arguments, "--overwrite") == code
    captured = capsys.readouterr()
    assert captured.out == "" and "0 bytes" in captured.err
    assert Path("stdin-segmented/images/stdin.png").is_file()
    assert "stdin.png,120,90,cat,10800,1.000000," in Path("stdin-segmented/segments.csv").read_text()


def test_every_format_is_written_and_described():
    assert {"png", *_WRITERS} == set(FORMATS)
    page = (Path(__file__).parent.parent / "examples" / "segment.md").read_text()
    assert not [name for name in FORMATS if f"`{name}`" not in page]
