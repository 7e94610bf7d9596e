"""A Gradio Space that segments images by text labels."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from gradio_client.utils import is_file_obj_with_meta, traverse
from handlers import NO_MODEL, Handlers, check_file, file_as_it_is, presets, speaking
from model_catalogue import Catalogue
from settings import MAX_SHORT_SIDE, Settings, read_settings

from pgseg_hf import DEFAULT_CHECKPOINT
from pgseg_hf.suggestions import MIN_AREA

HERE = Path(__file__).parent
EXAMPLES = HERE / "examples"
EXAMPLE_LABELS = {
    "horses.jpg": "horse, person, sand, sea, rock",
    "dog.jpg": "dog, ground, tree",
    "cat.jpg": "cat",
    "pizza.jpg": "pizza, person, bottle, table",
    "bus.jpg": "bus, car, road, tree, grass",
    "pagoda.jpg": "building, tree, sky, road, person",
    "green-jacket.jpg": "jacket, pants, shoe, hair, building, road, tree",
}
FIRST = "horses.jpg"  # segmented when the page opens
WINDOWS = [("sliding window", "sliding"), ("whole image", "whole")]
SYNONYMS = [("average", "average"), ("best at each place", "best")]
# System fonts, because web fonts need a network.
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
CODE_FONTS = ["ui-monospace", "Consolas", "monospace"]
INTRODUCTION = """# PGSeg: segment by words
Type what may be in an image and get a mask for each label. The model was trained on images and texts, without masks.
The included model is small: it works best for large objects and misses thin ones.
[Paper](https://arxiv.org/abs/2310.19001) · [Code](https://pypi.org/project/pgseg-hf/), Apache-2.0, based on the
[released code](https://github.com/Ferenas/PGSeg) ·
[Weights](#licence), for research only"""


# Components by purpose, in the order of the handlers' arguments and results.
Parts = dict[str, list[Any]]


class Page(gr.Blocks):
    """Blocks that only fetch files from the web if `web_files` is True; Gradio fetches every URL of a request."""

    def __init__(self, *, web_files: bool, **options: Any):
        super().__init__(**options)
        self.web_files = web_files

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], *args: Any, **options: Any
    ) -> list[Any]:
        """Checks the files of a request before Gradio opens them."""
        traverse(inputs, partial(check_file, web_files=self.web_files), is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *args, **options)


def build_app(settings: Settings) -> gr.Blocks:
    """Builds the page and its API; raises a ValueError if a model of the settings cannot be offered."""
    catalogue = Catalogue(settings)
    catalogue.load(catalogue.default)
    keep = settings.keep_seconds
    with Page(
        web_files=settings.web_images,
        title="PGSeg: segment by words",
        analytics_enabled=False,
        delete_cache=(max(1, keep // 10), keep),
    ) as app:
        handlers = Handlers(settings, catalogue, app.GRADIO_CACHE)
        first = handlers.first_study(str(EXAMPLES / FIRST), EXAMPLE_LABELS[FIRST])
        parts: Parts = {"states": [gr.State(study, time_to_live=keep) for study in (first, None)]}
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                parts |= _what_is_asked(catalogue, settings)
            with gr.Column(scale=3, min_width=320, elem_id="results"):
                parts |= _what_is_found(catalogue, settings)
        with gr.Accordion("Licence and limits of the weights", open=False, elem_id="licence"):
            gr.Markdown(_model_card())
        _connect(handlers, parts, app)
    app.queue(max_size=100)
    return app


def _what_is_asked(catalogue: Catalogue, settings: Settings) -> Parts:
    """The left column: image, labels and options."""
    image = gr.Image(
        str(EXAMPLES / FIRST),
        type="filepath",
        label="Image",
        sources=["upload", "webcam", "clipboard"],
        height=240,
        elem_id="image",
    )
    image.preprocess = file_as_it_is(image.GRADIO_CACHE, str(EXAMPLES))
    samples = [[str(EXAMPLES / name)] for name in EXAMPLE_LABELS]
    shown = [gr.Image(visible=False)]
    examples = gr.Dataset(
        components=shown, samples=samples, type="index", label="Examples", elem_id="examples"
    )
    words = gr.Textbox(
        EXAMPLE_LABELS[FIRST],
        label="Labels, separated by commas or lines",
        info="car|automobile:red:0.4 has a synonym, a colour and a threshold",
        max_lines=8,
    )
    with gr.Row():
        button = gr.Button("Segment", variant="primary", min_width=120)
        no_words = gr.Button("What is in it?", min_width=120)
    with gr.Row():
        background = gr.Checkbox(False, label="Background where no label fits", min_width=150)
        threshold = _slider(
            0.5, "Background threshold", elem_id="threshold", interactive=False, min_width=150
        )
    with gr.Accordion("Model, resolution, labels and prompts", open=False):
        preset, *choices = _choices(catalogue, settings)
    return {
        "asked": [image, words, background, threshold, *choices],
        "asking": [button, no_words, examples, preset],
    }


def _choices(catalogue: Catalogue, settings: Settings) -> list[Any]:
    """Labels of a benchmark, and rarely used options."""
    model = gr.Dropdown(
        catalogue.names, value=catalogue.default, label="Model", **_picker(catalogue, settings)
    )
    preset = gr.Dropdown(list(presets()), value=None, label="Labels of a benchmark")
    window = gr.Radio(WINDOWS, value="sliding", label="Inference")
    short_side = _slider(0, "Short side in pixels (0: the model's own)", maximum=MAX_SHORT_SIDE, step=16)
    info = f"share of the image; 0 keeps all labels ({MIN_AREA} for What is in it?)"
    min_area = _slider(0, "Minimum area of a label", info=info)
    info = "for labels such as car|automobile"
    synonyms = gr.Radio(
        SYNONYMS, value="average", label="Synonyms", info=info, interactive=False, elem_id="synonyms"
    )
    templates = gr.Textbox(
        "",  # without a default, API clients would have to pass one
        label="Prompt templates, one per line",
        info="{} stands for the label; empty for the model's own templates",
        placeholder="a photo of a {}.",
        lines=2,
        max_lines=8,
    )
    return [preset, model, window, short_side, min_area, synonyms, templates]


def _slider(value: float, label: str, maximum: float = 1, step: float = 0.01, **options: Any) -> gr.Slider:
    """A slider from 0 whose value is checked by the handlers, because Gradio's error messages are not helpful."""
    slider = gr.Slider(0, maximum, value, step=step, label=label, **options)
    slider.preprocess = lambda payload: payload
    return slider


def _picker(catalogue: Catalogue, settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {"allow_custom_value": settings.any_hub_model, "interactive": True}
    if settings.any_hub_model:
        options["info"] = "or any public model on the Hub, such as nvidia/groupvit-gcc-yfcc"
    elif len(catalogue.names) == 1:
        options["info"] = "start the server with --models FOLDER or NAME to add models"
    return options


def _model_card() -> str:
    """The model card of the included checkpoint, without front matter and title."""
    text = (Path(DEFAULT_CHECKPOINT) / "README.md").read_text(encoding="utf-8")
    return text.split("---\n", 2)[2].partition("\n# ")[2].partition("\n")[2]


def _what_is_found(catalogue: Catalogue, settings: Settings) -> Parts:
    """The right column: tabs with results."""
    shown: dict[str, Any] = {"interactive": False, "show_label": False, "buttons": []}
    with gr.Tab("Masks"):
        masks = gr.AnnotatedImage(label="Masks", show_label=False, height=440, elem_id="masks")
        with gr.Row():
            view = gr.Radio(["Masks", "Image"], value="Masks", label="Show", min_width=120, scale=1)
            opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Opacity", min_width=160, scale=2)
        js = "(view, opacity) => document.body.style.setProperty('--mask-opacity', view === 'Image' ? 0 : opacity)"
        for control in (view, opacity):
            control.change(None, [view, opacity], js=js)
        note = gr.Markdown(visible=False)
        with gr.Row():
            mask = gr.DownloadButton("Mask (PNG)", interactive=False, min_width=120)
            labels = gr.DownloadButton("Labels (JSON)", interactive=False, min_width=120)
        columns: dict[str, Any] = {
            "headers": ["label", "area", "score"],
            "column_widths": ["50%", "25%", "25%"],
        }
        rows = gr.Dataframe(
            label="Labels", interactive=False, datatype="str", wrap=True, elem_id="rows", **columns
        )
    with gr.Tab("Groups"):
        number = gr.Slider(1, 2, 1, step=1, label="Window", visible=False)
        groups = gr.Image(label="Groups", **shown)
        gr.Markdown("### How well the labels fit the groups")
        heat = gr.Image(label="Labels and groups", elem_id="heat", **shown)
        became = gr.Markdown("Press **Segment** first.")
    with gr.Tab("Prototypes") as tab:
        gallery = gr.Gallery(
            show_label=False, height="auto", object_fit="contain", visible=False, elem_id="prototypes"
        )
        explained = gr.Markdown()
    with gr.Tab("Comparison"):
        gr.Markdown("Choose a second model and press **Segment** to compare both side by side.")
        names = [NO_MODEL, *catalogue.names]
        other = gr.Dropdown(names, value=NO_MODEL, label="Compare with", **_picker(catalogue, settings))
        with gr.Row(elem_id="comparison"):
            both = [gr.AnnotatedImage(visible=False, min_width=280) for _ in range(2)]
    return {
        "found": [masks, rows, mask, labels, groups, heat, became, number, *both, note],
        "prototypes": [tab, gallery, explained],
        "other": [other],
    }


def _connect(handlers: Handlers, parts: Parts, app: gr.Blocks) -> None:
    """Connects components and handlers; all requests share one queue."""
    image, words, background, threshold, *choices = asked = parts["asked"]
    _, _, _, _, groups, heat, became, number, *_ = found = parts["found"]
    study, _ = states = parts["states"]
    button, no_words, examples, preset = parts["asking"]
    tab, *of_prototypes = parts["prototypes"]
    private: dict[str, Any] = {"api_visibility": "private"}
    at_once = private | {"queue": False}
    shared = private | {"concurrency_limit": handlers.settings.concurrency, "concurrency_id": "model"}
    show_masks = speaking(handlers.show_masks)
    inputs, outputs = [*asked, *parts["other"], number, *states], [*found, words, *states]
    show_results = f"(...values) => {{ showResults(); return values.slice(0, {len(inputs)}); }}"
    app.load(show_masks, inputs, outputs, show_progress="hidden", **shared)
    # No progress overlay on the labels, so that users can correct them after an error.
    asking = {"js": show_results, "show_progress_on": found, **shared}
    gr.on([button.click, words.submit], show_masks, inputs, outputs, **asking)
    nothing = gr.State("")
    without_words = [nothing if each is words else each for each in inputs]
    no_words.click(show_masks, without_words, outputs, **asking)
    known = [(str(EXAMPLES / name), labels) for name, labels in EXAMPLE_LABELS.items()]
    chosen = examples.click(lambda index: known[index], examples, [image, words], **at_once)
    chosen.then(show_masks, inputs, outputs, **asking)
    of_title = presets()
    preset.input(
        lambda title: of_title.get(title, (gr.skip(), gr.skip())), preset, [words, background], **at_once
    )
    background.change(lambda on: gr.Slider(interactive=on), background, threshold, **at_once)
    has_synonyms = "(words) => ({ __type__: 'update', interactive: words.includes('|') })"
    *_, synonyms, _ = choices
    words.change(None, words, synonyms, js=has_synonyms)
    # These only update existing results.
    again = {"trigger_mode": "always_last", "show_progress": "minimal", "show_progress_on": found, **shared}
    moved = _if_segmented(show_masks, len(outputs))
    threshold.release(moved, inputs, outputs, **again)
    background.input(moved, inputs, outputs, **again)
    of_groups = [image, background, threshold, number, study]
    number.release(speaking(handlers.show_groups), of_groups, [groups, heat, became], **again)
    tab.select(speaking(handlers.show_prototypes), [image, study], [*of_prototypes, study], **shared)
    # The page's defaults are an example; API clients need their own inputs, without these defaults.
    given, said = gr.Image(type="filepath", visible=False, label="Image"), gr.Textbox("", visible=False)
    given.preprocess = image.preprocess
    mask, found_labels = gr.File(visible=False, label="mask"), gr.JSON(visible=False, label="labels")
    gr.Button(visible=False).click(
        speaking(handlers.segment),
        [given, said, background, threshold, *choices],
        [mask, found_labels],
        **{**shared, "api_visibility": "public"},
        api_name="segment",
    )


def _if_segmented(show_masks: Callable, count: int) -> Callable:
    """Wraps `show_masks` so that nothing happens before the first study."""

    def again(*args: Any) -> Any:
        return show_masks(*args) if args[-2] is not None else [gr.skip()] * count

    return again


def _keep_clean(folder: Path, keep_seconds: int) -> None:
    """Deletes visitors' old files in a thread, because a request that names a folder can stop Gradio's own cleanup."""
    ours = set(folder.rglob("*"))

    def clean() -> None:
        while True:
            time.sleep(max(1, keep_seconds / 10))
            for path in sorted(set(folder.rglob("*")) - ours, reverse=True):
                with contextlib.suppress(OSError):
                    if time.time() - path.lstat().st_mtime <= keep_seconds:
                        continue
                    if path.is_dir():
                        path.rmdir()  # only where it is empty
                    else:
                        path.unlink()

    threading.Thread(target=clean, daemon=True).start()


def launch(settings: Settings, **options: Any) -> Any:
    """Starts the server; `options` are passed to Gradio's `launch`."""
    theme = gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=CODE_FONTS).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )
    app = build_app(settings)
    _keep_clean(Path(app.GRADIO_CACHE), settings.keep_seconds)
    return app.launch(
        theme=theme,
        css_paths=HERE / "page.css",
        js=(HERE / "page.js").read_text(),
        mcp_server=settings.mcp,
        max_file_size=settings.max_file_size,
        allowed_paths=[str(EXAMPLES)],
        share=False,
        ssr_mode=False,
        footer_links=["api", "settings"],
        **options,
    )


def main() -> None:
    """Serves the page until the process is stopped, and then deletes all visitors' files."""
    settings = read_settings()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    status = 0
    with tempfile.TemporaryDirectory(prefix="pgseg-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            launch(settings)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
        except SystemExit:
            pass  # raised by the signal handler
    # A normal exit can abort while a request is running, because torch's threads cannot be stopped from outside.
    shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
