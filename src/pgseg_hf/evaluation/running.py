"""A whole evaluation: pictures in chunks over processes, continued where it stopped, with a report at the end."""

import hashlib
import json
import platform
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

import accelerate
import numpy as np
import PIL
import torch
import transformers
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
from ..files import remove_unfinished, write_atomically, write_image, write_json
from ..run_records import differences, read_record
from ..segmentation import Segmenter
from ..visualization import indexed_png, overlay, side_by_side
from .benchmarks.mask_dataset import MaskDataset, Picture
from .classification import Classes, ClassificationScores, Classifier
from .evaluator import MaskEvaluator, MaskOptions, MaskScores, SegmentedPicture

logger = logging.get_logger(__name__)

CHUNK = 16
"""Pictures that are counted together; a stopped run loses at most so many in each process."""

CLASSIFICATION_CHUNK = 256
"""The same for pictures with one class each."""


# What an evaluation writes into its folder beside run.json.
_WRITTEN = ("parts", "predictions", "pictures", "results.json", "results.md")


@dataclass
class Output:
    """The folder of an evaluation.

    Args:
        folder: with `parts/` for what is counted, `predictions/` and `pictures/`.
        record: what was asked for; a run goes on only with the same.
        overwrite: an earlier run with another record gives way, with all that it wrote.
    """

    folder: Path
    record: dict[str, Any]
    overwrite: bool = False

    def prepare(self) -> None:
        """Writes the record, or checks it against that of an earlier run.

        Raises:
            ValueError: the folder holds a run of something else.
        """
        path = self.folder / "run.json"
        record = json.loads(json.dumps(self.record))
        known = read_record(path)
        remove_unfinished(self.folder)
        if known == record:
            return
        if known is None:
            foreign = [name for name in _WRITTEN if (self.folder / name).exists()]
            if foreign:
                raise ValueError(
                    f"{self.folder / foreign[0]} is there and of no evaluation; choose another --output."
                )
        elif not self.overwrite:
            changes = "; ".join(differences(known, record))
            raise ValueError(
                f"{self.folder} holds an evaluation with {changes}. Choose another --output, or --overwrite."
            )
        for name in _WRITTEN:
            written = self.folder / name
            if written.is_dir():
                shutil.rmtree(written)
            else:
                written.unlink(missing_ok=True)
        write_json(record, path)

    def part(self, number: int) -> Path:
        """File of a chunk's counts."""
        return self.folder / "parts" / f"{number:06d}.npz"


def evaluate_in_parts(
    segmenter: Segmenter,
    dataset: MaskDataset,
    options: MaskOptions,
    output: Output,
    save_predictions: bool = False,
    num_pictures: int = 0,
) -> MaskScores:
    """Counts a data set on all processes and returns the sums; every process has to call it.

    The pictures are cut into chunks of `CHUNK`, whatever the number of processes; each process takes every n-th chunk.
    What a chunk gave is written before the next one begins, and read instead of counted where it is there and whole.

    Args:
        segmenter: the model's, on this process's device.
        dataset: all pictures, the same on every process.
        options: what to do.
        output: prepared.
        save_predictions: write `predictions/NAME.png`, indexed, with the numbers of the data set's labels, which for
            masks with 0 for unknown are one less than the masks' values.
        num_pictures: write so many `pictures/NAME.jpg` of picture, truth and prediction side by side, spread over the
            data set.
    """
    state = PartialState()
    shown = {picture.name for picture in dataset.spread(num_pictures).pictures} if num_pictures else set()

    def files_of(picture: Picture) -> Iterator[Path]:
        if save_predictions:
            yield output.folder / "predictions" / f"{picture.name}.png"
        if picture.name in shown:
            yield output.folder / "pictures" / f"{picture.name}.jpg"

    def on_picture(found: SegmentedPicture) -> None:
        for file in files_of(found.picture):
            if file.suffix == ".png":
                write_image(_indexed(found, dataset), file)
            else:
                write_image(draw_evaluation(found, dataset), file)
        progress.update(state.num_processes)

    evaluator = MaskEvaluator(segmenter, dataset, options, on_picture)
    scores = MaskScores.empty(dataset, options)
    with logging.tqdm(
        total=len(dataset), desc=f"Evaluating {dataset.name}", unit="image", disable=not state.is_main_process
    ) as progress:
        for number, pictures in _chunks(dataset.pictures, state.process_index, state.num_processes):
            path = output.part(number)
            done = _read_scores(path, dataset, options)
            if done is not None and all(
                options.skip_broken if each.name in done.broken else all(map(Path.is_file, files_of(each)))
                for each in pictures
            ):
                scores.merge(done)
                scores.reused += done.pictures
                progress.update(len(pictures) * state.num_processes)
                continue
            counted = evaluator(pictures)
            write_atomically(path, partial(_save_arrays, counted.to_arrays()))
            scores.merge(counted)
    return scores.sum_over_processes(state.device)


def _save_arrays(arrays: dict[str, np.ndarray], file: BinaryIO) -> None:
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _read_scores(path: Path, dataset: MaskDataset, options: MaskOptions) -> MaskScores | None:
    """What an earlier run counted; None where there is nothing, or a damaged file."""
    if not path.is_file():
        return None
    scores = MaskScores.empty(dataset, options)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            scores.add_arrays(arrays)
    except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning(f"{path} cannot be read and is counted again: {error}")
        return None
    return scores


def _chunks(items: Sequence[Any], rank: int, world_size: int) -> Iterator[tuple[int, Sequence[Any]]]:
    """Numbers and items of the chunks of one process."""
    for number in range(rank, -(-len(items) // CHUNK), world_size):
        yield number, items[number * CHUNK : (number + 1) * CHUNK]


def _indexed(found: SegmentedPicture, dataset: MaskDataset) -> Image.Image:
    background = dataset.background == 0
    return indexed_png(found.predicted, len(dataset.labels) - background, background=background)


def draw_evaluation(found: SegmentedPicture, dataset: MaskDataset) -> Image.Image:
    """Picture, truth and prediction side by side; background and what is unknown stay uncoloured."""
    order = [value for value in range(len(dataset.labels)) if value != dataset.background]
    labels = [dataset.labels[value] for value in order]
    panels = [found.image]
    for values in (found.truth, found.predicted):
        # 0 where there is no colour, then the labels in their order.
        coloured = np.searchsorted(order, values) + 1
        coloured[~np.isin(values, order)] = 0
        panels.append(overlay(found.image, coloured, labels, background=True))
    return side_by_side(panels, ["picture", "truth", "prediction"])


def classify_in_parts(classifier: Classifier, classes: Classes, output: Output) -> ClassificationScores:
    """Counts pictures with one class each on all processes; every process has to call it. Chunks and their files are as
    in [`evaluate_in_parts`], of `CLASSIFICATION_CHUNK` pictures."""
    state = PartialState()
    scores = ClassificationScores()
    pictures = classes.pictures()
    with logging.tqdm(
        desc=f"Classifying {classes.name}", unit="image", disable=not state.is_main_process
    ) as progress:
        for number in count():
            chunk = list(islice(pictures, CLASSIFICATION_CHUNK))
            if not chunk:
                break
            progress.update(len(chunk))
            if number % state.num_processes != state.process_index:
                continue
            path = output.part(number)
            done = _read_classification(path)
            if done is None or (done.broken and not classifier.skip_broken):
                done = classifier(chunk)
                write_json(done.to_counts(), path.with_suffix(".json"))
            else:
                scores.reused += done.pictures
            scores.merge(done)
    return scores.sum_over_processes(state.device)


def _read_classification(path: Path) -> ClassificationScores | None:
    path = path.with_suffix(".json")
    if not path.is_file():
        return None
    try:
        return ClassificationScores.from_counts(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        logger.warning(f"{path} cannot be read and is counted again: {error}")
        return None


def checkpoint_hash(name_or_path: str) -> str | None:
    """SHA-256 of the files that a checkpoint's weights are loaded from (on the Hub of their index, where there are
    several), the first 16 digits; None where there are none."""
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
            while block := content.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def versions(device: torch.device | str) -> dict[str, str]:
    """What the figures were made with."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "pgseg_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
    }
