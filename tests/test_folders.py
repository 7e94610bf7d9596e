"""Folders by several threads and processes, and large pictures."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import run
from tiny_models import make_photo

from pgseg_hf import Segmentation, SegmentationOptions, folders, load_segmenter
from pgseg_hf.files import mask_source
from pgseg_hf.folders import segment_folder
from pgseg_hf.images import load_label_map


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):
        make_photo(60 + number, 50, seed=number).save(folder / f"{number:02d}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def program(*arguments):
    return ["-m", "pgseg_hf", "segment", *map(str, arguments)]


def test_threads_change_nothing(tiny_segmenter, photos, tmp_path):
    summaries = [
        segment_folder(tiny_segmenter, photos, tmp_path / str(workers), ["cat", "dog"], workers=workers)
        for workers in (0, 3)
    ]
    for one in (tmp_path / "0").rglob("*.*"):
        assert one.read_bytes() == (tmp_path / "3" / one.relative_to(tmp_path / "0")).read_bytes()
    assert [summary.segmented for summary in summaries] == [20, 20]
    assert summaries[0].pixels == summaries[1].pixels
    assert sum(summaries[0].pixels.values()) == sum(50 * (60 + number) for number in range(20))
    assert list(summaries[0].broken) == list(summaries[1].broken) == ["broken.png"]
    assert not (tmp_path / "3" / ".locks").exists()


def test_what_a_kill_left_just_before_is_removed(tiny_segmenter, photos, tmp_path, monkeypatch):
    left = tmp_path / "masks" / ".pgseg-left.part"
    left.parent.mkdir()
    left.touch()
    write = folders.write_mask

    def slow(*args):
        if left.exists():
            os.utime(left, (0, 0))  # a minute has passed
        return write(*args)

    monkeypatch.setattr(folders, "write_mask", slow)
    segment_folder(tiny_segmenter, photos, tmp_path, ["cat", "dog"])
    assert not left.exists()


def test_pictures_are_read_while_the_model_works(tiny_segmenter, photos, tmp_path, monkeypatch):
    """The next pictures are there before the last ones are segmented; no more of them than threads."""
    read, ahead = [], []
    load, stream = folders.load_image, tiny_segmenter.stream

    def watched(images, *args, **kwargs):
        def handed():
            for number, image in enumerate(images):
                time.sleep(0.05)
                ahead.append(len(read) - number - 1)
                yield image

        yield from stream(handed(), *args, **kwargs)

    monkeypatch.setattr(folders, "load_image", lambda *given: read.append(given[0]) or load(*given))
    monkeypatch.setattr(tiny_segmenter, "stream", watched)
    segment_folder(tiny_segmenter, photos, tmp_path / "out", ["cat", "dog"], workers=3)
    assert len(read) == 21 and 1 <= max(ahead) <= 4
    ahead.clear(), read.clear()
    segment_folder(tiny_segmenter, photos, tmp_path / "serial", ["cat", "dog"], workers=0)
    assert max(ahead) == 0


@pytest.mark.parametrize("launcher", ["plain", "accelerate"])
def test_processes_share_a_folder(tiny_folder, photos, tmp_path, launcher):
    arguments = program(
        photos, "--labels", "cat,dog", "--model", tiny_folder, "--format", "csv", "--output", "out"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = {"cwd": tmp_path, "env": environment, "text": True, "stdout": -1, "stderr": -1}
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
        launch = ["-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "2"]
        commands = [[sys.executable, *launch, *arguments]]
    else:
        commands = [[sys.executable, *arguments]] * 2
    running = [subprocess.Popen(command, **settings) for command in commands]
    outputs = [process.communicate() for process in running]
    for process, (out, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 1, errors
        # One that came late found some or all done before.
        counts = re.search(r"(\d+) pictures segmented.*, (\d+) done before, 1 broken", out)
        assert int(counts[1]) + int(counts[2]) == 20, out
    if launcher == "accelerate":
        assert outputs[0][0].count("pictures segmented") == 1, "one process tells"
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 20
    with open(tmp_path / "out" / "segments.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["image"] for row in rows) == sorted(f"{n:02d}.png" for n in range(20) for _ in "ab")
    assert not (tmp_path / "out" / ".locks").exists()


def test_of_two_runs_that_start_together_one_has_the_folder(tiny_segmenter, photos, tmp_path, monkeypatch):
    """Both find no record, and both would write theirs."""
    together, read, first = threading.Barrier(2, timeout=60), folders.read_record, threading.local()

    def read_together(path):
        known = read(path)
        if not hasattr(first, "done"):
            first.done = together.wait()
        return known

    monkeypatch.setattr(folders, "read_record", read_together)
    output, asked = tmp_path / "out", (["cat", "dog"], ["cat", "horse"])
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(segment_folder, tiny_segmenter, photos, output, labels) for labels in asked]
    (loser,) = (number for number, run in enumerate(runs) if run.exception())
    theirs, ours = asked[1 - loser], asked[loser]
    assert f"{output} holds results with labels = {theirs} there and {ours} now" in str(
        runs[loser].exception()
    )
    assert json.loads((output / "segmentation.json").read_text())["labels"] == theirs
    assert runs[1 - loser].result().segmented == 20


def test_each_picture_is_segmented_once(tiny_folder, photos, tmp_path, monkeypatch):
    """Two runs, the second one begun in the middle of the first, each of whose pictures count in both."""
    output, labels = tmp_path / "out", ["cat", "dog"]
    segmenter = load_segmenter(tiny_folder, SegmentationOptions(batch_size=2))
    code = f"""
import json
from pgseg_hf import SegmentationOptions, load_segmenter
from pgseg_hf.folders import segment_folder
segmenter = load_segmenter({tiny_folder!r}, SegmentationOptions(batch_size=2))
found = segment_folder(segmenter, {str(photos)!r}, {str(output)!r}, {labels}, workers=0)
print(json.dumps([found.segmented, found.elsewhere, found.skipped]))
"""
    other = None
    stream = segmenter.stream

    def slow(images, *args, **kwargs):
        nonlocal other
        for number, result in enumerate(stream(images, *args, **kwargs)):
            if number == 2 and other is None:
                other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
                while not (output / ".locks" / "2.lock").exists() and other.poll() is None:
                    time.sleep(0.05)
            yield result

    monkeypatch.setattr(segmenter, "stream", slow)
    summary = segment_folder(segmenter, photos, output, labels, workers=0)
    segmented, elsewhere, skipped = json.loads(other.communicate()[0].splitlines()[-1])
    assert segmented + summary.segmented == 20 and segmented > 0, "none of them twice"
    assert summary.segmented + summary.elsewhere == 20 and segmented + elsewhere + skipped == 20
    assert sum(summary.pixels.values()) == sum(50 * (60 + number) for number in range(20))
    assert len(summary.results) == 20


def test_a_stopped_call_leaves_its_share_to_the_next(tiny_segmenter, photos, tmp_path, monkeypatch):
    labels, stream = ["cat", "dog"], tiny_segmenter.stream

    def stopped(*args, **kwargs):
        yield next(stream(*args, **kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_segmenter, "stream", stopped)
    with pytest.raises(KeyboardInterrupt) as kept:
        segment_folder(tiny_segmenter, photos, tmp_path / "out", labels)
    monkeypatch.setattr(tiny_segmenter, "stream", stream)
    # Not for ever.
    monkeypatch.setattr(folders.time, "sleep", lambda seconds: pytest.fail("waits for itself"))
    summary = segment_folder(tiny_segmenter, photos, tmp_path / "out", labels)
    assert summary.segmented + summary.skipped == 20 and kept.value is not None


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_process_leaves_its_share_to_others(tiny_folder, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(60):
        make_photo(400, 300, seed=number).save(tmp_path / "photos" / f"{number:02d}.png")
    command = [
        sys.executable,
        *program("photos", "--labels", "cat,dog", "--model", tiny_folder, "--output", "out"),
    ]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    masks = tmp_path / "out" / "masks"
    while not masks.exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = {path.name for path in masks.glob("[0-9]*.png")}
    assert 0 < len(done) < 60 and all(mask_source(masks / name) for name in done), "whole ones only"
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    count, before = re.search(r"(\d+) pictures segmented, (\d+) done before", finished.stdout).groups()
    assert int(count) + int(before) == 60 and int(before) > 0 and "images/s)" in finished.stdout
    assert len(list(masks.glob("*.png"))) == 60


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--workers", "-1"], "--workers is -1"),
        (["--max-pixels", "0"], "--max-pixels is 0"),
        (["--short-side", "0"], "--short-side is 0"),
    ],
)
def test_wrong_numbers_are_told_before_a_model_is_loaded(photos, capsys, extra, message):
    assert run("segment", photos, "--labels", "cat", "--model", "no/such/model", *extra) == 2
    assert message in capsys.readouterr().err


def test_the_largest_picture_by_option(tiny_folder, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--labels", "cat,dog", "--model", tiny_folder, "--max-pixels", str(50 * 78)]
    assert run("segment", photos / "19.png", *arguments) == 2
    assert "19.png' has 79 x 50 = 3,950 pixels, more than the 3,900" in (error := capsys.readouterr().err)
    assert "--max-pixels" in error
    assert run("segment", photos, *arguments, "--output", "out") == 1
    captured = capsys.readouterr()
    assert (
        "broken: 19.png" in captured.err and "19 pictures segmented, 0 done before, 2 broken" in captured.out
    )


def test_masks_that_pillow_refuses_are_read(tmp_path, monkeypatch):
    mask = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20))
    mask.save(tmp_path / "mask.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert np.array_equal(load_label_map(tmp_path / "mask.png"), np.asarray(mask))
    assert mask_source(tmp_path / "mask.png") is None


def test_segments_are_counted_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    result = Segmentation(
        rng.integers(0, 3, (40, 30)), rng.random((40, 30), dtype=np.float32), ["a", "b", "c"]
    )
    whole = result.segments()
    monkeypatch.setattr("pgseg_hf.segmentation._COUNTED_AT_ONCE", 7)
    for one, other in zip(whole, result.segments(), strict=True):
        assert (one.label, one.area) == (other.label, other.area) and one.score == pytest.approx(other.score)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="memory by getrusage")
def test_hundred_megapixels_in_bounded_memory(tmp_path):
    """By windows, against the same picture at a fifth of its side, at which the model sees nearly the same."""
    photo = Image.open(Path(__file__).parent.parent / "examples" / "images" / "horses.jpg").convert("RGB")
    side, windows = min(photo.size), ["--short-side", "1120", "--window", "448", "--stride", "224"]
    square = photo.crop((0, 0, side, side)).resize((2000, 2000), Image.Resampling.BICUBIC)
    square.save(tmp_path / "small.png")
    square.resize((10_000, 10_000), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=95)
    for name in ("small.png", "large.jpg"):
        arguments = [name, "--labels", "horse, person, sand, sea", "--mask", f"{name}-mask.png", *windows]
        command = [sys.executable, *program(*arguments, "--output", f"{name}-overlay.jpg")]
        running = subprocess.Popen(command, cwd=tmp_path)
        _, status, usage = os.wait4(running.pid, 0)
        assert status == 0
    peak = usage.ru_maxrss / 1024**2 / (1024 if sys.platform == "darwin" else 1)
    assert peak < 3.5, f"{peak:.1f} GiB"
    small, large = (load_label_map(tmp_path / f"{name}-mask.png") for name in ("small.png", "large.jpg"))
    assert large.shape == (10_000, 10_000) and len(np.unique(large)) > 2
    assert (large[2::5, 2::5] == small).mean() > 0.9


def test_ctrl_c_says_how_to_go_on(tiny_folder, photos, tmp_path, capsys, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pgseg_hf.commands.segment_folder", stopped)
    arguments = ["--labels", "cat,dog", "--model", tiny_folder, "--output", tmp_path / "out"]
    assert run("segment", photos, *arguments) == 130
    assert "and the same command goes on from them." in capsys.readouterr().err
