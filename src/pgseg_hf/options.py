"""Options of segmentation. This module does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .values import hex_colour, share, whole_number

BACKGROUND = "background"
"""Name of the pixels that no label claims under a threshold."""

FORMATS = ("png", "masks", "coco", "coco-polygons", "coco-panoptic", "yolo", "labelme", "csv")
"""Formats of `pgseg segment --format`, see `outputs`."""


@dataclass(frozen=True)
class SegmentationOptions:
    """Options of segmentation. `"auto"` stands for the value saved with the processor.

    Args:
        window_size (`int`, *optional*, defaults to `"auto"`): side of the sliding window in pixels of the resized
            image; `None` for the whole image at once.
        window_stride (`int`, *optional*, defaults to `"auto"`): step between windows in pixels.
        background_threshold (`float`, *optional*): pixels where no label scores at least this, 0 to 1, are background;
            `None` for no background. If the processor has a vocabulary, the probability of all labels together against
            the vocabulary's words with another meaning is compared instead. A single label is always scored against
            these words, or against `NEUTRAL_WORDS` if there are none, even without a threshold.
        templates (`tuple[str, ...]`, *optional*): prompt templates for the labels; by default the processor's.
        batch_size (`int`, *optional*, defaults to 8): images prepared together, and windows per encoder pass.
        top_k (`int`, *optional*, defaults to `"auto"`): largest number of labels in one window.
        patch_weight (`float`, *optional*, defaults to `"auto"`): weight of patch scores against group scores, 0 to 1.
        shortest_edge (`int`, *optional*): short side after resizing, in pixels; by default the processor's.
        longest_edge (`int`, *optional*): limit in pixels for the long side, used with `shortest_edge`; `None` for
            no limit.
        synonyms (`str`, *optional*, defaults to `"average"`): a label with synonyms, `"car|automobile"`, is scored by
            the `"average"` of their embeddings, or by the `"best"` word at each position.
        thresholds (`Mapping[str, float]`, *optional*): minimum score of a pixel, 0 to 1, by a label's first word; where
            a label wins with less, the pixel is background.
        colours (`Mapping[str, str]`, *optional*): colours of labels in drawings and masks, such as `"#ff0000"` or
            `"red"`; other labels use the palette.
        min_area (`float`, *optional*): treats the labels as a vocabulary. Only labels with at least this share of the
            image's pixels, 0 to 1, when all compete are kept, and only if no larger one has the same meaning.
    """

    window_size: int | Literal["auto"] | None = "auto"
    window_stride: int | Literal["auto"] = "auto"
    background_threshold: float | None = None
    templates: tuple[str, ...] | None = None
    batch_size: int = 8
    top_k: int | Literal["auto"] = "auto"
    patch_weight: float | Literal["auto"] = "auto"
    shortest_edge: int | None = None
    longest_edge: int | None = None
    synonyms: Literal["average", "best"] = "average"
    thresholds: Mapping[str, float] | None = None
    colours: Mapping[str, str] | None = None
    min_area: float | None = None

    def __post_init__(self) -> None:
        for name, special in (
            ("window_size", ("auto", None)),
            ("window_stride", ("auto",)),
            ("batch_size", ()),
            ("top_k", ("auto",)),
            ("shortest_edge", (None,)),
            ("longest_edge", (None,)),
        ):
            value = getattr(self, name)
            if isinstance(value, str | None) and value in special:
                continue
            object.__setattr__(self, name, whole_number(value, name))
        if self.longest_edge is not None and self.shortest_edge is None:
            raise ValueError(f"longest_edge is {self.longest_edge}, but shortest_edge is None; set both.")
        if isinstance(self.window_size, int) and isinstance(self.window_stride, int):
            refuse_gaps(self.window_size, self.window_stride)
        if not isinstance(self.patch_weight, str) or self.patch_weight != "auto":
            weight = share(self.patch_weight, "patch_weight", "'auto' or ")
            object.__setattr__(self, "patch_weight", weight)
        if self.background_threshold is not None:
            threshold = share(self.background_threshold, "background_threshold", "None or ")
            object.__setattr__(self, "background_threshold", threshold)
        if self.synonyms not in ("average", "best"):
            raise ValueError(f"synonyms is {self.synonyms!r}, expected 'average' or 'best'.")
        if self.min_area is not None:
            object.__setattr__(self, "min_area", share(self.min_area, "min_area", "None or "))
        for name, check in (("thresholds", share), ("colours", hex_colour)):
            values = getattr(self, name)
            if values is not None and not isinstance(values, Mapping):
                raise ValueError(f"{name} is {values!r}, expected None or a dictionary with labels as keys.")
            checked: dict[str, Any] = {
                label: check(value, f"{name}[{label!r}]") for label, value in (values or {}).items()
            }
            object.__setattr__(self, name, checked or None)

    @property
    def has_background(self) -> bool:
        """Whether value 0 of a label map is background."""
        return self.background_threshold is not None or bool(self.thresholds)

    def check_labels(self, labels: Sequence[str]) -> None:
        """Raises a ValueError if a threshold or colour is for an unknown label, or as [`check_one_background`] does."""
        for name in ("thresholds", "colours"):
            unknown = next((label for label in getattr(self, name) or () if label not in labels), None)
            if unknown is not None:
                raise ValueError(f"{name} has {unknown!r}, which is not one of the labels.")
        check_one_background(labels, self.has_background)


def check_one_background(labels: Sequence[str], background: bool) -> None:
    """Raises a ValueError if a label is called background although a threshold creates one."""
    own = next((label for label in labels if label.casefold() == BACKGROUND), None)
    if background and own is not None:
        raise ValueError(
            f"labels contain {own!r}, but a threshold creates a background too: leave out one of the two, "
            "or use a more specific label, such as 'wall'."
        )


def refuse_gaps(size: int, stride: int) -> None:
    if stride > size:
        raise ValueError(
            f"window_stride is {stride}, expected at most the window size, {size}, so that no pixels are left out."
        )
