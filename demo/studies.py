"""From an image and words to scores, keeping what the image encoder made of the image."""

import binascii
import hashlib
import unicodedata
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from limits import map_size, resampled
from model_catalogue import Catalogue
from PIL import Image
from settings import MAX_LABEL_LETTERS, MAX_LABELS, MAX_SHORT_SIDE

from pgseg_hf import Segmentation, SegmentationOptions, Segmenter
from pgseg_hf.images import load_image
from pgseg_hf.prompts import SYNONYM, LabelList, parse_labels
from pgseg_hf.segmentation import EncodedImage, ScoredImage
from pgseg_hf.suggestions import suggest_labels
from pgseg_hf.visualization import prototype_maps

try:
    import spaces
except ImportError:  # anywhere but on a Space with ZeroGPU
    spaces = None

LONGEST_EDGE = 2 * MAX_SHORT_SIDE  # of an image that is resized to a visitor's short side
GPU_SECONDS = 60  # that a function borrows a GPU for, at most


@dataclass(frozen=True)
class Choices:
    """What decides how an image is encoded.

    Args:
        model: a name of the catalogue, or on the Hub.
        sliding: windows over the image instead of the image at once.
        short_side: pixels that the image's short side is resized to; 0 for what the model was saved with.
    """

    model: str
    sliding: bool = True
    short_side: int = 0

    def options(self, background_threshold: float | None = None) -> SegmentationOptions:
        """The same for the library."""
        return SegmentationOptions(
            window_size="auto" if self.sliding else None,
            background_threshold=background_threshold,
            shortest_edge=self.short_side or None,
            longest_edge=LONGEST_EDGE if self.short_side else None,
        )


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


@dataclass(frozen=True)
class Prototypes:
    """One stage's prototypes on an image.

    Args:
        patches: int64 [h, w], the prototype that each patch belongs to.
        count: how many there are.
    """

    patches: np.ndarray = field(repr=False)
    count: int


@dataclass(frozen=True)
class Study:
    """What is kept of a visitor's image, all on the CPU: features, and the scores of the last labels.

    Args:
        digest: of the image's file.
        choices: it was encoded with.
        model: what stands for the model's weights and processor then.
        encoded: its features.
        asked: N labels, with their synonyms, colours and thresholds.
        class_embeds: [N, D], these in the joint space.
        scored: scores without a background.
        remarks: on labels that are far from all that the model learned.
        prototypes: of each stage, once they were looked at.
    """

    digest: str
    choices: Choices
    model: str
    encoded: EncodedImage = field(repr=False)
    asked: LabelList
    class_embeds: torch.Tensor = field(repr=False)
    scored: ScoredImage = field(repr=False)
    remarks: tuple[str, ...] = ()
    prototypes: tuple[Prototypes, ...] | None = field(default=None, repr=False)

    @property
    def labels(self) -> list[str]:
        """What the labels are called."""
        return self.asked.names

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
        on_gpu = spaces.GPU(duration=GPU_SECONDS) if spaces is not None else _as_it_is
        self._study_on_gpu = on_gpu(_study)
        self._prototypes_on_gpu = on_gpu(_prototypes)

    def study(
        self, upload: Upload, labels: list[str], choices: Choices, before: Study | None = None
    ) -> Study:
        """A study of an image, by labels as [`read_labels`] gives them, or by what is found in it where none are given;
        the image encoder only runs where `before` is of another image, other choices or other weights.

        Raises:
            ValueError: a model that cannot be loaded, or that takes too long.
        """
        segmenter = self._model(choices)
        model = self.catalogue.digest(choices.model)
        if before is not None and (before.digest, before.choices, before.model) != (
            upload.digest,
            choices,
            model,
        ):
            before = None
        asked = parse_labels(labels) if labels else None
        if before is not None and asked is not None and before.asked.words == asked.words:
            return before if before.asked == asked else replace(before, asked=asked)
        study = self._study_on_gpu(segmenter, self._device, upload, asked, choices, before)
        return replace(study, model=model)

    def with_prototypes(self, upload: Upload, study: Study) -> Study:
        """The same study with the prototypes of the whole image; empty for a model without any."""
        if study.prototypes is not None and study.digest == upload.digest:
            return study
        segmenter = self._model(study.choices)
        if self.catalogue.digest(study.choices.model) != study.model:
            raise ValueError(f"{study.choices.model} has changed since; press Segment again.")
        found = self._prototypes_on_gpu(segmenter, self._device, upload, study.choices)
        return replace(study, prototypes=found)

    def _model(self, choices: Choices) -> Segmenter:
        """The model, loaded outside of the time that a GPU is lent for."""
        return self.catalogue.load(choices.model)

    @property
    def _device(self) -> str:
        return self.catalogue.settings.device


def _as_it_is(function: Callable) -> Callable:
    return function


# What a ZeroGPU runs, in another process: all it needs is among the arguments, and results are on the CPU.
def _study(
    segmenter: Segmenter,
    device: str,
    upload: Upload,
    asked: LabelList | None,
    choices: Choices,
    before: Study | None,
) -> Study:
    segmenter.model.to(device)
    options = choices.options()
    if before is None:
        encoded = next(iter(segmenter.encode([upload.image], options)))
    else:
        encoded = _moved(before.encoded, device)
    asked = asked or parse_labels(suggest_labels(segmenter, encoded, options=options))
    class_embeds = segmenter.class_embeddings(asked.words, options)
    scored = segmenter.score(encoded, class_embeds, options, may_have_background=True)
    return Study(
        digest=upload.digest,
        choices=choices,
        model="",
        encoded=_moved(encoded, "cpu") if before is None else before.encoded,
        asked=asked,
        class_embeds=class_embeds.cpu(),
        scored=_moved(scored, "cpu"),
        remarks=tuple(segmenter.remarks_on_far_labels(asked.names, class_embeds, options)),
        prototypes=None if before is None else before.prototypes,
    )


def _prototypes(
    segmenter: Segmenter, device: str, upload: Upload, choices: Choices
) -> tuple[Prototypes, ...]:
    if segmenter.model.config.npr_variant == "none":
        return ()
    segmenter.model.to(device)
    pixel_values = prepared(segmenter, upload.image, choices.options())
    with torch.inference_mode():
        output = segmenter.model.vision_model(pixel_values, output_npr=True, output_attentions=True)
    counts = [stage.prototypes.shape[1] for stage in output.npr]
    return tuple(Prototypes(*pair) for pair in zip(prototype_maps(output), counts))


def prepared(segmenter: Segmenter, image: Image.Image, options: SegmentationOptions) -> torch.Tensor:
    """The whole image as the model takes it, [1, 3, h, w]."""
    edges = {"shortest_edge": options.shortest_edge, "longest_edge": options.longest_edge}
    size = {"size": edges} if options.shortest_edge else {}
    batch = segmenter.processor.image_processor(image, return_tensors="pt", **size)
    return batch["pixel_values"].to(segmenter.model.device)


def _moved(image: Any, device: torch.device | str) -> Any:
    """An encoded or scored image with the tensors of its windows on a device."""
    windows = [
        replace(
            window,
            **{name: value.to(device) for name, value in vars(window).items() if torch.is_tensor(value)},
        )
        for window in image.windows
    ]
    return replace(image, windows=windows)


def read_labels(text: str | None) -> list[str]:
    """Labels from words that are separated by commas or lines, each as [`parse_labels`] takes it; none of an empty
    text.

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
    for label in labels:
        odd = next((letter for letter in label if unicodedata.category(letter) in ("Cc", "Cs")), None)
        if odd is not None:
            raise ValueError(
                f"The label {label[:30]!r} has the character {odd!r}, which is no text; leave it out."
            )
    longest = max(labels, key=len, default="")
    if len(longest) > MAX_LABEL_LETTERS:
        raise ValueError(
            f"The label {longest[:30]!r}… has {len(longest)} letters, more than {MAX_LABEL_LETTERS}; make it shorter, "
            "or separate words by commas."
        )
    if labels:
        parse_labels(labels)
    return labels


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
