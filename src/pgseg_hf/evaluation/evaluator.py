"""Segmenting the images of a data set and counting what is right."""

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
    """What [`evaluate_masks`] does.

    Args:
        segmentation: sizes, windows, templates and the background threshold; the segmenter's by default.
        thresholds: further background thresholds, all counted in the same pass.
        synonyms: whether a label's other names take part: not at all, by the mean of their embeddings with its own
            (`"average"`), or as labels of their own whose pixels are the label's (`"merge"`; `top_k` then counts
            names).
        oracle: also what a perfect namer would make of the groups, see [`oracle_map`].
        groups: also figures of the groups, see [`GroupStatistics`].
        released_names: labels have the names of the released code in prompts, where these differ.
        refinement: applied to the scores before each pixel's best label is chosen.
        skip_broken: images that cannot be decoded are named and left out; otherwise they are an error.
        readers: threads that read images ahead.
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
    """What [`evaluate_masks`] counted. Scores of other images can be added.

    Args:
        labels: of the data set.
        confusion: of the model.
        by_threshold: of the model with other background thresholds.
        oracle: of its groups, each with its majority label; None if not asked for.
        groups: figures of the groups; None if not asked for.
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
        """The one of `by_threshold` with the largest mean IoU; None where there are none."""
        return max(self.by_threshold, key=lambda each: self.by_threshold[each].mean_iou(), default=None)

    def doubts(self, dataset: MaskDataset) -> list[str]:
        """What a reader of the figures has to know about the data set's masks, see [`ConfusionMatrix`]; above all that
        they look like masks of 0 and 255 whose 255 is taken for unknown."""
        found = self.confusion.doubts(self.labels)
        only_zeros = not self.confusion.counts[1:].any()
        as_they_are = dataset.label_of_value is None and dataset.ignore_index == IGNORE_INDEX
        if as_they_are and only_zeros and self.confusion.ignored and len(self.labels) > 1:
            found.append(
                f"The masks hold 0 and 255 only, as masks of two values do, and here 255 is unknown: "
                f"{self.confusion.ignored:,} pixels ({self.confusion.ignored_share():.1%}) do not count. If it is a "
                f"label, say so: --mask_values 0={self.labels[0]},255={self.labels[1]}, or mask_values in labels.json."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """`mean_iou` (labels left out that are neither in the masks nor predicted; `mean_iou_absent_as_zero` counts
        them as 0), `pixel_accuracy`, `mean_accuracy`, `frequency_weighted_iou`, `iou` of each label (None where it is
        absent), `ignored_share` of the truth's pixels, and what else was asked for: `thresholds`, `oracle_mean_iou`,
        `oracle_pixel_accuracy`, `groups`; `images`, `broken`, `seconds`. NaN becomes None."""
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
            # Sums in another order, as of several processes, differ in the last digits.
            scores["groups"] = {name: round(value, 10) for name, value in self.groups.to_dict().items()}
        rest = {"images": self.images, "broken": self.broken, "seconds": self.seconds}
        return without_nan({**scores, **rest})


def without_nan(value: Any) -> Any:
    """None in the place of every NaN, in dicts too: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and value != value else value


@dataclass
class SegmentedImage:
    """An image that was counted, for files made of it.

    Args:
        labelled: of the data set.
        image: as it was read.
        truth: int64 [H, W].
        predicted: int64 [H, W], values of the data set's labels.
        encoded: its groups.
    """

    labelled: LabelledImage
    image: Image.Image
    truth: np.ndarray
    predicted: np.ndarray
    encoded: EncodedImage


class MaskEvaluator:
    """Segments images of a data set and counts, see [`evaluate_masks`].

    Args:
        segmenter: the model's.
        dataset: its labels and how its masks are read.
        options: what to do.
        on_image: called with each image that was counted.

    Raises:
        ValueError: a background threshold for a data set without a background.
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
                f"thresholds are {list(self.options.thresholds)}, but there is no background_threshold; expected one, "
                "for a data set with a background."
            )
        dataset.check_threshold(self.segmentation.background_threshold)
        background = None if self.segmentation.background_threshold is None else dataset.background
        asked = [value for value in range(len(dataset.labels)) if value != background]
        # Of each value of the segmentation the data set's.
        self._label_of_score = np.array(asked if background is None else [background, *asked])
        own = dataset.released if self.options.released_names else {}
        others = dataset.synonyms if self.options.synonyms != "none" else {}
        labels = [dataset.labels[value] for value in asked]
        names = [[own.get(label, label), *others.get(label, ())] for label in labels]
        # The number of the label that each embedded name stands for.
        self._owners = np.array([number for number, each in enumerate(names) for _ in each])
        prompts = [name for each in names for name in each]
        self.class_embeds = segmenter.class_embeddings(prompts, self.segmentation)
        if self.options.synonyms == "average":
            self.class_embeds = average_by_owner(self.class_embeds, self._owners)
            self._owners = np.arange(len(labels))

    @property
    def skip_broken(self) -> bool:
        """Whether broken images are left out."""
        return self.options.skip_broken

    def empty(self) -> MaskScores:
        """Nothing counted yet."""

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
        """Counts some of the data set's images."""
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
                f"{labelled.mask_place} has {truth.shape} pixels (height, width), its image {labelled.image_place} "
                f"{(image.height, image.width)}; an image is turned as its EXIF data say, a mask is not."
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
                f"the model gives NaN or infinity for {labelled.image_place}: its weights are broken, or their type "
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
        """Labels of the data set, int64 [H, W]."""
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
        return self._label_of_score[owners[found]]

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
    """Segments the images of a data set and compares with their masks, at the images' own sizes.

    The background is a label like the others, with its name as prompt, unless there is a `background_threshold`: then
    it has no prompt and is where no other label scores as much.

    Args:
        segmenter: the model's.
        dataset: or a part of it: `dataset.spread(100)` in training, `.part(rank, world_size)` for each process and
            `sum_over_processes` on the result.
        options: what to do.

    Raises:
        ValueError: broken files, masks of another size than their image, values that are no labels, or a
            background threshold for a data set without a background.
    """
    scores = MaskEvaluator(segmenter, dataset, options)(dataset.images)
    # A part of several processes has to be seen with the others.
    for doubt in scores.doubts(dataset) if distributed.world_size() == 1 else ():
        logger.warning_once(doubt)
    return scores
