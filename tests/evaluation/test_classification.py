"""Zero-shot classification."""

import io
import math
import shutil

import datasets
import numpy as np
import pytest
import torch
from data_files import image_bytes, tar_bytes
from PIL import Image
from tiny_models import make_photo

from pgseg_hf.evaluation import BrokenImage, LabelledImage, classification
from pgseg_hf.evaluation.benchmarks.catalogue import read_class_names
from pgseg_hf.evaluation.classification import (
    ClassFinder,
    Classifier,
    open_imagenet,
    template_sets,
    zero_shot_accuracy,
)
from pgseg_hf.prompts import IMAGENET_TEMPLATES


def test_zero_shot_accuracy_against_one_image_at_a_time(tiny_segmenter):
    model, processor = tiny_segmenter.model, tiny_segmenter.processor
    labels = ["cat", "dog", "grass", "sky", "road", "tree", "car"]
    rng = np.random.default_rng(0)
    images = [
        (make_photo(*rng.integers(20, 90, 2).tolist(), seed=seed), labels[seed % 7]) for seed in range(9)
    ]
    classes = processor.get_class_embeddings(model, labels, IMAGENET_TEMPLATES)
    ranks = []
    for image, label in images:
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
    expected = {"top1": ranks.count(0) / 9, "top5": sum(rank < 5 for rank in ranks) / 9, "images": 9}
    assert 0 < expected["top5"] < 1
    for batch_size in (1, 4, 64):
        assert zero_shot_accuracy(model, processor, images, labels, batch_size) == expected


def test_zero_shot_of_few_labels_and_odd_inputs(tiny_segmenter, photo):
    model, processor = tiny_segmenter.model, tiny_segmenter.processor
    scores = zero_shot_accuracy(model, processor, [(photo, "cat"), (photo, " dog ")], ["cat", "dog"])
    assert scores == {"top1": 0.5, "top5": 1.0, "images": 2}
    nothing = zero_shot_accuracy(model, processor, [], ["cat"])
    assert math.isnan(nothing["top1"]) and nothing["images"] == 0
    with pytest.raises(ValueError, match="label 'cow', which is not among the labels"):
        zero_shot_accuracy(model, processor, [(photo, "cow")], ["cat"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        zero_shot_accuracy(model, processor, [(photo, "cat")], ["cat"], batch_size=0)


IMAGENET = read_class_names("imagenet")
WNIDS, LABELS = IMAGENET["wnids"], IMAGENET["labels"]


def found_in(classes):
    """Class and first pixel of each image made by `data_files.image_bytes`."""
    return [
        str(each) if isinstance(each, BrokenImage) else (each.label, each.read().getpixel((0, 0))[0])
        for each in classes.images()
    ]


def write_class_folders(root, names):
    """Writes image i to the folder names[i]."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"ILSVRC2012_val_{number:08d}.png").write_bytes(image_bytes(number))
    return root


def test_template_sets():
    sets = template_sets()
    assert [len(set(sets[name])) for name in ("simple", "subset", "full")] == [1, 7, 80]
    assert all(template.count("{}") == 1 for templates in sets.values() for template in templates)


class TestClassFinder:
    def test_numbers_ids_and_names(self):
        finder = ClassFinder(LABELS, WNIDS)
        for tag in ("2", "n01484850", "N01484850", "great white shark", "Great White Shark"):
            assert finder([tag], "a.jpg") == 2
        assert finder(["tench", "n01440764", "Tinca tinca"], "a.jpg") == 0

    @pytest.mark.parametrize("tags", [[], ["submarine sandwich"], ["1000"], ["-1"], ["tench", "goldfish"]])
    def test_no_class_or_several(self, tags):
        with pytest.raises(ValueError, match=r"a.jpg has the label .*expected one of the 1000 classes"):
            ClassFinder(LABELS, WNIDS)(tags, "a.jpg")

    def test_names_of_the_data_set_count_by_their_place(self):
        listed = ["tench", "goldfish, Carassius auratus", "crane"]
        finder = ClassFinder(["a", "tench", "b"], ["n1", "n2", "n3"], listed)
        assert [finder([name], "x") for name in listed] == [0, 1, 2]
        assert [finder([name], "x") for name in ("n1", "n2", "b")] == [0, 1, 2]


class TestFolders:
    @pytest.mark.parametrize("split", ["val", ""])
    def test_folders_of_ids_or_names(self, tmp_path, split):
        names = [WNIDS[3], WNIDS[0], WNIDS[3], "goldfish"]
        write_class_folders(tmp_path / split, names)
        classes = open_imagenet(str(tmp_path))
        expected = sorted((name, number) for number, name in enumerate(names))
        numbers = {WNIDS[3]: 3, WNIDS[0]: 0, "goldfish": 1}
        assert found_in(classes) == [(numbers[name], number) for name, number in expected]
        assert found_in(classes) == found_in(classes) and classes.labels == LABELS
        write_class_folders(tmp_path / "train", [WNIDS[1]])
        assert found_in(open_imagenet(str(tmp_path), "train")) == [(1, 0)]

    def test_clear_errors(self, tmp_path):
        with pytest.raises(ValueError, match="nowhere is not a folder"):
            open_imagenet(str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match="no images"):
            open_imagenet(str(tmp_path))
        write_class_folders(tmp_path, ["n99999999"])
        with pytest.raises(ValueError, match=r"n99999999.*.png has the label n99999999|'n99999999'"):
            open_imagenet(str(tmp_path))


def write_shard(path, classes, first=0, ending="cls"):
    files = {}
    for number, content in enumerate(classes, start=first):
        files |= {f"{number:05d}.png": image_bytes(number), f"{number:05d}.{ending}": content.encode()}
    path.write_bytes(tar_bytes(files))


class TestShards:
    def test_other_shards_have_another_fingerprint(self, tmp_path):
        def fingerprint():
            return open_imagenet(str(tmp_path / "*.tar")).fingerprint()

        write_shard(tmp_path / "a.tar", ["0", "1"])
        before = fingerprint()
        assert fingerprint() == before
        write_shard(tmp_path / "a.tar", ["0", "1", "2", "3"])
        assert fingerprint() != before

    def test_a_pattern_of_shards_with_numbers_ids_and_names(self, tmp_path):
        write_shard(tmp_path / "val-00.tar", ["3", WNIDS[1]])
        write_shard(tmp_path / "val-01.tar", ["tiger shark\n"], first=2)
        classes = open_imagenet(f"{tmp_path}/val-{{00..01}}.tar")
        assert found_in(classes) == [(3, 0), (1, 1), (3, 2)] == found_in(classes)
        assert found_in(open_imagenet(str(tmp_path / "val-01.tar"))) == [(3, 2)]
        write_shard(tmp_path / "a.tar", ["2"], ending="target")
        assert found_in(open_imagenet(str(tmp_path / "a.tar"), label_column="target")) == [(2, 0)]

    def test_clear_errors(self, tmp_path):
        write_shard(tmp_path / "a.tar", ["0", "no such class"])
        with pytest.raises(ValueError, match=r"00001.* has the label 'no such class'|no such class"):
            list(open_imagenet(str(tmp_path / "a.tar")).images())
        with pytest.raises(ValueError, match=r"b.tar"):
            open_imagenet(str(tmp_path / "b.tar"))


class TestSavedDataSets:
    @staticmethod
    def save(folder, names, labels, split="validation"):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        images = [{"bytes": image_bytes(number), "path": None} for number in range(len(labels))]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        datasets.DatasetDict({split: rows}).save_to_disk(str(folder))
        return f"hub:{folder}"

    def test_class_labels_with_synonyms_by_their_place(self, tmp_path, monkeypatch):
        content = {**IMAGENET, "labels": LABELS[:3], "wnids": WNIDS[:3]}
        monkeypatch.setattr(classification, "read_class_names", lambda name: content)
        names = ["tench, Tinca tinca", "goldfish, Carassius auratus", "white shark, man-eater"]
        path = self.save(tmp_path / "saved", names, [2, 0, 1, 2])
        assert found_in(open_imagenet(path)) == [(2, 0), (0, 1), (1, 2), (2, 3)]

    def test_a_part_of_the_classes_counts_by_names(self, tmp_path):
        path = self.save(tmp_path / "saved", ["tiger shark, Galeocerdo cuvieri", "n01440764"], [1, 0], "val")
        assert found_in(open_imagenet(path)) == [(0, 0), (3, 1)]
        with pytest.raises(ValueError, match="no split 'test'; its splits are val"):
            open_imagenet(path, split="test")
        shutil.rmtree(tmp_path / "saved")
        path = self.save(tmp_path / "saved", ["tiger shark, Galeocerdo cuvieri", "n01440764"], [1, 0])
        assert found_in(open_imagenet(path)) == [(0, 0), (3, 1)]

    def test_broken_and_missing_cells(self, tmp_path):
        features = datasets.Features(
            {"image": datasets.Image(decode=False), "label": datasets.Value("int64")}
        )
        images = [{"bytes": image_bytes(0), "path": None}, None, {"bytes": b"no image", "path": None}]
        rows = datasets.Dataset.from_dict({"image": images, "label": [5, 6, 7]}, features=features)
        datasets.DatasetDict({"validation": rows}).save_to_disk(str(tmp_path / "saved"))
        found = list(open_imagenet(f"hub:{tmp_path / 'saved'}").images())
        assert found[0].label == 5 and "image is empty" in str(found[1]) and found[2].label == 7


class TestClassifier:
    names = ["cat", "dog", "grass", "sky", "road", "tree", "car"]

    def images(self, count=9):
        sizes = np.random.default_rng(0).integers(20, 90, (count, 2)).tolist()
        return [
            LabelledImage(f"p{number}", make_photo(*size, seed=number), label=number % 7)
            for number, size in enumerate(sizes)
        ]

    def classifier(self, segmenter, **options):
        return Classifier(segmenter.model, segmenter.processor, self.names, **options)

    def test_other_templates_change_the_class_embeddings(self, tiny_segmenter):
        sets = template_sets()
        first, second = (
            self.classifier(tiny_segmenter, templates=sets[name]).class_embeds
            for name in ("simple", "subset")
        )
        assert not torch.allclose(first, second)

    def test_broken_images(self, tiny_segmenter, tmp_path):
        whole = self.images()
        (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 broken")
        file = io.BytesIO()
        make_photo().save(file, format="JPEG")
        images = [
            LabelledImage("first", tmp_path / "broken.jpg", label=0),
            *whole[:4],
            LabelledImage("half", file.getvalue()[:400], label=1),
            BrokenImage("row 3", "row 3 is empty"),
            *whole[4:],
        ]
        with pytest.raises(BrokenImage, match=r"broken.jpg"):
            self.classifier(tiny_segmenter)(images)
        with pytest.raises(BrokenImage, match=r"^row 3"):
            self.classifier(tiny_segmenter)(images[6:])
        expected = self.classifier(tiny_segmenter)(whole).to_dict()
        assert 0 < expected["top1"] < expected["top5"] < 1
        for batch_size in (1, 3, 64):
            scores = self.classifier(tiny_segmenter, batch_size=batch_size, skip_broken=True)(images)
            assert list(scores.broken) == ["first", "half", "row 3"] and scores.to_dict() == expected
        scores = self.classifier(tiny_segmenter, skip_broken=True)(images[:1])
        assert (scores.images, len(scores.broken)) == (0, 1) and math.isnan(scores.to_dict()["top5"])
