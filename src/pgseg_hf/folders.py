"""Segmenting a folder of images: progress, continuing where a run stopped, broken images reported and not fatal,
and several processes on one folder."""

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
from .run_records import file_digest, hash_of, is_same_run, model_record
from .segmentation import Segmenter
from .values import whole_number
from .visualization import indexed_png, label_colours, overlay

logger = logging.get_logger(__name__)

RECORD_NAME = "segmentation.json"
LOCKS = ".locks"

WORKERS = 2
"""Threads that read images and write results by default."""

# Images that a process claims at a time, and seconds between looks at those that others have claimed.
_SHARED_AT_ONCE, _POLL_SECONDS = 8, 0.5
# Pixels whose results, 12 bytes each, may wait for being written.
_LARGE_PIXELS = 2**25


@dataclass
class FolderSummary:
    """What a run over a folder did.

    Args:
        segmented: images of this run.
        elsewhere: images that other processes have done meanwhile.
        skipped: images that an earlier run had done.
        renewed: how many of the segmented ones an earlier run had done before they were changed.
        broken: file names and what was wrong with them.
        seconds: wall time.
        pixels: pixels of each label, over the images of this run and of other processes meanwhile.
        results: the masks of all images that are not broken, of earlier runs too.
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
    """Segments all images of a folder into `output`: `masks/NAME.png` (indexed, values as in [`Segmentation`]),
    `overlays/NAME.png` with a legend, and in `segmentation.json` what they depend on: labels, options, the model's
    weights and its processor. Images that are done are skipped, so a stopped run is continued by the same call; one
    whose file has changed since is segmented anew. `images` are files under `folder`, instead of all in it.

    Several processes may make the same call at once: each image is segmented by one of them, and all return when all
    images are done. `workers` threads read images and write results while the model works; with 0 all goes one
    after the other. Images of more than `max_pixels` count as broken.

    Raises:
        ValueError: no images, labels that make no sense, or an output folder that holds a run with other labels,
            options or another model.
    """
    folder, output = Path(folder), Path(output)
    options = options or segmenter.options
    images = images_apart_from(folder, output) if images is None else images
    # Fails on labels and options that make no sense before anything is written.
    next(segmenter.stream([Image.new("RGB", (64, 64))], labels, options))
    start = time.monotonic()
    record = {
        "labels": list(labels),
        "options": {**asdict(options), "batch_size": None},
        **model_record(segmenter),
    }
    _take(output / RECORD_NAME, record)
    remove_unfinished(output)
    run = _Run(segmenter, folder, output, labels, options, overlays, images, hash_of(record))
    run.segment(whole_number(workers, "workers", least=0), whole_number(max_pixels, "max_pixels"))
    remove_unfinished(output)  # again: what was left just before the start is old now
    run.summary.results = [
        run.result_of(path) for path in images if str(path.relative_to(folder)) not in run.summary.broken
    ]
    run.summary.seconds = time.monotonic() - start
    return run.summary


class _Share:
    """Some neighbouring images that one process works on at a time, as long as it lives."""

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
    """An image that was read, or what is wrong with it."""

    path: Path
    share: _Share
    digest: str
    image: Image.Image | None = None
    reason: str = ""


class _Run:
    """One process's part of a folder."""

    def __init__(
        self,
        segmenter: Segmenter,
        folder: Path,
        output: Path,
        labels: Sequence[str],
        options: SegmentationOptions,
        overlays: bool,
        images: Sequence[Path],
        name: str,
    ):
        self.folder, self.output, self.overlays, self._name = folder, output, overlays, name
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
        """What an image's mask was made from; None where there is none of this run."""
        source, _, name = (mask_source(self.mask_of(path)) or "").partition(" ")
        return source if name == self._name else None

    def is_done(self, path: Path) -> bool:
        is_drawn = not self.overlays or self.overlay_of(path).exists()
        return is_drawn and self._source(path) == _digest(path)

    def segment(self, workers: int, max_pixels: int) -> None:
        """Segments what is not done, waiting for images that other processes work on."""
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
                # A notebook keeps the traceback, and with it the locks, which its next call would wait for.
                for share in shares:
                    share.give_up()
                raise
        # Whoever comes later finds everything done.
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
        """Segments shares but for those that other processes hold, which are added to `held`."""
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
        """Writes an image's results, and counts the pixels of its labels."""
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
        write_mask(mask, self.mask_of(loaded.path), f"{loaded.digest} {self._name}", scores)
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
        stale = "; its mask is of what was there before" if is_stale else ""
        self.summary.broken[str(loaded.path.relative_to(self.folder))] = f"{loaded.reason}{stale}"
        loaded.share.done()


def _load(path: Path, share: _Share, max_pixels: int) -> _Loaded:
    digest = _digest(path)
    try:
        return _Loaded(path, share, digest, load_image(path, max_pixels))
    except ValueError as error:
        return _Loaded(path, share, digest, reason=str(error))


def _results(futures: Iterator[Future[_Loaded]], ahead: int) -> Iterator[_Loaded]:
    """What futures give, in their order; so many of them are begun before they are needed."""
    begun: deque[Future[_Loaded]] = deque()
    for future in futures:
        begun.append(future)
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _digest(path: Path) -> str:
    """Of an image's file; nothing for one that cannot be read, which is reported when its turn comes."""
    try:
        return file_digest(path)
    except OSError:
        return ""


def _take(path: Path, record: dict) -> None:
    """Makes an output folder that of a run.

    Raises:
        ValueError: it is another's.
    """
    way_out = "Choose another output folder."
    if is_same_run(path, record, way_out) is None:
        try:
            write_json(record, path, replace=False)
        except FileExistsError:  # another run began just now
            is_same_run(path, record, way_out)


def _output_names(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """A name ending in .png for each image, the old ending kept where another image's name would be the same, also
    on a disk that takes capitals for small letters."""
    relative = {path: path.relative_to(folder) for path in images}
    whole = {path: name.with_name(f"{name.name}.png") for path, name in relative.items()}
    short = {path: name.with_suffix(".png") for path, name in relative.items()}
    taken = Counter(str(name).casefold() for name in [*whole.values(), *short.values()])
    return {path: name if taken[str(name).casefold()] == 1 else whole[path] for path, name in short.items()}
