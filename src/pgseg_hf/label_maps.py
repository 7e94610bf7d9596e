"""Label maps and their segments."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from .options import BACKGROUND, check_one_background

# Pixels counted at once: NumPy converts their scores to float64.
_COUNTED_AT_ONCE = 2**22


@dataclass
class Segment:
    """The part of a segmentation with one label.

    Args:
        label (`str`): the label as given, or "background".
        value (`int`): its value in the label map.
        area (`float`): share of the image's pixels, 0 to 1.
        score (`float` or `None`): mean score of these pixels, 0 to 1; `None` if there are none and for the background.
    """

    label: str
    value: int
    area: float
    score: float | None


@dataclass
class Segmentation:
    """The label of each pixel of an image.

    Args:
        label_map (`np.ndarray`): int64 [H, W] at the original image's size. Without a background, values index
            `labels`; with one, 0 is background and label i has value i + 1.
        scores (`np.ndarray`): float [H, W], the score of each pixel's label.
        labels (`list[str]`): N label names.
        background (`bool`, *optional*, defaults to `False`): whether value 0 is background.
        colours (`Mapping[str, str]`, *optional*): "#rrggbb" for drawings, by name of the labels with their own colour.

    Raises:
        ValueError: there is a background, and also a label called background.
    """

    label_map: np.ndarray = field(repr=False)
    scores: np.ndarray = field(repr=False)
    labels: list[str]
    background: bool = False
    colours: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        check_one_background(self.labels, self.background)

    def with_thresholds(self, thresholds: Mapping[str, float] | None) -> "Segmentation":
        """A copy with background where a label scores below its threshold; itself if there are no thresholds."""
        if not thresholds:
            return self
        least = np.array([0.0] * self.background + [thresholds.get(label, 0.0) for label in self.labels])
        is_low = self.scores < least[self.label_map]
        values = np.where(is_low, 0, self.label_map + (not self.background))
        return replace(self, label_map=values, scores=np.where(is_low, 1, self.scores), background=True)

    def without_absent(self) -> "Segmentation":
        """A copy with only the labels that are present, largest first; with only the first label if none is present."""
        shown = [segment for segment in self.segments() if segment.value or not self.background]
        values = np.zeros(len(self.labels) + self.background, dtype=np.int64)
        values[[segment.value for segment in shown]] = np.arange(len(shown)) + self.background
        labels = [segment.label for segment in shown] or self.labels[:1]
        return replace(self, label_map=values[self.label_map], labels=labels)

    def segments(self, include_absent: bool = False) -> list[Segment]:
        """The segments of the labels that are present, largest first; with `include_absent`, of all in label order."""
        names = [BACKGROUND, *self.labels] if self.background else self.labels
        counts, totals = np.zeros(len(names), dtype=int), np.zeros(len(names))
        values, scores = self.label_map.ravel(), self.scores.ravel()
        for start in range(0, values.size, _COUNTED_AT_ONCE):
            part = slice(start, start + _COUNTED_AT_ONCE)
            counts += np.bincount(values[part], minlength=len(names))
            totals += np.bincount(values[part], weights=scores[part], minlength=len(names))
        order = range(len(names)) if include_absent else np.argsort(-counts, kind="stable")
        return [
            Segment(
                label=names[value],
                value=int(value),
                area=float(counts[value] / self.label_map.size),
                score=float(totals[value] / counts[value])
                if counts[value] and (value or not self.background)
                else None,
            )
            for value in order
            if counts[value] or include_absent
        ]

    def mask(self, segment: Segment) -> np.ndarray:
        """The mask of a segment, bool [H, W]."""
        return self.label_map == segment.value
