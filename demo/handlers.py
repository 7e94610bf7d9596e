"""What the page's buttons do."""

import html
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio_client.utils import is_http_url_like
from limits import time_limit
from model_catalogue import Catalogue
from settings import (
    LONGEST_EDGE,
    MAX_DATA_LETTERS,
    MAX_LABELS,
    MAX_SHORT_SIDE,
    MIN_SHORT_SIDE,
    Settings,
    is_zerogpu,
)
from studies import Choices, Laboratory, Study, Upload, read_labels, read_templates, read_upload
from views import annotated, group_views, mask_file, notes, prototype_views, report, table

from pgseg_hf import SegmentationOptions
from pgseg_hf.evaluation.benchmarks.catalogue import BENCHMARKS
from pgseg_hf.prompts import LabelList
from pgseg_hf.values import share, whole_number

NO_MODEL = "none"
NOT_HERE = "The image is not on the server; please upload it again."


def file_as_it_is(*folders: str) -> Callable[[Any], str | None]:
    """What takes the place of `gr.Image.preprocess`, which would open the file: the library says what is wrong with a
    bad one. It gives the path of an uploaded file, or a `data:` address of an image.

    Gradio checks a path only where the request says that it is a file, so it is checked here.

    Args:
        folders: where files of visitors lie; no other is opened.
    """

    def preprocess(payload: Any) -> str | None:
        if payload is None:
            return None
        if payload.url and payload.url.startswith("data:image/"):
            if len(payload.url) > MAX_DATA_LETTERS:
                raise gr.Error("The image is too large; upload it as a file.", print_exception=False)
            return payload.url
        try:
            place = Path(payload.path or "").resolve()
            known = place.is_file() and any(place.is_relative_to(Path(each).resolve()) for each in folders)
        except (OSError, ValueError):
            known = False
        if not known:
            raise gr.Error(NOT_HERE, print_exception=False)
        return str(place)

    return preprocess


def check_file(payload: dict[str, Any], web_files: bool) -> dict[str, Any]:
    """A file of a request before Gradio looks for it.

    Raises:
        gr.Error: it lies on the web, unless that is allowed, or its path can be none.
    """
    if "\0" in payload["path"]:
        raise gr.Error(NOT_HERE, print_exception=False)
    if is_http_url_like(payload["path"]) and not web_files:
        raise gr.Error("A web address is not fetched here; send the image itself.", print_exception=False)
    return payload


def speaking(handler: Callable) -> Callable:
    """A handler whose refusals are shown to the visitor, as text."""

    @wraps(handler)
    def wrapped(*args: Any) -> Any:
        try:
            return handler(*args)
        except ValueError as error:
            # A toast renders HTML, and messages quote what visitors typed.
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error

    return wrapped


@dataclass(frozen=True)
class Asked:
    """The values of the page that its masks depend on, in the order of the components in `_connect`.

    Args:
        path, words, ...: as [`Handlers.segment`] takes them.
        other: name of the model to compare with, or "none".
        number: of the window whose groups are shown, from 1.
        study: of the last call.
        other_study: of the other model.
    """

    path: str | None
    words: str | None
    background: bool
    threshold: float | None
    model: str | None
    window: str
    short_side: int
    min_area: float | None
    synonyms: Any
    templates: str | None
    other: str | None = None
    number: int = 1
    study: Study | None = None
    other_study: Study | None = None

    @property
    def choices(self) -> Choices:
        """The same for a study.

        Raises:
            ValueError: a choice that there is not; programs send anything.
        """
        if self.window not in ("sliding", "whole"):
            raise ValueError(f"window is {self.window!r}, expected 'sliding' or 'whole'.")
        side = self.short_side
        is_number = isinstance(side, (int, float)) and math.isfinite(side) and side == int(side)
        if not (is_number and (side == 0 or MIN_SHORT_SIDE <= side <= MAX_SHORT_SIDE)):
            raise ValueError(
                f"short_side is {side!r}, expected 0 for the model's own, or a whole number of pixels from "
                f"{MIN_SHORT_SIDE} to {MAX_SHORT_SIDE}."
            )
        options = SegmentationOptions(
            window_size="auto" if self.window == "sliding" else None,
            shortest_edge=int(side) or None,
            longest_edge=LONGEST_EDGE if side else None,
            min_area=self.min_area or None,
            synonyms=self.synonyms,
            templates=read_templates(self.templates),
        )
        return Choices(self.model or "", options)

    @property
    def limit(self) -> float | None:
        """The background threshold of the library."""
        return share(self.threshold, "threshold") if self.background else None


class Handlers:
    """What the page's buttons do.

    Args:
        settings: of the server.
        catalogue: its models.
        cache: folder of the files that Gradio serves and deletes.
    """

    def __init__(self, settings: Settings, catalogue: Catalogue, cache: str):
        self.settings = settings
        self.laboratory = Laboratory(catalogue)
        self.cache = cache

    def first_study(self, path: str, words: str) -> Study | None:
        """What the page opens with; nothing yet where only a visitor can borrow the GPU."""
        if is_zerogpu():
            return None
        upload = read_upload(path, self.settings.max_pixels)
        choices = Choices(self.laboratory.catalogue.default)
        return self.laboratory.study(upload, read_labels(words), choices)

    def show_masks(self, *values: Any) -> tuple:
        """All that the page shows for the values of [`Asked`], and the studies for the next call."""
        asked = Asked(*values)
        upload, labels, choices, limit = self._read(asked)
        study, other_study = self._studies(upload, labels, choices, asked)
        result = study.segmentation(limit)
        both = [gr.AnnotatedImage(visible=False)] * 2
        if other_study is not None:
            results = {choices.model: result, other_study.choices.model: other_study.segmentation(limit)}
            both = [
                gr.AnnotatedImage(**annotated(upload.image, each), label=name, visible=True)
                for name, each in results.items()
            ]
        count = len(study.encoded.windows)
        seen_before = asked.study is not None and asked.study.encoded is study.encoded
        number = whole_number(asked.number, "window") if seen_before else count // 2 + 1
        said = notes(study, limit)
        explained = json.dumps(report(result, study, limit), indent=1, ensure_ascii=False)
        files = {"mask.png": mask_file(result), "labels.json": explained.encode()}
        return (
            gr.AnnotatedImage(**annotated(upload.image, result)),
            table(result),
            *(
                gr.DownloadButton(value=self._file(data, f"{upload.name}-{name}"), interactive=True)
                for name, data in files.items()
            ),
            *group_views(upload.image, study, limit, number - 1),
            gr.Slider(maximum=max(2, count), value=number, visible=count > 1),
            *both,
            gr.Markdown("\n\n".join(said), visible=bool(said)),
            gr.skip() if labels else ", ".join(study.labels),
            study,
            other_study,
        )

    def _read(self, asked: Asked) -> tuple[Upload, LabelList | None, Choices, float | None]:
        """The image, the labels, what was chosen under the model's real name, and the background threshold."""
        upload = read_upload(asked.path, self.settings.max_pixels)
        choices = asked.choices
        choices = replace(choices, model=self.laboratory.catalogue.real_name(choices.model))
        return upload, read_labels(asked.words), choices, asked.limit

    def _studies(
        self, upload: Upload, labels: LabelList | None, choices: Choices, asked: Asked
    ) -> tuple[Study, Study | None]:
        """Of the model, and of the one to compare with, by the labels that count for the first."""
        others = []
        if asked.other and asked.other != NO_MODEL:
            options = replace(choices.options, min_area=None)
            others = [Choices(self.laboratory.catalogue.real_name(asked.other), options)]
            if others[0].model == choices.model:
                raise ValueError(
                    f"{choices.model} is the model already; choose another one to compare it with."
                )
        make = self.laboratory.study
        with self._limited(choices, *others):
            study = make(upload, labels, choices, asked.study)
            compared = [make(upload, study.kept_labels, each, asked.other_study) for each in others]
        return study, *(compared or [None])

    def segment(
        self,
        image: str | None,
        labels: str,
        background: bool,
        threshold: float,
        model: str,
        window: str,
        short_side: int,
        min_area: float,
        synonyms: Any,
        templates: str | None,
    ) -> tuple[str, dict]:
        """Segment an image by words.

        Args:
            image: the image.
            labels: what may be in it, separated by commas or lines, each with its synonyms, colour and threshold if it
                has them, as in "car|automobile:red:0.4"; empty for what is found of everyday words.
            background: whether there is background where no label scores as much as the threshold.
            threshold: from 0 to 1.
            model: name of a model that the server offers, or of one on the Hugging Face Hub.
            window: "sliding" for windows over the image, "whole" for the image at once.
            short_side: pixels that the image's short side is resized to, 0 for what the model was saved with.
            min_area: share of the image that a label must cover to count when all compete, from 0 to 1; 0 for all
                labels, and 0.02 where there are none.
            synonyms: whether a label is scored by the "average" of its synonyms or by the "best" at each place.
            templates: prompts such as "a photo of a {}.", one a line; empty for the model's own.

        Returns:
            the mask, an indexed PNG whose values are explained in the second result: labels, areas and scores.
        """
        how = (model, window, short_side, min_area, synonyms, templates)
        upload, asked, choices, limit = self._read(Asked(image, labels, background, threshold, *how))
        with self._limited(choices):
            study = self.laboratory.study(upload, asked, choices)
        result = study.segmentation(limit)
        return self._file(mask_file(result), f"{upload.name}-mask.png"), report(result, study, limit)

    def show_groups(
        self, path: str | None, background: bool, threshold: float, number: int, study: Study | None
    ) -> tuple:
        """The groups of another window."""
        upload = read_upload(path, self.settings.max_pixels)
        if study is None or study.digest != upload.digest:
            raise ValueError("Press Segment first.")
        index = min(whole_number(number, "window"), len(study.encoded.windows)) - 1
        limit = share(threshold, "threshold") if background else None
        return group_views(upload.image, study, limit, index)

    def show_prototypes(self, path: str | None, study: Study | None) -> tuple:
        """The prototypes of the image that was segmented last, and the study with them."""
        if study is None:
            return gr.Gallery(visible=False), "Press **Segment** first.", None
        upload = read_upload(path, self.settings.max_pixels)
        if study.digest != upload.digest:
            return gr.Gallery(visible=False), "This is a new image; press **Segment** first.", study
        with self._limited(study.choices):
            study = self.laboratory.with_prototypes(upload, study)
        if not study.prototypes:
            return gr.Gallery(visible=False), "This model has no prototypes.", study
        words = (
            "Before each grouping, PGSeg looks for prototypes among the tokens themselves, with nothing learned but "
            "where the search begins. Each patch has the colour of the prototype that it belongs to most, on the whole "
            "image at once."
        )
        return gr.Gallery(prototype_views(upload.image, study.prototypes), visible=True), words, study

    @contextmanager
    def _limited(self, *choices: Choices) -> Iterator[None]:
        """The time that models have for a request, which begins once they are loaded."""
        for each in choices:
            self.laboratory.catalogue.load(each.model)
        with time_limit(self.settings.max_seconds):
            yield

    def _file(self, data: bytes, name: str) -> str:
        """A file where Gradio serves it, and deletes it once it was handed out."""
        return save_bytes_to_cache(data, name, self.cache)


def presets() -> dict[str, tuple[str, bool]]:
    """Words of the known benchmarks by title, and whether they have a background."""
    known = {b.title: (", ".join(b.classes), b.has_background) for b in BENCHMARKS.values()}
    return {title: preset for title, preset in known.items() if preset[0].count(",") < MAX_LABELS}
