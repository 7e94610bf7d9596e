"""Event handlers of the page and the API."""

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
    """Creates a replacement for `gr.Image.preprocess` that returns the path of an uploaded file, or an image's `data:`
    URL, without opening it, because the library has better error messages for broken files.

    Gradio only checks a path if the request declares it as a file, so it is checked here: only files in `folders` are
    accepted.
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
    """Checks a file of a request before Gradio opens it.

    Raises:
        gr.Error: the file is on the web and `web_files` is False, or the path is invalid.
    """
    if "\0" in payload["path"]:
        raise gr.Error(NOT_HERE, print_exception=False)
    if is_http_url_like(payload["path"]) and not web_files:
        raise gr.Error("This server does not fetch URLs; send the image itself.", print_exception=False)
    return payload


def speaking(handler: Callable) -> Callable:
    """Wraps a handler so that its ValueErrors are shown to the visitor as text."""

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
    """The inputs of the page, in the order of the components in `_connect`.

    Args:
        path, words, ...: as in [`Handlers.segment`].
        other: name of the model to compare with, or "none".
        number: number of the window whose groups are shown, from 1.
        study: study of the last call.
        other_study: last study of the model to compare with.
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
        """The inputs as settings of a study; raises a ValueError for invalid values, which API clients can send."""
        if self.window not in ("sliding", "whole"):
            raise ValueError(f"window is {self.window!r}, expected 'sliding' or 'whole'.")
        side = self.short_side
        is_number = isinstance(side, (int, float)) and math.isfinite(side) and side == int(side)
        if not (is_number and (side == 0 or MIN_SHORT_SIDE <= side <= MAX_SHORT_SIDE)):
            raise ValueError(
                f"short_side is {side!r}, expected 0 for the model's own size, or an integer from "
                f"{MIN_SHORT_SIDE} to {MAX_SHORT_SIDE} pixels."
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
        """The background threshold; None without a background."""
        return share(self.threshold, "threshold") if self.background else None


class Handlers:
    """Event handlers of the page and the API; `cache` is the folder of files that Gradio serves and deletes."""

    def __init__(self, settings: Settings, catalogue: Catalogue, cache: str):
        self.settings = settings
        self.laboratory = Laboratory(catalogue)
        self.cache = cache

    def first_study(self, path: str, words: str) -> Study | None:
        """The study that the page opens with; None on ZeroGPU, where only a visitor's request can use the GPU."""
        if is_zerogpu():
            return None
        upload = read_upload(path, self.settings.max_pixels)
        choices = Choices(self.laboratory.catalogue.default)
        return self.laboratory.study(upload, read_labels(words), choices)

    def show_masks(self, *values: Any) -> tuple:
        """All outputs of the page for the values of [`Asked`], and the studies for the next call."""
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
        """The image, the labels, the settings with the model's real name, and the background threshold."""
        upload = read_upload(asked.path, self.settings.max_pixels)
        choices = asked.choices
        choices = replace(choices, model=self.laboratory.catalogue.real_name(choices.model))
        return upload, read_labels(asked.words), choices, asked.limit

    def _studies(
        self, upload: Upload, labels: LabelList | None, choices: Choices, asked: Asked
    ) -> tuple[Study, Study | None]:
        """Studies of the model and of the model to compare with, which uses the first one's labels."""
        others = []
        if asked.other and asked.other != NO_MODEL:
            options = replace(choices.options, min_area=None)
            others = [Choices(self.laboratory.catalogue.real_name(asked.other), options)]
            if others[0].model == choices.model:
                raise ValueError(
                    f"{choices.model} is already the main model; choose a different one to compare with."
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
        """Segment an image by text labels.

        Args:
            image: the image.
            labels: labels separated by commas or lines, optionally with synonyms, a colour and a threshold, as in
                "car|automobile:red:0.4"; empty to find everyday words in the image.
            background: whether pixels where no label reaches the threshold are background.
            threshold: background threshold from 0 to 1.
            model: name of a model offered by the server, or on the Hugging Face Hub.
            window: "sliding" for a sliding window, "whole" for the whole image at once.
            short_side: size in pixels that the image's short side is resized to; 0 for the model's own size.
            min_area: smallest share of the image, from 0 to 1, that a label must cover to be kept; 0 keeps all labels,
                but defaults to 0.02 if no labels are given.
            synonyms: score a label by the "average" of its synonyms, or by the "best" one at each location.
            templates: prompt templates such as "a photo of a {}.", one per line; empty for the model's own.

        Returns:
            the mask as an indexed PNG, and a JSON object with the labels, areas and scores of its values.
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
        """Shows the groups of another window."""
        upload = read_upload(path, self.settings.max_pixels)
        if study is None or study.digest != upload.digest:
            raise ValueError("Press Segment first.")
        index = min(whole_number(number, "window"), len(study.encoded.windows)) - 1
        limit = share(threshold, "threshold") if background else None
        return group_views(upload.image, study, limit, index)

    def show_prototypes(self, path: str | None, study: Study | None) -> tuple:
        """Shows the prototypes of the last segmented image; also returns the study with them."""
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
            "Before each grouping stage, PGSeg clusters the image tokens into prototypes; only the starting points of "
            "the clustering are learned. Each patch has the colour of its most likely prototype. The whole image is "
            "processed at once."
        )
        return gr.Gallery(prototype_views(upload.image, study.prototypes), visible=True), words, study

    @contextmanager
    def _limited(self, *choices: Choices) -> Iterator[None]:
        """Applies the time limit of a request, which starts after the models are loaded."""
        for each in choices:
            self.laboratory.catalogue.load(each.model)
        with time_limit(self.settings.max_seconds):
            yield

    def _file(self, data: bytes, name: str) -> str:
        """Writes a file to the cache, where Gradio serves and later deletes it."""
        return save_bytes_to_cache(data, name, self.cache)


def presets() -> dict[str, tuple[str, bool]]:
    """Labels of the benchmarks, by title, and whether they have a background."""
    known = {b.title: (", ".join(b.classes), b.has_background) for b in BENCHMARKS.values()}
    return {title: preset for title, preset in known.items() if preset[0].count(",") < MAX_LABELS}
