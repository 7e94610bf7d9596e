"""Masks made from benchmark downloads: COCO-style annotations, and maps with other values."""

import json
from pathlib import Path

import numpy as np
import pytest
from benchmark_layouts import BLOCK_COUNTS, BLOCK_POLYGON, BLOCK_STRING, HEIGHT, WIDTH, box_polygon
from PIL import Image

from pgseg_hf.evaluation.benchmarks.preparing import (
    PreparationSummary,
    prepare_cityscapes,
    prepare_coco_object,
    prepare_coco_object_from_stuff,
    prepare_coco_stuff,
    prepare_context,
    prepare_lvis,
    source_of_coco_object,
)


def write(content, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_mask(values, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values)).save(path)


def read_mask(path: Path) -> list[list[int]]:
    with Image.open(path) as image:
        return np.asarray(image).tolist()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counts(summary: PreparationSummary) -> tuple[int, int]:
    return summary.written, summary.skipped


def image(number: int = 1, name: str = "a.jpg", **other) -> dict:
    return {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH, **other}


def instance(category: int, segmentation, area: float = 1.0, image_id: int = 1, **other) -> dict:
    found = {"id": 7, "image_id": image_id, "category_id": category, "segmentation": segmentation}
    return {**found, "area": area, **other}


def write_instances(root: Path, images: list, annotations: list) -> None:
    write({"images": images, "annotations": annotations}, root / "annotations" / "instances_val2017.json")


class TestCocoObject:
    def test_crowds_lie_below_and_small_instances_on_top(self, tmp_path):
        annotations = [
            instance(2, BLOCK_POLYGON, area=4),  # bicycle, on top although it comes first
            instance(1, box_polygon(0, 0, 4, 4), area=16, iscrowd=0),
            # A crowd of toothbrushes, below all others despite its small area.
            instance(90, {"size": [HEIGHT, WIDTH], "counts": [8, 12]}, area=0.5, iscrowd=1),
        ]
        write_instances(tmp_path, [image(name="000000000139.jpg"), image(2, "b.jpg")], annotations)
        assert counts(prepare_coco_object(tmp_path)) == (2, 0)
        folder = tmp_path / "annotations" / "val2017"
        assert read_mask(folder / "000000000139_instanceTrainIds.png") == [
            [1, 1, 1, 1, 80],
            [1, 2, 2, 1, 80],
            [1, 2, 2, 1, 80],
            [1, 1, 1, 1, 80],
        ]
        assert read_mask(folder / "b_instanceTrainIds.png") == [[0] * WIDTH] * HEIGHT
        assert Image.open(folder / "b_instanceTrainIds.png").mode == "L"

    def test_a_stopped_run_is_continued(self, tmp_path):
        images = [image(), image(2, "b.jpg"), image(3, "c.jpg")]
        good = [instance(1, BLOCK_POLYGON), instance(1, BLOCK_POLYGON, image_id=2)]
        write_instances(tmp_path, images, [good[0], instance(1, [[1, 2]], image_id=2)])
        with pytest.raises(ValueError, match=r"instances_val2017.json, annotation 7: a polygon is \[1, 2\]"):
            prepare_coco_object(tmp_path)
        folder = tmp_path / "annotations" / "val2017"
        made = sorted(path.name for path in folder.iterdir())
        assert made == ["a_instanceTrainIds.png", "instanceTrainIds.txt"]
        with pytest.raises(ValueError, match="masks made from the instances; remove them"):
            prepare_coco_object_from_stuff(tmp_path)
        write_mask(np.uint8([[9]]), folder / "a_instanceTrainIds.png")
        write_instances(tmp_path, images, good)
        assert counts(prepare_coco_object(tmp_path)) == (2, 1)
        assert read_mask(folder / "a_instanceTrainIds.png") == [[9]]
        before = files(tmp_path)
        assert counts(prepare_coco_object(tmp_path)) == (0, 3)
        assert files(tmp_path) == before
        # The annotations have changed since the masks were made.
        (folder / "c_instanceTrainIds.png").unlink()
        write_instances(tmp_path, images, good[:1])
        before = files(tmp_path)
        with pytest.raises(ValueError, match=r"b_instanceTrainIds.png was made from instances_val2017.json"):
            prepare_coco_object(tmp_path)
        assert files(tmp_path) == before

    @pytest.mark.parametrize(
        ("images", "annotations", "words"),
        [
            ([image()], [instance(12, BLOCK_POLYGON)], "annotation 7 has category_id = 12"),
            ([image()], [instance(1, BLOCK_POLYGON, image_id=5)], "= 5, which is not among"),
            ([image()], [instance(1, BLOCK_POLYGON, area=None)], "area = None"),
            ([image()], [instance(1, BLOCK_POLYGON, area=float("nan"))], "area = nan"),
            ([image()], [instance(True, BLOCK_POLYGON)], "category_id = True"),
            ([image(), image()], [], "image 1 occurs twice"),
            ([image(), image(2)], [], "two images have the mask .*a_instanceTrainIds.png"),
            ([image(height=0)], [], "0 x 5"),
            ([image(width=10**9)], [], "4 x 1000000000"),
            ([image(height="4")], [], "height = '4'"),
            ([{"file_name": "a.jpg"}], [], "image at place 0 has id = None"),
            ([3], [], "no list 'images' of objects"),
            ([image()], None, "no list 'annotations' of objects"),
        ],
    )
    def test_annotations_that_make_no_sense(self, tmp_path, images, annotations, words):
        write_instances(tmp_path, images, annotations)
        before = files(tmp_path)
        with pytest.raises(ValueError, match=words) as caught:
            prepare_coco_object(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert files(tmp_path) == before

    @pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\xff", None])
    def test_files_that_are_missing_or_broken(self, tmp_path, text):
        (tmp_path / "annotations").mkdir()
        if text is not None:
            (tmp_path / "annotations" / "instances_val2017.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"instances_val2017.json"):
            prepare_coco_object(tmp_path)

    @pytest.mark.parametrize(
        "name",
        [
            *["../a.jpg", "/a.jpg", "b/a.jpg", "..", ".a.jpg", "b\\a.jpg", "C:a.jpg"],
            "",
            "a\n.jpg",
            "a" * 300,
            None,
        ],
    )
    def test_names_stay_in_the_root(self, tmp_path, name):
        root = tmp_path / "x" / "y"
        write_instances(root, [image(name=name)], [])
        before = files(tmp_path)
        with pytest.raises(ValueError, match="file_name = "):
            prepare_coco_object(root)
        assert files(tmp_path) == before


class TestStuffthingmaps:
    RAW = np.uint8([[0, 10, 12, 89], [91, 181, 255, 0]])

    def test_things_become_objects(self, tmp_path):
        folder = tmp_path / "annotations" / "val2017"
        write_mask(self.RAW, folder / "a.png")
        write_mask(np.uint8([[11]]), folder / "b_labelTrainIds.png")
        write_mask(np.uint8([[11]]), folder / "._a.png")
        before = files(tmp_path)
        assert counts(prepare_coco_object_from_stuff(tmp_path)) == (1, 0)
        after = files(tmp_path)
        made = {"a_instanceTrainIds.png", "instanceTrainIds.txt"}
        assert set(after) - set(before) == {f"annotations/val2017/{name}" for name in made}
        assert all(after[name] == before[name] for name in before)
        assert read_mask(folder / "a_instanceTrainIds.png") == [[1, 11, 12, 80], [0, 0, 0, 1]]
        assert counts(prepare_coco_object_from_stuff(tmp_path)) == (0, 1)
        assert source_of_coco_object(tmp_path, "val2017") == "stuffthingmaps"
        with pytest.raises(ValueError, match="masks made from the stuffthingmaps; remove them"):
            prepare_coco_object(tmp_path)
        # The source of masks that already existed is unknown.
        (folder / "instanceTrainIds.txt").unlink()
        write_mask(self.RAW, folder / "c.png")
        assert counts(prepare_coco_object_from_stuff(tmp_path)) == (1, 1)
        assert source_of_coco_object(tmp_path, "val2017") is None

    @pytest.mark.parametrize("prepare", [prepare_coco_object_from_stuff, prepare_coco_stuff])
    def test_values_that_do_not_occur(self, tmp_path, prepare):
        folder = tmp_path / "annotations" / "val2017"
        write_mask(np.uint16([[11, 90], [182, 300]]), folder / "a.png")
        with pytest.raises(ValueError, match=r"a.png has the values \[11, 90, 182, 300\]"):
            prepare(tmp_path)
        assert list(folder.iterdir()) == [folder / "a.png"]

    def test_every_other_value_is_known(self, tmp_path):
        unused = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90, *range(182, 255)}
        known = [value for value in range(256) if value not in unused]
        assert len(known) == 80 + 91 + 1
        write_mask(np.uint8([known]), tmp_path / "annotations" / "val2017" / "a.png")
        prepare_coco_stuff(tmp_path)
        prepared = read_mask(tmp_path / "annotations" / "val2017" / "a_labelTrainIds.png")
        assert prepared == [[*range(171), 255]]
        write_mask(self.RAW, tmp_path / "annotations" / "train2017" / "a.png")
        prepare_coco_stuff(tmp_path, split="train2017")
        prepared = read_mask(tmp_path / "annotations" / "train2017" / "a_labelTrainIds.png")
        assert prepared == [[0, 10, 11, 79], [80, 170, 255, 0]]

    def test_missing_and_broken_maps(self, tmp_path):
        with pytest.raises(ValueError, match="no stuffthingmaps"):
            prepare_coco_stuff(tmp_path)
        write_mask(np.zeros((2, 2, 3), dtype=np.uint8), tmp_path / "annotations" / "val2017" / "a.png")
        with pytest.raises(ValueError, match=r"a\.png"):
            prepare_coco_stuff(tmp_path)


class TestContext:
    def content(self) -> dict:
        return {
            "images": [
                {"image_id": number, "file_name": name, "height": HEIGHT, "width": WIDTH, "phase": phase}
                for number, name, phase in (
                    (3, "b.jpg", "val"),
                    (1, "2008_a.jpg", "train"),
                    (2, "a.jpg", "val"),
                )
            ],
            "annos_segmentation": [
                {"id": 1, "image_id": 1, "category_id": 458, "segmentation": box_polygon(0, 0, 5, 2)},
                {"id": 2, "image_id": 2, "category_id": 9, "segmentation": BLOCK_STRING},
                {"id": 3, "image_id": 1, "category_id": 2, "segmentation": BLOCK_COUNTS, "area": 99},
                {"id": 4, "image_id": 2, "category_id": 0, "segmentation": box_polygon(1, 1, 2, 2)},
            ],
        }

    def test_masks_and_lists(self, tmp_path):
        write(self.content(), tmp_path / "trainval_merged.json")
        assert counts(prepare_context(tmp_path)) == (3, 0)
        folder = tmp_path / "SegmentationClassContext"
        assert read_mask(folder / "2008_a.png") == [
            [59, 59, 59, 59, 59],
            [59, 1, 1, 59, 59],
            [0, 1, 1, 0, 0],
            [0, 0, 0, 0, 0],
        ]
        assert read_mask(folder / "a.png")[1:3] == [[0, 0, 2, 0, 0], [0, 2, 2, 0, 0]]
        lists = tmp_path / "ImageSets" / "SegmentationContext"
        assert (lists / "train.txt").read_text() == "2008_a\n"
        assert (lists / "val.txt").read_text() == "a\nb\n"
        before = files(tmp_path)
        assert counts(prepare_context(tmp_path)) == (0, 3)
        assert files(tmp_path) == before

    def test_phases(self, tmp_path):
        content = self.content()
        content["images"][0]["phase"] = "test"
        write(content, tmp_path / "other.json")
        assert counts(prepare_context(tmp_path, annotations="other.json")) == (2, 0)
        assert (tmp_path / "ImageSets" / "SegmentationContext" / "val.txt").read_text() == "a\n"
        for phase in (None, "training", ["val"]):
            content["images"][1]["phase"] = phase
            write(content, tmp_path / "trainval_merged.json")
            with pytest.raises(ValueError, match="image 1 has the phase"):
                prepare_context(tmp_path)

    def test_the_lists_come_last(self, tmp_path):
        content = self.content()
        content["annos_segmentation"][0]["segmentation"] = None
        write(content, tmp_path / "trainval_merged.json")
        with pytest.raises(ValueError, match="annotation 1: the segmentation is None"):
            prepare_context(tmp_path)
        assert set(files(tmp_path)) == {"trainval_merged.json", "SegmentationClassContext/b.png"}

    def test_a_list_of_other_images_is_kept(self, tmp_path):
        write(self.content(), tmp_path / "trainval_merged.json")
        path = tmp_path / "ImageSets" / "SegmentationContext" / "val.txt"
        path.parent.mkdir(parents=True)
        path.write_text("c\n")
        before = files(tmp_path)
        with pytest.raises(ValueError, match=r"val\.txt lists other images"):
            prepare_context(tmp_path)
        assert files(tmp_path) == before


class TestCityscapes:
    def test_nineteen_classes(self, tmp_path):
        folder = tmp_path / "gtFine" / "val" / "lindau"
        source = folder / "lindau_000000_000019_gtFine_labelIds.png"
        write_mask(np.arange(34, dtype=np.uint8)[None], source)
        write_mask(np.uint8([[99]]), folder / "lindau_000000_000019_gtFine_instanceIds.png")
        before = source.read_bytes()
        assert counts(prepare_cityscapes(tmp_path)) == (1, 0)
        assert source.read_bytes() == before
        (row,) = read_mask(folder / "lindau_000000_000019_gtFine_labelTrainIds.png")
        counted = [7, 8, 11, 12, 13, *range(17, 29), 31, 32, 33]
        counted.remove(18)
        counting = {value: label for label, value in enumerate(counted)}
        assert len(counting) == 19
        assert row == [counting.get(value, 255) for value in range(34)]
        assert counts(prepare_cityscapes(tmp_path)) == (0, 1)

    def test_values_that_are_no_ids_and_missing_maps(self, tmp_path):
        write_mask(np.uint8([[7, 34]]), tmp_path / "gtFine" / "val" / "a" / "a_gtFine_labelIds.png")
        with pytest.raises(ValueError, match=r"a_gtFine_labelIds.png has the values \[34\]"):
            prepare_cityscapes(tmp_path)
        with pytest.raises(ValueError, match="no CITY"):
            prepare_cityscapes(tmp_path, split="train")


class TestLvis:
    @staticmethod
    def image(number: int, address: str) -> dict:
        return {"id": number, "coco_url": address, "height": HEIGHT, "width": WIDTH}

    def test_masks_of_16_bits_and_the_list(self, tmp_path):
        server = "http://images.cocodataset.org"
        images = [
            self.image(1, f"{server}/val2017/000000000139.jpg"),
            self.image(2, f"{server}/train2017/000000000030.jpg"),
        ]
        annotations = [instance(1203, BLOCK_POLYGON, area=4), instance(300, box_polygon(0, 0, 5, 2), area=10)]
        write({"images": images, "annotations": annotations}, tmp_path / "lvis_v1_val.json")
        assert counts(prepare_lvis(tmp_path)) == (2, 0)
        path = tmp_path / "annotations" / "lvis_val" / "000000000139.png"
        assert read_mask(path) == [
            [300, 300, 300, 300, 300],
            [300, 1203, 1203, 300, 300],
            [0, 1203, 1203, 0, 0],
            [0, 0, 0, 0, 0],
        ]
        assert Image.open(path.with_name("000000000030.png")).mode.startswith("I;16")
        listed = (tmp_path / "lvis_val.txt").read_text().splitlines()
        assert listed == ["train2017/000000000030.jpg", "val2017/000000000139.jpg"]
        assert counts(prepare_lvis(tmp_path)) == (0, 2)

    def test_the_training_part_has_its_own_names(self, tmp_path):
        images = [self.image(1, "http://x/train2017/a.jpg")]
        write({"images": images, "annotations": []}, tmp_path / "lvis_v1_train.json")
        prepare_lvis(tmp_path, annotations="lvis_v1_train.json")
        assert (tmp_path / "lvis_train.txt").read_text() == "train2017/a.jpg\n"
        assert (tmp_path / "annotations" / "lvis_train" / "a.png").is_file()

    @pytest.mark.parametrize(
        "address",
        ["http://x/../a.jpg", "http://x//a.jpg", "http://x/val2017/..", "val2017/a.jpg", "a.jpg", "", None],
    )
    def test_addresses_stay_in_the_root(self, tmp_path, address):
        root = tmp_path / "x" / "y"
        write({"images": [self.image(1, address)], "annotations": []}, root / "lvis_v1_val.json")
        before = files(tmp_path)
        with pytest.raises(ValueError, match="coco_url = "):
            prepare_lvis(root)
        assert files(tmp_path) == before
