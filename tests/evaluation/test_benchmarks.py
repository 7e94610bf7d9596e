"""Every benchmark on a miniature of its published layout: files, ignored pixels, and the mean IoU by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_layouts import LAYOUTS, quarters, write_benchmark, write_mask
from mask_folders import KnownGroups, make_folder

from pgseg_hf import SegmentationOptions
from pgseg_hf.evaluation import BrokenImage, MaskOptions, evaluate_masks
from pgseg_hf.evaluation.benchmarks.catalogue import BENCHMARKS, open_benchmark
from pgseg_hf.evaluation.evaluator import MaskEvaluator

NAMES = list(LAYOUTS)
# Number of labels; first, second and last label.
LABELS = {
    "voc": (21, "background", "aeroplane", "monitor"),
    "voc20": (20, "aeroplane", "bicycle", "monitor"),
    "context": (60, "background", "airplane", "wood"),
    "context59": (59, "airplane", "bag", "wood"),
    "coco_object": (81, "background", "person", "toothbrush"),
    "coco_stuff": (171, "person", "bicycle", "wood"),
    "ade20k": (150, "wall", "building", "flag"),
    "cityscapes": (19, "road", "sidewalk", "bicycle"),
    "imagenet_s50": (51, "background", "goldfish", "agaric"),
    "imagenet_s300": (301, "background", "tench", "bolete"),
    "imagenet_s919": (920, "background", "tench", "toilet tissue"),
    "lvis": (1204, "background", "aerosol can", "zucchini"),
}
WITH_BACKGROUND = {name for name, (_, first, *_) in LABELS.items() if first == "background"}


def written(name, tmp_path, split="val"):
    """A miniature in its published folder, and the dataset opened from the parent folder."""
    miniature = write_benchmark(name, tmp_path / LAYOUTS[name].folder, split)
    return miniature, open_benchmark(name, tmp_path, split)


def known_segmenter(name, best):
    """Predicts the label `best[i]` in quarter i; the background has a score of zero."""
    count, background = LABELS[name][0], name in WITH_BACKGROUND
    scores = torch.zeros(4, count)
    for quarter, label in enumerate(best):
        if not (background and label == 0):
            scores[quarter, label] = 0.9
    return KnownGroups(scores[:, int(background) :].tolist())


def options_for(name, **changes):
    threshold = 0.5 if name in WITH_BACKGROUND else None
    return MaskOptions(SegmentationOptions(background_threshold=threshold), **changes)


def brute_force_iou(truths, predictions, ignored):
    """IoU of each label that occurs, pixel by pixel over all images."""
    pairs = [
        (true, found)
        for truth, prediction in zip(truths, predictions)
        for true, found in zip(truth.ravel().tolist(), prediction.ravel().tolist())
        if true != ignored
    ]
    result = {}
    for label in {label for pair in pairs for label in pair}:
        both = sum(pair == (label, label) for pair in pairs)
        result[label] = both / sum(label in pair for pair in pairs)
    return result


def test_all_benchmarks_are_here():
    assert set(BENCHMARKS) == set(NAMES) == set(LABELS)


def test_every_benchmark_is_described():
    page = (Path(__file__).parents[2] / "examples" / "evaluate.md").read_text()
    assert not [name for name in BENCHMARKS if f"`{name}`" not in page]


@pytest.mark.parametrize("name", NAMES)
class TestEveryBenchmark:
    def test_labels(self, name):
        benchmark = BENCHMARKS[name]
        labels = benchmark.labels
        assert (len(labels), labels[0], labels[1], labels[-1]) == LABELS[name]
        assert benchmark.classes == labels[name in WITH_BACKGROUND :]

    def test_images_and_their_decoded_truth(self, name, tmp_path):
        miniature, dataset = written(name, tmp_path)
        assert [image.name for image in dataset.images] == miniature.names
        assert [image.image for image in dataset.images] == miniature.images
        assert [image.mask for image in dataset.images] == miniature.masks
        for image, truth in zip(dataset.images, miniature.truths):
            assert image.read().size == truth.shape[::-1]
            found = dataset.truth(image)
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found, truth)
        assert dataset.background == (0 if name in WITH_BACKGROUND else None)
        assert dataset.ignore_index == (None if name == "lvis" else LAYOUTS[name].ignored)
        assert dataset.labels == BENCHMARKS[name].labels

    def test_places_and_splits(self, name, tmp_path):
        layout = LAYOUTS[name]
        with pytest.raises(ValueError, match="does not contain") as caught:
            open_benchmark(name, tmp_path)
        for number, root in enumerate(BENCHMARKS[name].roots):
            assert str(tmp_path / root) in str(caught.value)
            miniature = write_benchmark(name, tmp_path / str(number) / root)
            dataset = open_benchmark(name, str(tmp_path / str(number)))
            assert [image.image for image in dataset.images] == miniature.images
        if layout.listing is not None:
            assert layout.listing.format(split=layout.splits["val"]) in str(caught.value)
        if "train" in layout.splits:
            miniature, dataset = written(name, tmp_path, "train")
            assert dataset.name == f"{name} train"
            for image, truth in zip(dataset.images, miniature.truths, strict=True):
                np.testing.assert_array_equal(dataset.truth(image), truth)
        with pytest.raises(
            ValueError, match=f"{name} has no split 'dev', expected one of {', '.join(layout.splits)}"
        ):
            open_benchmark(name, tmp_path, "dev")

    def test_the_figure_is_that_of_a_count_by_hand(self, name, tmp_path):
        miniature, dataset = written(name, tmp_path)
        layout = LAYOUTS[name]
        # Correct in the first image; in the others the same labels are shifted by one quarter.
        best = [label if label != layout.ignored or name == "lvis" else 3 for label in layout.labels]
        predictions = [quarters(best, truth.shape) for truth in miniature.truths]
        ignored = None if name == "lvis" else layout.ignored
        expected = brute_force_iou(miniature.truths, predictions, ignored)
        segmenter = known_segmenter(name, best)
        scores = evaluate_masks(segmenter, dataset, options_for(name))
        assert segmenter.seen == [BENCHMARKS[name].classes]
        assert {
            label: iou for label, iou in enumerate(scores.confusion.iou()) if not np.isnan(iou)
        } == pytest.approx(expected)
        result = scores.to_dict()
        assert result["mean_iou"] == pytest.approx(sum(expected.values()) / len(expected))
        assert 0.1 < result["mean_iou"] < 0.9, "neither all correct nor all wrong"
        # The first image alone is entirely correct.
        first = evaluate_masks(segmenter, dataset.part(0, len(dataset)), options_for(name)).to_dict()
        assert first["mean_iou"] == first["pixel_accuracy"] == 1

    def test_missing_masks(self, name, tmp_path):
        miniature, _ = written(name, tmp_path)
        for mask in miniature.masks[1:]:
            mask.unlink()
        with pytest.raises(ValueError) as caught:
            open_benchmark(name, tmp_path)
        message = str(caught.value)
        count = len(miniature.masks) - 1
        assert (
            f"{count} images or masks of {name} val are missing, the first is {miniature.masks[1]}."
            in message
        )
        others = {"context59": "context", "coco_object": "coco_object_from_stuff"}
        prepared = others.get(name, name)
        if prepared in ("context", "coco_object_from_stuff", "coco_stuff", "cityscapes", "lvis"):
            assert f"`pgseg prepare {prepared} DIR`" in message
        else:
            assert "prepare" not in message

    def test_values_that_are_no_labels(self, name, tmp_path):
        miniature, dataset = written(name, tmp_path)
        layout = LAYOUTS[name]
        # If raw values start with unknown, the highest equals the number of labels.
        highest = LABELS[name][0] - (name not in ("voc20", "context59", "ade20k"))
        strange = highest + 1
        write_mask(miniature.masks[1], np.full(miniature.truths[1].shape, strange), layout.encoding)
        ignored = "" if name == "lvis" else f", {layout.ignored}"
        message = (
            f"{miniature.masks[1].name} has the value {strange}, expected one of 0 to {highest}{ignored}:"
        )
        with pytest.raises(ValueError, match=message):
            evaluate_masks(known_segmenter(name, ()), dataset, options_for(name))


@pytest.mark.parametrize(
    ("name", "changes", "first"),
    [
        ("cityscapes", {"synonyms": "merge"}, ["road", "street", "roadway", "sidewalk"]),
        ("imagenet_s919", {"released_names": True}, ["tench", "goldfish", "great_white_shark"]),
        ("imagenet_s919", {}, ["tench", "goldfish", "great white shark"]),
    ],
)
def test_other_names_are_asked_for_where_told(tmp_path, name, changes, first):
    segmenter = known_segmenter(name, ())
    MaskEvaluator(segmenter, written(name, tmp_path)[1], options_for(name, **changes))
    assert segmenter.seen[0][: len(first)] == first


def test_class_255_of_lvis_counts(tmp_path):
    miniature, dataset = written("lvis", tmp_path)
    right = known_segmenter("lvis", (0, 255, 256, 1203))
    wrong = known_segmenter("lvis", (0, 7, 256, 1203))
    first = dataset.part(0, 2)
    assert evaluate_masks(right, first, options_for("lvis", oracle=True)).to_dict()["oracle_mean_iou"] == 1
    scores = evaluate_masks(wrong, first, options_for("lvis"))
    assert scores.confusion.counts.sum() == miniature.truths[0].size == 64
    assert scores.confusion.counts[255, 7] == 16
    assert scores.to_dict()["mean_iou"] == pytest.approx(3 / 5)
    assert dataset.labels[255] == BENCHMARKS["lvis"].classes[254]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "voc val has no images"),
        (["", "  "], "voc val has no images"),
        (["2007_000033", "../../secret"], r"val.txt: '../../secret' leads out of the folder"),
        (["/etc/secret"], "'/etc/secret' leads out"),
        (["2007_000033", "2007_000033"], "2 images of voc val have the name 2007_000033"),
        (["2007_000033", "absent"], r"2 images or masks .* the first is .*JPEGImages/absent.jpg"),
    ],
)
def test_lists_that_make_no_sense(tmp_path, lines, message):
    miniature, _ = written("voc", tmp_path)
    miniature.listing.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        open_benchmark("voc", tmp_path)


def test_lists_may_hold_more_than_names(tmp_path):
    miniature, _ = written("voc", tmp_path)
    miniature.listing.write_text("2007_000033 1\n\n2007_000042.jpg\n")
    assert [image.name for image in open_benchmark("voc", tmp_path).images] == [
        "2007_000033",
        "2007_000042",
    ]


@pytest.mark.parametrize("name", ["ade20k", "cityscapes"])
def test_a_folder_without_images(name, tmp_path):
    miniature, _ = written(name, tmp_path)
    for image in miniature.images:
        image.unlink()
    with pytest.raises(ValueError, match=f"{name} val has no images"):
        open_benchmark(name, tmp_path)


def test_hidden_files_are_no_images(tmp_path):
    miniature, _ = written("ade20k", tmp_path)
    miniature.images[0].with_name("._ADE_val_00000001.jpg").write_bytes(b"of another system")
    assert len(open_benchmark("ade20k", tmp_path)) == 2


def test_names_that_are_no_benchmarks(tmp_path):
    with pytest.raises(ValueError, match=r"benchmark is 'vok', expected one of voc, .*lvis, folder"):
        open_benchmark("vok", tmp_path)
    with pytest.raises(ValueError, match="background is 'sky', but voc"):
        open_benchmark("voc", tmp_path, background="sky")
    folder = make_folder(tmp_path / "own", [np.zeros((8, 8))])
    dataset = open_benchmark("folder", folder, background="road")
    assert (dataset.labels, dataset.background) == (["sky", "road", "tree"], 1)


@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize("name", ["voc", "imagenet_s50"])
def test_truncated_files(name, kind, tmp_path):
    miniature, dataset = written(name, tmp_path)
    whole = evaluate_masks(known_segmenter(name, LAYOUTS[name].labels), dataset.part(0, 1), options_for(name))
    broken = getattr(miniature, kind)[1]
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    segmenter = known_segmenter(name, LAYOUTS[name].labels)
    with pytest.raises(BrokenImage, match=broken.name) as caught:
        evaluate_masks(segmenter, dataset, options_for(name))
    assert caught.value.name == miniature.names[1]
    scores = evaluate_masks(segmenter, dataset, options_for(name, skip_broken=True))
    assert list(scores.broken) == [miniature.names[1]] == list(scores.to_dict()["broken"])
    assert str(broken) in scores.broken[miniature.names[1]]
    assert scores.images == len(dataset) - 1 == whole.images - 1
    rest = dataset.only(image for image in dataset.images if image.name != miniature.names[1])
    expected = evaluate_masks(segmenter, rest, options_for(name))
    assert scores.confusion.counts.tolist() == expected.confusion.counts.tolist()
