"""Confusion matrix of pixels and the metrics computed from it."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ...data.mask_labels import IGNORE_INDEX as IGNORE_INDEX
from .sums import Sums

AbsentRule = Literal["skip", "zero"]

# Above this share of ignored pixels the metrics describe only a part of the images. The supported benchmarks stay below
# it, except Pascal VOC without background.
MANY_UNKNOWN = 0.25


class ConfusionMatrix(Sums):
    """Counts pixels by true and predicted label, in `counts`, int64 [N, N].

    IoU and accuracy are defined as in mmsegmentation: pixels whose ground truth is `ignore_index` are ignored, and
    labels that are neither in the ground truth nor predicted are left out of means (`absent="skip"`). Metrics are
    computed from the counts of all images, not averaged over images.

    Args:
        num_labels: N; labels are 0 to N - 1. A background is a label like the others.
        ignore_index: value of the ground truth that is ignored; None if there is none.
    """

    def __init__(self, num_labels: int, ignore_index: int | None = IGNORE_INDEX):
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}, expected at least 1.")
        if ignore_index is not None and 0 <= ignore_index < num_labels:
            raise ValueError(
                f"ignore_index is {ignore_index}, which is one of the {num_labels} labels; expected a different number "
                "or None."
            )
        self.ignore_index = ignore_index
        self.counts = np.zeros((num_labels, num_labels), dtype=np.int64)
        self._ignored = np.zeros(1, dtype=np.int64)

    @property
    def ignored(self) -> int:
        """Number of pixels whose ground truth is `ignore_index`."""
        return int(self._ignored[0])

    def arrays(self) -> dict[str, np.ndarray]:
        return {"counts": self.counts, "ignored": self._ignored}

    def add(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Adds the pixels of an image, two integer arrays of the same shape.

        Raises:
            ValueError: the shapes differ, or a value is out of range. Predictions of ignored pixels are not checked.
        """
        if truth.shape != predicted.shape:
            raise ValueError(
                f"the ground truth has shape {truth.shape} and the prediction {predicted.shape}; they must be equal."
            )
        known = np.full(truth.shape, True) if self.ignore_index is None else truth != self.ignore_index
        num_labels = len(self.counts)
        pairs = []
        for name, values in (("ground truth", truth[known]), ("prediction", predicted[known])):
            if values.size and not 0 <= values.min() <= values.max() < num_labels:
                raise ValueError(
                    f"the {name} has values from {values.min()} to {values.max()}, expected 0 to {num_labels - 1}"
                    + ("." if self.ignore_index is None else f" and {self.ignore_index} for unknown.")
                )
            pairs.append(values.astype(np.int64))
        present, places = np.unique(pairs[0] * num_labels + pairs[1], return_counts=True)
        self.counts.ravel()[present] += places
        self._ignored += truth.size - np.count_nonzero(known)

    def ignored_share(self) -> float:
        """Share of ignored pixels; NaN without pixels."""
        total = self.counts.sum() + self.ignored
        return float(self.ignored / total) if total else float("nan")

    def doubts(self, labels: Sequence[str]) -> list[str]:
        """Warnings about the ground truth, as sentences: many of its pixels are ignored, or labels are absent."""
        found = []
        if self.ignored_share() > MANY_UNKNOWN:
            found.append(
                f"{self.ignored:,} of the masks' {self.counts.sum() + self.ignored:,} pixels "
                f"({self.ignored_share():.1%}) are unknown and ignored."
            )
        absent = [label for label, pixels in zip(labels, self.counts.sum(1), strict=True) if not pixels]
        if absent:
            names = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            found.append(f"{len(absent)} of {len(labels)} labels do not occur in the masks: {names}.")
        return found

    def iou(self) -> np.ndarray:
        """IoU of each label, float [N]; NaN for labels that are neither in the ground truth nor predicted."""
        hits = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return np.where(union > 0, hits / np.maximum(union, 1), np.nan)

    def accuracy(self) -> np.ndarray:
        """Share of each label's true pixels that are predicted correctly, float [N]; NaN if there are none."""
        total = self.counts.sum(1)
        return np.where(total > 0, np.diag(self.counts) / np.maximum(total, 1), np.nan)

    def mean_iou(self, absent: AbsentRule = "skip") -> float:
        """Mean IoU over the labels; NaN without pixels.

        Args:
            absent: how to treat labels that are neither in the ground truth nor predicted: `"skip"` leaves them out,
                as mmsegmentation does, `"zero"` counts them as 0.
        """
        return self._mean(self.iou(), absent)

    def mean_accuracy(self, absent: AbsentRule = "skip") -> float:
        """Mean accuracy over the labels; NaN without pixels. `absent` applies to labels not in the ground truth."""
        return self._mean(self.accuracy(), absent)

    def pixel_accuracy(self) -> float:
        """Share of correctly predicted pixels; NaN without pixels."""
        return float(np.trace(self.counts) / self.counts.sum()) if self.counts.any() else float("nan")

    def frequency_weighted_iou(self) -> float:
        """Mean IoU weighted by each label's share of the true pixels; NaN without pixels."""
        if not self.counts.any():
            return float("nan")
        share = self.counts.sum(1) / self.counts.sum()
        return float(np.nansum(share * self.iou()))

    def figures(self) -> dict[str, float]:
        """`mean_iou`, `pixel_accuracy`, `mean_accuracy` and `frequency_weighted_iou`."""
        names = ("mean_iou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou")
        return {name: getattr(self, name)() for name in names}

    def _mean(self, values: np.ndarray, absent: AbsentRule) -> float:
        if absent not in ("skip", "zero"):
            raise ValueError(f"absent is {absent!r}, expected 'skip' or 'zero'.")
        if not self.counts.any():
            return float("nan")
        return float(np.nanmean(values) if absent == "skip" else np.nan_to_num(values).mean())
