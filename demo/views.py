"""Images, tables and files of a study, in the library's colours."""

import io
from typing import Any

import numpy as np
import torch
from limits import resampled
from PIL import Image
from studies import Prototypes, Study

from pgseg_hf import Segmentation
from pgseg_hf.scoring import best_word
from pgseg_hf.segmentation import remarks_on_one_label
from pgseg_hf.visualization import draw_groups, group_palette, heat_map, indexed_png, label_colours

SHOWN_SIDE = 1024  # longest side on the page in pixels; files have the size of the image
MAX_HEAT_MAP_ROWS = 24
_LEAST_WINDOW_SIDE = 448  # smaller windows are enlarged


def shown_size(width: int, height: int) -> tuple[int, int]:
    """Width and height on the page."""
    factor = min(1, SHOWN_SIDE / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


def colours_of(result: Segmentation) -> dict[str, str]:
    """Colour of each label as #rrggbb."""
    rows = label_colours(result.labels, result.colours)
    return {label: f"#{bytes(rgb).hex()}" for label, rgb in zip(result.labels, rows)}


def annotated(image: Image.Image, result: Segmentation) -> dict[str, Any]:
    """Arguments of `gr.AnnotatedImage`: the image and the masks of the labels present, the largest first, with label
    and score. The page sets their opacity."""
    size = shown_size(*image.size)
    label_map = resampled(result.label_map, size[::-1])
    colours = colours_of(result)
    masks, color_map = [], {}
    for segment in result.segments():
        if not (result.background and segment.value == 0):
            name = f"{segment.label} {segment.score:.2f}"
            masks.append(((label_map == segment.value).astype(float), name))
            color_map[name] = colours[segment.label]
    return {"value": (image.resize(size, Image.Resampling.LANCZOS), masks), "color_map": color_map}


def table(result: Segmentation) -> list[list[str]]:
    """Rows of label, share of the pixels and mean score, the largest first."""
    segments = sorted(result.segments(include_absent=True), key=lambda segment: -segment.area)
    return [
        [segment.label, f"{segment.area:.1%}", "–" if segment.score is None else f"{segment.score:.3f}"]
        for segment in segments
    ]


def mask_file(result: Segmentation) -> bytes:
    """The label map as an indexed PNG at the size of the image."""
    buffer = io.BytesIO()
    colours = label_colours(result.labels, result.colours)
    indexed_png(result.label_map, len(result.labels), result.background, colours).save(buffer, format="PNG")
    return buffer.getvalue()


def notes(study: Study, threshold: float | None) -> list[str]:
    """Remarks on masks that are less meaningful or less detailed than they look."""
    has_background = threshold is not None or bool(study.asked.thresholds)
    said = [*remarks_on_one_label(study.labels, has_background), *study.remarks]
    if study.made_at != study.scored.size:
        said.append(
            f"The image is large for this many labels: masks were computed at {study.made_at[1]:,} x "
            f"{study.made_at[0]:,} pixels and enlarged."
        )
    return said


def report(result: Segmentation, study: Study, threshold: float | None) -> dict[str, Any]:
    """Settings and results, for JSON."""
    colours = colours_of(result)
    height, width = result.label_map.shape
    options = study.choices.options
    return {
        "width": width,
        "height": height,
        "notes": notes(study, threshold),
        "made_at": {"width": study.made_at[1], "height": study.made_at[0]},
        "model": study.choices.model,
        "options": {
            "window": "whole" if options.window_size is None else "sliding",
            "short_side": options.shortest_edge,
            "background_threshold": threshold,
            **{name: getattr(options, name) for name in ("min_area", "synonyms", "templates")},
        },
        "labels": [
            {**vars(segment), "colour": colours.get(segment.label, "#000000")}
            for segment in result.segments(include_absent=True)
        ],
    }


def group_views(
    image: Image.Image, study: Study, threshold: float | None, index: int = 0
) -> tuple[Image.Image, Image.Image, str]:
    """An image of the groups of window `index`, a heat map of their similarity to the labels, and an explanation."""
    window = study.encoded.windows[index]
    scored = study.scored if threshold is None else study.scored.with_background(threshold)
    scores = scored.windows[index].scores
    kept = (study.scored.windows[index].scores > 0).any(dim=0)
    chosen = scores.argmax(dim=1) - int(threshold is not None)
    segments = torch.nn.functional.normalize(window.features.segment_embeds[0].float(), dim=-1)
    count = len(segments)
    cosines = best_word(study.class_embeds.float().flatten(0, -2) @ segments.T, study.class_embeds)
    best = cosines.amax(dim=1).masked_fill(~kept, -2.0)
    rows = sorted(best.topk(min(MAX_HEAT_MAP_ROWS, len(best))).indices.tolist())
    values = cosines.masked_fill(~kept[:, None], float("nan"))[rows]
    of_row = {label: row for row, label in enumerate(rows)}
    heat = heat_map(
        values,
        [study.labels[label] for label in rows],
        [str(group + 1) for group in range(count)],
        [of_row.get(label, -1) for label in chosen.tolist()],
        label_colours(study.labels, study.asked.colours)[rows],
        group_palette(count),
    )
    height, width = window.groups.shape
    part = image.resize(study.encoded.resized[::-1], Image.Resampling.BICUBIC)
    part = part.crop((window.left, window.top, window.left + width, window.top + height))
    factor = max(1, round(_LEAST_WINDOW_SIDE / min(part.size)))
    part = part.resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    drawn = draw_groups(part, window.groups, count, legend=False)
    shares = np.bincount(window.groups.numpy().ravel(), minlength=count) / window.groups.numel()
    names = ["background" if label < 0 else study.labels[label] for label in chosen.tolist()]
    return drawn, heat, _group_words(names, shares, study, len(rows))


def _group_words(names: list[str], shares: np.ndarray, study: Study, shown: int) -> str:
    """Explains the groups' labels and the heat map; labels are code spans, in which Markdown has no effect."""
    became = ", ".join(
        f"{group + 1} ({share:.0%}) → {_plain(name)}"
        for group, (name, share) in enumerate(zip(names, shares))
        if share
    )
    parts = [
        f"Groups in use, with their shares of the window and their labels: {became}.",
        "The heat map shows the cosine similarity of labels and groups. A frame marks the label of each group; grey "
        "labels are not among those that fit the whole window best.",
    ]
    if len(study.encoded.windows) > 1:
        parts.append("Where windows overlap, their scores are averaged.")
    if shown < len(study.labels):
        parts.append(f"The {shown} best of {len(study.labels)} labels are shown.")
    return " ".join(parts)


def _plain(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"


def prototype_views(image: Image.Image, stages: tuple[Prototypes, ...]) -> list[tuple[Image.Image, str]]:
    """An image and a caption of the prototypes of each stage."""
    shown = image.resize(shown_size(*image.size), Image.Resampling.LANCZOS)
    return [
        (
            draw_groups(shown, patches, count, legend=False),
            f"stage {number}: {len(np.unique(patches))} of {count} prototypes in use",
        )
        for number, (patches, count) in enumerate(stages, start=1)
    ]
