"""Segments videos frame by frame in constant memory. PyAV, `pgseg-hf[video]`, is imported on demand."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image
from transformers.utils import logging

from .files import folder_written_whole, write_atomically, write_image
from .images import MAX_IMAGE_PIXELS
from .values import whole_number
from .visualization import indexed_png, label_colours, overlay

if TYPE_CHECKING:
    from .label_maps import Segment, Segmentation
    from .options import SegmentationOptions
    from .segmentation import Segmenter

logger = logging.get_logger(__name__)

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".3gp", ".mts")
"""Lower-case file name endings that are treated as videos."""

SMOOTH = 5
"""Default number of frames over which scores are averaged."""

# Container and encoder for each file name ending that can be written, and the options of the encoders.
WRITTEN = {
    ".mp4": ("mp4", "libx264"),
    ".mov": ("mov", "libx264"),
    ".mkv": ("matroska", "libx264"),
    ".webm": ("webm", "libvpx-vp9"),
}
_ENCODER_OPTIONS = {
    "libx264": {"crf": "20", "preset": "veryfast"},
    "libvpx-vp9": {"crf": "30", "b": "0", "deadline": "realtime", "cpu-used": "6"},
}
_BT709, _LIMITED_RANGE = 1, 1
# A video counts as truncated if it ends earlier than its header says by more than both of these.
_MISSING_SECONDS, _MISSING_SHARE = 0.5, 0.02


def load_av() -> Any:
    """Imports PyAV.

    Raises:
        ValueError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(
            "videos need PyAV, which is not installed; run pip install 'pgseg-hf[video]'."
        ) from error
    return av


@dataclass
class Frame:
    """A frame of a video.

    Args:
        image: the upright RGB image.
        pts: presentation time in units of the video's `time_base`.
    """

    image: Image.Image = field(repr=False)
    pts: int


class Video:
    """Iterates over the frames of a video file, reading them one by one.

    Args:
        path: a file of any format that FFmpeg reads.
        max_pixels: largest number of pixels per frame.

    Attributes:
        rate: average number of frames per second.
        time_base: length of a time unit in seconds.
        length: estimated number of frames from the file's header; None if it has none.

    Raises:
        ValueError: PyAV is not installed, or the file is not a video, is too large, or is broken or truncated; the
            latter may be raised only while frames are read.
    """

    def __init__(self, path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS):
        self.path = Path(path)
        with self._open() as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > max_pixels:
                raise ValueError(
                    f"{path} has frames of {stream.width} x {stream.height} = {stream.width * stream.height:,} pixels, "
                    f"more than the {max_pixels:,} allowed: raise max_pixels (--max-pixels)."
                )
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self.time_base: Fraction = stream.time_base
            ends = [
                stream.duration * stream.time_base if stream.duration else None,
                _seconds_of_tag(stream.metadata.get("DURATION", "")),
                container.duration / 1e6 if container.duration and len(container.streams) == 1 else None,
            ]
            self._seconds = next((float(end) for end in ends if end), None)
            length = stream.frames or (self._seconds and round(self._seconds * self.rate))
            self.length: int | None = length or None

    def __iter__(self) -> Iterator[Frame]:
        av = load_av()
        count, pts = 0, -1
        with self._open() as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            first, last = None, 0.0
            decoded = container.decode(stream)
            while True:
                try:
                    frame = next(decoded, None)
                except av.error.FFmpegError as error:
                    raise self._broken(f"{error.strerror} after {count} frames") from error
                if frame is None:
                    break
                step = 1 / (self.rate * self.time_base)
                given = round(count * step) if frame.pts is None else frame.pts
                pts = given if first is None else max(given, pts + 1)
                first = pts if first is None else first
                last = float((pts - first + (frame.duration or step)) * self.time_base)
                count += 1
                yield Frame(_upright(frame), pts)
        if not count:
            raise self._broken("no frames")
        missing = (self._seconds or 0.0) - last
        if missing > max(_MISSING_SECONDS, _MISSING_SHARE * last):
            raise self._broken(f"it ends after {last:.1f} of {self._seconds:.1f} seconds")

    def _open(self) -> Any:
        av = load_av()
        try:
            container = av.open(str(self.path))
        except (av.error.FFmpegError, OSError) as error:
            raise self._broken(error.strerror or str(error)) from error
        if not container.streams.video:
            container.close()
            raise ValueError(f"{self.path} contains only sound; expected a video.")
        return container

    def _broken(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.path} is broken, truncated or not a video: {reason}; copy the complete file again."
        )


def _seconds_of_tag(text: str) -> float | None:
    """Parses a duration such as "00:00:02.500000", the form in Matroska files."""
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None


def _upright(frame: Any) -> Image.Image:
    """The frame as an image. Phones store frames unrotated, with the rotation for players as metadata."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image


def segment_frames(
    segmenter: "Segmenter",
    frames: Iterable[Frame],
    labels: Sequence[str],
    options: "SegmentationOptions | None" = None,
    smooth: int = SMOOTH,
    every: int = 1,
) -> Iterator[tuple[Frame, "Segmentation"]]:
    """Yields each frame with its segmentation, in order. Memory holds at most one batch of frames plus
    `every * (smooth / 2 + 1)`.

    Args:
        segmenter: the segmenter to use.
        frames: frames of the same size.
        labels: labels as in [`Segmenter`].
        options: replaces the segmenter's options.
        smooth: number of encoded frames, centred on the current one, over which scores are averaged; 1 for none.
        every: frames per block; only the middle frame is encoded, and its labels are used for the whole block.

    Raises:
        ValueError: options or labels are invalid.
    """
    smooth, every = whole_number(smooth, "smooth"), whole_number(every, "every")
    options = options or segmenter.options
    options = replace(options, batch_size=max(1, options.batch_size // every))
    blocks, encoded = itertools.tee(_blocks(frames, every))
    results = segmenter.stream((block[len(block) // 2].image for block in encoded), labels, options, smooth)
    # Results come first, so that zip consumes no extra block at the end.
    for result, block in zip(results, blocks):
        for frame in block:
            yield frame, result


def _blocks(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    iterator = iter(frames)
    while block := list(itertools.islice(iterator, size)):
        yield block


@dataclass
class VideoSummary:
    """Summary of a segmented video.

    Args:
        frames: number of frames.
        size: width and height in pixels.
        rate: frames per second of the video.
        seconds: wall time.
        segments: area and score of each label over all frames, in the order of the labels.
    """

    frames: int
    size: tuple[int, int]
    rate: float
    seconds: float
    segments: list["Segment"]


def check_video(
    video: Path, output: Path | None, mask: Path | None, overwrite: bool, max_pixels: int = MAX_IMAGE_PIXELS
) -> None:
    """Raises a ValueError if the video cannot be read, or the outputs cannot be written or already exist."""
    Video(video, max_pixels)
    if output is not None and output.suffix.lower() not in WRITTEN:
        raise ValueError(
            f"{output} does not have the ending of a video that can be written, expected {', '.join(WRITTEN)}."
        )
    if mask is not None and (mask.suffix or mask.is_file()):
        raise ValueError(
            f"--mask is {mask}, expected a folder for one PNG per frame: a video would change the label values."
        )
    for place in (output, mask):
        if place is None or not place.exists():
            continue
        if place.samefile(video):
            raise ValueError(f"{place} is the input video; choose another output path.")
        if not overwrite and (place.is_file() or any(place.iterdir())):
            raise ValueError(
                f"{place} already exists; choose another path, or use --overwrite to replace it."
            )


def segment_video(
    segmenter: "Segmenter",
    video: str | Path,
    labels: Sequence[str],
    output: str | Path,
    mask: str | Path | None = None,
    options: "SegmentationOptions | None" = None,
    smooth: int = SMOOTH,
    every: int = 1,
    overwrite: bool = False,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> VideoSummary:
    """Writes the overlay of a video, completely or not at all, with the same size and timing and without sound.

    Args:
        segmenter: the segmenter to use.
        video: a file of any format that FFmpeg reads.
        labels: labels as in [`Segmenter`].
        output: path of the overlay, .mp4, .mov, .mkv (H.264) or .webm (VP9).
        mask: folder for one indexed PNG per frame, `000000.png` and so on; a video would not keep the label values.
        options, smooth, every: as in [`segment_frames`].
        overwrite: whether to replace existing results.
        max_pixels: largest number of pixels per frame.

    Raises:
        ValueError: options, labels or the video are invalid, results already exist, or PyAV is not installed.
    """
    start = time.monotonic()
    output, mask = Path(output), None if mask is None else Path(mask)
    check_video(Path(video), output, mask, overwrite, max_pixels)
    source = Video(video, max_pixels)
    totals = _Totals()
    with ExitStack() as stack:
        folder = None if mask is None else stack.enter_context(folder_written_whole(mask, replace=True))
        progress = stack.enter_context(
            logging.tqdm(total=source.length, desc="Segmenting", unit="frame", smoothing=0.1)
        )

        def drawn() -> Iterator[Frame]:
            for frame, result in segment_frames(segmenter, source, labels, options, smooth, every):
                if folder is not None:
                    colours = label_colours(result.labels, result.colours)
                    png = indexed_png(result.label_map, len(result.labels), result.background, colours)
                    write_image(png, folder / f"{totals.frames:06d}.png")
                totals.add(frame, result)
                shown = (result.label_map, result.labels, result.background)
                painted = overlay(frame.image, *shown, legend=False, colours=result.colours)
                yield Frame(painted, frame.pts)
                progress.update()

        write_atomically(output, lambda file: _encode(drawn(), file, source, output.suffix.lower()))
    return VideoSummary(
        totals.frames, totals.size, float(source.rate), time.monotonic() - start, totals.segments()
    )


class _Totals:
    """Sums of areas and scores over frames."""

    def __init__(self) -> None:
        self.frames, self.size = 0, (0, 0)
        self._sums: list[tuple[Segment, float, float]] = []

    def add(self, frame: Frame, result: "Segmentation") -> None:
        found = result.segments(include_absent=True)
        before = self._sums or [(each, 0.0, 0.0) for each in found]
        self._sums = [
            (each, area + each.area, scores + each.area * (each.score or 0.0))
            for each, (_, area, scores) in zip(found, before)
        ]
        self.frames, self.size = self.frames + 1, frame.image.size

    def segments(self) -> list["Segment"]:
        return [
            replace(each, area=area / self.frames, score=scores / area if scores else None)
            for each, area, scores in self._sums
        ]


def _encode(frames: Iterator[Frame], file: BinaryIO, source: Video, ending: str) -> None:
    """Encodes frames with their timestamps; the first frame gives the size."""
    av = load_av()
    container_format, codec = WRITTEN[ending]
    first = next(frames)
    width, height = first.image.size
    pixel_format = "yuv444p" if width % 2 or height % 2 else "yuv420p"
    with av.open(file, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=source.rate, options=_ENCODER_OPTIONS[codec])
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        context = stream.codec_context
        context.time_base = source.time_base
        context.colorspace, context.color_range = _BT709, _LIMITED_RANGE
        for frame in itertools.chain([first], frames):
            encoded = av.VideoFrame.from_image(frame.image).reformat(
                format=pixel_format, dst_colorspace=_BT709
            )
            encoded.pts, encoded.time_base = frame.pts, source.time_base
            container.mux(stream.encode(encoded))
        container.mux(stream.encode())
