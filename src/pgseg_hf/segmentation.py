"""The one way from photos and words to masks, used by the pipeline, the command line and everything else."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from .images import load_image
from .modeling_pgseg import PGSegModel, PGSegVisionOutput
from .processing_pgseg import PGSegProcessor
from .prompts import validate_labels
from .scoring import (
    WindowScores,
    best_labels,
    chance_of_labels,
    group_map,
    group_scores,
    merge_windows,
    patch_scores,
    window_starts,
)

logger = logging.get_logger(__name__)

# What a label is compared with that is alone and has no other words of a vocabulary: the mean of these.
NEUTRAL_WORDS = ("object", "thing", "background", "scene")
# Words whose embeddings have at least this cosine are taken for one meaning, and do not compete.
SAME_MEANING = 0.5


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
            if value not in special and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1.")
        if self.longest_edge is not None and self.shortest_edge is None:
            raise ValueError(f"longest_edge is {self.longest_edge}, but shortest_edge is None; give both.")
        size, stride = self.window_size, self.window_stride
        if isinstance(size, int) and isinstance(stride, int) and stride > size:
            raise ValueError(
                f"window_stride is {stride}, expected at most the window's {size} pixels, or pixels are left out."
            )
        if self.patch_weight != "auto" and not (
            isinstance(self.patch_weight, (int, float)) and 0 <= self.patch_weight <= 1
        ):
            raise ValueError(
                f"patch_weight is {self.patch_weight!r}, expected 'auto' or a number from 0 to 1."
            )
        threshold = self.background_threshold
        if threshold is not None and not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
            raise ValueError(f"background_threshold is {threshold!r}, expected None or a number from 0 to 1.")


@dataclass
class Segment:
    """One label's part of a segmentation.

    Args:
        label: as it was given, or "background".
        value: its value in the label map.
        area: share of the image's pixels, 0 to 1.
        score: mean score of these pixels, 0 to 1; None where there are none.
    """

    label: str
    value: int
    area: float
    score: float | None


@dataclass
class Segmentation:
    """The labels of an image's pixels.

    Args:
        label_map: int64 [H, W] of the original image's size. Without a background, values index `labels`; with one,
            0 is background and label i has value i + 1.
        scores: float [H, W], the score of each pixel's label.
        labels: N label names.
        background: whether value 0 is background.
    """

    label_map: np.ndarray = field(repr=False)
    scores: np.ndarray = field(repr=False)
    labels: list[str]
    background: bool = False

    def segments(self, include_absent: bool = False) -> list[Segment]:
        """The labels that are present, largest area first; with `include_absent` all, in their order."""
        names = ["background", *self.labels] if self.background else self.labels
        counts = np.bincount(self.label_map.ravel(), minlength=len(names))
        totals = np.bincount(self.label_map.ravel(), weights=self.scores.ravel(), minlength=len(names))
        order = range(len(names)) if include_absent else np.argsort(-counts, kind="stable")
        return [
            Segment(
                label=names[value],
                value=int(value),
                area=float(counts[value] / self.label_map.size),
                score=float(totals[value] / counts[value]) if counts[value] else None,
            )
            for value in order
            if counts[value] or include_absent
        ]

    def mask(self, segment: Segment) -> np.ndarray:
        """Where a segment is, bool [H, W]."""
        return self.label_map == segment.value


@dataclass
class WindowFeatures:
    """What the image encoder makes of one window, whatever the labels.

    Args:
        groups: uint8 [H, W] (int32 above 256 groups), the group of each pixel.
        grouping: [K, h, w], soft assignment of the patches.
        segments: [K, D], the groups in the joint space, not normalised.
        pooled: [D], the window as a whole.
        patches: [L, D], the patches in the joint space, not normalised; None for models that do not name them.
        top: row of the window's first pixel in the resized image.
        left: column of it.
    """

    groups: Tensor = field(repr=False)
    grouping: Tensor = field(repr=False)
    segments: Tensor = field(repr=False)
    pooled: Tensor = field(repr=False)
    top: int = 0
    left: int = 0
    patches: Tensor | None = field(repr=False, default=None)


@dataclass
class EncodedImage:
    """What segmentation keeps of an image: other labels and thresholds need no second pass through the encoder.

    Args:
        size: height and width of the original.
        resized: height and width of what the windows cover.
        windows: their features.
    """

    size: tuple[int, int]
    resized: tuple[int, int]
    windows: list[WindowFeatures] = field(default_factory=list)


@dataclass
class ScoredImage:
    """An image's windows with their groups' scores for some labels.

    Args:
        size: height and width of the original.
        resized: height and width of what the windows cover.
        windows: their scores.
    """

    size: tuple[int, int]
    resized: tuple[int, int]
    windows: list[WindowScores] = field(default_factory=list)

    def with_background(self, threshold: float) -> "ScoredImage":
        """The same with a background channel in front, from scores without one."""
        return replace(self, windows=[window.with_background(threshold) for window in self.windows])

    def label_map(self) -> tuple[Tensor, Tensor]:
        """The best label of each pixel of the original, int64 [H, W], and its score [H, W]."""
        scores, channels, count = merge_windows(self.windows, self.resized)
        return best_labels(scores, channels, count, self.size)


def remarks_on_one_label(labels: Sequence[str], background_threshold: float | None) -> list[str]:
    """A sentence on a label that is alone and has no background to leave anything to."""
    if len(labels) > 1 or background_threshold is not None:
        return []
    return [
        f"{labels[0]!r} is the only label and there is no background threshold, so that it covers the whole image; "
        "with one, for instance 0.5, it covers what is more like it than like anything else."
    ]


class Segmenter:
    """Segments images with a model and its processor.

    Args:
        model: in evaluation mode, on any device and in any dtype.
        processor: of that model.
        options: defaults of the calls.
    """

    def __init__(
        self, model: PGSegModel, processor: PGSegProcessor, options: SegmentationOptions | None = None
    ):
        self.model = model.eval()
        self.processor = processor
        self.options = options or SegmentationOptions()

    def __call__(
        self, images: Any, labels: Sequence[str], options: SegmentationOptions | None = None
    ) -> Segmentation | list[Segmentation]:
        """Segments one image, or a list of them.

        Args:
            images: path, bytes, file object, PIL image or array [H, W, 3], or a list or tuple of these.
            labels: names of what may be in the images.
            options: instead of the segmenter's.

        Raises:
            ValueError: labels, options or an image that make no sense.
        """
        if isinstance(images, (list, tuple)):
            return list(self.stream(images, labels, options))
        return next(self.stream([images], labels, options))

    def stream(
        self, images: Iterable[Any], labels: Sequence[str], options: SegmentationOptions | None = None
    ) -> Iterator[Segmentation]:
        """Segments images one after the other, in their order, reading no more of them than a batch ahead."""
        options = options or self.options
        labels = validate_labels(labels)
        class_embeds = self.class_embeddings(labels, options)
        background = options.background_threshold is not None
        for remark in (
            *remarks_on_one_label(labels, options.background_threshold),
            *self.remarks_on_far_labels(labels, class_embeds, options),
        ):
            logger.warning_once(remark)
        for image in self.encode(images, options):
            label_map, best = self.score(image, class_embeds, options).label_map()
            yield Segmentation(label_map.cpu().numpy(), best.cpu().numpy(), labels, background)

    def class_embeddings(self, labels: Sequence[str], options: SegmentationOptions | None = None) -> Tensor:
        """Labels in the joint space, unit rows [N, D]."""
        options = options or self.options
        return self.processor.get_class_embeddings(self.model, labels, options.templates)

    def encode(
        self, images: Iterable[Any], options: SegmentationOptions | None = None
    ) -> Iterator[EncodedImage]:
        """The image encoder's part of [`~Segmenter.stream`], image by image."""
        options = options or self.options
        iterator = iter(images)
        while batch := list(islice(iterator, options.batch_size)):
            yield from self._encode_batch([load_image(image) for image in batch], options)

    @torch.inference_mode()
    def score(
        self,
        image: EncodedImage,
        class_embeds: Tensor,
        options: SegmentationOptions | None = None,
        may_have_background: bool = False,
    ) -> ScoredImage:
        """How well labels fit the groups of an encoded image.

        Args:
            image: from [`~Segmenter.encode`].
            class_embeds: [N, D], from [`~Segmenter.class_embeddings`].
            options: threshold, `top_k`, `patch_weight` and, with a threshold, `templates` are used.
            may_have_background: [`~ScoredImage.with_background`] will be called on the result.
        """
        options = options or self.options
        threshold, weight, top_k = options.background_threshold, *self._weight_and_top_k(options)
        others, is_alone = None, len(class_embeds) == 1
        if threshold is not None or may_have_background or is_alone:
            others = self._other_words(class_embeds, options)
        scored = ScoredImage(image.size, image.resized)
        for window in image.windows:
            features = self._features(window)
            (image_logits,), (segment_logits,) = self.model.get_logits(features, class_embeds)
            scores = WindowScores(
                window.groups,
                group_scores(segment_logits, image_logits, top_k=top_k),
                window.top,
                window.left,
                patch_weight=weight,
            )
            if others is not None:
                scores.known = chance_of_labels(
                    segment_logits, self.model.get_logits(features, others)[1][0], 1
                )
            if weight:
                patch_logits = self.model.get_patch_logits(features, class_embeds)[0]
                scores.patch_scores = patch_scores(patch_logits, image_logits, top_k=top_k)
                if others is not None:
                    other_logits = self.model.get_patch_logits(features, others)[0]
                    scores.patch_known = chance_of_labels(patch_logits, other_logits, 0)
            if is_alone and scores.known is not None:
                # Among the labels its share would be 1 everywhere.
                scores.scores = scores.known[:, None]
                scores.patch_scores = None if scores.patch_known is None else scores.patch_known[None]
            scored.windows.append(scores if threshold is None else scores.with_background(threshold))
        return scored

    def _features(self, window: WindowFeatures) -> PGSegVisionOutput:
        """A window's features as the model takes them, a batch of one."""
        features = PGSegVisionOutput(
            pooler_output=window.pooled[None],
            grouping=window.grouping[None],
            segment_embeds=window.segments[None],
        )
        if window.patches is not None:
            features.patch_embeds = window.patches[None]
        return features

    def _other_words(self, class_embeds: Tensor, options: SegmentationOptions) -> Tensor | None:
        """Embeddings [M, D] of the words that the checkpoint knows and that mean something else than all labels; of a
        single label without such words a neutral one [1, D]."""
        words = None if self.processor is None else self.processor.vocabulary
        if words:
            embeds = self.class_embeddings(words, options)
            different = (embeds @ class_embeds.T.to(embeds.dtype)).amax(dim=1) < SAME_MEANING
            if different.any():
                return embeds[different]
        if len(class_embeds) > 1:
            return None
        neutral = self.class_embeddings(NEUTRAL_WORDS, options)
        return nn.functional.normalize(neutral.mean(dim=0, keepdim=True), dim=-1)

    def remarks_on_far_labels(
        self, labels: Sequence[str], class_embeds: Tensor, options: SegmentationOptions | None = None
    ) -> list[str]:
        """A sentence on each label that is farther from all words of the vocabulary than these, in the median, are from
        each other; none without a vocabulary.

        Args:
            labels: N labels.
            class_embeds: [N, D], from [`~Segmenter.class_embeddings`].
            options: `templates` is used.
        """
        words = self.processor.vocabulary or ()
        if len(words) < 2 or {label.casefold() for label in labels} <= {word.casefold() for word in words}:
            return []
        known = self.class_embeddings(words, options)
        spacing = (known @ known.T).fill_diagonal_(-1).amax(dim=1).median()
        nearest = (class_embeds.to(known.dtype) @ known.T).max(dim=1)
        return [
            f"{label!r} is far from the {len(words)} words that this checkpoint learned, of which {words[index]!r} is "
            "the nearest; its mask may mean nothing."
            for label, index, value in zip(labels, nearest.indices.tolist(), nearest.values)
            if value < spacing
        ]

    def _weight_and_top_k(self, options: SegmentationOptions) -> tuple[float, int]:
        """How much the patches count, and how many labels a window may show.

        Raises:
            ValueError: patches count for a model that does not name them.
        """
        weight = self.processor.patch_weight if options.patch_weight == "auto" else options.patch_weight
        if weight and self.model.config.contrastive_pooling != "patches":
            raise ValueError(
                f"patch_weight is {weight}, but the model was trained with contrastive_pooling "
                f"{self.model.config.contrastive_pooling!r} and does not name patches; expected 0."
            )
        return weight, self.processor.top_k if options.top_k == "auto" else options.top_k

    def _pixel_values(self, image: Image.Image, options: SegmentationOptions) -> Tensor:
        """Resized and normalised pixels [1, 3, h, w]."""
        edges = {"shortest_edge": options.shortest_edge, "longest_edge": options.longest_edge}
        size = {name: value for name, value in edges.items() if value is not None}
        sized = {"size": size} if size else {}
        return self.processor.image_processor(image, return_tensors="pt", **sized)["pixel_values"]

    def _windows(
        self, pixel_values: Tensor, options: SegmentationOptions
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Top, left and pixels [1, 3, h, w] of each window."""
        size = self.processor.window_size if options.window_size == "auto" else options.window_size
        stride = self.processor.window_stride if options.window_stride == "auto" else options.window_stride
        height, width = pixel_values.shape[-2:]
        if size is None:
            yield 0, 0, pixel_values
            return
        for top in window_starts(height, size, stride):
            for left in window_starts(width, size, stride):
                yield top, left, pixel_values[:, :, top : top + size, left : left + size]

    @torch.inference_mode()
    def _encode_batch(self, images: list[Image.Image], options: SegmentationOptions) -> list[EncodedImage]:
        """Cuts images into windows and encodes those of one shape together."""
        encoded: list[EncodedImage] = []
        by_shape: dict[tuple[int, ...], list[tuple[EncodedImage, int, int, Tensor]]] = {}
        for image in images:
            pixel_values = self._pixel_values(image, options)
            height, width = pixel_values.shape[-2:]
            encoded.append(EncodedImage((image.height, image.width), (height, width)))
            for top, left, pixels in self._windows(pixel_values, options):
                by_shape.setdefault(tuple(pixels.shape), []).append((encoded[-1], top, left, pixels))
        for same_shape in by_shape.values():
            for start in range(0, len(same_shape), options.batch_size):
                batch = same_shape[start : start + options.batch_size]
                pixel_values = torch.cat([pixels for *_, pixels in batch]).to(self.model.device)
                features = self.model.get_image_features(pixel_values)
                for index, (owner, top, left, pixels) in enumerate(batch):
                    grouping = features.grouping[index]
                    owner.windows.append(
                        WindowFeatures(
                            groups=group_map(grouping, (pixels.shape[2], pixels.shape[3])),
                            grouping=grouping,
                            segments=features.segment_embeds[index],
                            pooled=features.pooler_output[index],
                            top=top,
                            left=left,
                            patches=None if features.patch_embeds is None else features.patch_embeds[index],
                        )
                    )
        return encoded
