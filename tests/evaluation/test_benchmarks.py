"""Every benchmark on a miniature copy of its published layout: what is found, what counts, and the figure by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmark_layouts import (
    LAYOUTS,
    quarters,
    write_benchmark,
    write_instances,
    write_mask,
    write_picture,
)
from mask_folders import KnownGroups, make_folder
from PIL import Image

from pgseg_hf import SegmentationOptions
from pgseg_hf.evaluation import BrokenPicture, ConfusionMatrix, MaskFolder, MaskOptions, evaluate_masks
from pgseg_hf.evaluation.benchmarks.catalogue import BENCHMARKS, open_benchmark
from pgseg_hf.evaluation.benchmarks.preparing import (
    prepare_cityscapes,
    prepare_coco_object,
    prepare_coco_object_from_stuff,
    prepare_coco_stuff,
    prepare_context,
    prepare_lvis,
)

NAMES = list(LAYOUTS)
# Number of labels, the first, the second and the last.
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
    """A miniature at its published place, and the data set that opens it from above."""
    miniature = write_benchmark(name, tmp_path / LAYOUTS[name].folder, split)
    return miniature, open_benchmark(name, tmp_path, split)


def known_segmenter(name, best):
    """The label `best[i]` in quarter i; the background scores nothing."""
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
    """IoU of each label that occurs, pixel by pixel over all pictures."""
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


@pytest.mark.parametrize("name", NAMES)
class TestEveryBenchmark:
    def test_labels(self, name):
        benchmark = BENCHMARKS[name]
        labels = benchmark.labels
        assert (len(labels), labels[0], labels[1], labels[-1]) == LABELS[name]
        assert benchmark.classes == labels[name in WITH_BACKGROUND :]

    def test_pictures_and_their_decoded_truth(self, name, tmp_path):
        miniature, dataset = written(name, tmp_path)
        assert [picture.name for picture in dataset.pictures] == miniature.names
        assert [picture.image for picture in dataset.pictures] == miniature.images
        assert [picture.mask for picture in dataset.pictures] == miniature.masks
        for picture, truth in zip(dataset.pictures, miniature.truths):
            assert picture.read().size == truth.shape[::-1]
            found = dataset.truth(picture)
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found, truth)
        assert dataset.background == (0 if name in WITH_BACKGROUND else None)
        assert dataset.ignore_index == (None if name == "lvis" else LAYOUTS[name].ignored)
        assert dataset.labels == BENCHMARKS[name].labels

    def test_it_opens_from_each_place(self, name, tmp_path):
        for number, root in enumerate(BENCHMARKS[name].roots):
            miniature = write_benchmark(name, tmp_path / str(number) / root)
            dataset = open_benchmark(name, str(tmp_path / str(number)))
            assert [picture.image for picture in dataset.pictures] == miniature.images

    def test_other_splits(self, name, tmp_path):
        if "train" in LAYOUTS[name].splits:
            miniature, dataset = written(name, tmp_path, "train")
            assert dataset.name == f"{name} train"
            for picture, truth in zip(dataset.pictures, miniature.truths, strict=True):
                np.testing.assert_array_equal(dataset.truth(picture), truth)
        known = ", ".join(LAYOUTS[name].splits)
        with pytest.raises(ValueError, match=f"{name} has no split 'dev', expected one of {known}"):
            open_benchmark(name, tmp_path, "dev")

    def test_the_figure_is_that_of_a_count_by_hand(self, name, tmp_path):
        miniature, dataset = written(name, tmp_path)
        layout = LAYOUTS[name]
        # Right in the first picture where it counts; the others have the same labels one quarter further.
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
        assert 0.1 < result["mean_iou"] < 0.9, "neither all right nor all wrong"
        # The first picture alone is all right.
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
            f"{count} pictures or masks of {name} val are missing, the first is {miniature.masks[1]}."
            in message
        )
        others = {"context59": "context", "coco_object": "coco_object_from_stuff"}
        prepared = others.get(name, name)
        if prepared in ("context", "coco_object_from_stuff", "coco_stuff", "cityscapes", "lvis"):
            assert f"`pgseg prepare {prepared} DIR`" in message
        else:
            assert "prepare" not in message

    def test_a_missing_folder_tells_where_it_was_looked_for(self, name, tmp_path):
        with pytest.raises(ValueError, match="does not hold") as caught:
            open_benchmark(name, tmp_path)
        for root in BENCHMARKS[name].roots:
            assert str(tmp_path / root) in str(caught.value)
        layout = LAYOUTS[name]
        if layout.listing is not None:
            assert layout.listing.format(split=layout.splits["val"]) in str(caught.value)

    def test_values_that_are_no_labels(self, name, tmp_path):
        miniature, dataset = written(name, tmp_path)
        layout = LAYOUTS[name]
        # Where raw values begin with unknown, the last is the number of the labels.
        highest = LABELS[name][0] - (name not in ("voc20", "context59", "ade20k"))
        strange = highest + 1
        write_mask(miniature.masks[1], np.full(miniature.truths[1].shape, strange), layout.encoding)
        ignored = "" if name == "lvis" else f", {layout.ignored}"
        message = (
            rf"{miniature.masks[1].name} has the value {strange}, expected one of 0 to {highest}{ignored}:"
        )
        with pytest.raises(ValueError, match=message):
            evaluate_masks(known_segmenter(name, ()), dataset, options_for(name))


def test_voc_by_hand(tmp_path):
    # 8 x 8 pixels without the top row: 12 of background, 12 of aeroplane, 16 of monitor and 16 of person, all right. Of
    # a second picture that is all aeroplane the model finds a quarter.
    miniature, dataset = written("voc", tmp_path)
    write_picture(miniature.images[1], (8, 8))
    write_mask(miniature.masks[1], np.full((8, 8), 1), "palette")
    scores = evaluate_masks(
        known_segmenter("voc", (0, 1, 20, 15)), dataset.only(dataset.pictures[:2]), options_for("voc")
    ).to_dict()
    iou = {"background": 12 / 28, "aeroplane": 28 / 76, "monitor": 16 / 32, "person": 16 / 32}
    # In VOC's order person is the 15th and monitor the 20th class.
    assert {label: value for label, value in scores["iou"].items() if value is not None} == iou
    assert scores["mean_iou"] == pytest.approx(sum(iou.values()) / 4)
    assert scores["mean_iou_absent_as_zero"] == pytest.approx(sum(iou.values()) / 21)


def test_ade_has_no_class_zero(tmp_path):
    miniature, dataset = written("ade20k", tmp_path)
    raw = quarters((0, 0, 1, 150), (8, 8))
    write_mask(miniature.masks[0], raw)
    np.testing.assert_array_equal(dataset.truth(dataset.pictures[0]), quarters((255, 255, 0, 149), (8, 8)))
    scores = evaluate_masks(known_segmenter("ade20k", (5, 5, 0, 149)), dataset.part(0, 2))
    assert scores.confusion.counts.sum() == 32
    assert scores.to_dict()["mean_iou"] == 1


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
        ([], "voc val has no pictures"),
        (["", "  "], "voc val has no pictures"),
        (["2007_000033", "../../secret"], r"val.txt: '../../secret' leads out of the folder"),
        (["/etc/secret"], "'/etc/secret' leads out"),
        (["2007_000033", "2007_000033"], "2 pictures of voc val have the name 2007_000033"),
        (["2007_000033", "absent"], r"2 pictures or masks .* the first is .*JPEGImages/absent.jpg"),
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
    assert [picture.name for picture in open_benchmark("voc", tmp_path).pictures] == [
        "2007_000033",
        "2007_000042",
    ]


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "coco_stuff", "imagenet_s50"])
def test_a_folder_without_pictures(name, tmp_path):
    miniature, _ = written(name, tmp_path)
    for image in miniature.images:
        image.unlink()
    with pytest.raises(ValueError, match=f"{name} val has no pictures"):
        open_benchmark(name, tmp_path)


def test_hidden_files_are_no_pictures(tmp_path):
    miniature, _ = written("ade20k", tmp_path)
    miniature.images[0].with_name("._ADE_val_00000001.jpg").write_bytes(b"of another system")
    assert len(open_benchmark("ade20k", tmp_path)) == 2


def test_names_that_are_no_benchmarks(tmp_path):
    with pytest.raises(ValueError, match=r"benchmark is 'vok', expected one of voc, .*lvis, folder"):
        open_benchmark("vok", tmp_path)
    with pytest.raises(ValueError, match="background is 'sky', but voc has its own"):
        open_benchmark("voc", tmp_path, background="sky")
    folder = make_folder(tmp_path / "own", [np.zeros((8, 8))])
    dataset = open_benchmark("folder", folder, background="road")
    assert (dataset.labels, dataset.background) == (["sky", "road", "tree"], 1)


@pytest.mark.parametrize("name", NAMES)
def test_masks_of_another_size(name, tmp_path):
    miniature, dataset = written(name, tmp_path)
    write_mask(miniature.masks[1], np.ones((7, 9), int), LAYOUTS[name].encoding)
    with pytest.raises(ValueError, match=rf"{miniature.masks[1].name} has \(7, 9\) pixels .*\(10, 12\)"):
        evaluate_masks(known_segmenter(name, ()), dataset, options_for(name))


@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize("name", ["voc", "cityscapes", "imagenet_s50", "lvis"])
def test_truncated_files(name, kind, tmp_path):
    miniature, dataset = written(name, tmp_path)
    whole = evaluate_masks(known_segmenter(name, LAYOUTS[name].labels), dataset.part(0, 1), options_for(name))
    broken = getattr(miniature, kind)[1]
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    segmenter = known_segmenter(name, LAYOUTS[name].labels)
    with pytest.raises(BrokenPicture, match=broken.name) as caught:
        evaluate_masks(segmenter, dataset, options_for(name))
    assert caught.value.name == miniature.names[1]
    scores = evaluate_masks(segmenter, dataset, options_for(name, skip_broken=True))
    assert list(scores.broken) == [miniature.names[1]] == list(scores.to_dict()["broken"])
    assert str(broken) in scores.broken[miniature.names[1]]
    assert scores.pictures == len(dataset) - 1 == whole.pictures - 1
    rest = dataset.only(picture for picture in dataset.pictures if picture.name != miniature.names[1])
    expected = evaluate_masks(segmenter, rest, options_for(name))
    assert scores.confusion.counts.tolist() == expected.confusion.counts.tolist()


# Synonyms and thresholds

SYNONYMS = {"labels": ["sky", "road", "tree"], "synonyms": {"sky": ["cloud"], "tree": ["bush", "wood"]}}
# Columns: sky, cloud, road, tree, bush, wood.
SCORES = [
    [0.0, 0.9, 0.8, 0.0, 0.0, 0.0],  # merged it is sky; its mean is 0.64, less than road
    [0.6, 0.9, 1.0, 0.0, 0.0, 0.0],  # merged it is road; its mean is 1.06, more than road
    [0.0, 0.0, 0.5, 0.1, 0.2, 0.6],  # merged it is tree; its mean is 0.52
    [0.3, 0.0, 0.2, 0.0, 0.0, 0.1],  # sky either way
]


@pytest.mark.parametrize(("rule", "expected"), [("merge", [0, 1, 2, 0]), ("average", [1, 0, 2, 0])])
@pytest.mark.parametrize("threshold", [None, 0.15])
def test_synonyms_by_hand(tmp_path, rule, expected, threshold):
    content = dict(SYNONYMS)
    if threshold is not None:
        content |= {"labels": ["sky", "none", "road", "tree"], "background": 1}
        expected = [[0, 2, 3][label] for label in expected]
    folder = MaskFolder(make_folder(tmp_path / "a", [quarters(expected, (8, 8))], content))
    segmenter = KnownGroups(SCORES)
    options = MaskOptions(SegmentationOptions(background_threshold=threshold), synonyms=rule)
    scores = evaluate_masks(segmenter, folder, options)
    assert segmenter.seen == [["sky", "cloud", "road", "tree", "bush", "wood"]]
    assert scores.to_dict()["pixel_accuracy"] == 1
    with_background = KnownGroups([*SCORES[:3], [0.0] * 6])
    if threshold is not None:
        counts = evaluate_masks(with_background, folder, options).confusion.counts
        assert counts[0, 1] == 16


def test_without_synonyms_only_labels_are_asked_for(tmp_path):
    folder = MaskFolder(make_folder(tmp_path / "a", [np.zeros((8, 8))], SYNONYMS))
    segmenter = KnownGroups([[1.0, 0.0, 0.0]] * 4)
    evaluate_masks(segmenter, folder)
    assert segmenter.seen == [["sky", "road", "tree"]]
    with pytest.raises(ValueError, match="synonyms is 'all', expected none, average or merge"):
        MaskOptions(synonyms="all")


@pytest.mark.parametrize("rule", ["none", "merge", "average"])
def test_synonyms_of_a_benchmark_with_a_model(tiny_segmenter, tmp_path, rule):
    miniature, dataset = written("cityscapes", tmp_path)
    for number, image in enumerate(miniature.images):
        write_picture(image, (80, 96), seed=number)
        write_mask(miniature.masks[number], np.full((80, 96), number))
    options = SegmentationOptions(top_k=60, window_size=16, window_stride=16)
    names, owners = [], []
    for number, label in enumerate(dataset.labels):
        for word in [label, *(dataset.synonyms.get(label, ()) if rule != "none" else ())]:
            names.append(word)
            owners.append(number)
    assert (len(names) > 19) == (rule != "none")
    embeds = tiny_segmenter.class_embeddings(names, options)
    if rule == "average":
        means = [embeds[[owner == number for owner in owners]].mean(dim=0) for number in range(19)]
        embeds = torch.stack([mean / mean.norm() for mean in means])
        owners = list(range(19))
    expected = ConfusionMatrix(19)
    for number, features in enumerate(tiny_segmenter.encode(miniature.images, options)):
        found = tiny_segmenter.score(features, embeds, options).label_map()[0].numpy()
        expected.add(np.full((80, 96), number), np.array(owners)[found])
    scores = evaluate_masks(tiny_segmenter, dataset, MaskOptions(options, synonyms=rule))
    assert scores.confusion.counts.tolist() == expected.counts.tolist()
    assert (expected.counts.sum(0) > 0).sum() > 1, "the test needs several labels"


def test_thresholds_in_one_pass_are_those_of_runs_of_their_own(tiny_segmenter, tmp_path):
    miniature, dataset = written("voc", tmp_path)
    rng = np.random.default_rng(0)
    for number, (image, mask) in enumerate(zip(miniature.images, miniature.masks)):
        write_picture(image, (80, 96), seed=number)
        write_mask(mask, rng.integers(0, 21, (80, 96)), "palette")
    options = SegmentationOptions(background_threshold=0.02)
    thresholds = (0.0, 0.02, 0.05, 0.1, 1.0)
    swept = evaluate_masks(tiny_segmenter, dataset, MaskOptions(options, thresholds=thresholds))
    background = []
    for threshold in thresholds:
        alone = evaluate_masks(
            tiny_segmenter, dataset, MaskOptions(replace(options, background_threshold=threshold))
        )
        assert swept.by_threshold[threshold].counts.tolist() == alone.confusion.counts.tolist()
        assert swept.to_dict()["thresholds"][str(threshold)]["mean_iou"] == alone.confusion.mean_iou()
        background.append(int(alone.confusion.counts[:, 0].sum()))
    assert swept.confusion.counts.tolist() == swept.by_threshold[0.02].counts.tolist()
    assert background == sorted(background) and background[0] == 0
    assert len(set(background)) >= 3, "the test needs thresholds that matter"
    best = swept.best_threshold()
    assert swept.by_threshold[best].mean_iou() == max(each.mean_iou() for each in swept.by_threshold.values())


def test_thresholds_need_a_background(tmp_path):
    _, dataset = written("voc20", tmp_path)
    with pytest.raises(ValueError, match="voc20 val has no background"):
        evaluate_masks(
            known_segmenter("voc20", ()), dataset, MaskOptions(SegmentationOptions(background_threshold=0.5))
        )
    with pytest.raises(ValueError, match=r"thresholds are \[0.5\], but there is no background_threshold"):
        evaluate_masks(known_segmenter("voc20", ()), dataset, MaskOptions(thresholds=(0.5,)))
    with pytest.raises(ValueError, match=r"thresholds has 1\.5"):
        MaskOptions(thresholds=(0.5, 1.5))


# From raw downloads


def opened_truths(name, path, split="val"):
    dataset = open_benchmark(name, path, split)
    return {picture.name: dataset.truth(picture) for picture in dataset.pictures}


def check_truths(found, expected):
    assert list(found) == list(expected)
    for name, truth in expected.items():
        np.testing.assert_array_equal(found[name], truth)


def relabelled(categories, labels):
    return np.vectorize(lambda value: labels[value])(categories)


# Large first: what is drawn last is the smaller one.
BOXES_OF_COCO = [(90, 1, 1, 9, 7), (1, 2, 2, 5, 6), (13, 4, 5, 7, 7)]


def test_coco_object_from_instances(tmp_path):
    names = ("000000000139.jpg", "000000000285.jpg")
    with pytest.raises(ValueError, match="does not hold COCO-Object"):
        open_benchmark("coco_object", tmp_path)
    for name in names:
        write_picture(tmp_path / "coco" / "images" / "val2017" / name, (8, 10))
    with pytest.raises(
        ValueError,
        match=r"2 pictures or masks .*000000000139_instance.*`pgseg prepare coco_object_from_stuff DIR`",
    ):
        open_benchmark("coco_object", tmp_path)
    path = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    categories = write_instances(path, "file_name", names, BOXES_OF_COCO)
    assert prepare_coco_object(tmp_path / "coco").written == 2
    # COCO has no category 12, and 80 in all up to 90.
    truth = relabelled(categories, {0: 0, 1: 1, 13: 12, 90: 80})
    assert {1, 12, 80} < set(np.unique(truth))
    check_truths(
        opened_truths("coco_object", tmp_path), dict.fromkeys(("000000000139", "000000000285"), truth)
    )


def test_coco_object_and_coco_stuff_from_stuffthingmaps(tmp_path):
    root = tmp_path / "coco_stuff164k"
    write_picture(root / "images" / "val2017" / "000000000139.jpg", (8, 8))
    raw = quarters((0, 89, 91, 181), (8, 8))
    raw[0] = 255
    write_mask(root / "annotations" / "val2017" / "000000000139.png", raw)
    prepare_coco_stuff(root)
    prepare_coco_object_from_stuff(root)
    stuff = quarters((0, 79, 80, 170), (8, 8))
    stuff[0] = 255
    things = quarters((1, 80, 0, 0), (8, 8))
    things[0] = 0
    check_truths(opened_truths("coco_stuff", tmp_path), {"000000000139": stuff})
    check_truths(opened_truths("coco_object", tmp_path), {"000000000139": things})


def test_context_from_its_trainval_file(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2010"
    write_picture(root / "JPEGImages" / "2008_000002.jpg", (8, 10))
    with pytest.raises(ValueError, match="does not hold Pascal Context"):
        open_benchmark("context", tmp_path)
    boxes = [(2, 0, 0, 10, 3), (458, 0, 3, 6, 8), (284, 5, 2, 10, 6)]
    categories = write_instances(
        root / "trainval_merged.json",
        "file_name",
        ["2008_000002.jpg"],
        boxes,
        image_id="image_id",
        phase="val",
    )
    prepare_context(root)
    truth = relabelled(categories, {0: 0, 2: 1, 284: 37, 458: 59})
    assert set(np.unique(truth)) == {0, 1, 37, 59}
    check_truths(opened_truths("context", tmp_path), {"2008_000002": truth})
    without = relabelled(truth, {0: 255, 1: 0, 37: 36, 59: 58})
    check_truths(opened_truths("context59", tmp_path), {"2008_000002": without})


def test_cityscapes_from_its_ids(tmp_path):
    root = tmp_path / "cityscapes"
    name = "munster_000000_000019"
    write_picture(root / "leftImg8bit" / "val" / "munster" / f"{name}_leftImg8bit.png", (8, 8))
    raw = quarters((7, 33, 26, 0), (8, 8))
    write_mask(root / "gtFine" / "val" / "munster" / f"{name}_gtFine_labelIds.png", raw)
    with pytest.raises(ValueError, match="`pgseg prepare cityscapes DIR`"):
        open_benchmark("cityscapes", tmp_path)
    prepare_cityscapes(root)
    check_truths(
        opened_truths("cityscapes", tmp_path), {f"munster/{name}": quarters((0, 18, 13, 255), (8, 8))}
    )


@pytest.mark.parametrize("split", ["val", "train"])
def test_lvis_from_its_instances(tmp_path, split):
    names = ("train2017/000000391895", "val2017/000000000139")
    for name in names:
        write_picture(tmp_path / "lvis" / "images" / f"{name}.jpg", (8, 10))
    truth = write_instances(
        tmp_path / "lvis" / f"lvis_v1_{split}.json",
        "coco_url",
        [f"http://images.cocodataset.org/{name}.jpg" for name in names],
        [(1203, 1, 1, 9, 7), (255, 2, 2, 5, 6), (256, 4, 5, 7, 7)],
    )
    prepare_lvis(tmp_path / "lvis", f"lvis_v1_{split}.json")
    check_truths(opened_truths("lvis", tmp_path, split), dict.fromkeys(names, truth))


def test_a_prepared_mask_of_16_bits_is_read_whole(tmp_path):
    miniature, dataset = written("lvis", tmp_path)
    with Image.open(miniature.masks[0]) as image:
        assert image.mode.startswith("I;16")
    assert dataset.truth(dataset.pictures[0]).max() == 1203
