"""Counts of pixels by true and predicted label, and the figures made of them."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ...data.mask_labels import IGNORE_INDEX as IGNORE_INDEX
from .sums import Sums

AbsentRule = Literal["skip", "zero"]

# Share of pixels without a truth from which on figures are of a selection. Benchmarks of the field stay below, but for
# Pascal VOC without its background.
MANY_UNKNOWN = 0.25


class ConfusionMatrix(Sums):
    """Counts of pixels, int64 `counts` [true label, predicted label].

    IoU and the accuracies are those of mmsegmentation: pixels whose truth is `ignore_index` count nowhere, and a label
    that is neither in the truth nor predicted is left out of means (`absent="skip"`). Counts are over all images; no
    figure is a mean over images.

    Args:
        num_labels: N; labels are 0 to N - 1. A background is a label like the others.
        ignore_index: value of the truth that does not count; None for none.
    """

    def __init__(self, num_labels: int, ignore_index: int | None = IGNORE_INDEX):
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}, expected at least 1.")
        if ignore_index is not None and 0 <= ignore_index < num_labels:
            raise ValueError(
                f"ignore_index is {ignore_index}, which is one of the {num_labels} labels; expected another number or "
                "None."
            )
        self.ignore_index = ignore_index
        self.counts = np.zeros((num_labels, num_labels), dtype=np.int64)
        self._ignored = np.zeros(1, dtype=np.int64)

    @property
    def ignored(self) -> int:
        """Pixels whose truth is `ignore_index`."""
        return int(self._ignored[0])

    def arrays(self) -> dict[str, np.ndarray]:
        return {"counts": self.counts, "ignored": self._ignored}

    def add(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Counts the pixels of an image, two integer arrays of one shape.

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
        present, places = np.unique(pairs[0] * num_labels + pairs[1], return_counts=True)
        self.counts.ravel()[present] += places
        self._ignored += truth.size - np.count_nonzero(known)

    def ignored_share(self) -> float:
        """Share of the truth's pixels that do not count; NaN without pixels."""
        total = self.counts.sum() + self.ignored
        return float(self.ignored / total) if total else float("nan")

    def doubts(self, labels: Sequence[str]) -> list[str]:
        """What a reader of the figures has to know about the truth, in sentences with numbers: that a large part of its
        pixels does not count, and which of the labels it lacks."""
        found = []
        if self.ignored_share() > MANY_UNKNOWN:
            found.append(
                f"{self.ignored:,} of the masks' {self.counts.sum() + self.ignored:,} pixels "
                f"({self.ignored_share():.1%}) are unknown and do not count."
            )
        absent = [label for label, pixels in zip(labels, self.counts.sum(1), strict=True) if not pixels]
        if absent:
            names = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            found.append(f"{len(absent)} of {len(labels)} labels are in none of the masks: {names}.")
        return found

    def iou(self) -> np.ndarray:
        """IoU of each label, float [N]; NaN where it is neither in the truth nor predicted."""
        hits = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return np.where(union > 0, hits / np.maximum(union, 1), np.nan)

    def accuracy(self) -> np.ndarray:
        """Share of each label's true pixels that are right, float [N]; NaN where there are none."""
        total = self.counts.sum(1)
        return np.where(total > 0, np.diag(self.counts) / np.maximum(total, 1), np.nan)

    def mean_iou(self, absent: AbsentRule = "skip") -> float:
        """Mean of the labels' IoU; NaN without pixels.

        Args:
            absent: what labels do that are neither in the truth nor predicted: `"skip"` leaves them out, as
                mmsegmentation does, `"zero"` counts them as 0.
        """
        return self._mean(self.iou(), absent)

    def mean_accuracy(self, absent: AbsentRule = "skip") -> float:
        """Mean of the labels' accuracies; `absent` is about labels that are not in the truth. NaN without pixels."""
        return self._mean(self.accuracy(), absent)

    def pixel_accuracy(self) -> float:
        """Share of pixels that are right; NaN without pixels."""
        return float(np.trace(self.counts) / self.counts.sum()) if self.counts.any() else float("nan")

    def frequency_weighted_iou(self) -> float:
        """Mean of the labels' IoU weighted by their share of the true pixels; NaN without pixels."""
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
