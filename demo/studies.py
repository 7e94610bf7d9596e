"""Computes scores from an image and labels, and keeps the image features for further labels."""

import binascii
import hashlib
import unicodedata
from base64 import b64decode
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from limits import map_size, resampled
from model_catalogue import Catalogue
from PIL import Image
from settings import MAX_LABELS, MAX_LETTERS, MAX_TEMPLATES

from pgseg_hf import Segmentation, SegmentationOptions, Segmenter
from pgseg_hf.images import load_image
from pgseg_hf.prompts import SYNONYM, LabelList, parse_labels, validate_templates
from pgseg_hf.segmentation import EncodedImage, ScoredImage
from pgseg_hf.suggestions import MIN_AREA, everyday_words
from pgseg_hf.visualization import prototype_maps

try:
    import spaces
except ImportError:  # only available on a Space with ZeroGPU
    spaces = None

GPU_SECONDS = 60  # longest GPU allocation of a ZeroGPU function


@dataclass(frozen=True)
class Choices:
    """Settings of a segmentation.

    Args:
        model: name of a model in the catalogue or on the Hub.
        options: all options except the background threshold, which is passed to [`Study.segmentation`].
    """

    model: str
    options: SegmentationOptions = field(default_factory=SegmentationOptions)

    @property
    def encoding(self) -> tuple[Any, ...]:
        """The settings that the image features depend on."""
        return self.model, self.options.window_size, self.options.shortest_edge


@dataclass(frozen=True)
class Upload:
    """An image of a visitor.

    Args:
        image: RGB image, rotated according to its EXIF data.
        digest: hash of the file.
        name: name of the file without suffix.
    """

    image: Image.Image = field(repr=False)
    digest: str
    name: str


# Prototypes of one stage on an image: the prototype of each patch, int64 [h, w], and their number.
Prototypes = tuple[np.ndarray, int]


@dataclass(frozen=True)
class Study:
    """The state kept for a visitor's image, on the CPU: image features, and the scores of the last labels.

    Args:
        digest: hash of the image file.
        choices: settings of the segmentation.
        model: hash of the model's weights and processor.
        encoded: image features.
        asked: requested labels with their synonyms, colours and thresholds.
        kept: indices of the N labels in use; with a minimum area, the largest first.
        class_embeds: label embeddings [N, D] in the joint space, or [N, W, D] if the best of W synonyms is used.
        scored: scores without a background.
        remarks: remarks on labels that are far from everything the model was trained on.
        prototypes: prototypes of each stage, once requested.
    """

    digest: str
    choices: Choices
    model: str
    encoded: EncodedImage = field(repr=False)
    asked: LabelList
    kept: tuple[int, ...]
    class_embeds: torch.Tensor = field(repr=False)
    scored: ScoredImage = field(repr=False)
    remarks: tuple[str, ...] = ()
    prototypes: tuple[Prototypes, ...] | None = field(default=None, repr=False)

    @property
    def kept_labels(self) -> LabelList:
        """The labels in use."""
        words, names = ([each[index] for index in self.kept] for each in (self.asked.words, self.asked.names))
        return replace(self.asked, words=words, names=names)

    @property
    def labels(self) -> list[str]:
        """Names of the labels in use."""
        return self.kept_labels.names

    @property
    def made_at(self) -> tuple[int, int]:
        """Height and width at which masks are computed: those of the image, or smaller to limit the time."""
        shown = torch.stack([window.used() for window in self.scored.windows]).any(dim=0)
        return map_size(self.scored.size, int(shown.sum()))

    def segmentation(self, threshold: float | None) -> Segmentation:
        """The masks at the size of the image for a background threshold; does not run a model."""
        scored = self.scored if threshold is None else self.scored.with_background(threshold)
        maps = replace(scored, size=self.made_at).label_map()
        label_map, scores = (resampled(values.numpy(), scored.size) for values in maps)
        result = Segmentation(label_map, scores, self.labels, threshold is not None, self.asked.colours)
        return result.with_thresholds(self.asked.thresholds)


class Laboratory:
    """Creates studies with the models of a catalogue, on ZeroGPU if available."""

    def __init__(self, catalogue: Catalogue):
        self.catalogue = catalogue
        on_gpu = spaces.GPU(duration=GPU_SECONDS) if spaces is not None else lambda function: function
        self._study_on_gpu = on_gpu(_study)
        self._prototypes_on_gpu = on_gpu(_prototypes)

    def study(
        self, upload: Upload, labels: LabelList | None, choices: Choices, before: Study | None = None
    ) -> Study:
        """A study of an image with labels, or with the words of a vocabulary that cover most of it if there are none.
        The image encoder only runs if `before` has another image, resolution, window or model.

        Raises:
            ValueError: the model cannot be loaded or takes too long.
        """
        segmenter = self.catalogue.load(choices.model)
        model = self.catalogue.digest(choices.model)
        if labels is None:
            words = self._vocabulary(segmenter)
            labels = LabelList(words, words, {}, {})
            options = replace(choices.options, min_area=choices.options.min_area or MIN_AREA)
            choices = replace(choices, options=options)
        source = (upload.digest, choices.encoding, model)
        if before is not None and (before.digest, before.choices.encoding, before.model) != source:
            before = None
        if before is not None and (before.asked.words, before.choices) == (labels.words, choices):
            return before if before.asked == labels else replace(before, asked=labels)
        study = self._study_on_gpu(segmenter, self._device, upload, labels, choices, before)
        return replace(study, model=model)

    def _vocabulary(self, segmenter: Segmenter) -> list[str]:
        """Everyday words, plus those that a fine-tuned checkpoint adds to the included one. A checkpoint with
        fewer than half of the everyday words only uses its own vocabulary."""
        own, everyday = segmenter.processor.vocabulary, everyday_words()
        if not own:
            return everyday
        if len({*own} & {*everyday}) < len(everyday) / 2:
            return list(own)
        shipped = self.catalogue.load("").processor.vocabulary or ()
        return everyday + [word for word in own if word not in {*everyday, *shipped}]

    def with_prototypes(self, upload: Upload, study: Study) -> Study:
        """Adds the prototypes of the whole image to a study; empty for a model without prototypes."""
        if study.prototypes is not None and study.digest == upload.digest:
            return study
        segmenter = self.catalogue.load(study.choices.model)
        if self.catalogue.digest(study.choices.model) != study.model:
            raise ValueError(f"{study.choices.model} has changed; press Segment again.")
        found = self._prototypes_on_gpu(segmenter, self._device, upload, study.choices)
        return replace(study, prototypes=found)

    @property
    def _device(self) -> str:
        return self.catalogue.settings.device


# ZeroGPU runs this in another process, so all inputs are arguments, and results are moved to the CPU.
def _study(
    segmenter: Segmenter,
    device: str,
    upload: Upload,
    asked: LabelList,
    choices: Choices,
    before: Study | None,
) -> Study:
    segmenter.model.to(device)
    options = choices.options
    if before is None:
        encoded = next(iter(segmenter.encode([upload.image], options)))
    else:
        encoded = _moved(before.encoded, device)
    class_embeds = segmenter.class_embeddings(asked.words, options)
    kept = range(len(asked.words))
    if options.min_area is not None:
        kept = segmenter.largest(encoded, class_embeds, options.min_area, options)
        class_embeds = class_embeds[kept]
    scored = segmenter.score(encoded, class_embeds, options, may_have_background=True)
    study = Study(
        digest=upload.digest,
        choices=choices,
        model="",
        encoded=_moved(encoded, "cpu") if before is None else before.encoded,
        asked=asked,
        kept=tuple(kept),
        class_embeds=class_embeds.cpu(),
        scored=_moved(scored, "cpu"),
        prototypes=None if before is None else before.prototypes,
    )
    remarks = segmenter.remarks_on_far_labels(study.labels, class_embeds, options)
    return replace(study, remarks=tuple(remarks))


def _prototypes(
    segmenter: Segmenter, device: str, upload: Upload, choices: Choices
) -> tuple[Prototypes, ...]:
    if segmenter.model.config.npr_variant == "none":
        return ()
    segmenter.model.to(device)
    edges = {"shortest_edge": choices.options.shortest_edge, "longest_edge": choices.options.longest_edge}
    size = {"size": edges} if choices.options.shortest_edge else {}
    batch = segmenter.processor.image_processor(upload.image, return_tensors="pt", **size)
    with torch.inference_mode():
        pixel_values = batch["pixel_values"].to(segmenter.model.device)
        output = segmenter.model.vision_model(pixel_values, output_npr=True, output_attentions=True)
    counts = [stage.prototypes.shape[1] for stage in output.npr]
    return tuple(zip(prototype_maps(output), counts))


def _moved(image: Any, device: torch.device | str) -> Any:
    windows = [replace(window, **send_to_device(vars(window), device)) for window in image.windows]
    return replace(image, windows=windows)


def read_labels(text: str | None) -> LabelList | None:
    """Parses labels separated by commas or lines, each in the syntax of [`parse_labels`]; None if there are none.

    Raises:
        ValueError: there are too many labels or synonyms, or a label is too long, repeated, or has a control character.
    """
    words = [word.strip() for line in (text or "").splitlines() for word in line.split(",")]
    labels = [word for word in words if word]
    count = sum(label.count(SYNONYM) + 1 for label in labels)
    if count > MAX_LABELS:
        raise ValueError(
            f"{count} labels are more than the {MAX_LABELS} that this demo accepts; remove some."
        )
    _check_texts(labels, "label")
    return parse_labels(labels) if labels else None


def read_templates(text: str | None) -> tuple[str, ...] | None:
    """Parses prompt templates, one per line; None if there are none.

    Raises:
        ValueError: there are too many templates, or one is too long or has no `{}`.
    """
    templates = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if len(templates) > MAX_TEMPLATES:
        raise ValueError(
            f"{len(templates)} templates are more than the {MAX_TEMPLATES} that this demo accepts."
        )
    _check_texts(templates, "template")
    return tuple(validate_templates(templates)) if templates else None


def _check_texts(texts: list[str], what: str) -> None:
    for text in texts:
        odd = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs")), None)
        if odd is not None:
            raise ValueError(f"The {what} {text[:30]!r} has the invalid character {odd!r}; remove it.")
        if len(text) > MAX_LETTERS:
            raise ValueError(
                f"The {what} {text[:30]!r}… has {len(text)} characters, expected at most {MAX_LETTERS}."
            )


class _NamedBytes(BytesIO):
    """A file in memory with the name that error messages show instead of its path on the server."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name


def read_upload(path: str | None, max_pixels: int) -> Upload:
    """Reads the image of an uploaded file.

    Raises:
        ValueError: there is no file, or it has been deleted, is not an image or is too large.
    """
    if not path:
        raise ValueError("Choose an image first: upload one, use the camera, or select an example.")
    try:
        if path.startswith("data:"):
            data, name = b64decode(path.partition(",")[2], validate=True), "image"
        else:
            data, name = Path(path).read_bytes(), Path(path).name
    except binascii.Error as error:
        raise ValueError(f"The image's data: URL is broken: {error}") from error
    except OSError as error:
        raise ValueError("The image is no longer on the server; please upload it again.") from error
    image = load_image(_NamedBytes(data, name), max_pixels)
    return Upload(image, hashlib.sha256(data).hexdigest(), Path(name).stem)
