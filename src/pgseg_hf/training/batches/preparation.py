"""Turns records into training examples: decodes and crops images and chooses texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from PIL import Image

from ...data.augmentation import Augmentation, AugmentationOptions, Crop
from ...data.mask_labels import IGNORE_INDEX
from ...data.records import Record, UnusableRecord
from ...images import ImageSource, load_image, load_label_map
from ...prompts import build_prompts
from .texts import TextOptions, choose_texts, load_noun_model

CROP_TRIES = 5


@dataclass
class Example:
    """One training example, as the collator expects it.

    Args:
        pixel_values: float32 [3, S, S], normalised; None if there are `backbone_features` instead.
        caption: the image's text.
        labels: prompts of its tags and nouns; may be empty.
        backbone_features: features [C, h, w] of a backbone.
        patch_texts: the share of some texts in each cell of a grid, {text: [h, w]}.
    """

    pixel_values: np.ndarray | None
    caption: str
    labels: list[str]
    backbone_features: np.ndarray | None = None
    patch_texts: dict[str, np.ndarray] | None = None


class Preparation:
    """Turns a `Record` into an `Example`. All randomness comes from the generator passed to the call.

    Args:
        augmentation: how images are cropped and augmented.
        texts: how texts are chosen.
        mask_labels: names of the mask values, "" for a value without a name (a background); 255 has no name. If given,
            the tags of a record with a mask are replaced by the labels visible in the crop. Masks have no other use.
        crop_tag_share: a label counts as visible if it covers more than this share of the crop.
        patch_stride: keeps only every `patch_stride`-th row and column of cached features, starting at a random offset.

    Raises:
        ValueError: if an option is invalid, or the noun model cannot be loaded.
    """

    def __init__(
        self,
        augmentation: AugmentationOptions | None = None,
        texts: TextOptions | None = None,
        mask_labels: Sequence[str] | None = None,
        crop_tag_share: float = 0.02,
        patch_stride: int = 1,
    ):
        if mask_labels is not None and len(mask_labels) > IGNORE_INDEX:
            raise ValueError(f"mask_labels has {len(mask_labels)} names, expected at most {IGNORE_INDEX}.")
        if not 0 <= crop_tag_share < 1:
            raise ValueError(f"crop_tag_share is {crop_tag_share}, expected at least 0 and below 1.")
        if patch_stride < 1:
            raise ValueError(f"patch_stride is {patch_stride}, expected at least 1.")
        self.patch_stride = patch_stride
        self.augmentation = Augmentation(augmentation)
        self.texts = texts or TextOptions()
        self.mask_labels = None if mask_labels is None else [label.strip() for label in mask_labels]
        self.crop_tag_share = crop_tag_share
        if self.texts.noun_model and self.texts.num_nouns:
            load_noun_model(self.texts.noun_model)

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        """A random view of a record.

        Raises:
            UnusableRecord: with the reason "broken image", "broken mask" or "no text". The latter also applies if
                several crops in a row show no label and the record has no caption.
        """
        if record.views is not None:
            view = int(rng.integers(len(record.views)))
            tags = record.view_tags[view] if record.view_tags else None
            texts = choose_texts(record if tags is None else replace(record, tags=tags), self.texts, rng)
            names = None if record.view_names is None else record.view_names[view]
            features = np.array(_every_so_many(record.views[view], self.patch_stride, rng))
            prompts = [prompt for (prompt,) in build_prompts(list(names))] if names else []
            patch_texts = None if names is None else dict(zip(prompts, names.values()))
            return Example(None, texts.caption, texts.labels, features, patch_texts)
        image, crop, tags = self.draw(record, rng)
        pixels = self.augmentation.crop_pixels(image, crop, rng)
        texts = choose_texts(record if tags is None else replace(record, tags=tags), self.texts, rng)
        return Example(pixels, texts.caption, texts.labels)

    def draw(self, record: Record, rng: np.random.Generator) -> tuple[Image.Image, Crop, list[str] | None]:
        """A record's image, a random crop of it, and the tags visible in the crop (None without a mask or
        `mask_labels`).

        Raises:
            UnusableRecord: with the reason "broken image" or "broken mask".
        """
        name = record.name or "a record"
        tags: list[str] | None = None
        try:
            image = load_image(record.image)
        except ValueError as error:
            raise UnusableRecord("broken image", f"{name}: {error}") from error
        crop = self.augmentation.draw_crop(image.size, rng)
        if record.mask is not None and self.mask_labels is not None:
            try:
                crop, tags = self._crop_with_tags(_load_mask(record.mask), crop, rng)
            except ValueError as error:
                raise UnusableRecord("broken mask", f"{name}: {error}") from error
        return image, crop, tags

    def _crop_with_tags(
        self, mask: Image.Image, crop: Crop, rng: np.random.Generator
    ) -> tuple[Crop, list[str]]:
        """The crop and its tags. If it has no tags, further crops are tried."""
        for tries_left in reversed(range(CROP_TRIES)):
            tags = self._tags(self.augmentation.crop_mask(mask, crop))
            if tags or not tries_left:
                break
            crop = self.augmentation.draw_crop(crop.size, rng)
        return crop, tags

    def _tags(self, labels_SS: np.ndarray) -> list[str]:
        """The names of the labels that cover enough of a crop."""
        names = cast(list[str], self.mask_labels)
        counts = np.bincount(labels_SS.ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        if counts[len(names) :].any():
            value = len(names) + int(counts[len(names) :].argmax())
            raise ValueError(
                f"its mask has the value {value}, but mask_labels names {len(names)} values; use {IGNORE_INDEX} for "
                "pixels without a label."
            )
        shown = counts[: len(names)] > self.crop_tag_share * labels_SS.size
        return [name for name, is_shown in zip(names, shown) if is_shown and name]


def _every_so_many(features: np.ndarray, stride: int, rng: np.random.Generator) -> np.ndarray:
    """Every `stride`-th row and column of features [C, H, W]: [C, H // stride, W // stride]."""
    stride = min(stride, *features.shape[1:])
    if stride == 1:
        return features
    spans = [(size // stride - 1) * stride + 1 for size in features.shape[1:]]
    top, left = (int(rng.integers(size - span + 1)) for size, span in zip(features.shape[1:], spans))
    return features[:, top : top + spans[0] : stride, left : left + spans[1] : stride]


def _load_mask(source: ImageSource) -> Image.Image:
    """A label map as a PIL image with mode L."""
    values = load_label_map(source)
    if values.min() < 0 or values.max() > IGNORE_INDEX:
        raise ValueError(
            f"its mask has values from {values.min()} to {values.max()}, expected 0 to {IGNORE_INDEX}."
        )
    return Image.fromarray(values.astype(np.uint8))
