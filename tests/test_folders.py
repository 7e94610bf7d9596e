"""Folder runs with several threads and processes, and large images."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import WORDS, run
from tiny_models import make_photo

from pgseg_hf import PGSegModel, Segmentation, SegmentationOptions, folders, load_segmenter, run_records
from pgseg_hf.files import mask_source
from pgseg_hf.folders import segment_folder
from pgseg_hf.images import load_label_map

LABELS = ["cat", "dog"]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three shares of images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):
        make_photo(60 + number, 50, seed=number).save(folder / f"{number:02d}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def program(*arguments) -> list[str]:
    return [sys.executable, "-m", "pgseg_hf", "segment", *map(str, arguments)]


def test_threads_change_nothing(tiny_segmenter, photos, tmp_path):
    summaries = [
        segment_folder(tiny_segmenter, photos, tmp_path / str(workers), LABELS, workers=workers)
        for workers in (0, 3)
    ]
    for one in (tmp_path / "0").rglob("*.*"):
        assert one.read_bytes() == (tmp_path / "3" / one.relative_to(tmp_path / "0")).read_bytes()
    for summary in summaries:
        assert summary.segmented == 20 and list(summary.broken) == ["broken.png"]
        assert sum(summary.pixels.values()) == sum(50 * (60 + number) for number in range(20))
    assert summaries[0].pixels == summaries[1].pixels and not (tmp_path / "3" / ".locks").exists()


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
    segment_folder(tiny_segmenter, photos, tmp_path, LABELS)
    assert not left.exists()


def test_images_are_read_while_the_model_works(tiny_segmenter, photos, tmp_path, monkeypatch):
    """The next images are read before the last ones are segmented, at most as many as there are threads."""
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
    segment_folder(tiny_segmenter, photos, tmp_path / "out", LABELS, workers=3)
    assert len(read) == 21 and 1 <= max(ahead) <= 4
    ahead.clear(), read.clear()
    segment_folder(tiny_segmenter, photos, tmp_path / "serial", LABELS, workers=0)
    assert max(ahead) == 0


def test_processes_of_accelerate_share_a_folder(tiny_folder, photos, tmp_path):
    pytest.importorskip("accelerate")
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "2"]
    arguments = program(photos, *WORDS, "--model", tiny_folder, "--format", "csv", "--output", "out")
    command = [sys.executable, *launch, *arguments[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 1, done.stderr
    # A process that starts late finds some or all images already done.
    ((segmented, before),) = re.findall(r"(\d+) images segmented.*, (\d+) done before, 1 broken", done.stdout)
    assert int(segmented) + int(before) == 20, "one process reports for all"
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 20
    with open(tmp_path / "out" / "segments.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["image"] for row in rows) == sorted(f"{n:02d}.png" for n in range(20) for _ in LABELS)
    assert not (tmp_path / "out" / ".locks").exists()


def test_of_two_runs_that_start_together_one_has_the_folder(tiny_segmenter, photos, tmp_path, monkeypatch):
    """Both runs find no record, and both try to write one."""
    together, read, first = threading.Barrier(2, timeout=60), run_records.read_record, threading.local()

    def read_together(path):
        known = read(path)
        if not hasattr(first, "done"):
            first.done = together.wait()
        return known

    monkeypatch.setattr(run_records, "read_record", read_together)
    output, asked = tmp_path / "out", (LABELS, ["cat", "horse"])
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(segment_folder, tiny_segmenter, photos, output, labels) for labels in asked]
    (loser,) = (number for number, run in enumerate(runs) if run.exception())
    theirs, ours = asked[1 - loser], asked[loser]
    assert f"labels was {theirs} and is {ours}" in str(runs[loser].exception())
    assert json.loads((output / "segmentation.json").read_text())["labels"] == theirs
    assert runs[1 - loser].result().segmented == 20


def test_each_image_is_segmented_once(tiny_folder, photos, tmp_path, monkeypatch):
    """A second run starts in the middle of the first, and both count all images."""
    output = tmp_path / "out"
    segmenter = load_segmenter(tiny_folder, SegmentationOptions(batch_size=2))
    code = f"""
import json
from pgseg_hf import SegmentationOptions, load_segmenter
from pgseg_hf.folders import segment_folder
segmenter = load_segmenter({tiny_folder!r}, SegmentationOptions(batch_size=2))
found = segment_folder(segmenter, {str(photos)!r}, {str(output)!r}, {LABELS}, workers=0)
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
    summary = segment_folder(segmenter, photos, output, LABELS, workers=0)
    segmented, elsewhere, skipped = json.loads(other.communicate()[0].splitlines()[-1])
    assert segmented + summary.segmented == 20 and segmented > 0, "none of them twice"
    assert summary.segmented + summary.elsewhere == 20 and segmented + elsewhere + skipped == 20
    assert sum(summary.pixels.values()) == sum(50 * (60 + number) for number in range(20))
    assert len(summary.results) == 20


def test_a_stopped_call_leaves_its_share_to_the_next(tiny_segmenter, photos, tmp_path, monkeypatch):
    stream = tiny_segmenter.stream

    def stopped(*args, **kwargs):
        yield next(stream(*args, **kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_segmenter, "stream", stopped)
    with pytest.raises(KeyboardInterrupt) as kept:
        segment_folder(tiny_segmenter, photos, tmp_path / "out", LABELS)
    monkeypatch.setattr(tiny_segmenter, "stream", stream)
    # The next call must not wait for the locks of the stopped one.
    monkeypatch.setattr(folders.time, "sleep", lambda seconds: pytest.fail("waits for itself"))
    summary = segment_folder(tiny_segmenter, photos, tmp_path / "out", LABELS)
    assert summary.segmented + summary.skipped == 20 and kept.value is not None


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_stopped_process_leaves_whole_masks_and_the_next_goes_on(
    tiny_folder, tiny_segmenter, tmp_path, name
):
    (tmp_path / "photos").mkdir()
    for number in range(30):
        make_photo(500, 400, seed=number).save(tmp_path / "photos" / f"{number:02d}.png")
    command = program("photos", *WORDS, "--model", tiny_folder, "--format", "csv", "--output", "out")
    # Background jobs of a shell ignore SIGINT, and their child processes inherit that.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, preexec_fn=listen)
    masks = tmp_path / "out" / "masks"
    while not masks.exists() and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(getattr(signal, name))
    errors = running.communicate()[1].decode()
    if name == "SIGINT":
        assert running.returncode == 130 and "Traceback" not in errors, errors
        assert "run the same command again to resume" in errors and not list(masks.glob(".*"))
    done = {path.name for path in masks.glob("[0-9]*.png")}
    assert 0 < len(done) < 30 and all(mask_source(masks / name) for name in done), "whole ones only"
    assert not (tmp_path / "out" / "segments.csv").exists()
    summary = segment_folder(load_segmenter(tiny_folder), tmp_path / "photos", tmp_path / "out", LABELS)
    assert summary.segmented + summary.skipped == 30 and summary.skipped > 0
    assert len(list(masks.glob("[0-9]*.png"))) == 30


def test_the_largest_image_by_option(tiny_folder, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*WORDS, "--model", tiny_folder, "--max-pixels", str(50 * 78)]
    assert run("segment", photos / "19.png", *arguments) == 2
    assert "19.png' has 79 x 50 = 3,950 pixels, more than the 3,900" in capsys.readouterr().err
    assert run("segment", photos, *arguments, "--output", "out") == 1
    captured = capsys.readouterr()
    assert "broken: 19.png" in captured.err
    assert "19 images segmented, 0 done before, 2 broken" in captured.out and "images/s)" in captured.out


def test_a_folder_is_continued_and_broken_images_are_reported(tiny_segmenter, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    (photos / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "a.jpg", "sub/b.webp")):
        make_photo(seed=number).save(photos / name)
    (photos / "c.png").write_bytes(b"")
    (photos / "notes.txt").write_text("no image")

    def again(labels=LABELS):
        found = segment_folder(tiny_segmenter, photos, output, labels)
        return found.segmented, found.skipped, list(found.broken)

    assert again() == (3, 0, ["c.png"])
    masks = sorted(str(path.relative_to(output)) for path in (output / "masks").rglob("*.png"))
    assert masks == ["masks/a.jpg.png", "masks/a.png.png", "masks/sub/b.png"]

    make_photo(seed=3).save(photos / "c.png")
    stamp = (output / "masks" / "a.png.png").stat().st_mtime_ns
    left = output / "masks" / "sub" / ".pgseg-x1.part"
    left.write_bytes(b"half a mask")
    os.utime(left, (0, 0))
    assert again() == (1, 3, []) and not left.exists(), "what a killed run left behind"
    assert (output / "masks" / "a.png.png").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"labels was \['cat', 'dog'\] and is \['cat', 'horse'\]"):
        again(["cat", "horse"])


def test_a_folder_is_continued_with_the_same_contents_only(tiny_folder, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for number in range(2):
        make_photo(60, 50, seed=number).save(photos / f"{number}.png")
    elsewhere = Path(shutil.copytree(tiny_folder, tmp_path / "elsewhere"))

    def again(model=tiny_folder):
        found = segment_folder(load_segmenter(model), photos, output, LABELS)
        return found.segmented, found.skipped, found.renewed, list(found.broken.values())

    assert again() == (2, 0, 0, [])
    assert again(elsewhere) == (0, 2, 0, []), "the path does not matter"
    PGSegModel.from_pretrained(elsewhere).save_pretrained(elsewhere)
    assert "auto_map" in json.loads((elsewhere / "config.json").read_text())
    # The same weights in the older format, without safetensors, are still the same run.
    weights = load_file(elsewhere / "model.safetensors")
    torch.save(weights, elsewhere / "pytorch_model.bin")
    (elsewhere / "model.safetensors").unlink()
    assert again(elsewhere) == (0, 2, 0, []), "nor how transformers saved the checkpoint"

    stamp = (output / "masks" / "1.png").stat().st_mtime_ns
    image = photos / "0.png"
    times = image.stat()
    make_photo(60, 50, seed=5).save(image)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert again() == (1, 1, 1, [])
    assert (output / "masks" / "1.png").stat().st_mtime_ns == stamp
    (output / "overlays" / "1.png").unlink()
    assert again() == (1, 1, 0, [])

    image.write_bytes(b"no image")
    (reason,) = again()[3]
    assert "its mask is from an earlier version" in reason
    make_photo(60, 50, seed=5).save(image)

    torch.save(weights | {"logit_scale": weights["logit_scale"] + 1e-3}, elsewhere / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"):
        again(elsewhere)
    (output / "segmentation.json").unlink()
    assert again() == (0, 2, 0, []), "a mask says of which run it is"
    earlier = {mask: mask.read_bytes() for mask in (output / "masks").iterdir()}
    (output / "segmentation.json").unlink()
    assert again(elsewhere) == (2, 0, 0, []), "masks of another run"
    for mask, content in earlier.items():
        mask.write_bytes(content)
    assert again(elsewhere) == (2, 0, 0, []), "as after a kill between the record and the first mask"


def test_equal_records_are_of_one_run(tiny_folder, tiny_segmenter, photos, tmp_path):
    """Equal despite another order, integers for floats, or a checkpoint that was loaded and saved."""
    images = [photos / "00.png"]

    def skipped(model=tiny_segmenter, threshold=0.0, **thresholds):
        options = SegmentationOptions(thresholds=thresholds, background_threshold=threshold)
        return segment_folder(model, photos, tmp_path / "out", LABELS, options, images=images).skipped

    assert skipped(cat=0.3, dog=0.5) == 0
    assert skipped(threshold=0, dog=0.5, cat=0.3) == 1
    tiny_segmenter.model.save_pretrained(tmp_path / "saved")
    tiny_segmenter.processor.save_pretrained(tmp_path / "saved")
    assert skipped(load_segmenter(tmp_path / "saved"), cat=0.3, dog=0.5) == 1


def test_a_changed_processor_is_another_run(tiny_segmenter, photos, tmp_path, monkeypatch):
    segment_folder(tiny_segmenter, photos, tmp_path / "out", LABELS, images=[photos / "00.png"])
    monkeypatch.setattr(tiny_segmenter.processor, "top_k", 1)
    with pytest.raises(ValueError, match=r"processor\.top_k was 5 and is 1"):
        segment_folder(tiny_segmenter, photos, tmp_path / "out", LABELS)


def test_images_of_nearly_one_name_have_masks_of_their_own(tiny_segmenter, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    names = ["a.jpg", "a.png", "a.jpg.png", "a.jpg.png.webp", "b.jpg", "C.png", "c.bmp"]
    for number, name in enumerate(names):
        make_photo(30 + number, 20, seed=number).save(photos / name)
    assert segment_folder(tiny_segmenter, photos, output, LABELS).segmented == 7
    sizes = {path.name: Image.open(path).width for path in (output / "masks").iterdir()}
    masks = [
        "a.jpg.png",
        "a.png.png",
        "a.jpg.png.png",
        "a.jpg.png.webp.png",
        "b.png",
        "C.png.png",
        "c.bmp.png",
    ]
    assert sizes == {name: 30 + number for number, name in enumerate(masks)}


def test_results_above_the_images_and_inside_their_folder(tiny_segmenter, tmp_path):
    photos = tmp_path / "album" / "photos"
    photos.mkdir(parents=True)
    make_photo(40, 30).save(photos / "a.png")
    for output in (tmp_path / "album", photos / "out"):
        for done in (1, 0):
            assert segment_folder(tiny_segmenter, photos, output, LABELS).segmented == done
        assert (output / "masks" / "a.png").is_file()
    more = tmp_path / "album" / "masks" / "more"
    more.mkdir()
    make_photo().save(more / "b.png")
    for folder, output in ((more, tmp_path / "album"), (photos, photos)):
        with pytest.raises(ValueError, match="would be mixed with the images of"):
            segment_folder(tiny_segmenter, folder, output, LABELS)


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
    monkeypatch.setattr("pgseg_hf.label_maps._COUNTED_AT_ONCE", 7)
    for one, other in zip(whole, result.segments(), strict=True):
        assert replace(one, score=0) == replace(other, score=0) and one.score == pytest.approx(other.score)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="memory by getrusage")
def test_hundred_megapixels_in_bounded_memory(tmp_path):
    """Compares with the same image at a fifth of its side, which looks nearly the same to the model."""
    photo = Image.open(Path(__file__).parent.parent / "examples" / "images" / "horses.jpg").convert("RGB")
    side, windows = min(photo.size), ["--short-side", "1120", "--window", "448", "--stride", "224"]
    square = photo.crop((0, 0, side, side)).resize((2000, 2000), Image.Resampling.BICUBIC)
    square.save(tmp_path / "small.png")
    square.resize((10_000, 10_000), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=95)
    for name in ("small.png", "large.jpg"):
        arguments = [name, "--labels", "horse, person, sand, sea", "--mask", f"{name}-mask.png", *windows]
        running = subprocess.Popen(program(*arguments, "--output", f"{name}-overlay.jpg"), cwd=tmp_path)
        _, status, usage = os.wait4(running.pid, 0)
        assert status == 0
    peak = usage.ru_maxrss / 1024**2 / (1024 if sys.platform == "darwin" else 1)
    assert peak < 3.5, f"{peak:.1f} GiB"
    small, large = (load_label_map(tmp_path / f"{name}-mask.png") for name in ("small.png", "large.jpg"))
    assert large.shape == (10_000, 10_000) and len(np.unique(large)) > 2
    assert (large[2::5, 2::5] == small).mean() > 0.9
