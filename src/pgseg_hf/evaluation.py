"""How good masks and names are: IoU on pictures with masks, the oracle, and zero-shot classification."""

import copy
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import losses
from .folders import find_images
from .images import ImageSource, load_image, load_label_map
from .modeling_pgseg import PGSegModel
from .processing_pgseg import PGSegProcessor
from .prompts import IMAGENET_TEMPLATES, validate_labels
from .scoring import WindowScores
from .segmentation import EncodedImage, SegmentationOptions, Segmenter

IGNORE_INDEX = 255
"""Value of mask pixels that do not count, the field's habit."""


class ConfusionMatrix:
    """Counts of pixels, int64 `counts` [true label, predicted label].

    Args:
        num_labels: N; labels are 0 to N - 1.
        ignore_index: value of the truth that does not count; None for none.
    """

    def __init__(self, num_labels: int, ignore_index: int | None = IGNORE_INDEX):
        self.ignore_index = ignore_index
        self.counts = np.zeros((num_labels, num_labels), dtype=np.int64)

    def add(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Counts the pixels of a picture, two integer arrays of one shape.

        Raises:
            ValueError: other shapes, or values that are no labels; predictions only where the truth counts.
        """
        if truth.shape != predicted.shape:
            raise ValueError(
                f"the truth has shape {truth.shape} and the prediction {predicted.shape}, expected the same."
            )
        known = np.full(truth.shape, True) if self.ignore_index is None else truth != self.ignore_index
        num_labels = len(self.counts)
        pairs = []
        for name, values in (("truth", truth[known]), ("prediction", predicted[known])):
            if values.size and not 0 <= values.min() <= values.max() < num_labels:
                raise ValueError(
                    f"the {name} has values from {values.min()} to {values.max()}, expected 0 to {num_labels - 1}"
                    + ("." if self.ignore_index is None else f" and {self.ignore_index} for unknown.")
                )
            pairs.append(values.astype(np.int64))
        counts = np.bincount(pairs[0] * num_labels + pairs[1], minlength=num_labels**2)
        self.counts += counts.reshape(num_labels, num_labels)

    def merge(self, other: "ConfusionMatrix") -> None:
        """Adds what another one has counted of the same labels."""
        if self.counts.shape != other.counts.shape:
            raise ValueError(
                f"counts of {len(self.counts)} labels cannot take those of {len(other.counts)} labels."
            )
        self.counts += other.counts

    def sum_over_processes(self, device: str | torch.device = "cpu") -> None:
        """Adds the counts of all processes of `torch.distributed`; `device` as its backend needs it."""
        total = losses.sum_over_processes(torch.from_numpy(self.counts).to(device))
        self.counts = total.cpu().numpy()

    def iou(self) -> np.ndarray:
        """IoU of each label, float [N]; NaN where it is neither in the truth nor predicted."""
        hits = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return np.where(union > 0, hits / np.maximum(union, 1), np.nan)

    def mean_iou(self) -> float:
        """Mean over the labels that are in the truth or predicted; NaN without pixels."""
        iou = self.iou()
        return float(np.nanmean(iou)) if self.counts.any() else float("nan")

    def pixel_accuracy(self) -> float:
        """Share of pixels that are right; NaN without pixels."""
        return float(np.trace(self.counts) / self.counts.sum()) if self.counts.any() else float("nan")


class MaskFolder:
    """Pictures with masks in a folder: `metadata.jsonl` with `file_name` and `mask_file_name`, or `images/` and
    `masks/` with files of equal names but for their endings.

    `labels.json`, there or in the folder above, holds `labels`, in the order of the masks' values, and may hold
    `ignore_index` (a value of the masks that does not count, 255 by default, or null) and `background` (the value
    that means background, null by default).

    Args:
        path: the folder.
        background: the label that means background, instead of what `labels.json` says.

    Attributes:
        pictures: paths of picture and mask.
        labels, ignore_index, background: of `labels.json`.

    Raises:
        ValueError: files that are missing or make no sense.
    """

    def __init__(self, path: str | os.PathLike, background: str | None = None):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is no folder; expected one with pictures and masks.")
        self.labels, self.ignore_index, self.background = _read_labels(self.path)
        if background is not None:
            if background not in self.labels:
                raise ValueError(f"background {background!r} is none of the labels {', '.join(self.labels)}.")
            self.background = self.labels.index(background)
        metadata = self.path / "metadata.jsonl"
        self.pictures = _pairs_of_metadata(metadata) if metadata.is_file() else _pairs_of_names(self.path)
        missing = [file for pair in self.pictures for file in pair if not file.is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} pictures or masks of {self.path} are missing, the first is {missing[0]}."
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def spread(self, count: int) -> "MaskFolder":
        """At most `count` of the pictures, spread evenly over all of them."""
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1 picture.")
        count = min(count, len(self))
        return self._with([self.pictures[index * len(self) // count] for index in range(count)])

    def part(self, rank: int, world_size: int) -> "MaskFolder":
        """The pictures of one process: number i belongs to rank i % world_size. There may be none."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of world_size {world_size}, expected 0 <= rank < world_size.")
        return self._with(self.pictures[rank::world_size])

    def _with(self, pictures: list[tuple[Path, Path]]) -> "MaskFolder":
        other = copy.copy(self)
        other.pictures = pictures
        return other


def _read_labels(folder: Path) -> tuple[list[str], int | None, int | None]:
    """Labels, ignore_index and background."""
    places = [folder / "labels.json", folder.resolve().parent / "labels.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(
            f'{places[0]} is missing, expected {{"labels": [...]}} there or in the folder above.'
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        labels = validate_labels(content["labels"])
        ignore_index, background = content.get("ignore_index", IGNORE_INDEX), content.get("background")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f'{path} cannot be read, expected {{"labels": [...]}}: {error}') from error
    for name, value in (("ignore_index", ignore_index), ("background", background)):
        if value is not None and not isinstance(value, int):
            raise ValueError(f"{name} in {path} is {value!r}, expected a whole number or null.")
    if ignore_index is not None and 0 <= ignore_index < len(labels):
        raise ValueError(f"ignore_index {ignore_index} in {path} is a label; give null or another number.")
    if background is not None and not 0 <= background < len(labels):
        raise ValueError(
            f"background {background} in {path} is no label, expected 0 to {len(labels) - 1} or null."
        )
    return labels, ignore_index, background


def _pairs_of_metadata(path: Path) -> list[tuple[Path, Path]]:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pairs.append((path.parent / row["file_name"], path.parent / row["mask_file_name"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"line {number} of {path} has no file_name and mask_file_name: {error!r}."
            ) from error
    if not pairs:
        raise ValueError(f"{path} is empty, expected a line for each picture.")
    return pairs


def _pairs_of_names(folder: Path) -> list[tuple[Path, Path]]:
    images, masks = folder / "images", folder / "masks"
    if not images.is_dir() or not masks.is_dir():
        raise ValueError(f"{folder} holds neither metadata.jsonl nor the folders images and masks.")
    by_name = {mask.relative_to(masks).with_suffix(""): mask for mask in find_images(masks)}
    pairs = []
    for image in find_images(images):
        name = image.relative_to(images).with_suffix("")
        pairs.append((image, by_name.get(name, masks / name.with_suffix(".png"))))
    return pairs


@dataclass
class MaskScores:
    """What [`evaluate_masks`] counted.

    Args:
        labels: of the folder.
        confusion: of the model.
        oracle: of its groups, each with its majority label; None if not asked for.
        pictures: how many.
        seconds: wall time of this process.
    """

    labels: list[str]
    confusion: ConfusionMatrix
    oracle: ConfusionMatrix | None
    pictures: int
    seconds: float

    def sum_over_processes(self, device: str | torch.device = "cpu") -> "MaskScores":
        """Adds what all processes counted, each on its part of the folder; every process has to call it."""
        for matrix in (self.confusion, self.oracle):
            if matrix is not None:
                matrix.sum_over_processes(device)
        self.pictures = int(losses.sum_over_processes(torch.tensor(self.pictures, device=device)))
        return self

    def to_dict(self) -> dict[str, Any]:
        """`mean_iou`, `pixel_accuracy`, `iou` of each label (None where it is neither in the masks nor predicted),
        `oracle_mean_iou` and `oracle_pixel_accuracy` where asked for, `pictures` and `seconds`."""
        iou = self.confusion.iou().tolist()
        scores: dict[str, Any] = {
            "mean_iou": self.confusion.mean_iou(),
            "pixel_accuracy": self.confusion.pixel_accuracy(),
            "iou": {label: None if value != value else value for label, value in zip(self.labels, iou)},
        }
        if self.oracle is not None:
            scores["oracle_mean_iou"] = self.oracle.mean_iou()
            scores["oracle_pixel_accuracy"] = self.oracle.pixel_accuracy()
        return {**scores, "pictures": self.pictures, "seconds": self.seconds}


def evaluate_masks(
    segmenter: Segmenter,
    folder: MaskFolder,
    options: SegmentationOptions | None = None,
    oracle: bool = False,
) -> MaskScores:
    """Segments the pictures of a folder and compares with their masks, at the pictures' own sizes.

    The folder's background is a label like the others, with its name as prompt, unless the options have a
    `background_threshold`: then it has no prompt and is where no other label scores as much.

    Args:
        segmenter: the model's.
        folder: or a part of it: `folder.spread(100)` in training, `.part(rank, world_size)` for each process and
            `sum_over_processes` on the result.
        options: instead of the segmenter's.
        oracle: also what a perfect namer would make of the model's groups, see [`oracle_map`].

    Raises:
        ValueError: broken files, masks of another size than their picture, values that are no labels, or a
            background threshold for a folder without a background.
    """
    options = options or segmenter.options
    labels, values = segmentation_labels(folder, options)
    num_labels = len(folder.labels)
    scores = MaskScores(
        labels=folder.labels,
        confusion=ConfusionMatrix(num_labels, folder.ignore_index),
        oracle=ConfusionMatrix(num_labels, folder.ignore_index) if oracle else None,
        pictures=len(folder),
        seconds=0.0,
    )
    start = time.monotonic()
    encoded = segmenter.encode((image for image, _ in folder.pictures), labels, options)
    for (path, mask), image in zip(folder.pictures, encoded, strict=True):
        truth = load_label_map(mask)
        if truth.shape != image.size:
            raise ValueError(
                f"{mask} has {truth.shape} pixels (height, width), its picture {path} {image.size}."
            )
        try:
            scores.confusion.add(truth, values[image.label_map()[0].cpu().numpy()])
        except ValueError as error:
            raise ValueError(f"{mask}: {error}") from error
        if scores.oracle is not None:
            scores.oracle.add(truth, oracle_map(image, truth, num_labels, folder.ignore_index))
    scores.seconds = time.monotonic() - start
    return scores


def segmentation_labels(folder: MaskFolder, options: SegmentationOptions) -> tuple[list[str], np.ndarray]:
    """The labels to segment, and for each value of the segmentation that of the folder's masks.

    Raises:
        ValueError: a background threshold for a folder without a background.
    """
    order = list(range(len(folder.labels)))
    if options.background_threshold is None:
        return folder.labels, np.array(order)
    if folder.background is None:
        raise ValueError(
            f"background_threshold is {options.background_threshold}, but {folder.path} has no background; expected "
            "None, or background in its labels.json."
        )
    order.remove(folder.background)
    return [folder.labels[value] for value in order], np.array([folder.background, *order])


def oracle_map(
    image: EncodedImage, truth: np.ndarray, num_labels: int, ignore_index: int | None = IGNORE_INDEX
) -> np.ndarray:
    """What a perfect namer would make of the groups: in each window each group takes its majority label (of equal
    ones the first), the windows are merged as ever. What the model loses below it are names, the rest are groups.

    Args:
        image: groups and windows, from [`Segmenter.encode`].
        truth: int [H, W] of the picture's size.

    Returns:
        int64 [H, W].
    """
    height, width = image.resized
    resized = Image.fromarray(truth.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
    small = torch.from_numpy(np.array(resized)).long()
    named = [
        WindowScores(
            window.groups, _majority(window, small, num_labels, ignore_index), window.top, window.left
        )
        for window in image.windows
    ]
    return replace(image, windows=named).label_map()[0].cpu().numpy()


def _majority(window: WindowScores, truth_HW: Tensor, num_labels: int, ignore_index: int | None) -> Tensor:
    """One for each group's most frequent label, [K, num_labels]; the first one where all its pixels are unknown."""
    height, width = window.groups.shape
    part = truth_HW[window.top : window.top + height, window.left : window.left + width]
    part = part.to(window.groups.device)
    known = torch.ones_like(part, dtype=torch.bool) if ignore_index is None else part != ignore_index
    pairs = window.groups[known].long() * num_labels + part[known]
    votes = pairs.bincount(minlength=len(window.scores) * num_labels).view(-1, num_labels)
    return torch.nn.functional.one_hot(votes.argmax(1), num_labels).float()


@torch.no_grad()
def zero_shot_accuracy(
    model: PGSegModel,
    processor: PGSegProcessor,
    pictures: Iterable[tuple[ImageSource, str]],
    labels: Sequence[str],
    batch_size: int = 64,
) -> dict[str, float]:
    """Share of pictures whose label is the most similar one, or among the five most similar.

    As released: the seven ImageNet templates; short side 256/224 of the model's image size, of which the centre is
    cropped.

    Args:
        model: in evaluation mode.
        processor: of that model.
        pictures: each with its one label.
        labels: all that a picture may have.
        batch_size: pictures in one pass of the image encoder, and read at once.

    Returns:
        `top1`, `top5` (NaN without pictures) and `pictures`, their number.

    Raises:
        ValueError: a picture's label that is not among the labels, a broken picture, a model in training mode.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
    numbers = {label: number for number, label in enumerate(validate_labels(labels))}
    class_embeds = processor.get_class_embeddings(model, labels, IMAGENET_TEMPLATES)
    side = model.config.vision_config.image_size
    hits, count = np.zeros(2, dtype=np.int64), 0
    iterator = iter(pictures)
    while batch := list(islice(iterator, batch_size)):
        unknown = [label for _, label in batch if label.strip() not in numbers]
        if unknown:
            raise ValueError(f"a picture has the label {unknown[0]!r}, which is not among the labels.")
        pixel_values = processor.image_processor(
            [load_image(image) for image, _ in batch],
            size={"shortest_edge": round(side * 256 / 224)},
            do_center_crop=True,
            crop_size={"height": side, "width": side},
            return_tensors="pt",
        )["pixel_values"]
        features = model.get_image_features(pixel_values.to(model.device))
        similarity, _ = model.get_logits(features, class_embeds)
        best = similarity.topk(min(5, len(numbers)), dim=1).indices.cpu()
        truth = torch.tensor([numbers[label.strip()] for _, label in batch])
        right = best == truth[:, None]
        hits += [int(right[:, 0].sum()), int(right.sum())]
        count += len(batch)
    top1, top5 = hits / count if count else (float("nan"), float("nan"))
    return {"top1": float(top1), "top5": float(top5), "pictures": count}
