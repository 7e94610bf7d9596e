"""Videos, read and written with PyAV."""

import itertools
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_cli import run
from tiny_models import make_photo

from pgseg_hf import Segmentation, SegmentationOptions
from pgseg_hf.images import load_label_map
from pgseg_hf.video import Frame, Video, _Totals, segment_frames, segment_video

av = pytest.importorskip("av")

LABELS = ["cat", "dog", "grass", "sky", "road"]
IDENTITY = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
QUARTER_TURN = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()


def pan(count, width=96, height=64, noise=12):
    """Frames of a photo as a shaking camera would record them."""
    photo, rng = make_photo(2 * width, 2 * height, seed=3), np.random.default_rng(0)
    for number in range(count):
        left, top = rng.integers(0, 6, 2) + number
        pixels = np.asarray(photo.crop((left, top, left + width, top + height)), dtype=float)
        yield Image.fromarray((pixels + noise * rng.normal(size=pixels.shape)).clip(0, 255).astype(np.uint8))


def write_video(path, images, rate=Fraction(30000, 1001), times=None, codec="libx264", **options):
    images = list(images)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *images[0].size, "yuv420p"
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = times[number] if times else number, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def clip(tmp_path):
    return write_video(tmp_path / "clip.mp4", pan(12))


def arguments(clip, folder, *more):
    return ["segment", clip, "--labels", ",".join(LABELS), "--model", folder, *more]


def test_a_video_as_a_program(tiny_folder, tiny_segmenter, clip, tmp_path):
    command = [sys.executable, "-m", "pgseg_hf", *map(str, arguments(clip, tiny_folder, "--smooth", "1"))]
    done = subprocess.run([*command, "--mask", "masks"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 frames of 96 x 64 pixels" in done.stdout and "clip-segmented.mp4, masks" in done.stdout
    assert "colours: cat #e69f00, dog #" in done.stdout
    assert "12/12" in done.stderr and "frame/s" in done.stderr, "progress"
    overlay, frames = Video(tmp_path / "clip-segmented.mp4"), list(Video(clip))
    assert (overlay.rate, overlay.length) == (Fraction(30000, 1001), 12)
    assert [frame.image.size for frame in overlay] == [(96, 64)] * 12
    times = [[float(each.pts * video.time_base) for each in video] for video in (overlay, Video(clip))]
    assert times[0] == pytest.approx(times[1], abs=1e-4)
    masks = sorted((tmp_path / "masks").iterdir())
    assert [mask.name for mask in masks] == [f"{number:06d}.png" for number in range(12)]
    for frame, mask in zip(frames, masks, strict=True):
        expected = tiny_segmenter(frame.image, LABELS).label_map
        assert np.array_equal(load_label_map(mask), expected), "numbers as they are, of the frame itself"


def test_one_of_some_frames_is_encoded(tiny_folder, clip, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clip-segmented.mp4").touch()
    given = arguments(clip, tiny_folder, "--mask", "masks", "--every", "3", "--background-threshold", ".3")
    assert run(*given, "--overwrite", "--json", "--quiet") == 0
    (found,) = json.loads(capsys.readouterr().out)["videos"]
    assert (found["frames"], found["width"], found["mask"]) == (12, 96, "masks")
    background, cat, *_ = found["segments"]
    assert background["score"] is None and cat["colour"] == "#e69f00"
    maps = [load_label_map(f"masks/{number:06d}.png") for number in range(12)]
    for segment in found["segments"]:
        assert segment["area"] == pytest.approx(np.mean([part == segment["value"] for part in maps]))
    for number in range(12):
        assert np.array_equal(maps[number], maps[number // 3 * 3])


def test_the_middle_of_some_frames_is_encoded():
    frames = [Frame(image, number) for number, image in enumerate(pan(8))]
    seen = SimpleNamespace(options=SegmentationOptions(), stream=lambda images, *others: images)
    number_of = {id(frame.image): frame.pts for frame in frames}
    found = [
        (frame.pts, number_of[id(image)]) for frame, image in segment_frames(seen, frames, LABELS, every=3)
    ]
    assert found == list(enumerate([1, 1, 1, 4, 4, 4, 7, 7]))


def test_scores_are_averaged_over_neighbours(tiny_segmenter):
    """Compares with an average of the dense scores of single frames."""
    frames = [Frame(image, number) for number, image in enumerate(pan(7))]
    embeds = tiny_segmenter.class_embeddings(LABELS)
    options = SegmentationOptions(window_size=None, top_k=len(LABELS))
    from pgseg_hf.scoring import best_labels, merge_windows

    scores = []
    for image in tiny_segmenter.encode([frame.image for frame in frames], options):
        scored = tiny_segmenter.score(image, embeds, options)
        merged, channels, count = merge_windows(scored.windows, scored.resized)
        assert channels == list(range(len(LABELS)))
        scores.append(merged)
    found = [result for _, result in segment_frames(tiny_segmenter, frames, LABELS, options, smooth=3)]
    for number, result in enumerate(found):
        near = scores[max(number - 1, 0) : number + 2]
        expected, best = best_labels(sum(near) / len(near), channels, count, (64, 96))
        assert (result.label_map != expected.numpy()).mean() < 1e-3
        np.testing.assert_allclose(result.scores, best, atol=1e-5)


def test_labels_hold_still(shipped_segmenter):
    """A still photo with camera noise."""
    path = Path(__file__).parent.parent / "examples" / "images" / "green-jacket.jpg"
    photo, rng = (
        np.asarray(Image.open(path).convert("RGB").resize((96, 144)), dtype=float),
        np.random.default_rng(0),
    )
    noisy = [(photo + 20 * rng.normal(size=photo.shape)).clip(0, 255).astype(np.uint8) for _ in range(7)]
    frames = [Frame(Image.fromarray(pixels), number) for number, pixels in enumerate(noisy)]
    labels = ["jacket", "pants", "shoe", "hair", "sidewalk", "building"]

    def flicker(smooth):
        maps = [
            result.label_map for _, result in segment_frames(shipped_segmenter, frames, labels, smooth=smooth)
        ]
        assert len(maps) == len(frames)
        return np.mean([(one != other).mean() for one, other in itertools.pairwise(maps)])

    one, five = flicker(1), flicker(5)
    assert five < one / 2, (one, five)


@pytest.mark.parametrize(("smooth", "every", "ahead"), [(1, 1, 3), (5, 1, 5), (3, 4, 12)])
def test_few_frames_are_held(tiny_segmenter, smooth, every, ahead):
    read = []

    def frames():
        for number, image in enumerate(pan(40)):
            read.append(number)
            yield Frame(image, number)

    options = SegmentationOptions(window_size=None, batch_size=3)
    given = 0
    for frame, _ in segment_frames(tiny_segmenter, frames(), LABELS, options, smooth, every):
        assert frame.pts == given and len(read) - given <= ahead + every
        given += 1
    assert given == 40


def test_scores_of_labels_are_means_over_their_pixels_in_all_frames():
    totals = _Totals()
    for cats in (1, 3):
        label_map, scores = np.array([[0] * cats + [1] * (4 - cats)]), np.full((1, 4), cats / 4)
        totals.add(Frame(Image.new("RGB", (4, 1)), 0), Segmentation(label_map, scores, ["cat", "dog"]))
    assert [(each.area, each.score) for each in totals.segments()] == [(0.5, 0.625), (0.5, 0.375)]


def test_times_that_vary_and_odd_sizes(tiny_segmenter, tmp_path):
    times = [0, 1, 5, 5, 20]
    clip = write_video(tmp_path / "clip.mkv", pan(5), rate=25, times=times)
    assert len({frame.pts for frame in Video(clip)}) == 5, "frames of one time follow each other"
    options = SegmentationOptions(window_size=None)
    segment_video(tiny_segmenter, clip, LABELS, tmp_path / "o.webm", options=options)
    video = Video(tmp_path / "o.webm")
    assert [float(frame.pts * video.time_base) for frame in video] == pytest.approx(
        [t / 25 for t in times], abs=2e-3
    )
    with av.open(str(tmp_path / "odd.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 65, 33, "bgr0"
        for image in pan(3, 65, 33):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    summary = segment_video(
        tiny_segmenter, tmp_path / "odd.mkv", ["cat"], tmp_path / "o.mp4", options=options
    )
    frames = list(Video(tmp_path / "o.mp4"))
    assert (summary.frames, summary.size) == (3, (65, 33)) and {frame.image.size for frame in frames} == {
        (65, 33)
    }


def test_a_header_may_promise_half_a_second_too_much(clip):
    video = Video(clip)
    video._seconds += 0.45
    assert len(list(video)) == 12
    video._seconds += 0.1
    with pytest.raises(ValueError, match=r"it ends after 0\.4 of 1\.0 seconds"):
        list(video)


def test_colours_of_the_overlay(tiny_segmenter, tmp_path):
    """The colour of a single label over grey, as in `overlay`."""
    from pgseg_hf.visualization import overlay

    clip = write_video(tmp_path / "clip.mp4", [Image.new("RGB", (64, 64), (128, 128, 128))] * 3)
    segment_video(tiny_segmenter, clip, ["cat"], tmp_path / "o.mp4")
    for frame in Video(tmp_path / "o.mp4"):
        expected = overlay(
            Image.new("RGB", (64, 64), (128, 128, 128)), np.zeros((64, 64), int), ["cat"], legend=False
        )
        difference = np.asarray(frame.image, dtype=int) - np.asarray(expected, dtype=int)
        assert abs(difference).max() <= 6


def test_telephones_turn_their_videos(clip):
    data = clip.read_bytes()
    place = data.index(IDENTITY, data.index(b"tkhd"))
    clip.write_bytes(data[:place] + QUARTER_TURN + data[place + len(IDENTITY) :])
    turned = next(iter(Video(clip))).image
    clip.write_bytes(data)
    expected = next(iter(Video(clip))).image.transpose(Image.Transpose.ROTATE_270)
    assert turned.size == (64, 96) and np.array_equal(np.asarray(turned), np.asarray(expected)), "clockwise"


@pytest.mark.parametrize("kind", ["cut", "cut in its frames", "text", "empty", "sound"])
def test_broken_videos_leave_nothing(tiny_folder, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    clip = write_video(
        tmp_path / "c.mp4", pan(60), movflags="faststart" if kind == "cut in its frames" else "+write_colr"
    )
    data = clip.read_bytes()
    if kind == "sound":
        with av.open("c.mp4", "w") as container:
            stream = container.add_stream("aac", rate=8000)
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            samples.sample_rate = 8000
            container.mux(stream.encode(samples))
            container.mux(stream.encode())
    else:
        broken = {"text": b"no video", "empty": b""}
        clip.write_bytes(broken.get(kind, data[: len(data) * 6 // 10]))
    before = sorted(os.listdir())
    model = tiny_folder if kind == "cut in its frames" else "no/such/model"
    assert run(*arguments("c.mp4", model, "--mask", "masks")) == 2
    error = capsys.readouterr().err
    assert (
        "c.mp4" in error
        and ("only sound" if kind == "sound" else "is broken, truncated or not a video") in error
    )
    assert "Traceback" not in error and sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "o.png"], "o.png does not have the ending of a video"),
        (["--mask", "m.mp4"], "--mask is m.mp4, expected a folder"),
        (["--output", "clip.mp4", "--overwrite"], "clip.mp4 is the input video"),
        (["--output", "there.mp4"], "there.mp4 already exists"),
        (["--mask", "full"], "full already exists"),
        (["--smooth", "0"], "--smooth is 0"),
        (["--every", "-1"], "--every is -1"),
        (["--format", "csv"], "--format is ['csv'], but clip.mp4 is a video"),
        (["--workers", "0"], "--workers is 0, but clip.mp4 is a video"),
        (["--max-pixels", "6143"], "clip.mp4 has frames of 96 x 64 = 6,144 pixels, more than the 6,143"),
        (["--vocabulary", "everyday"], "--vocabulary is everyday, but clip.mp4 is a video"),
        (["photo.png"], "clip.mp4 is one of 2"),
    ],
)
def test_wrong_arguments_are_told_before_a_model_is_loaded(
    clip, photo_file, tmp_path, capsys, monkeypatch, more, message
):
    monkeypatch.chdir(tmp_path)
    Path("there.mp4").touch()
    Path("full").mkdir()
    Path("full/a.png").touch()
    given = ["segment", "clip.mp4", *more, "--model", "no/such/model"]
    assert run(*given, *([] if "--vocabulary" in more else ["--labels", "cat"])) == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir()) == ["clip.mp4", "full", "photo.png", "there.mp4"]


def test_labels_that_compete_for_a_frame_are_not_averaged(tiny_segmenter, clip):
    with pytest.raises(ValueError, match=r"min_area is 0.1 and smooth 5"):
        next(segment_frames(tiny_segmenter, Video(clip), LABELS, SegmentationOptions(min_area=0.1)))


def test_the_missing_extra_is_told_before_a_model_is_loaded(clip, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(*arguments(clip, "no/such/model")) == 2
    assert "videos need PyAV" in (error := capsys.readouterr().err)
    assert "pip install 'pgseg-hf[video]'" in error and len(error.splitlines()) == 1


def test_a_stopped_run_leaves_no_half_video(tiny_segmenter, clip, tmp_path, monkeypatch):
    stream = tiny_segmenter.stream

    def stopped(*args):
        yield next(stream(*args))
        yield next(stream(*args))
        assert not (tmp_path / "o.mp4").exists() and not (tmp_path / "masks").exists(), (
            "nor does a killed one"
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_segmenter, "stream", stopped)
    with pytest.raises(KeyboardInterrupt):
        segment_video(tiny_segmenter, clip, LABELS, tmp_path / "o.mp4", tmp_path / "masks")
    assert os.listdir(tmp_path) == ["clip.mp4"]
