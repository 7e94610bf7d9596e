"""Segments a folder of images: shows progress, resumes a stopped run, reports broken images without failing, and shares
a folder among several processes."""

import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image
from transformers.utils import logging

from .files import mask_source, remove_unfinished, write_image, write_json, write_mask
from .images import MAX_IMAGE_PIXELS, images_apart_from, load_image
from .label_maps import Segmentation
from .options import SegmentationOptions
from .outputs import MaskResult
from .prompts import split_synonyms
from .run_records import file_digest, hash_of, is_same_run, model_record, read_record
from .segmentation import Segmenter
from .values import whole_number
from .visualization import indexed_png, label_colours, overlay

logger = logging.get_logger(__name__)

RECORD_NAME = "segmentation.json"
LOCKS = ".locks"

WORKERS = 2
"""Default number of threads that read images and write results."""

# Images that a process claims at a time, and seconds between checks of those that other processes hold.
_SHARED_AT_ONCE, _POLL_SECONDS = 8, 0.5
# Largest number of pixels whose results (12 bytes each) may wait to be written.
_LARGE_PIXELS = 2**25


@dataclass
class FolderSummary:
    """Summary of a run over a folder.

    Args:
        segmented: number of images that this process segmented.
        elsewhere: number of images that other processes segmented in the meantime.
        skipped: number of images that an earlier run had segmented.
        renewed: how many of the `segmented` images had changed since an earlier run.
        broken: reason for each broken image, by file name.
        seconds: wall time.
        pixels: number of pixels of each label over the `segmented` and `elsewhere` images.
        results: the masks of all images that are not broken, including those of earlier runs.
    """

    segmented: int = 0
    elsewhere: int = 0
    skipped: int = 0
    renewed: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    pixels: Counter = field(default_factory=Counter)
    results: list[MaskResult] = field(default_factory=list)


def segment_folder(
    segmenter: Segmenter,
    folder: str | Path,
    output: str | Path,
    labels: Sequence[str],
    options: SegmentationOptions | None = None,
    overlays: bool = True,
    images: Sequence[Path] | None = None,
    workers: int = WORKERS,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> FolderSummary:
    """Segments all images of a folder, or only the files `images` under it. Writes to `output`: `masks/NAME.png`
    (indexed, values as in [`Segmentation`]), `overlays/NAME.png` with a legend, and `segmentation.json` with the
    labels, options, model weights and processor that they depend on. Finished images are skipped, so the same call
    resumes a stopped run; an image whose file has changed is segmented again.

    Several processes can make the same call at once: each image is segmented by one of them, and all return when all
    images are finished. `workers` threads read images and write results while the model runs; 0 works sequentially.
    Images of more than `max_pixels` count as broken.

    Raises:
        ValueError: there are no images, labels or options are invalid, or the output folder holds a run with other
            labels, options or another model.
    """
    folder, output = Path(folder), Path(output)
    options = options or segmenter.options
    images = images_apart_from(folder, output) if images is None else images
    # Fails on invalid labels and options before anything is written.
    next(segmenter.stream([Image.new("RGB", (64, 64))], labels, options))
    start = time.monotonic()
    record = {
        "labels": list(labels),
        "options": {**asdict(options), "batch_size": None},
        **model_record(segmenter),
    }
    run_hash = _take_folder(output / RECORD_NAME, record)
    remove_unfinished(output)
    run = _Run(segmenter, folder, output, labels, options, overlays, images, run_hash)
    run.segment(whole_number(workers, "workers", least=0), whole_number(max_pixels, "max_pixels"))
    remove_unfinished(output)  # again: files left just before the start are old enough now
    run.summary.results = [
        run.result_of(path) for path in images if str(path.relative_to(folder)) not in run.summary.broken
    ]
    run.summary.seconds = time.monotonic() - start
    return run.summary


class _Share:
    """A few neighbouring images that one process claims; its lock is released if the process dies."""

    def __init__(self, lock: Path, images: list[Path]):
        self.images = images
        self.open = 0
        self._lock = FileLock(lock)

    def claim(self) -> bool:
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        return True

    def done(self, count: int = 1) -> None:
        self.open -= count
        if not self.open:
            self.give_up()

    def give_up(self) -> None:
        self._lock.release()


@dataclass
class _Loaded:
    """A loaded image, or the reason why it could not be read."""

    path: Path
    share: _Share
    digest: str
    image: Image.Image | None = None
    reason: str = ""


class _Run:
    """The part of a folder run that one process does."""

    def __init__(
        self,
        segmenter: Segmenter,
        folder: Path,
        output: Path,
        labels: Sequence[str],
        options: SegmentationOptions,
        overlays: bool,
        images: Sequence[Path],
        run_hash: str,
    ):
        self.folder, self.output, self.overlays, self._hash = folder, output, overlays, run_hash
        self.names = _output_names(images, folder)
        self._stream = partial(segmenter.stream, labels=labels, options=options)
        self._images = images
        self._called = [words[0] for words in split_synonyms(labels)]
        self._how = (options.has_background, options.colours, options.min_area is not None)
        self.made_from = {path: self._source(path) for path in images}
        self.summary = FolderSummary()

    def mask_of(self, path: Path) -> Path:
        return self.output / "masks" / self.names[path]

    def overlay_of(self, path: Path) -> Path:
        return self.output / "overlays" / self.names[path]

    def result_of(self, path: Path) -> MaskResult:
        name, mask = path.relative_to(self.folder).as_posix(), self.mask_of(path)
        return MaskResult(path, name, self.names[path], mask, self._called, *self._how)

    def _source(self, path: Path) -> str | None:
        """The digest of the image that its mask was made from; None if the mask is missing or from another run."""
        source, _, run_hash = (mask_source(self.mask_of(path)) or "").partition(" ")
        return source if run_hash == self._hash else None

    def is_done(self, path: Path) -> bool:
        is_drawn = not self.overlays or self.overlay_of(path).exists()
        return is_drawn and self._source(path) == _digest(path)

    def segment(self, workers: int, max_pixels: int) -> None:
        """Segments unfinished images and waits for those that other processes hold."""
        locks = self.output / LOCKS
        locks.mkdir(exist_ok=True)
        shares = []
        for number, first in enumerate(range(0, len(self._images), _SHARED_AT_ONCE)):
            images = self._images[first : first + _SHARED_AT_ONCE]
            waiting = [path for path in images if not self.is_done(path)]
            self.summary.skipped += len(images) - len(waiting)
            if waiting:
                shares.append(_Share(locks / f"{number}.lock", waiting))
        total = sum(len(share.images) for share in shares)
        with (
            logging.tqdm(total=total, desc="Segmenting", unit="image") as progress,
            ThreadPoolExecutor(max(1, workers)) as pool,
        ):
            try:
                while shares:
                    held: list[_Share] = []
                    self._segment_shares(shares, held, pool, workers, max_pixels, progress)
                    shares = held
                    if shares:
                        time.sleep(_POLL_SECONDS)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                # A notebook keeps the traceback and so the locks, and its next call would wait for them.
                for share in shares:
                    share.give_up()
                raise
        # Later calls find everything done and need no locks.
        shutil.rmtree(locks, ignore_errors=True)

    def _segment_shares(
        self,
        shares: Sequence[_Share],
        held: list[_Share],
        pool: ThreadPoolExecutor,
        workers: int,
        max_pixels: int,
        progress: Any,
    ) -> None:
        """Segments the shares that are free and appends those that other processes hold to `held`."""
        reading = (
            pool.submit(_load, path, share, max_pixels)
            for path, share in self._claimed(shares, held, progress)
        )
        given: deque[_Loaded] = deque()
        writing: deque[tuple[Future[Counter], _Loaded]] = deque()

        def images() -> Iterator[Image.Image]:
            for loaded in _results(reading, ahead=workers):
                if loaded.image is None:
                    self._report(loaded)
                    progress.update()
                else:
                    given.append(loaded)
                    yield loaded.image

        def finish(left: int) -> None:
            while len(writing) > left:
                future, loaded = writing.popleft()
                self._count(loaded, future.result())
                progress.update()

        for result in self._stream(images()):
            writing.append((pool.submit(self._write, given[0], result), given.popleft()))
            finish(min(2 * workers, _LARGE_PIXELS // result.label_map.size))
        finish(0)

    def _claimed(
        self, shares: Sequence[_Share], held: list[_Share], progress: Any
    ) -> Iterator[tuple[Path, _Share]]:
        for share in shares:
            if not share.claim():
                held.append(share)
                continue
            here = []
            for path in share.images:
                if self.is_done(path):
                    self._count_elsewhere(path)
                    progress.update()
                else:
                    here.append(path)
            share.open = len(here) + 1
            for path in here:
                yield path, share
            share.done()

    def _write(self, loaded: _Loaded, result: Segmentation) -> Counter:
        """Writes an image's results and counts the pixels of each label."""
        assert loaded.image is not None
        if self.overlays:
            shown = (result.label_map, result.labels, result.background)
            image = overlay(loaded.image, *shown, colours=result.colours)
            write_image(image, self.overlay_of(loaded.path))
        loaded.image = None
        colours = label_colours(result.labels, result.colours)
        mask = indexed_png(result.label_map, len(result.labels), result.background, colours)
        segments = result.segments(include_absent=True)
        scores = [segment.score for segment in segments]
        write_mask(mask, self.mask_of(loaded.path), f"{loaded.digest} {self._hash}", scores)
        return Counter(
            {each.label: round(each.area * result.label_map.size) for each in segments if each.area}
        )

    def _count(self, loaded: _Loaded, pixels: Counter) -> None:
        self.summary.segmented += 1
        self.summary.renewed += self.made_from[loaded.path] not in (None, loaded.digest)
        self.summary.pixels += pixels
        loaded.share.done()

    def _count_elsewhere(self, path: Path) -> None:
        self.summary.elsewhere += 1
        for each in self.result_of(path).segments()[2]:
            self.summary.pixels[each["label"]] += each["pixels"]

    def _report(self, loaded: _Loaded) -> None:
        logger.warning(f"skipped {loaded.path.name}: {loaded.reason}")
        is_stale = self.made_from[loaded.path] is not None
        stale = "; its mask is from an earlier version of the file" if is_stale else ""
        self.summary.broken[str(loaded.path.relative_to(self.folder))] = f"{loaded.reason}{stale}"
        loaded.share.done()


def _load(path: Path, share: _Share, max_pixels: int) -> _Loaded:
    digest = _digest(path)
    try:
        return _Loaded(path, share, digest, load_image(path, max_pixels))
    except ValueError as error:
        return _Loaded(path, share, digest, reason=str(error))


def _results(futures: Iterator[Future[_Loaded]], ahead: int) -> Iterator[_Loaded]:
    """The results of futures in order; `ahead` of them are started before they are needed."""
    begun: deque[Future[_Loaded]] = deque()
    for future in futures:
        begun.append(future)
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _digest(path: Path) -> str:
    """Digest of an image file; empty if it cannot be read, which is reported when the image is loaded."""
    try:
        return file_digest(path)
    except OSError:
        return ""


def _take_folder(path: Path, record: dict) -> str:
    """Claims an output folder for a run and returns the run's hash.

    Raises:
        ValueError: the folder belongs to another run.
    """
    way_out = "Choose another output folder."
    if is_same_run(path, record, way_out) is None:
        try:
            write_json(record, path, replace=False)
        except FileExistsError:  # another process wrote it just now
            is_same_run(path, record, way_out)
    # The hash is of the file, because an equal record may have another order.
    return hash_of(read_record(path))


def _output_names(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """A .png name for each image. It keeps the old ending where two names would be the same, also on a
    case-insensitive file system."""
    relative = {path: path.relative_to(folder) for path in images}
    whole = {path: name.with_name(f"{name.name}.png") for path, name in relative.items()}
    short = {path: name.with_suffix(".png") for path, name in relative.items()}
    taken = Counter(str(name).casefold() for name in [*whole.values(), *short.values()])
    return {path: name if taken[str(name).casefold()] == 1 else whole[path] for path, name in short.items()}
