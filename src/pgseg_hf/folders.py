"""Segmenting a folder of pictures: progress, continuing where a run stopped, broken pictures reported and not fatal."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.utils import logging

from .files import mask_source, remove_unfinished, write_image, write_json, write_mask
from .images import images_apart_from, load_image
from .outputs import MaskResult
from .prompts import split_synonyms
from .run_records import differences, file_digest, model_record, read_record
from .segmentation import SegmentationOptions, Segmenter
from .visualization import indexed_png, label_colours, overlay

logger = logging.get_logger(__name__)

RECORD_NAME = "segmentation.json"


@dataclass
class FolderSummary:
    """What a run over a folder did.

    Args:
        segmented: pictures of this run.
        skipped: pictures that an earlier run had done.
        renewed: how many of the segmented ones an earlier run had done before they were changed.
        broken: file names and what was wrong with them.
        seconds: wall time.
        pixels: pixels of each label, over the pictures of this run.
        results: the masks of all pictures that are not broken, of earlier runs too.
    """

    segmented: int = 0
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
) -> FolderSummary:
    """Segments all pictures of a folder into `output`: `masks/NAME.png` (indexed, values as in [`Segmentation`]),
    `overlays/NAME.png` with a legend, and in `segmentation.json` what they depend on: labels, options, the model's
    weights and its processor. Pictures that are done are skipped, so a stopped run is continued by the same call; one
    whose file has changed since is segmented anew. `images` are files under `folder`, instead of all in it.

    Raises:
        ValueError: no pictures, labels that make no sense, or an output folder that holds a run with other labels,
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
    continues = _is_continued(record, output)
    names = _output_names(images, folder)
    digests = {path: _digest(path) for path in images}
    made_from = {path: mask_source(output / "masks" / names[path]) if continues else None for path in images}
    waiting = [
        path
        for path in images
        if made_from[path] != digests[path] or (overlays and not (output / "overlays" / names[path]).exists())
    ]
    summary = FolderSummary(skipped=len(images) - len(waiting))
    remove_unfinished(output)
    write_json(record, output / RECORD_NAME)
    with logging.tqdm(total=len(waiting), desc="Segmenting", unit="image") as progress:
        for first in range(0, len(waiting), options.batch_size):
            paths = waiting[first : first + options.batch_size]
            batch, broken = _load_images(paths)
            for path, reason in broken.items():
                stale = "; its mask is of what was there before" if made_from[path] is not None else ""
                summary.broken[str(path.relative_to(folder))] = f"{reason}{stale}"
            progress.update(len(broken))
            results = segmenter.stream(batch.values(), labels, options)
            for (path, image), result in zip(batch.items(), results, strict=True):
                if overlays:
                    shown = (result.label_map, result.labels, result.background)
                    picture = overlay(image, *shown, colours=result.colours)
                    write_image(picture, output / "overlays" / names[path])
                colours = label_colours(result.labels, result.colours)
                mask = indexed_png(result.label_map, len(labels), result.background, colours)
                scores = [segment.score for segment in result.segments(include_absent=True)]
                write_mask(mask, output / "masks" / names[path], digests[path], scores)
                summary.segmented += 1
                summary.renewed += made_from[path] not in (None, digests[path])
                for segment in result.segments():
                    summary.pixels[segment.label] += int(np.count_nonzero(result.mask(segment)))
                progress.update()
    called = [words[0] for words in split_synonyms(labels)]
    how = (options.has_background, options.colours, options.min_area is not None)
    for path in images:
        name = path.relative_to(folder)
        if str(name) not in summary.broken:
            mask_file = output / "masks" / names[path]
            summary.results.append(MaskResult(path, name.as_posix(), names[path], mask_file, called, *how))
    summary.seconds = time.monotonic() - start
    return summary


def _load_images(paths: Sequence[Path]) -> tuple[dict[Path, Image.Image], dict[Path, str]]:
    """The images that can be read, and what is wrong with the others."""
    images: dict[Path, Image.Image] = {}
    broken: dict[Path, str] = {}
    for path in paths:
        try:
            images[path] = load_image(path)
        except ValueError as error:
            broken[path] = str(error)
            logger.warning(f"skipped {path.name}: {error}")
    return images, broken


def _digest(path: Path) -> str:
    """Of a picture's file; nothing for one that cannot be read, which is reported when its turn comes."""
    try:
        return file_digest(path)
    except OSError:
        return ""


def _is_continued(record: dict, output: Path) -> bool:
    """Whether masks that are there are of the same run; without a record nobody knows what they are of."""
    known = read_record(output / RECORD_NAME)
    changes = [] if known is None else differences(known, record)
    if changes:
        raise ValueError(f"{output} holds results with {'; '.join(changes)}. Choose another output folder.")
    return known is not None


def _output_names(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """A name ending in .png for each picture, the old ending kept where another picture's name would be the same, also
    on a disk that takes capitals for small letters."""
    relative = {path: path.relative_to(folder) for path in images}
    whole = {path: name.with_name(f"{name.name}.png") for path, name in relative.items()}
    short = {path: name.with_suffix(".png") for path, name in relative.items()}
    taken = Counter(str(name).casefold() for name in [*whole.values(), *short.values()])
    return {path: name if taken[str(name).casefold()] == 1 else whole[path] for path, name in short.items()}
