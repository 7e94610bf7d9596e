"""How images are segmented, in numbers and words; nothing here needs torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .values import hex_colour, share, whole_number

BACKGROUND = "background"
"""What a threshold leaves over is called so."""

FORMATS = ("png", "masks", "coco", "coco-polygons", "coco-panoptic", "yolo", "labelme", "csv")
"""What `pgseg segment --format` writes, see `outputs`."""


@dataclass(frozen=True)
class SegmentationOptions:
    """How images are segmented.

    Args:
        window_size: side in pixels of the sliding window, on the resized image; None for the whole image at once;
            `"auto"` for what the processor was saved with.
        window_stride: pixels from one window to the next; `"auto"` as above.
        background_threshold: where no label scores this much there is background; None for no background. With a
            processor that has a vocabulary: where the labels together are less likely than this against all words of
            the vocabulary that mean something else. A single label is compared with these words, or with
            `NEUTRAL_WORDS` where there are none; that is its score, with a threshold or without.
        templates: prompt templates for the labels; the processor's by default.
        batch_size: images that are prepared together, and windows in one pass of the image encoder.
        top_k: number of labels that one window may show; `"auto"` for what the processor was saved with.
        patch_weight: share of the patches' own scores in a pixel's, beside its group's, 0 to 1; `"auto"` as above.
        shortest_edge: pixels that an image's short side is resized to; what the processor was saved with by default.
        longest_edge: pixels that the long side may have then, with `shortest_edge`; None for any number.
        synonyms: how a label with several words, `"car|automobile"`, is scored: by the `"average"` of their embeddings,
            or by the `"best"` word at each place.
        thresholds: for labels, called by their first word, the score that a pixel must have, 0 to 1; where a label wins
            with less there is background.
        colours: of labels in drawings and masks, such as `"#ff0000"` or `"red"`; the others have the palette's.
        min_area: the labels are a vocabulary of what may be in an image: only those count that have this share of its
            pixels when all compete, 0 to 1, and mean something else than one with more. None for all labels.
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
            raise ValueError(f"longest_edge is {self.longest_edge}, but shortest_edge is None; give both.")
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
                raise ValueError(f"{name} is {values!r}, expected None or a dictionary by label.")
            checked: dict[str, Any] = {
                label: check(value, f"{name}[{label!r}]") for label, value in (values or {}).items()
            }
            object.__setattr__(self, name, checked or None)

    @property
    def has_background(self) -> bool:
        """Whether value 0 of a label map is background."""
        return self.background_threshold is not None or bool(self.thresholds)

    def check_labels(self, labels: Sequence[str]) -> None:
        """Raises a ValueError where a threshold or colour is for none of the labels, or one is called background and
        there is another."""
        for name in ("thresholds", "colours"):
            unknown = next((label for label in getattr(self, name) or () if label not in labels), None)
            if unknown is not None:
                raise ValueError(f"{name} are for {unknown!r}, which is none of the labels.")
        check_one_background(labels, self.has_background)


def check_one_background(labels: Sequence[str], background: bool) -> None:
    """Raises a ValueError where a label is called as what a threshold leaves over."""
    own = next((label for label in labels if label.casefold() == BACKGROUND), None)
    if background and own is not None:
        raise ValueError(
            f"labels have {own!r}, and a threshold makes a background of its own: leave one of the two out, "
            "or say what the label means, such as 'wall'."
        )


def refuse_gaps(size: int, stride: int) -> None:
    if stride > size:
        raise ValueError(
            f"window_stride is {stride}, expected at most the window's {size} pixels, or pixels are left out."
        )
