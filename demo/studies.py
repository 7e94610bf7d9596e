"""From an image and words to scores, keeping what the image encoder made of the image."""

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
except ImportError:  # anywhere but on a Space with ZeroGPU
    spaces = None

GPU_SECONDS = 60  # that a function borrows a GPU for, at most


@dataclass(frozen=True)
class Choices:
    """How an image is segmented.

    Args:
        model: a name of the catalogue, or on the Hub.
        options: all but the background, which [`Study.segmentation`] is asked for.
    """

    model: str
    options: SegmentationOptions = field(default_factory=SegmentationOptions)

    @property
    def encoding(self) -> tuple[Any, ...]:
        """What decides how the image is encoded, whatever the labels."""
        return self.model, self.options.window_size, self.options.shortest_edge


@dataclass(frozen=True)
class Upload:
    """An image that a visitor gave.

    Args:
        image: upright, RGB.
        digest: of the file.
        name: of the file, without ending.
    """

    image: Image.Image = field(repr=False)
    digest: str
    name: str


# One stage's prototypes on an image: which one each patch belongs to, int64 [h, w], and how many there are.
Prototypes = tuple[np.ndarray, int]


@dataclass(frozen=True)
class Study:
    """What is kept of a visitor's image, all on the CPU: features, and the scores of the last labels.

    Args:
        digest: of the image's file.
        choices: it was segmented with.
        model: what stands for the model's weights and processor then.
        encoded: its features.
        asked: labels, with their synonyms, colours and thresholds.
        kept: indices of the N that count; with a minimum area the largest first.
        class_embeds: [N, D], these in the joint space, or [N, W, D] where the best of W synonyms counts.
        scored: scores without a background.
        remarks: on labels that are far from all that the model learned.
        prototypes: of each stage, once they were looked at.
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
        """The labels that count."""
        words, names = ([each[index] for index in self.kept] for each in (self.asked.words, self.asked.names))
        return replace(self.asked, words=words, names=names)

    @property
    def labels(self) -> list[str]:
        """What these are called."""
        return self.kept_labels.names

    @property
    def made_at(self) -> tuple[int, int]:
        """Height and width that the masks are made at: the image's, or less where that would take too long."""
        shown = torch.stack([window.used() for window in self.scored.windows]).any(dim=0)
        return map_size(self.scored.size, int(shown.sum()))

    def segmentation(self, threshold: float | None) -> Segmentation:
        """The masks in the image's size for a background threshold; no model is needed."""
        scored = self.scored if threshold is None else self.scored.with_background(threshold)
        maps = replace(scored, size=self.made_at).label_map()
        label_map, scores = (resampled(values.numpy(), scored.size) for values in maps)
        result = Segmentation(label_map, scores, self.labels, threshold is not None, self.asked.colours)
        return result.with_thresholds(self.asked.thresholds)


class Laboratory:
    """Makes studies with the models of a catalogue, on a ZeroGPU where there is one.

    Args:
        catalogue: the models.
    """

    def __init__(self, catalogue: Catalogue):
        self.catalogue = catalogue
        on_gpu = spaces.GPU(duration=GPU_SECONDS) if spaces is not None else lambda function: function
        self._study_on_gpu = on_gpu(_study)
        self._prototypes_on_gpu = on_gpu(_prototypes)

    def study(
        self, upload: Upload, labels: LabelList | None, choices: Choices, before: Study | None = None
    ) -> Study:
        """A study of an image by labels, or by those words of a vocabulary that cover most of it where none are given;
        the image encoder only runs where `before` is of another image, resolution or window, or of other weights.

        Raises:
            ValueError: a model that cannot be loaded, or that takes too long.
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
        """Everyday words, and what a fine-tuned checkpoint learned beside those of the shipped one; a checkpoint that
        learned few of them has its own alone."""
        own, everyday = segmenter.processor.vocabulary, everyday_words()
        if not own:
            return everyday
        if len({*own} & {*everyday}) < len(everyday) / 2:
            return list(own)
        shipped = self.catalogue.load("").processor.vocabulary or ()
        return everyday + [word for word in own if word not in {*everyday, *shipped}]

    def with_prototypes(self, upload: Upload, study: Study) -> Study:
        """The same study with the prototypes of the whole image; empty for a model without any."""
        if study.prototypes is not None and study.digest == upload.digest:
            return study
        segmenter = self.catalogue.load(study.choices.model)
        if self.catalogue.digest(study.choices.model) != study.model:
            raise ValueError(f"{study.choices.model} has changed since; press Segment again.")
        found = self._prototypes_on_gpu(segmenter, self._device, upload, study.choices)
        return replace(study, prototypes=found)

    @property
    def _device(self) -> str:
        return self.catalogue.settings.device


# What a ZeroGPU runs, in another process: all it needs is among the arguments, and results are on the CPU.
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
    """An encoded or scored image with the tensors of its windows on a device."""
    windows = [replace(window, **send_to_device(vars(window), device)) for window in image.windows]
    return replace(image, windows=windows)


def read_labels(text: str | None) -> LabelList | None:
    """Labels from words that are separated by commas or lines, each as [`parse_labels`] takes it; None without any.

    Raises:
        ValueError: too many labels or synonyms, a very long one, one that is given twice, or one with a character that
            is no text, such as NUL.
    """
    words = [word.strip() for line in (text or "").splitlines() for word in line.split(",")]
    labels = [word for word in words if word]
    count = sum(label.count(SYNONYM) + 1 for label in labels)
    if count > MAX_LABELS:
        raise ValueError(
            f"{count} labels are more than the {MAX_LABELS} that this demo takes; leave some out."
        )
    _check_texts(labels, "label")
    return parse_labels(labels) if labels else None


def read_templates(text: str | None) -> tuple[str, ...] | None:
    """Prompt templates, one in each line; None without any.

    Raises:
        ValueError: too many, a very long one, or one without `{}`.
    """
    templates = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if len(templates) > MAX_TEMPLATES:
        raise ValueError(
            f"{len(templates)} templates are more than the {MAX_TEMPLATES} that this demo takes."
        )
    _check_texts(templates, "template")
    return tuple(validate_templates(templates)) if templates else None


def _check_texts(texts: list[str], what: str) -> None:
    for text in texts:
        odd = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs")), None)
        if odd is not None:
            raise ValueError(
                f"The {what} {text[:30]!r} has the character {odd!r}, which is no text; leave it out."
            )
        if len(text) > MAX_LETTERS:
            raise ValueError(
                f"The {what} {text[:30]!r}… has {len(text)} letters, more than {MAX_LETTERS}; make it shorter."
            )


class _NamedBytes(BytesIO):
    """A file in memory that error messages call by its own name and not by its place on the server."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name


def read_upload(path: str | None, max_pixels: int) -> Upload:
    """The image of an uploaded file.

    Raises:
        ValueError: none was given, it is gone, it is no image, or too large.
    """
    if not path:
        raise ValueError("Choose an image first: upload one, use the camera, or take an example.")
    try:
        if path.startswith("data:"):
            data, name = b64decode(path.partition(",")[2], validate=True), "image"
        else:
            data, name = Path(path).read_bytes(), Path(path).name
    except binascii.Error as error:
        raise ValueError(f"The image's data: address is broken: {error}") from error
    except OSError as error:
        raise ValueError("The image is not kept on the server any more; please upload it again.") from error
    image = load_image(_NamedBytes(data, name), max_pixels)
    return Upload(image, hashlib.sha256(data).hexdigest(), Path(name).stem)
