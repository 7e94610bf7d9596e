"""Segmentation of images by labels. The pipeline, the command line and all other parts use this module."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from .images import load_image
from .label_maps import Segmentation
from .modeling_pgseg import PGSegModel, PGSegVisionOutput
from .options import SegmentationOptions, refuse_gaps
from .processing_pgseg import PGSegProcessor
from .prompts import split_synonyms, validate_templates
from .scoring import (
    ScoredImage,
    WindowScores,
    average_by_owner,
    averaged_over_neighbours,
    best_word,
    chance_of_labels,
    group_map,
    group_scores,
    patch_scores,
    window_starts,
)
from .values import are_images, whole_number
from .weights import refuse_other_tokenizer

logger = logging.get_logger(__name__)

# A single label without other vocabulary words is compared with the mean of these.
NEUTRAL_WORDS = ("object", "thing", "background", "scene")
# Words whose embeddings have at least this cosine similarity count as having the same meaning and do not compete.
SAME_MEANING = 0.5
# Number of label lists whose embeddings are cached.
_KEPT_EMBEDDINGS = 32
# Model outputs from which scores are computed.
_KEPT_FEATURES = ("pooler_output", "grouping", "segment_embeds", "patch_embeds")
# A batch is full once its images have more pixels than this.
_BATCH_PIXELS = 2**26


@dataclass
class WindowFeatures:
    """The image encoder's output for one window, independent of labels.

    Args:
        groups: uint8 [H, W] (int32 above 256 groups), the group of each pixel.
        features: `pooler_output`, `grouping`, `segment_embeds` and, if the model scores patches, `patch_embeds`, as a
            batch of one.
        top, left: row and column of the window's first pixel in the resized image.
    """

    groups: Tensor = field(repr=False)
    features: PGSegVisionOutput = field(repr=False)
    top: int = 0
    left: int = 0


@dataclass
class EncodedImage:
    """The encoded windows of an image. You can score them with other labels and thresholds without encoding again.

    Args:
        size: height and width of the original image.
        resized: height and width of the area that the windows cover.
        windows: features of the windows.
    """

    size: tuple[int, int]
    resized: tuple[int, int]
    windows: list[WindowFeatures] = field(default_factory=list)


def _batches(images: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yields lists of `size` images, or fewer if they are large PIL images."""
    batch, pixels = [], 0
    for image in images:
        batch.append(image)
        pixels += image.width * image.height if isinstance(image, Image.Image) else 0
        if len(batch) == size or pixels > _BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def remarks_on_one_label(labels: Sequence[str], background: bool) -> list[str]:
    """A warning about a single label without a background; empty otherwise."""
    if len(labels) > 1 or background:
        return []
    return [
        f"{labels[0]!r} is the only label and there is no background threshold, so it covers the whole image; "
        "set a threshold, for example 0.5, to keep only pixels that resemble it more than anything else."
    ]


def _text_weights(model: PGSegModel) -> tuple | None:
    """A key that changes whenever a weight or buffer of the text tower or its head is replaced or modified.

    None if changes cannot be detected: inference tensors have no version counter, and weights on the meta device
    (offloaded) have no address.
    """
    tensors: list[Tensor] = []
    for module in (model.text_model, model.text_projection):
        tensors += [*module.parameters(), *module.buffers()]
    if any(tensor.is_inference() or tensor.is_meta for tensor in tensors):
        return None
    return tuple((tensor.data_ptr(), tensor._version, tensor.dtype, str(tensor.device)) for tensor in tensors)


class Segmenter:
    """Segments images with a model and its processor. Embeddings of labels are cached until the weights of the text
    tower change.

    Args:
        model (`PGSegModel`): a model on any device and in any dtype. It is set to evaluation mode.
        processor (`PGSegProcessor`): the processor of that model.
        options (`SegmentationOptions`, *optional*): defaults of the calls.
    """

    def __init__(
        self, model: PGSegModel, processor: PGSegProcessor, options: SegmentationOptions | None = None
    ):
        self.model = model.eval()
        self.processor = processor
        self.options = options or SegmentationOptions()
        self._known_embeds: dict[tuple, Tensor] = {}

    def __call__(
        self, images: Any, labels: Sequence[str], options: SegmentationOptions | None = None
    ) -> Segmentation | list[Segmentation]:
        """Segments one image or a list of images.

        Args:
            images: a path, bytes, file object, PIL image or array [H, W, 3], or a list, tuple, `datasets` column or
                pandas series of these.
            labels (`Sequence[str]`): names of what may be in the images. `"car|automobile"` is one label; its first
                word is its name, and `options.synonyms` says how its words are scored.
            options (`SegmentationOptions`, *optional*): replaces the segmenter's options.

        Returns:
            A [`Segmentation`], or a list of them for several images.

        Raises:
            ValueError: labels, options or an image are invalid.
        """
        if are_images(images):
            return list(self.stream(images, labels, options))
        return next(self.stream([images], labels, options))

    def stream(
        self,
        images: Iterable[Any],
        labels: Sequence[str],
        options: SegmentationOptions | None = None,
        smooth: int = 1,
    ) -> Iterator[Segmentation]:
        """Yields a [`Segmentation`] for each image, in order, reading at most one batch plus `smooth / 2` images ahead.
        For video frames, `smooth` is the number of neighbouring images over which scores are averaged."""
        options = options or self.options
        words, labels = labels, [words[0] for words in split_synonyms(labels)]
        options.check_labels(labels)
        class_embeds = self.class_embeddings(words, options)
        smooth = whole_number(smooth, "smooth")
        if options.min_area is not None and smooth > 1:
            raise ValueError(f"min_area is {options.min_area} and smooth {smooth}; min_area needs smooth=1.")
        if options.min_area is None:
            for remark in (
                *remarks_on_one_label(labels, options.has_background),
                *self.remarks_on_far_labels(labels, class_embeds, options),
            ):
                logger.warning_once(remark)
        encoded = self.encode(images, options)
        if options.min_area is None:
            scored = (self.score(image, class_embeds, options) for image in encoded)
            maps = (image.label_map() for image in averaged_over_neighbours(scored, smooth))
        else:
            maps = (self._map_of_largest(image, class_embeds, options) for image in encoded)
        background = options.background_threshold is not None
        for label_map, best in maps:
            given = (label_map.cpu().numpy(), best.cpu().numpy(), labels, background, options.colours)
            yield Segmentation(*given).with_thresholds(options.thresholds)

    def _map_of_largest(
        self, image: EncodedImage, class_embeds: Tensor, options: SegmentationOptions
    ) -> tuple[Tensor, Tensor]:
        """Like [`~ScoredImage.label_map`], but only for the labels that [`~Segmenter.largest`] finds."""
        found = sorted(self.largest(image, class_embeds, options.min_area or 0.0, options))
        label_map, best = self.score(image, class_embeds[found], options).label_map()
        values = [0, *(index + 1 for index in found)] if options.background_threshold is not None else found
        return torch.tensor(values, device=label_map.device)[label_map], best

    def largest(
        self,
        image: EncodedImage,
        class_embeds: Tensor,
        min_area: float,
        options: SegmentationOptions | None = None,
    ) -> list[int]:
        """Finds the labels that cover most of an image when all compete. A label that means nearly the same as a larger
        one is left out.

        Args:
            image: image from [`~Segmenter.encode`].
            class_embeds: embeddings from [`~Segmenter.class_embeddings`].
            min_area: minimum share of the pixels, 0 to 1.
            options: only `templates`, `top_k` and `patch_weight` are used.

        Returns:
            Indices of labels, largest first; only the largest label if none reaches `min_area`.
        """
        options = replace(options or self.options, background_threshold=None)
        scored = self.score(image, class_embeds, options)
        label_map, _ = replace(scored, size=scored.resized).label_map()
        areas = label_map.flatten().bincount(minlength=len(class_embeds)) / label_map.numel()
        words = class_embeds.reshape(len(class_embeds), -1, class_embeds.shape[-1])
        found: list[int] = []
        for index in areas.argsort(descending=True, stable=True).tolist():
            if found and areas[index] < max(min_area, 1 / label_map.numel()):
                break
            if not found or (words[found].flatten(0, 1) @ words[index].T).max() < SAME_MEANING:
                found.append(index)
        return found

    def class_embeddings(self, labels: Sequence[str], options: SegmentationOptions | None = None) -> Tensor:
        """Embeds labels in the joint space as unit rows [N, D]; synonyms, `"car|automobile"`, give their unit mean.
        With `synonyms="best"`, the shape is [N, W, D] for at most W words per label, padded with the first word."""
        options = options or self.options
        words = split_synonyms(labels)
        flat = [word for each in words for word in each]
        refuse_other_tokenizer(self.model.config, self.processor.tokenizer, "the segmenter")
        embeds = self._embeddings_of_words(flat, options.templates)
        if len(flat) == len(words):
            return embeds
        owners = [number for number, each in enumerate(words) for _ in each]
        if options.synonyms == "average":
            return average_by_owner(embeds, owners)
        most = max(map(len, words))
        places = [[flat.index(word) for word in (each + each[:1] * most)[:most]] for each in words]
        return embeds[torch.tensor(places, device=embeds.device)]

    def _embeddings_of_words(self, words: list[str], templates: Sequence[str] | None) -> Tensor:
        templates = self.processor.templates if templates is None else validate_templates(templates)
        weights = _text_weights(self.model)
        key = (tuple(words), tuple(templates), weights)
        if weights is None or key not in self._known_embeds:
            embeds = self.processor.get_class_embeddings(self.model, words, templates)
            if weights is None:
                return embeds
            kept = self._known_embeds if len(self._known_embeds) < _KEPT_EMBEDDINGS else {}
            self._known_embeds = {**kept, key: embeds}
        return self._known_embeds[key].clone()

    def encode(
        self, images: Iterable[Any], options: SegmentationOptions | None = None
    ) -> Iterator[EncodedImage]:
        """Encodes images in batches and yields them one by one, as the first step of [`~Segmenter.stream`]."""
        options = options or self.options
        for batch in _batches(images, options.batch_size):
            yield from self._encode_batch(batch, options)

    @torch.inference_mode()
    def score(
        self,
        image: EncodedImage,
        class_embeds: Tensor,
        options: SegmentationOptions | None = None,
        may_have_background: bool = False,
    ) -> ScoredImage:
        """Scores labels for the groups of an encoded image.

        Args:
            image: image from [`~Segmenter.encode`].
            class_embeds: embeddings [N, D] or [N, W, D] from [`~Segmenter.class_embeddings`].
            options: only the threshold, `top_k`, `patch_weight` and, with a threshold or a single label, `templates`
                are used.
            may_have_background: whether [`~ScoredImage.with_background`] will be called on the result.
        """
        options = options or self.options
        threshold, weight, top_k = options.background_threshold, *self._weight_and_top_k(options)
        others, is_alone, all_words = None, len(class_embeds) == 1, class_embeds.flatten(0, -2)
        if threshold is not None or may_have_background or is_alone:
            others = self._other_words(class_embeds, options)
        scored = ScoredImage(image.size, image.resized)
        for window in image.windows:
            features = window.features
            (image_logits,), (segment_logits,) = self.model.get_logits(features, all_words)
            image_logits = best_word(image_logits, class_embeds)
            segment_logits = best_word(segment_logits.T, class_embeds).T
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
                patch_logits = best_word(self.model.get_patch_logits(features, all_words)[0], class_embeds)
                scores.patch_scores = patch_scores(patch_logits, image_logits, top_k=top_k)
                if others is not None:
                    other_logits = self.model.get_patch_logits(features, others)[0]
                    scores.patch_known = chance_of_labels(patch_logits, other_logits, 0)
            if is_alone and scores.known is not None:
                # A softmax over a single label would be 1 everywhere.
                scores.scores = scores.known[:, None]
                scores.patch_scores = None if scores.patch_known is None else scores.patch_known[None]
            scored.windows.append(scores if threshold is None else scores.with_background(threshold))
        return scored

    def _other_words(self, class_embeds: Tensor, options: SegmentationOptions) -> Tensor | None:
        """Embeddings [M, D] of the vocabulary words that differ in meaning from all labels. Without such words, a
        single label gets a neutral embedding [1, D], several labels None."""
        words = None if self.processor is None else self.processor.vocabulary
        if words:
            embeds = self.class_embeddings(words, options)
            labels = class_embeds.flatten(0, -2).to(embeds.dtype)
            different = (embeds @ labels.T).amax(dim=1) < SAME_MEANING
            if different.any():
                return embeds[different]
        if len(class_embeds) > 1:
            return None
        neutral = self.class_embeddings(NEUTRAL_WORDS, options)
        return nn.functional.normalize(neutral.mean(dim=0, keepdim=True), dim=-1)

    def remarks_on_far_labels(
        self, labels: Sequence[str], class_embeds: Tensor, options: SegmentationOptions | None = None
    ) -> list[str]:
        """Warnings about labels that are farther from the vocabulary than 90 % of its words are from their nearest
        neighbour; empty without a vocabulary.

        Args:
            labels: N labels.
            class_embeds: embeddings [N, D] or [N, W, D] from [`~Segmenter.class_embeddings`].
            options: only `templates` is used.
        """
        words = self.processor.vocabulary or ()
        if len(words) < 2 or {label.casefold() for label in labels} <= {word.casefold() for word in words}:
            return []
        known = self.class_embeddings(words, options)
        spacing = (known @ known.T).fill_diagonal_(-1).amax(dim=1).float().quantile(0.1)
        likeness = class_embeds.to(known.dtype) @ known.T
        nearest = (likeness if likeness.dim() == 2 else likeness.amax(dim=1)).max(dim=1)
        return [
            f"{label!r} is far from the {len(words)} words that this checkpoint learned (the nearest is "
            f"{words[index]!r}); its mask may be meaningless."
            for label, index, value in zip(labels, nearest.indices.tolist(), nearest.values)
            if value < spacing
        ]

    def _weight_and_top_k(self, options: SegmentationOptions) -> tuple[float, int]:
        """The patch weight and the largest number of labels per window.

        Raises:
            ValueError: the patch weight is not 0, but the model does not score patches.
        """
        weight = self.processor.patch_weight if options.patch_weight == "auto" else options.patch_weight
        if weight and self.model.config.pooling.parts != "patches":
            raise ValueError(
                f"patch_weight is {weight}, but the model was trained with contrastive_pooling "
                f"{self.model.config.contrastive_pooling!r} and does not score patches; expected 0: "
                "SegmentationOptions(patch_weight=0) or --patch-weight 0, or permanently "
                "processor.patch_weight = 0 and processor.save_pretrained(folder)."
            )
        return weight, self.processor.top_k if options.top_k == "auto" else options.top_k

    def _pixel_values(self, image: Image.Image, options: SegmentationOptions) -> Tensor:
        """Resized and normalised pixels [1, 3, h, w]."""
        edges = {"shortest_edge": options.shortest_edge, "longest_edge": options.longest_edge}
        size = {name: value for name, value in edges.items() if value is not None}
        sized = {"size": size} if size else {}
        return self.processor.image_processor(image, return_tensors="pt", **sized)["pixel_values"]

    def _window_sizes(self, options: SegmentationOptions) -> tuple[int | None, int]:
        """Side and stride of the windows in pixels; the side is None for the whole image at once.

        Raises:
            ValueError: there are gaps between windows, or windows of features do not consist of whole patches.
        """
        size = self.processor.window_size if options.window_size == "auto" else options.window_size
        stride = self.processor.window_stride if options.window_stride == "auto" else options.window_stride
        if size is not None:
            refuse_gaps(size, stride)
        patch = self.model.config.vision_config.patch_size
        if self._cuts_features(size) and (size % patch or stride % patch):
            raise ValueError(
                f"window_size is {size} and window_stride {stride}, expected multiples of {patch}, because the windows "
                "of this model are cut from patch features."
            )
        return size, stride

    def _cuts_features(self, size: int | None) -> bool:
        return size is not None and self.processor is not None and self.processor.window_features

    def _windows(self, pixel_values: Tensor, options: SegmentationOptions) -> tuple[int, Tensor, list[Any]]:
        """The pixels per grid step, the grid from which windows are cut, and the windows as (rows, columns) slices. The
        grid is pixels [1, 3, H, W] or, for windows of features, backbone features [1, C, H, W]."""
        size, stride = self._window_sizes(options)
        pixel_values, step = pixel_values.to(self.model.device), 1
        if self._cuts_features(size):
            embeddings: Any = self.model.vision_model.embeddings
            pixel_values, step = embeddings.features(pixel_values), self.model.config.vision_config.patch_size
        if size is None:
            return step, pixel_values, [(slice(0, None), slice(0, None))]
        rows, columns = (
            [
                slice(start, start + size // step)
                for start in window_starts(length, size // step, stride // step)
            ]
            for length in pixel_values.shape[-2:]
        )
        return step, pixel_values, [(row, column) for row in rows for column in columns]

    @torch.inference_mode()
    def _encode_batch(self, images: Iterable[Any], options: SegmentationOptions) -> list[EncodedImage]:
        """Cuts images into windows and encodes windows of the same shape together."""
        encoded: list[EncodedImage] = []
        by_shape: dict[tuple[int, ...], list[tuple[EncodedImage, int, int, Tensor]]] = {}
        step = 1
        for source_image in images:
            image = load_image(source_image)
            step, source, places = self._windows(self._pixel_values(image, options), options)
            height, width = source.shape[-2:]
            encoded.append(EncodedImage((image.height, image.width), (height * step, width * step)))
            for rows, columns in places:
                window = source[:, :, rows, columns]
                place = (encoded[-1], rows.start * step, columns.start * step, window)
                by_shape.setdefault(tuple(window.shape), []).append(place)
        name = "pixel_values" if step == 1 else "backbone_features"
        for same_shape in by_shape.values():
            for start in range(0, len(same_shape), options.batch_size):
                batch = same_shape[start : start + options.batch_size]
                windows = torch.cat([window for *_, window in batch])
                features = self.model.get_image_features(**{name: windows})
                for index, (owner, top, left, window) in enumerate(batch):
                    kept = {name: features[name][index, None] for name in _KEPT_FEATURES if name in features}
                    groups = group_map(kept["grouping"][0], (window.shape[2] * step, window.shape[3] * step))
                    owner.windows.append(WindowFeatures(groups, PGSegVisionOutput(**kept), top, left))
        return encoded
