"""Segments the images of a dataset and compares the predictions with its masks."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from .. import distributed
from ..data.mask_labels import IGNORE_INDEX
from ..scoring import average_by_owner, best_labels, merge_windows
from ..segmentation import EncodedImage, ScoredImage, SegmentationOptions, Segmenter
from ..values import share, whole_number
from .benchmarks.mask_dataset import MaskDataset
from .benchmarks.reading import LabelledImage, read_batches
from .metrics.analysis import GroupStatistics
from .metrics.confusion import ConfusionMatrix
from .metrics.oracle import oracle_map, resized_truth
from .metrics.refinement import PixelAdaptiveRefinement
from .metrics.sums import ImageSums, Sums

logger = logging.get_logger(__name__)

SynonymRule = Literal["none", "average", "merge"]


@dataclass(frozen=True)
class MaskOptions:
    """Options of [`evaluate_masks`].

    Args:
        segmentation: sizes, windows, templates and the background threshold; defaults to the segmenter's options.
        thresholds: additional background thresholds, evaluated in the same pass.
        synonyms: how a label's synonyms are used: not at all (`"none"`), averaged with the label's own embedding
            (`"average"`), or as separate labels whose pixels count for the label (`"merge"`; `top_k` then counts
            names).
        oracle: also evaluate the groups with perfect labels, see [`oracle_map`].
        groups: also compute group statistics, see [`GroupStatistics`].
        released_names: use the label names of the released code in prompts, where they differ.
        refinement: applied to the scores before each pixel's best label is chosen.
        skip_broken: log and skip images that cannot be decoded instead of raising.
        readers: number of threads that prefetch images.
    """

    segmentation: SegmentationOptions | None = None
    thresholds: tuple[float, ...] = ()
    synonyms: SynonymRule = "none"
    released_names: bool = False
    oracle: bool = False
    groups: bool = False
    refinement: PixelAdaptiveRefinement | None = None
    skip_broken: bool = False
    readers: int = 2

    def __post_init__(self) -> None:
        rules = get_args(SynonymRule)
        if self.synonyms not in rules:
            raise ValueError(f"synonyms is {self.synonyms!r}, expected one of {', '.join(rules)}.")
        whole_number(self.readers, "readers")
        for threshold in self.thresholds:
            share(threshold, "a threshold")


@dataclass(kw_only=True)
class MaskScores(ImageSums):
    """Counts returned by [`evaluate_masks`]. Scores of other images can be added with `merge`.

    Args:
        labels: labels of the dataset.
        confusion: confusion matrix of the model.
        by_threshold: confusion matrix of the model for each additional background threshold.
        oracle: confusion matrix of the groups, each with its majority label; None if not requested.
        groups: group statistics; None if not requested.
        images, broken, seconds, reused: see [`ImageSums`].
    """

    labels: list[str]
    confusion: ConfusionMatrix
    by_threshold: dict[float, ConfusionMatrix] = field(default_factory=dict)
    oracle: ConfusionMatrix | None = None
    groups: GroupStatistics | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        parts: dict[Any, Sums | None] = {
            "model": self.confusion,
            "oracle": self.oracle,
            "groups": self.groups,
        }
        return {
            f"{part} {name}": sums
            for part, counted in (parts | self.by_threshold).items()
            if counted is not None
            for name, sums in counted.arrays().items()
        }

    def best_threshold(self) -> float | None:
        """The threshold in `by_threshold` with the highest mean IoU; None if there are none."""
        return max(self.by_threshold, key=lambda each: self.by_threshold[each].mean_iou(), default=None)

    def doubts(self, dataset: MaskDataset) -> list[str]:
        """Warnings about the dataset's masks, see [`ConfusionMatrix.doubts`]. One of them is about binary masks with
        the values 0 and 255, whose 255 is read as unknown."""
        found = self.confusion.doubts(self.labels)
        only_zeros = not self.confusion.counts[1:].any()
        as_they_are = dataset.label_of_value is None and dataset.ignore_index == IGNORE_INDEX
        if as_they_are and only_zeros and self.confusion.ignored and len(self.labels) > 1:
            found.append(
                f"The masks contain only the values 0 and 255, as binary masks do, and 255 means unknown: "
                f"{self.confusion.ignored:,} pixels ({self.confusion.ignored_share():.1%}) are ignored. If 255 is a "
                f"label, pass --mask-values 0={self.labels[0]},255={self.labels[1]}, or set mask_values in labels.json."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Metrics by name; NaN becomes None. `mean_iou` skips labels that are neither in the masks nor predicted,
        `mean_iou_absent_as_zero` counts them as 0. Other keys are `pixel_accuracy`, `mean_accuracy`,
        `frequency_weighted_iou`, `iou` by label (None if absent), `ignored_share` of the pixels, `images`, `broken` and
        `seconds`, and if requested `thresholds`, `best_threshold`, `oracle_mean_iou`, `oracle_pixel_accuracy` and
        `groups`."""
        scores: dict[str, Any] = {
            **self.confusion.figures(),
            "mean_iou_absent_as_zero": self.confusion.mean_iou(absent="zero"),
            "ignored_share": self.confusion.ignored_share(),
            "iou": dict(zip(self.labels, self.confusion.iou().tolist())),
        }
        if self.by_threshold:
            scores["thresholds"] = {
                str(threshold): {"mean_iou": matrix.mean_iou(), "pixel_accuracy": matrix.pixel_accuracy()}
                for threshold, matrix in self.by_threshold.items()
            }
            scores["best_threshold"] = self.best_threshold()
        if self.oracle is not None:
            scores["oracle_mean_iou"] = self.oracle.mean_iou()
            scores["oracle_pixel_accuracy"] = self.oracle.pixel_accuracy()
        if self.groups is not None:
            # The last digits depend on the order of summation, and so on the number of processes.
            scores["groups"] = {name: round(value, 10) for name, value in self.groups.to_dict().items()}
        rest = {"images": self.images, "broken": self.broken, "seconds": self.seconds}
        return without_nan({**scores, **rest})


def without_nan(value: Any) -> Any:
    """Replaces NaN by None, also inside dictionaries: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and value != value else value


@dataclass
class SegmentedImage:
    """An evaluated image, passed to callbacks that write files.

    Args:
        labelled: entry of the dataset.
        image: the decoded image.
        truth: ground truth, int64 [H, W].
        predicted: predicted labels of the dataset, int64 [H, W].
        encoded: image features with the groups.
    """

    labelled: LabelledImage
    image: Image.Image
    truth: np.ndarray
    predicted: np.ndarray
    encoded: EncodedImage


class MaskEvaluator:
    """Segments images of a dataset and counts correct pixels, see [`evaluate_masks`].

    Args:
        segmenter: segmenter of the model.
        dataset: gives the labels and reads the masks.
        options: evaluation options.
        on_image: called with each evaluated image.

    Raises:
        ValueError: a background threshold is given for a dataset without a background.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        dataset: MaskDataset,
        options: MaskOptions | None = None,
        on_image: Callable[[SegmentedImage], None] | None = None,
    ):
        self.segmenter, self.dataset, self.on_image = segmenter, dataset, on_image
        self.options = options or MaskOptions()
        self.segmentation = self.options.segmentation or segmenter.options
        if self.options.thresholds and self.segmentation.background_threshold is None:
            raise ValueError(
                f"thresholds are {list(self.options.thresholds)}, but background_threshold is None; set it, for a "
                "dataset with a background."
            )
        dataset.check_threshold(self.segmentation.background_threshold)
        background = None if self.segmentation.background_threshold is None else dataset.background
        asked = [value for value in range(len(dataset.labels)) if value != background]
        # Maps values of the segmentation to labels of the dataset.
        self._label_of_value = np.array(asked if background is None else [background, *asked])
        own = dataset.released if self.options.released_names else {}
        others = dataset.synonyms if self.options.synonyms != "none" else {}
        labels = [dataset.labels[value] for value in asked]
        names = [[own.get(label, label), *others.get(label, ())] for label in labels]
        # Index of the label that each embedded name belongs to.
        self._owners = np.array([number for number, each in enumerate(names) for _ in each])
        prompts = [name for each in names for name in each]
        self.class_embeds = segmenter.class_embeddings(prompts, self.segmentation)
        if self.options.synonyms == "average":
            self.class_embeds = average_by_owner(self.class_embeds, self._owners)
            self._owners = np.arange(len(labels))

    @property
    def skip_broken(self) -> bool:
        """Whether broken images are skipped."""
        return self.options.skip_broken

    def empty(self) -> MaskScores:
        """Scores with all counts at zero."""

        def matrix() -> ConfusionMatrix:
            return ConfusionMatrix(len(self.dataset.labels), self.dataset.ignore_index)

        return MaskScores(
            labels=self.dataset.labels,
            confusion=matrix(),
            by_threshold={threshold: matrix() for threshold in self.options.thresholds},
            oracle=matrix() if self.options.oracle else None,
            groups=GroupStatistics() if self.options.groups else None,
        )

    def __call__(self, images: Iterable[LabelledImage]) -> MaskScores:
        """Evaluates some of the dataset's images."""
        start, scores = time.monotonic(), self.empty()
        how = (self.segmentation.batch_size, self.options.readers, self.skip_broken)
        for batch in read_batches(images, self._read, scores, *how):
            encoded = self.segmenter.encode([image for _, image, _ in batch], self.segmentation)
            for (labelled, image, truth), features in zip(batch, encoded, strict=True):
                self._count(labelled, image, truth, features, scores)
        scores.seconds = time.monotonic() - start
        return scores

    def _read(self, labelled: LabelledImage) -> tuple[LabelledImage, Image.Image, np.ndarray]:
        image, truth = labelled.read(), self.dataset.truth(labelled)
        if truth.shape != (image.height, image.width):
            raise ValueError(
                f"{labelled.mask_place} has {truth.shape} pixels (height, width), but its image {labelled.image_place} "
                f"{(image.height, image.width)}; images are rotated according to their EXIF data, masks are not."
            )
        return labelled, image, truth

    def _count(
        self,
        labelled: LabelledImage,
        image: Image.Image,
        truth: np.ndarray,
        features: EncodedImage,
        scores: MaskScores,
    ) -> None:
        segments: list[Any] = [window.features.segment_embeds for window in features.windows]
        if not all(bool(each.isfinite().all()) for each in segments):
            raise ValueError(
                f"the model returns NaN or infinity for {labelled.image_place}: its weights are broken, or their dtype "
                "overflows."
            )
        threshold = self.segmentation.background_threshold
        plain = replace(self.segmentation, background_threshold=None)
        scored = self.segmenter.score(features, self.class_embeds, plain, threshold is not None)
        predicted = self._label_map(scored, threshold, image)
        scores.confusion.add(truth, predicted)
        for other, matrix in scores.by_threshold.items():
            matrix.add(truth, predicted if other == threshold else self._label_map(scored, other, image))
        num_labels = len(self.dataset.labels)
        if scores.oracle is not None:
            scores.oracle.add(truth, oracle_map(scored, truth, num_labels, self.dataset.ignore_index))
        if scores.groups is not None:
            self._count_groups(features, truth, scores.groups)
        scores.images += 1
        if self.on_image is not None:
            self.on_image(SegmentedImage(labelled, image, truth, predicted, features))

    def _label_map(self, scored: ScoredImage, threshold: float | None, image: Image.Image) -> np.ndarray:
        """Labels of the dataset, int64 [H, W]."""
        if threshold is not None:
            scored = scored.with_background(threshold)
        if self.options.refinement is None:
            label_map = scored.label_map()[0]
        else:
            scores, channels, count = merge_windows(scored.windows, scored.resized)
            small = image.resize(scored.resized[::-1], Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).to(scores) / 255
            label_map = best_labels(self.options.refinement(scores, pixels), channels, count, scored.size)[0]
        found = label_map.cpu().numpy()
        owners = self._owners if threshold is None else np.concatenate([[0], self._owners + 1])
        return self._label_of_value[owners[found]]

    def _count_groups(self, image: EncodedImage, truth: np.ndarray, groups: GroupStatistics) -> None:
        small = resized_truth(truth, image.resized)
        for window in image.windows:
            features: Any = window.features
            height, width = window.groups.shape
            part = small[window.top : window.top + height, window.left : window.left + width]
            groups.add(
                window.groups.cpu(),
                features.segment_embeds[0].cpu().float(),
                part,
                len(self.dataset.labels),
                self.dataset.ignore_index,
                grouping=features.grouping[0].cpu().float(),
            )


def evaluate_masks(
    segmenter: Segmenter, dataset: MaskDataset, options: MaskOptions | None = None
) -> MaskScores:
    """Segments the images of a dataset and compares the predictions with their masks, at the size of each image.

    A background is a label like the others, with its name as prompt. With a `background_threshold` it has no prompt
    and is predicted where no other label reaches the threshold.

    Args:
        segmenter: segmenter of the model.
        dataset: the dataset or a part of it: `dataset.spread(100)` during training, or
            `dataset.part(rank, world_size)` in each process, followed by `sum_over_processes` on the result.
        options: evaluation options.

    Raises:
        ValueError: files are broken, a mask and its image differ in size, a mask has values without a label, or a
            background threshold is given for a dataset without a background.
    """
    scores = MaskEvaluator(segmenter, dataset, options)(dataset.images)
    # One process alone does not see all masks.
    for doubt in scores.doubts(dataset) if distributed.world_size() == 1 else ():
        logger.warning_once(doubt)
    return scores
