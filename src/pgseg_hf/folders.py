"""Segmenting a folder of pictures: progress, continuing where a run stopped, broken pictures reported and not fatal."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.utils import logging

from .files import write_image, write_json
from .images import IMAGE_EXTENSIONS, load_image
from .segmentation import SegmentationOptions, Segmenter
from .visualization import indexed_png, overlay

logger = logging.get_logger(__name__)

RECORD_NAME = "segmentation.json"


@dataclass
class FolderSummary:
    """What a run over a folder did.

    Args:
        segmented: pictures of this run.
        skipped: pictures that an earlier run had done.
        broken: file names and what was wrong with them.
        seconds: wall time.
        pixels: pixels of each label, over the pictures of this run.
    """

    segmented: int = 0
    skipped: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    pixels: Counter = field(default_factory=Counter)


def find_images(folder: Path, leave_out: Path | None = None) -> list[Path]:
    """The pictures in a folder and its subfolders, sorted; hidden files and the folder `leave_out` are not searched.

    Raises:
        ValueError: no folder, or no pictures in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    inside = [leave_out.resolve()] if leave_out is not None else []
    images = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix.lower() in IMAGE_EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not any(path.resolve().is_relative_to(place) for place in inside)
    )
    if not images:
        raise ValueError(
            f"{folder} holds no pictures; known endings are {', '.join(sorted(IMAGE_EXTENSIONS))}."
        )
    return images


def segment_folder(
    segmenter: Segmenter,
    folder: str | Path,
    output: str | Path,
    labels: Sequence[str],
    options: SegmentationOptions | None = None,
    overlays: bool = True,
) -> FolderSummary:
    """Segments all pictures of a folder into `output`: `masks/NAME.png` (indexed, values as in [`Segmentation`]),
    `overlays/NAME.png` with a legend, and the labels and options in `segmentation.json`. Pictures that are done are
    skipped, so a stopped run is continued by the same call.

    Raises:
        ValueError: no pictures, labels that make no sense, or an output folder that holds a run with other labels or
            options.
    """
    folder, output = Path(folder), Path(output)
    if output.resolve() == folder.resolve():
        raise ValueError(f"{output} is the folder of the pictures; choose another output folder.")
    options = options or segmenter.options
    images = find_images(folder, leave_out=output)
    # Fails on labels and options that make no sense before anything is written.
    next(segmenter.stream([Image.new("RGB", (64, 64))], labels, options))
    record = {
        "model": str(segmenter.model.config._name_or_path),
        "labels": list(labels),
        "options": {**asdict(options), "batch_size": None},
    }
    _check_record(record, output)
    names = _output_names(images, folder)
    waiting = [path for path in images if not (output / "masks" / names[path]).exists()]
    summary = FolderSummary(skipped=len(images) - len(waiting))
    start = time.monotonic()
    write_json(record, output / RECORD_NAME)
    with logging.tqdm(total=len(waiting), desc="Segmenting", unit="image") as progress:
        for first in range(0, len(waiting), options.batch_size):
            batch = {}
            for path in waiting[first : first + options.batch_size]:
                try:
                    batch[path] = load_image(path)
                except ValueError as error:
                    summary.broken[str(path.relative_to(folder))] = str(error)
                    logger.warning(f"skipped {path.name}: {error}")
                    progress.update()
            results = segmenter.stream(batch.values(), labels, options)
            for (path, image), result in zip(batch.items(), results, strict=True):
                if overlays:
                    picture = overlay(image, result.label_map, labels, background=result.background)
                    write_image(picture, output / "overlays" / names[path])
                mask = indexed_png(result.label_map, num_labels=len(labels), background=result.background)
                write_image(mask, output / "masks" / names[path])
                summary.segmented += 1
                for segment in result.segments():
                    summary.pixels[segment.label] += int(np.count_nonzero(result.mask(segment)))
                progress.update()
    summary.seconds = time.monotonic() - start
    return summary


def _check_record(record: dict, output: Path) -> None:
    path = output / RECORD_NAME
    if not path.exists():
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; choose another output folder.") from error
    if not isinstance(known, dict):
        raise ValueError(f"{path} is no record of a run; choose another output folder.")
    for key, value in json.loads(json.dumps(record)).items():
        if known.get(key) != value:
            raise ValueError(
                f"{output} holds results made with {key} = {known.get(key)}, this run has {value}; choose another "
                "output folder."
            )


def _output_names(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """A name ending in .png for each picture, the old ending kept where two pictures differ only in it."""
    relative = {path: path.relative_to(folder) for path in images}
    stems = Counter(name.with_suffix("") for name in relative.values())
    return {
        path: name.with_suffix(".png")
        if stems[name.with_suffix("")] == 1
        else name.with_name(f"{name.name}.png")
        for path, name in relative.items()
    }
