"""A Gradio Space: type words, see masks."""

from typing import Any

import gradio as gr
from PIL import Image

from pgseg_hf import SegmentationOptions, load_segmenter
from pgseg_hf.prompts import validate_labels
from pgseg_hf.visualization import palette

SEGMENTER = load_segmenter()
EXAMPLE_LABELS = "building, road, pavement, tree, sky, car, pedestrian"


def segment(image: Image.Image | None, words: str, threshold: float) -> tuple[Any, list[list[Any]]]:
    """Masks of the words for `gr.AnnotatedImage`, and rows of label, share of pixels and score."""
    if image is None:
        raise gr.Error("Choose a picture first.")
    try:
        labels = validate_labels([word for line in words.splitlines() for word in line.split(",")])
        options = SegmentationOptions(background_threshold=threshold or None)
        result = SEGMENTER(image, labels, options)
    except ValueError as error:
        raise gr.Error(str(error)) from error
    segments = result.segments()
    masks = [(result.mask(segment), segment.label) for segment in segments if segment.label in labels]
    rows = [[segment.label, f"{segment.area:.1%}", f"{segment.score:.3f}"] for segment in segments]
    colours = {label: f"#{bytes(rgb).hex()}" for label, rgb in zip(labels, palette(len(labels)), strict=True)}
    return gr.AnnotatedImage(value=(image, masks), color_map=colours), rows


def build_app() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="PGSeg: segment by words") as app:
        gr.Markdown(
            "# PGSeg\nSegment a picture by words. The model learned from photographs and tags, never from a mask."
        )
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="pil", label="Picture")
                words = gr.Textbox(EXAMPLE_LABELS, label="Words, separated by commas or lines", lines=2)
                threshold = gr.Slider(
                    0, 1, 0, step=0.01, label="Background below this score (0: no background)"
                )
                button = gr.Button("Segment", variant="primary")
            with gr.Column():
                masks = gr.AnnotatedImage(label="Masks")
                table = gr.Dataframe(headers=["label", "share", "score"], label="Labels", interactive=False)
        button.click(segment, [image, words, threshold], [masks, table], api_name="segment")
    return app


if __name__ == "__main__":
    build_app().launch()
