"""A Gradio Space: type words, see masks."""

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
from handlers import NO_MODEL, Handlers, as_it_is, check_file, file_as_it_is, presets, speaking
from model_catalogue import Catalogue
from settings import MAX_SHORT_SIDE, Settings, read_settings

EXAMPLES = Path(__file__).parent / "examples"
EXAMPLE_LABELS = {
    "horses.jpg": "horse, person, sand, sea, rock",
    "dog.jpg": "dog, ground, tree",
    "cat.jpg": "cat",
    "pizza.jpg": "pizza, person, bottle, table",
    "bus.jpg": "bus, car, road, tree, grass",
    "pagoda.jpg": "building, tree, sky, road, person",
    "green-jacket.jpg": "jacket, pants, shoe, hair, building, road, tree",
}
WINDOWS = [("sliding window", "sliding"), ("whole picture", "whole")]
# The system's own letters: fonts of the web would need a network.
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
CODE_FONTS = ["ui-monospace", "Consolas", "monospace"]
# On a phone: pictures of prototypes one below the other, and a heat map that is moved sideways.
CSS = """
#prototypes .grid-wrap { max-height: none; height: auto; }
#prototypes .grid-container { grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)) !important; }
#heat .image-container, #heat .image-container > button, #heat .image-frame { display: block; overflow-x: auto; }
#heat img { width: 100%; min-width: 600px; max-width: none; }
"""
INTRODUCTION = """# PGSeg: segment by words
Type what may be in an image and get a mask for each word. The model learned from images and their texts, never from a
mask. The one that ships is small: it knows everyday things and places, finds large ones best, and misses thin ones."""


# Components by what they are for, in the order in which handlers take and give their values.
Parts = dict[str, list[Any]]


class Page(gr.Blocks):
    """Blocks that fetch nothing from the web: Gradio would fetch a file that a request names by an address, for
    whichever component, before the component sees it.

    Args:
        web_files: whether it may.
    """

    def __init__(self, *, web_files: bool, **options: Any):
        super().__init__(**options)
        self.web_files = web_files

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], *args: Any, **options: Any
    ) -> list[Any]:
        """The values of a request's components."""
        traverse(inputs, partial(check_file, web_files=self.web_files), is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *args, **options)


def build_app(settings: Settings) -> gr.Blocks:
    """The page and its API.

    Raises:
        ValueError: a model of the settings that cannot be offered.
    """
    catalogue = Catalogue(settings)
    catalogue.load(catalogue.default)
    keep = settings.keep_seconds
    with Page(
        web_files=settings.web_pictures,
        title="PGSeg: segment by words",
        analytics_enabled=False,
        delete_cache=(max(1, keep // 10), keep),
    ) as app:
        parts: Parts = {"states": [gr.State(None, time_to_live=keep) for _ in range(2)]}
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                parts |= _what_is_asked(catalogue, settings)
            with gr.Column(scale=3, min_width=320):
                parts |= _what_is_found()
        _connect(Handlers(settings, catalogue, app.GRADIO_CACHE), parts)
    app.queue(max_size=100)
    return app


def _what_is_asked(catalogue: Catalogue, settings: Settings) -> Parts:
    """The left side: a picture, words and choices."""
    image = gr.Image(
        type="filepath",
        label="Picture",
        sources=["upload", "webcam", "clipboard"],
        height=320,
        elem_id="picture",
    )
    image.preprocess = file_as_it_is(image.GRADIO_CACHE, str(EXAMPLES))
    words = gr.Textbox(
        next(iter(EXAMPLE_LABELS.values())), label="Words, separated by commas or lines", lines=2, max_lines=8
    )
    preset = gr.Dropdown(list(presets()), value=None, label="Words of a benchmark")
    background = gr.Checkbox(False, label="Leave out what no word fits (background)")
    threshold = gr.Slider(0, 1, 0.5, step=0.01, label="Background where no word scores", elem_id="threshold")
    threshold.preprocess = as_it_is
    button = gr.Button("Segment", variant="primary")
    with gr.Accordion("Model and resolution", open=False):
        picker: dict[str, Any] = {"allow_custom_value": settings.any_hub_model, "interactive": True}
        if settings.any_hub_model:
            picker["info"] = "or any public model of the Hub: owner/name"
        model = gr.Dropdown(catalogue.names, value=catalogue.default, label="Model", **picker)
        other = gr.Dropdown([NO_MODEL, *catalogue.names], value=NO_MODEL, label="Compare with", **picker)
        window = gr.Radio(WINDOWS, value="sliding", label="Seen as")
        short_side = gr.Slider(
            0, MAX_SHORT_SIDE, 0, step=16, label="Short side in pixels (0: the model's own)"
        )
    short_side.preprocess = as_it_is
    examples = [[str(EXAMPLES / name), labels] for name, labels in EXAMPLE_LABELS.items()]
    gr.Examples(examples, [image, words], label="Images to try")
    return {
        "asked": [image, words, background, threshold, model, other, window, short_side],
        "asking": [button, preset],
    }


def _what_is_found() -> Parts:
    """The right side: tabs of results."""
    shown: dict[str, Any] = {"interactive": False, "show_label": False, "buttons": []}
    with gr.Tab("Masks"):
        masks = gr.AnnotatedImage(label="Masks", height=520, elem_id="masks")
        note = gr.Markdown(visible=False)
        with gr.Row():
            mask = gr.DownloadButton("Mask (PNG)", interactive=False, min_width=120)
            labels = gr.DownloadButton("Labels (JSON)", interactive=False, min_width=120)
        rows = gr.Dataframe(
            headers=["label", "area", "score"],
            label="Labels",
            interactive=False,
            datatype="str",
            wrap=True,
            column_widths=["50%", "25%", "25%"],
            elem_id="rows",
        )
    with gr.Tab("Groups"):
        number = gr.Slider(1, 2, 1, step=1, label="Window", visible=False)
        groups = gr.Image(label="Groups", **shown)
        gr.Markdown("### How well the labels fit the groups")
        heat = gr.Image(label="Labels and groups", elem_id="heat", **shown)
        became = gr.Markdown("Press **Segment** first.")
    with gr.Tab("Prototypes") as tab:
        gallery = gr.Gallery(
            label="Prototypes",
            show_label=False,
            height="auto",
            object_fit="contain",
            visible=False,
            elem_id="prototypes",
        )
        explained = gr.Markdown()
    with gr.Tab("Comparison"):
        gr.Markdown("Choose another model under *Model and resolution*: both are shown side by side.")
        with gr.Row(elem_id="comparison"):
            both = [gr.AnnotatedImage(visible=False, min_width=280) for _ in range(2)]
    return {
        "found": [masks, rows, mask, labels, groups, heat, became, number, *both, note],
        "prototypes": [tab, gallery, explained],
    }


def _connect(handlers: Handlers, parts: Parts) -> None:
    """What happens when; requests of all kinds share one queue."""
    image, words, background, threshold, model, _, window, short_side = asked = parts["asked"]
    _, _, _, _, groups, heat, became, number, *_ = found = parts["found"]
    study, _ = states = parts["states"]
    button, preset = parts["asking"]
    tab, *of_prototypes = parts["prototypes"]
    shared: dict[str, Any] = {
        "concurrency_limit": handlers.settings.concurrency,
        "concurrency_id": "model",
        "api_visibility": "private",
    }
    show_masks = speaking(handlers.show_masks)
    inputs, outputs = [*asked, number, *states], [*found, *states]
    # On a phone the masks are below the button.
    button.click(show_masks, inputs, outputs, scroll_to_output=True, **shared)
    words.submit(show_masks, inputs, outputs, **shared)
    # Only once there is something to change.
    again = {"trigger_mode": "always_last", "show_progress": "minimal", **shared}
    moved = _if_segmented(show_masks, len(outputs))
    threshold.release(moved, inputs, outputs, **again)
    background.input(moved, inputs, outputs, **again)
    number.release(
        speaking(handlers.show_groups),
        [image, background, threshold, number, study],
        [groups, heat, became],
        **again,
    )
    tab.select(speaking(handlers.show_prototypes), [image, study], [*of_prototypes, study], **shared)
    known = presets()
    preset.input(
        lambda title: known.get(title, (gr.skip(), gr.skip())),
        preset,
        [words, background],
        api_visibility="private",
        queue=False,
    )
    mask, found_labels = gr.File(visible=False, label="mask"), gr.JSON(visible=False, label="labels")
    gr.Button(visible=False).click(
        speaking(handlers.segment),
        [image, words, background, threshold, model, window, short_side],
        [mask, found_labels],
        **{**shared, "api_visibility": "public"},
        api_name="segment",
    )


def _if_segmented(show_masks: Callable, count: int) -> Callable:
    """The same, but nothing happens before the first study."""

    def again(*args: Any) -> Any:
        return show_masks(*args) if args[-2] is not None else [gr.skip()] * count

    return again


def _keep_clean(folder: Path, keep_seconds: int) -> None:
    """Deletes visitors' files once they are old, whatever becomes of Gradio's own cleaner, which a request that names a
    folder can stop."""
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
    """Starts the server; `options` are those of Gradio's `launch`."""
    theme = gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=CODE_FONTS).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )
    app = build_app(settings)
    _keep_clean(Path(app.GRADIO_CACHE), settings.keep_seconds)
    return app.launch(
        theme=theme,
        css=CSS,
        mcp_server=settings.mcp,
        max_file_size=settings.max_file_size,
        share=False,
        ssr_mode=False,
        footer_links=["api", "settings"],
        **options,
    )


def main() -> None:
    """Serves the page until it is stopped; nothing of the visitors' is left then."""
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
            pass  # the signal's
    # A usual end would abort where a request is still worked on, as torch's threads can't be ended from outside.
    shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
