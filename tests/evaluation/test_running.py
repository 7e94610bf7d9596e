"""Evaluation in chunks: resuming, several processes, and output files."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import PartialState
from mask_folders import LABELS, KnownGroups, make_folder, one_hot
from PIL import Image
from tiny_models import make_photo

from pgseg_hf import SegmentationOptions, load_segmenter
from pgseg_hf.cli import build_parser
from pgseg_hf.evaluation import LabelledImage, MaskFolder, MaskOptions, command, evaluate_masks, running
from pgseg_hf.evaluation.classification import ClassificationScores, Classifier
from pgseg_hf.evaluation.evaluator import SegmentedImage
from pgseg_hf.evaluation.metrics.mean_iou import MeanIoU
from pgseg_hf.evaluation.running import Output, checkpoint_hash, draw_evaluation, evaluate_in_parts, versions
from pgseg_hf.visualization import overlay

OPTIONS = MaskOptions(oracle=True, groups=True, skip_broken=True)
RECORD = {"protocol": {"name": "p", "templates": ("a {}",)}, "threshold": None}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(running, "CHUNK", 2)


class Recorder(KnownGroups):
    """Records the sizes of the images that it segments, and stops at a given image."""

    def __init__(self, stop_at=None):
        super().__init__(one_hot(0, 1, 1, 2))
        self.sizes, self.stop_at = [], stop_at

    def encode(self, images, options):
        for image in images:
            if image.height == self.stop_at:
                raise KeyboardInterrupt
            self.sizes.append(image.height)
            yield from super().encode([image], options)


def masks_of(count):
    """Masks that can be identified by their height: 8, 10, 12, ..."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 3, (8 + 2 * number, 8)) for number in range(count)]


@pytest.fixture
def folder(tmp_path):
    return MaskFolder(make_folder(tmp_path / "data", masks_of(5)))


def prepared(path, **changes):
    output = Output(path, {**RECORD, **changes})
    output.prepare()
    return output


def figures(scores):
    return {name: value for name, value in scores.to_dict().items() if name != "seconds"}


def assert_same(scores, expected):
    assert set(scores.arrays()) == set(expected.arrays())
    for name, sums in scores.arrays().items():
        np.testing.assert_allclose(sums, expected.arrays()[name], rtol=1e-12, err_msg=name)
    assert (scores.images, scores.broken) == (expected.images, expected.broken)


@pytest.mark.parametrize("thresholds", [(), (0.2, 0.9)])
def test_parts_give_what_one_pass_gives(tmp_path, thresholds):
    masks = masks_of(5)
    masks[0][0, 0] = 255
    folder = MaskFolder(make_folder(tmp_path / "data", masks, {**LABELS, "background": 0}))
    options, segmenter = OPTIONS, Recorder()
    if thresholds:
        segmentation = SegmentationOptions(background_threshold=0.5)
        options = replace(OPTIONS, segmentation=segmentation, thresholds=thresholds)
        segmenter.scores = segmenter.scores[:, 1:]
    scores = evaluate_in_parts(segmenter, folder, options, prepared(tmp_path / "out"))
    assert segmenter.sizes == [8, 10, 12, 14, 16]
    expected = evaluate_masks(segmenter, folder, options)
    assert_same(scores, expected)
    assert list(scores.by_threshold) == list(thresholds) and scores.confusion.ignored == 1
    parts = sorted(path.name for path in (tmp_path / "out" / "parts").iterdir())
    assert parts == ["000000.npz", "000001.npz", "000002.npz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["parts", "run.json"]
    segmenter.sizes.clear()
    again = evaluate_in_parts(segmenter, folder, options, prepared(tmp_path / "out"))
    assert_same(again, expected)
    assert (scores.reused, again.reused, segmenter.sizes) == (0, 5, [])
    assert figures(again) == figures(scores) and again.seconds == pytest.approx(scores.seconds)


def test_a_stopped_run_goes_on(tmp_path, folder):
    first = Recorder(stop_at=14)
    with pytest.raises(KeyboardInterrupt):
        evaluate_in_parts(first, folder, OPTIONS, prepared(tmp_path / "out"))
    assert first.sizes == [8, 10, 12]
    assert [path.name for path in (tmp_path / "out" / "parts").iterdir()] == ["000000.npz"]
    second = Recorder()
    scores = evaluate_in_parts(second, folder, OPTIONS, prepared(tmp_path / "out"))
    assert second.sizes == [12, 14, 16]
    assert_same(scores, evaluate_masks(Recorder(), folder, OPTIONS))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 half an archive", None])
def test_a_damaged_part_is_counted_again(tmp_path, folder, content, caplog):
    evaluate_in_parts(Recorder(), folder, OPTIONS, prepared(tmp_path / "out"))
    part = tmp_path / "out" / "parts" / "000001.npz"
    if content is None:
        whole = bytearray(part.read_bytes())
        whole[60:90] = bytes(30)
        content = bytes(whole)
    part.write_bytes(content)
    segmenter = Recorder()
    scores = evaluate_in_parts(segmenter, folder, OPTIONS, prepared(tmp_path / "out"))
    assert segmenter.sizes == [12, 14]
    assert_same(scores, evaluate_masks(Recorder(), folder, OPTIONS))
    again = Recorder()
    evaluate_in_parts(again, folder, OPTIONS, prepared(tmp_path / "out"))
    assert again.sizes == []


def test_a_run_of_something_else_is_not_mixed_in(tmp_path, folder):
    output = prepared(tmp_path / "out")
    evaluate_in_parts(Recorder(), folder, OPTIONS, output, save_predictions=True, num_drawn=1)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["threshold"] is None
    with pytest.raises(ValueError, match=r"threshold was None and is 0.5; dtype was None"):
        prepared(tmp_path / "out", threshold=0.5, dtype="bf16")
    segmenter = Recorder()
    evaluate_in_parts(segmenter, folder, OPTIONS, output)
    assert segmenter.sizes == [], "the refused run has deleted parts"

    other = Output(tmp_path / "out", {**RECORD, "threshold": 0.5}, overwrite=True)
    other.prepare()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["threshold"] == 0.5


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_parts_without_a_record_are_left_alone(tmp_path, folder, content):
    evaluate_in_parts(Recorder(), folder, OPTIONS, prepared(tmp_path / "out"))
    record = tmp_path / "out" / "run.json"
    record.unlink() if content is None else record.write_text(content)
    before = sorted((tmp_path / "out" / "parts").iterdir())
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"parts exists|run.json cannot be read"):
            Output(tmp_path / "out", RECORD, overwrite).prepare()
    assert sorted((tmp_path / "out" / "parts").iterdir()) == before


def test_broken_images_are_named_by_parts_too(tmp_path, folder):
    path, strict = folder.images[2].image, replace(OPTIONS, skip_broken=False)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"002.jpg"):
        evaluate_in_parts(Recorder(), folder, strict, prepared(tmp_path / "stopped"))
    for sizes in ([8, 10, 14, 16], []):
        segmenter = Recorder()
        output = prepared(tmp_path / "out")
        scores = evaluate_in_parts(segmenter, folder, OPTIONS, output, save_predictions=True, num_drawn=5)
        assert segmenter.sizes == sizes
        assert list(scores.broken) == ["images/002"] and "002.jpg" in scores.broken["images/002"]
        assert scores.images == 4
    with pytest.raises(ValueError, match=r"002.jpg"):
        evaluate_in_parts(Recorder(), folder, strict, output)
    whole = folder.only(folder.images[:2] + folder.images[3:])
    expected = evaluate_masks(Recorder(), whole, OPTIONS)
    assert scores.confusion.counts.tolist() == expected.confusion.counts.tolist()


@pytest.mark.parametrize("background", [None, 0, 2])
def test_predictions_and_images(tmp_path, background):
    labels = {**LABELS, "background": background}
    folder = MaskFolder(make_folder(tmp_path / "data", masks_of(5), labels))
    output = prepared(tmp_path / "out")
    evaluate_in_parts(KnownGroups(one_hot(0, 1, 1, 2)), folder, OPTIONS, output, True, num_drawn=2)
    for number in range(5):
        mask = Image.open(tmp_path / "out" / "predictions" / "images" / f"{number:03d}.png")
        assert mask.mode == "P" and mask.size == (8, 8 + 2 * number)
        half = 4 + number
        quarters = np.asarray(mask)[[0, half - 1, half, -1]][:, [0, 3, 4, 7]]
        np.testing.assert_array_equal(quarters, np.kron([[0, 1], [1, 2]], np.ones((2, 2), int)))
    palette = mask.getpalette()
    assert (palette[:3] == [0, 0, 0]) == (background == 0)
    drawn = tmp_path / "out" / "drawings" / "images"
    assert sorted(path.name for path in drawn.iterdir()) == ["000.jpg", "002.jpg"]
    assert all(Image.open(path).width >= 3 * 8 for path in drawn.iterdir())


def test_files_that_are_missing_are_made_later(tmp_path, folder):
    evaluate_in_parts(Recorder(), folder, OPTIONS, prepared(tmp_path / "out"))
    segmenter = Recorder()
    scores = evaluate_in_parts(segmenter, folder, OPTIONS, prepared(tmp_path / "out"), num_drawn=1)
    assert segmenter.sizes == [8, 10] and (tmp_path / "out" / "drawings" / "images" / "000.jpg").is_file()
    assert_same(scores, evaluate_masks(Recorder(), folder, OPTIONS))
    segmenter = Recorder()
    evaluate_in_parts(segmenter, folder, OPTIONS, prepared(tmp_path / "out"), True)
    (tmp_path / "out" / "predictions" / "images" / "003.png").unlink()
    evaluate_in_parts(segmenter, folder, OPTIONS, prepared(tmp_path / "out"), True, num_drawn=1)
    assert segmenter.sizes == [8, 10, 12, 14, 16, 12, 14]


@pytest.mark.parametrize("background", [None, 0, 1])
def test_what_is_drawn_beside_an_image(folder, background):
    folder.background = background
    image = Image.new("RGB", (40, 30), (90, 120, 150))

    def draw(truth, predicted):
        maps = (np.full((30, 40), value) for value in (truth, predicted))
        found = SegmentedImage(folder.images[0], image, *maps, None)
        return np.asarray(draw_evaluation(found, folder)).astype(int)

    def coloured(drawn):
        """Columns with pixels of the label's colour, blended over the image."""
        colour = np.asarray(overlay(image, np.full((30, 40), 2), folder.labels, legend=False))[15, 20]
        if background is not None:
            colour = np.asarray(overlay(image, np.full((30, 40), 1), ["a", "b"], legend=False))[15, 20]
        return np.flatnonzero((drawn == colour).all(2).sum(0) > 10)

    unknown = draw(255, 255)
    assert not len(coloured(unknown)) and (unknown == [90, 120, 150]).all(2).sum() == 3 * 40 * 30
    for value in (0, 1, 2):
        drawn = draw(value, 255)
        plain = drawn.shape == unknown.shape and (drawn == unknown).all()
        assert plain == (value == background), "no colour for background and unknown"
    # The ground truth is to the left of the prediction.
    left, right, both = (coloured(draw(*values)) for values in ((2, 255), (255, 2), (2, 2)))
    assert len(left) == len(right) == 40 and left.max() < right.min()
    assert len(both) == 80


def test_hash_of_weights_and_versions(tmp_path, tiny_folder):
    content = (Path(tiny_folder) / "model.safetensors").read_bytes()
    assert checkpoint_hash(tiny_folder) == hashlib.sha256(content).hexdigest()[:16]
    assert checkpoint_hash(str(tmp_path)) is None
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert checkpoint_hash(str(tmp_path)) == checkpoint_hash(tiny_folder)
    halves = tmp_path / "halves"
    halves.mkdir()
    for number in (0, 1):
        half = len(content) // 2
        (halves / f"model-{number}.safetensors").write_bytes(content[number * half : (number + 1) * half])
    (halves / f"model-{number + 1}.safetensors").write_bytes(content[2 * half :])
    assert checkpoint_hash(str(halves)) == checkpoint_hash(tiny_folder)
    assert versions("cpu")["torch"] == torch.__version__ and versions("cpu")["device"].startswith("cpu (")


def classify(segmenter, count, folder):
    """Evaluates `count` images, of which the third is broken."""
    names = ["cat", "dog", "grass", "sky", "road", "tree", "car"]
    images = [LabelledImage(f"p{n}", make_photo(20 + 9 * n, 50, seed=n), label=n % 7) for n in range(count)]
    images[2:3] = [replace(each, image=b"") for each in images[2:3]]
    classifier = Classifier(segmenter.model, segmenter.processor, names, batch_size=2, skip_broken=True)
    scores = Output(folder / f"classes-{count}", RECORD).count(classifier, iter(images), 2)
    return {"hits": scores.hits.tolist(), "images": scores.images, "broken": scores.broken}


def mean_iou(count, rank=None):
    """Metrics of `count` maps. The first of two processes has all but the last, so one can have none."""
    own = {None: np.s_[:], 0: np.s_[:-1], 1: np.s_[-1:]}[rank]
    truths, predictions = np.random.default_rng(0).integers(0, 3, (2, count, 4, 5))
    metric = MeanIoU(5)
    metric.confusion.counts[1, 1] = 0 if rank == 0 else 2**33
    found = metric.compute(predictions=predictions[own], references=truths[own])
    return {name: np.asarray(value).tolist() for name, value in found.items()}


@dataclass
class OneProcess:
    """Results of one of two processes for datasets of different sizes."""

    rank: int
    folder: Path
    checkpoint: str

    def run(self):
        running.CHUNK = 2
        PartialState._reset_state()
        os.environ |= {"RANK": str(self.rank), "LOCAL_RANK": str(self.rank), "MASTER_ADDR": "localhost"}
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        rendezvous = f"file://{self.folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=self.rank, world_size=2)
        state = PartialState(cpu=True)
        assert (state.num_processes, state.process_index) == (2, self.rank)
        segmenter = load_segmenter(self.checkpoint)
        results = {
            "masks": [self.evaluate(count) for count in range(6)],
            "classes": [classify(segmenter, count, self.folder) for count in (0, 1, 4, 9)],
            "mean_iou": [mean_iou(count, self.rank) for count in range(3)],
            "seconds": ClassificationScores(seconds=self.rank + 1.0).sum_over_processes().seconds,
        }
        (self.folder / f"{self.rank}.json").write_text(json.dumps(results))
        dist.destroy_process_group()

    def evaluate(self, count):
        folder = MaskFolder(self.folder / "data")
        folder.images = folder.images[:count]
        segmenter = Recorder()
        output = prepared(self.folder / str(count))
        scores = evaluate_in_parts(segmenter, folder, OPTIONS, output, count != 4)
        sums = {name: array.tolist() for name, array in scores.arrays().items()}
        told = {"images": scores.images, "broken": scores.broken, "reused": scores.reused}
        return {"sizes": segmenter.sizes, "sums": sums, "told": told}


def one_of_two_processes(rank, folder, checkpoint):
    OneProcess(rank, Path(folder), checkpoint).run()


def test_two_processes_give_what_one_gives(tmp_path, tiny_folder, tiny_segmenter):
    folder = MaskFolder(make_folder(tmp_path / "data", masks_of(5)))
    folder.images[3].image.write_bytes(b"\xff\xd8 broken")
    # A single process has already evaluated the second chunk of the run with four images.
    begun = folder.only(folder.images[:4])
    evaluate_in_parts(Recorder(), begun, OPTIONS, prepared(tmp_path / "4"))
    (tmp_path / "4" / "parts" / "000000.npz").unlink()
    # Forked processes do not import everything again.
    mp.start_processes(one_of_two_processes, args=(str(tmp_path), tiny_folder), nprocs=2, start_method="fork")
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for count in range(6):
        own = [each["masks"][count]["sizes"] for each in results]
        # All valid images once; the second chunk of the four images is not evaluated again.
        expected = {3: [8, 10, 12], 4: [8, 10], 5: [8, 10, 12, 16]}.get(count, [8, 10][:count])
        assert sorted(own[0] + own[1]) == expected
        alone = evaluate_masks(Recorder(), folder.only(folder.images[:count]), OPTIONS)
        told = {"images": alone.images, "broken": alone.broken, "reused": 1 if count == 4 else 0}
        for each in results:
            assert each["masks"][count]["told"] == told
            for name, sums in alone.arrays().items():
                np.testing.assert_allclose(each["masks"][count]["sums"][name], sums, rtol=1e-12, err_msg=name)
        if count not in (0, 4):
            found = sorted(path.stem for path in (tmp_path / str(count)).glob("predictions/images/*.png"))
            assert found == [f"{number:03d}" for number in range(count) if number != 3]
    # Chunks 0 and 2 belong to the first process, 1 to the second.
    assert [each["masks"][5]["sizes"] for each in results] == [[8, 10, 16], [12]]

    expected = [classify(tiny_segmenter, count, tmp_path / "alone") for count in (0, 1, 4, 9)]
    assert [each["images"] for each in expected] == [0, 1, 3, 8] and list(expected[3]["broken"]) == ["p2"]
    assert 0 < expected[3]["hits"][1] < 8
    for each in results:
        assert (each["classes"], each["seconds"]) == (expected, 2.0)
        for count, found in enumerate(each["mean_iou"]):
            for name, value in mean_iou(count).items():
                np.testing.assert_array_equal(found[name], value)


def test_processes_share_the_work_on_a_machine_without_an_accelerator(monkeypatch):
    """Also without --device cpu."""
    asked = []

    class State(command.PartialState):
        def __init__(self, cpu=False, **kwargs):
            asked.append(cpu)
            super().__init__(cpu=cpu, **kwargs)

    monkeypatch.setattr(command, "PartialState", State)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    parser = build_parser()
    args = parser.parse_args(["evaluate", "./no-such", "--benchmark", "folder", "--data", "nowhere"])
    with pytest.raises(ValueError, match="nowhere"):
        command.evaluate(args)
    assert asked == [True]
