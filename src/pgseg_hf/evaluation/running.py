"""Resumable evaluation of a dataset, in chunks distributed over processes."""

import hashlib
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)
from transformers.utils.hub import cached_file

from .. import __version__
from ..files import remove_unfinished, write_image, write_json
from ..run_records import is_same_run
from ..segmentation import Segmenter
from ..visualization import indexed_png, overlay, side_by_side
from .benchmarks.mask_dataset import MaskDataset
from .benchmarks.reading import LabelledImage
from .classification import Classifier
from .evaluator import MaskEvaluator, MaskOptions, MaskScores, SegmentedImage
from .metrics.sums import ImageSums

logger = logging.get_logger(__name__)

CHUNK, CLASSIFICATION_CHUNK = 16, 256
"""Images per chunk for segmentation and for classification."""


# What an evaluation writes into its folder, besides run.json.
_WRITTEN = ("parts", "predictions", "drawings", "results.json", "results.md")


@dataclass
class Output:
    """Output folder of an evaluation.

    Args:
        folder: path of the folder; `parts/` holds counts, the images are in `predictions/` and `drawings/`.
        record: settings of the run; a run is only resumed with the same record.
        overwrite: delete the results of an earlier run with another record.
    """

    folder: Path
    record: dict[str, Any]
    overwrite: bool = False

    def prepare(self) -> None:
        """Writes the record, or compares it with the record of an earlier run.

        Raises:
            ValueError: the folder contains a different run.
        """
        path = self.folder / "run.json"
        is_same = is_same_run(path, self.record, "Choose another --output, or --overwrite.", self.overwrite)
        remove_unfinished(self.folder)
        if is_same:
            return
        if is_same is None:
            foreign = [name for name in _WRITTEN if (self.folder / name).exists()]
            if foreign:
                raise ValueError(
                    f"{self.folder / foreign[0]} exists, but there is no run.json; choose another --output."
                )
        for name in _WRITTEN:
            written = self.folder / name
            if written.is_dir():
                shutil.rmtree(written)
            else:
                written.unlink(missing_ok=True)
        write_json(self.record, path)

    def count(
        self,
        counter: MaskEvaluator | Classifier,
        images: Iterable[Any],
        chunk: int,
        files_of: Callable[[LabelledImage], Iterable[Path]] = lambda labelled: (),
    ) -> Any:
        """Evaluates images on all processes and returns the summed counts; every process must call it.

        The images are split into chunks, independently of the number of processes; with n processes, each takes every
        n-th chunk. The counts of a chunk are written to `parts/` before the next chunk starts. A chunk whose file
        exists and is complete is not evaluated again.

        Args:
            counter: evaluates a list of images.
            images: all images, the same on every process.
            chunk: number of images in a chunk; a stopped run loses at most one chunk per process.
            files_of: returns the other files that must exist for an image.
        """
        state = PartialState()
        total: Any = counter.empty()
        length = len(images) if isinstance(images, list) else None
        images = iter(images)
        with logging.tqdm(
            total=length, desc="Evaluating", unit="image", disable=not state.is_main_process
        ) as progress:
            for number, part in enumerate(iter(lambda: list(islice(images, chunk)), [])):
                if number % state.num_processes == state.process_index:
                    path = self.folder / "parts" / f"{number:06d}.npz"
                    counted = counter.empty()
                    if not self._is_whole(path, counted, part, files_of, counter.skip_broken):
                        counted = counter(part)
                        counted.save(path)
                    total.merge(counted)
                progress.update(len(part))
        return total.sum_over_processes(state.device)

    @staticmethod
    def _is_whole(path: Path, counted: ImageSums, part: list, files_of: Callable, skip_broken: bool) -> bool:
        """Adds the counts of a chunk from an earlier run; returns whether they and all of its files exist."""
        if not path.is_file():
            return False
        try:
            counted.add_file(path)
        except ValueError as error:
            logger.warning(f"{error}; its images are evaluated again.")
            return False
        whole = (each for each in part if each.name not in counted.broken)
        return (skip_broken or not counted.broken) and all(
            file.is_file() for each in whole for file in files_of(each)
        )


def evaluate_in_parts(
    segmenter: Segmenter,
    dataset: MaskDataset,
    options: MaskOptions,
    output: Output,
    save_predictions: bool = False,
    num_drawn: int = 0,
) -> MaskScores:
    """Evaluates a dataset on all processes, see [`Output.count`].

    Args:
        segmenter: segmenter on this process's device.
        dataset: all images, the same on every process.
        options: evaluation options.
        output: output folder, after `prepare`.
        save_predictions: write `predictions/NAME.png`, indexed images of label indices. If 0 means unknown in the
            masks, the indices are one less than the masks' values.
        num_drawn: number of `drawings/NAME.jpg` to write, with image, ground truth and prediction side by side; the
            images are spread over the dataset.
    """
    shown = {labelled.name for labelled in dataset.spread(num_drawn).images} if num_drawn else set()

    def files_of(labelled: LabelledImage) -> Iterator[Path]:
        if save_predictions:
            yield output.folder / "predictions" / f"{labelled.name}.png"
        if labelled.name in shown:
            yield output.folder / "drawings" / f"{labelled.name}.jpg"

    def on_image(found: SegmentedImage) -> None:
        for file in files_of(found.labelled):
            write_image((_indexed if file.suffix == ".png" else draw_evaluation)(found, dataset), file)

    counter = MaskEvaluator(segmenter, dataset, options, on_image)
    return output.count(counter, dataset.images, CHUNK, files_of)


def _indexed(found: SegmentedImage, dataset: MaskDataset) -> Image.Image:
    background = dataset.background == 0
    return indexed_png(found.predicted, len(dataset.labels) - background, background=background)


def draw_evaluation(found: SegmentedImage, dataset: MaskDataset) -> Image.Image:
    """Image, ground truth and prediction side by side; background and unknown pixels are not coloured."""
    order = [value for value in range(len(dataset.labels)) if value != dataset.background]
    labels = [dataset.labels[value] for value in order]
    panels = [found.image]
    for values in (found.truth, found.predicted):
        # 0 is not coloured; the labels follow in their order.
        coloured = np.searchsorted(order, values) + 1
        coloured[~np.isin(values, order)] = 0
        panels.append(overlay(found.image, coloured, labels, background=True))
    return side_by_side(panels, ["image", "truth", "prediction"])


def checkpoint_hash(name_or_path: str) -> str | None:
    """First 16 digits of the SHA-256 of a checkpoint's weight files; None if there are none. For sharded weights on the
    Hub, only the index file is hashed."""
    folder = Path(name_or_path)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not folder.is_dir():
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
            found = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False)
            files += [Path(found)] if found and not files else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            hashlib.file_digest(content, lambda: digest)
    return digest.hexdigest()[:16]


def versions(device: torch.device | str) -> dict[str, str]:
    """Versions of the packages, and the device."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    packages = ("torch", "transformers", "accelerate", "numpy", "pillow")
    return {
        "pgseg_hf": __version__,
        **{package: metadata.version(package) for package in packages},
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
    }
