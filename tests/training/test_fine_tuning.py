"""`pgseg train` as users run it: complete, killed and resumed, with invalid input; and the parts of its report."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from tiny_backbones import tiny_backbone_model
from tiny_models import CLIP_TEXT

from pgseg_hf import PGSegConfig, PGSegImageProcessorPil, PGSegProcessor, default_tokenizer, load_segmenter
from pgseg_hf.cli import main
from pgseg_hf.data.photos import Record, read_photos
from pgseg_hf.training.fine_tuning.report import (
    average_precisions,
    confused_labels,
    labels_always_together,
    precision_by_chance,
)
from pgseg_hf.training.fine_tuning.run import competing_words, split_photos

COLOURS = {"rose": (200, 30, 40), "sea": (20, 60, 200), "meadow": (40, 180, 50)}
PATIENCE = 900


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint like the shipped one, with patches of a frozen backbone and a vocabulary."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_backbone_model(
        text_config=CLIP_TEXT, contrastive_pooling="patches", contrastive_loss="sigmoid", freeze_text=True
    )
    model.save_pretrained(folder)
    PGSegProcessor(
        PGSegImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}),
        default_tokenizer(),
        window_size=None,
        patch_weight=0.5,
        vocabulary=["cat", "sea"],
    ).save_pretrained(folder)
    return folder


def make_photos(folder, count=24):
    """Creates photos of two colours each; returns their labels by file name."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    labels = {}
    for index in range(count):
        own = [names[index % 3], names[(index + 1 + index // 3 % 2) % 3]]
        pixels = rng.integers(0, 30, (64, 72, 3))
        pixels[:, :36] += COLOURS[own[0]]
        pixels[:, 36:] += COLOURS[own[1]]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:02d}.png")
        labels[f"{index:02d}.png"] = own
    return labels


@pytest.fixture
def photos(tmp_path):
    """A folder and a table with realistic mistakes."""
    labels = make_photos(tmp_path / "photos")
    (tmp_path / "photos" / "07.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "extra.png")
    rows = [f"{name};{'Sea' if name == '01.png' else own[0]}, {own[1]}" for name, own in labels.items()]
    (tmp_path / "tags.csv").write_text("file_name;labels\n" + "\n".join([*rows, "lost.png;sea", "lost.png;"]))
    return tmp_path / "photos"


def command(photos, checkpoint, *more):
    output = photos.parent / "my-model"
    table = photos.parent / "tags.csv"
    start = ["train", photos, "--labels-from", table, "--output", output, "--model", checkpoint]
    return [str(part) for part in [*start, "--device", "cpu", *more]]


@pytest.mark.slow
def test_from_a_folder_and_a_table_to_a_model_with_a_report(photos, checkpoint, capsys):
    asked = command(photos, checkpoint, "--steps", "12")
    done = subprocess.run([sys.executable, "-m", "pgseg_hf", *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output = photos.parent / "my-model"
    report = json.loads((output / "report.json").read_text())
    assert report["photos"]["train"] + report["photos"]["held_out"] >= 23
    assert set(report["labels"]) == set(COLOURS)
    for when in ("before", "after"):
        assert 0 <= report[when]["mean_average_precision"] <= 1 and 0 <= report[when]["top1"] <= 1
    left_out = report["left_out"]
    assert [Path(name).name for name in left_out["broken image"]] == ["07.png"]
    assert "lost.png" in left_out["no such file"][0] and "row 25" in left_out["no such file"][0]
    assert left_out["no row in tags.csv"] == [str(photos / "extra.png")]
    text = (output / "report.md").read_text()
    assert "| before | after |" in text and "lost.png" in text
    assert report["drawings"] and all((output / name).is_file() for name in report["drawings"])
    assert not list(output.glob("checkpoint-*")) and not (photos.parent / "my-model-features").exists()
    segmenter = load_segmenter(output)
    assert sorted(segmenter.processor.vocabulary) == sorted(["cat", *COLOURS])
    competing = json.loads((output / "split" / "labels.json").read_text())["names"]
    assert sorted(competing) == sorted(["cat", *COLOURS])
    assert segmenter(photos / "00.png", list(COLOURS)).label_map.shape == (64, 72)
    assert f"report: {output / 'report.md'}" in done.stdout

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert main(asked) == 0 and "was trained before" in capsys.readouterr().out
    assert main([*asked, "--seed", "1"]) == 2
    assert "my-model contains results of another run: seed was 0 and is 1." in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_command(photos, checkpoint, capsys):
    asked = command(photos, checkpoint, "--steps", "30")
    assert main([part.replace("my-model", "whole") for part in asked]) == 0
    output = photos.parent / "my-model"
    for sign in ("my-model-features/*/states.npy", "my-model/checkpoint-00000010"):
        # Use the same number of threads as here, because it changes the rounding of sums.
        run = subprocess.Popen(
            [sys.executable, "-m", "pgseg_hf", *asked], env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        deadline = time.monotonic() + PATIENCE
        while not list(photos.parent.glob(sign)) and run.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert not (output / "report.json").exists()
    assert main(asked) == 0 and "Resuming from" in capsys.readouterr().out
    ours, theirs = (load_file(photos.parent / name / "model.safetensors") for name in ("my-model", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("table", "more", "message"),
    [
        ("file,labels\na.png,cat\n", [], "tags.csv has the columns file, labels, expected .*file_name"),
        ("file_name,kind\n00.png,cat\n", [], "tags.csv has the columns file_name, kind, expected .*tags"),
        ("file_name,tags\n00.png,7\n", [], r"row 1 of .*tags.csv has the label '7', expected a word"),
        ("file_name,tags\nx.png,cat\n", [], r"no photo can be used.*1 x no such file \(.*x.png \(row 1 of"),
        ("file_name,tags\n../x.png,cat\n", [], r"no photo can be used.*1 x bad path.*'../x.png'"),
        ("file_name,tags\n00.png,cat\n", [], r"photos has 1 photos with a label .*expected at least 8"),
        ("", [], "tags.csv cannot be read: .*empty"),
        (None, ["--labels-from", "absent.csv"], "--labels-from is absent.csv"),
        (None, ["--labels-from", __file__], r"--labels-from is .*\.py, expected .*\.csv"),
        (None, ["--steps", "0"], "--steps is 0, expected at least 1"),
        (None, ["--held-out", "1.5"], "--held-out is 1.5, expected a share"),
        (None, ["--masks", "absent"], "--masks is absent"),
        (None, ["--masks", "{taken}"], "taken"),
        (None, ["--model", "/absent/model"], "/absent/model"),
        (None, ["--output", "{photos}"], "--output is .*photos"),
        (None, ["--output", "{taken}"], "taken contains other files"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(photos, checkpoint, capsys, table, more, message):
    taken = photos.parent / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    if table is not None:
        (photos.parent / "tags.csv").write_text(table)
    before = sorted(photos.parent.rglob("*"))
    more = [part.format(photos=photos, taken=taken) for part in more]
    assert main(command(photos, checkpoint, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("pgseg train: error: ") and "\n" not in error
    assert re.search(message, error), error
    assert sorted(photos.parent.rglob("*")) == before


def test_known_words_compete_where_patches_are_named(checkpoint):
    config = PGSegConfig.from_pretrained(checkpoint)
    assert competing_words(str(checkpoint), config) == ["cat", "sea"]
    config.contrastive_pooling = "groups"
    assert competing_words(str(checkpoint), config) == []


def test_one_label_for_all_is_refused(photos, checkpoint, capsys):
    rows = "".join(f"{index:02d}.png,sea\n" for index in range(12))
    (photos.parent / "tags.csv").write_text(f"file_name,tags\n{rows}")
    assert main(command(photos, checkpoint)) == 2
    assert "all 12 photos have the same label 'sea'" in capsys.readouterr().err


def test_labels_by_folders_rows_and_metadata(tmp_path):
    labels = make_photos(tmp_path / "flat", 6)
    for name, own in labels.items():
        place = tmp_path / "sorted" / own[0].replace("rose", "red_rose")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "flat" / name, place / name)
    Image.new("RGB", (9, 9)).save(tmp_path / "sorted" / "loose.png")
    found = read_photos(tmp_path / "sorted")
    assert found.count_labels() == {"red rose": 2, "sea": 2, "meadow": 2}
    assert list(found.left_out) == ["in no folder of a label"]
    rows = [f"{name},{label}" for name, own in labels.items() for label in own]
    (tmp_path / "long.tsv").write_text("\n".join(["image,tags", "00.png,ROSE", *rows]).replace(",", "\t"))
    found = read_photos(tmp_path / "flat", tmp_path / "long.tsv")
    assert {photo.name: photo.tags for photo in found.photos} == labels and not found.left_out
    rows = [{"file_name": name, "labels": own} for name, own in labels.items()]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    found = read_photos(tmp_path / "flat", tmp_path / "list.json")
    assert {photo.name: photo.tags for photo in found.photos} == labels
    lines = [json.dumps({"file_name": "00.png", "caption": "a rose"}), "no JSON", '{"file_name": "01.png"}']
    lines.append(json.dumps({"file_name": "a caption where the name should be " * 99, "caption": "a rose"}))
    (tmp_path / "flat" / "metadata.jsonl").write_text("\n".join(lines))
    found = read_photos(tmp_path / "flat")
    assert [(photo.captions, photo.tags) for photo in found.photos] == [(["a rose"], [])]
    assert found.left_out["no label"] == ["01.png"] and len(found.left_out["broken row"]) == 1
    assert len(found.left_out["no such file"]) == 1
    (tmp_path / "flat" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"flat has no labels.*--labels-from FILE"):
        read_photos(tmp_path / "flat")


@pytest.mark.parametrize("count", [9, 30, 200, 4000])
def test_the_held_out_part_has_every_label_that_can_be_spared(count):
    rng = np.random.default_rng(count)
    words = [f"label {number}" for number in range(10)]
    labels = [
        [words[n % 10], *(word for word in words[:2] if n % 10 > 1 and rng.random() < 0.3)]
        for n in range(count)
    ]
    photos = [Record("", tags=tags, name=str(n)) for n, tags in enumerate(labels)]
    photos.append(Record("", [], ["only once"]))
    train, held_out = split_photos(photos, 0.2, seed=1)
    assert len(train) + len(held_out) == len(photos)
    assert len(held_out) == pytest.approx(min(0.2 * len(photos), 500), abs=1.1)
    assert split_photos(photos, 0.2, seed=1)[1] == held_out
    assert count < 200 or split_photos(photos, 0.2, seed=2)[1] != held_out
    learned, measured = ({label for photo in part for label in photo.tags} for part in (train, held_out))
    assert learned == {label for photo in photos for label in photo.tags}
    assert "only once" not in measured
    assert count < 200 or measured == set(words)


def test_figures_of_the_report():
    rng = np.random.default_rng(0)
    targets = rng.random((40, 5)) < 0.3
    targets[:, 3], targets[:, 4] = True, False
    scores = rng.normal(size=(40, 5)) + targets
    found = average_precisions(scores, targets)
    expected = [average_precision_score(targets[:, text], scores[:, text]) for text in range(3)]
    np.testing.assert_allclose(found[:3], expected)
    assert np.isnan(found[3:]).all()
    # Texts that all photos have, or none, are not evaluated and do not count for chance.
    assert precision_by_chance(targets) == pytest.approx(targets[:, :3].mean())
    assert precision_by_chance(targets[:, 3:]) is None
    targets = np.zeros((12, 3), bool)
    targets[:4, 0] = targets[4:8, 1] = targets[8:, 2] = True
    scores = targets.astype(float)
    scores[:8, :2] = 1
    assert confused_labels(scores, targets, ["a", "b", "c"]) == [("a", "b", 0.0)]
    labels = (["a", "b"], ["a", "b", "c"], ["c"])
    photos = [Record("", tags=tags, name=str(number)) for number, tags in enumerate(labels)]
    assert labels_always_together(photos) == [["a", "b"]]
