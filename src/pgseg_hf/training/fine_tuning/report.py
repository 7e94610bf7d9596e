"""The report of `pgseg train`: metrics on held-out photos before and after fine-tuning, and advice."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from os.path import normpath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from ...checkpoint import load_segmenter
from ...data.metadata import find_metadata
from ...data.photos import LabelledPhotos
from ...data.records import Record
from ...evaluation.benchmarks.mask_dataset import MaskDataset, MaskFolder
from ...evaluation.evaluator import MaskOptions, evaluate_masks, without_nan
from ...files import write_image, write_json, write_text
from ...images import load_image
from ...options import BACKGROUND
from ...segmentation import Segmentation, SegmentationOptions, Segmenter
from ...visualization import overlay, side_by_side

logger = logging.get_logger(__name__)

REPORT_NAME, JSON_NAME, DRAWINGS_NAME = "report.md", "report.json", "report"
FEW_PHOTOS = 10
"""A label with fewer training photos than this counts as having too few."""
NEARLY_ALL = 0.9
# Minimum share of correctly ordered photos for a pair of labels; 0.5 is chance, 1 is perfect.
TOLD_APART = 0.6
LEAST_TO_JUDGE = 3
MOST_COMPARED = 60
_DRAWINGS = 4
_LABELS_OF_A_DRAWING = 20
_SHOWN = 10


def write_report(
    args: argparse.Namespace,
    photos: LabelledPhotos,
    train: Sequence[Record],
    held_out: Sequence[Record],
    masks: MaskDataset | None,
    results: dict[str, Any],
) -> dict[str, Any]:
    """Evaluates both models and writes `report.md`, `report.json` and images; returns the content of the JSON."""
    output, device = args.output, results["device"]
    segmenters = {
        "before": load_segmenter(args.model, device=device),
        "after": load_segmenter(output, device=device),
    }
    labels = [label for label, _ in photos.count_labels().most_common()]
    measured = [photo for photo in held_out if photo.tags or not labels]
    texts = labels or list(dict.fromkeys(caption for photo in measured for caption in photo.captions))
    scores: dict[str, np.ndarray] = {}
    for name, segmenter in segmenters.items():
        scores[name], measured = score_photos(segmenter, photos, measured, texts, bool(labels))
    targets = np.array(
        [[text in (photo.tags or photo.captions) for text in texts] for photo in measured], bool
    ).reshape(len(measured), len(texts))
    precisions = {name: average_precisions(of_model, targets) for name, of_model in scores.items()}
    report: dict[str, Any] = {
        "kind": "labels" if labels else "captions",
        "photos": {"train": len(train), "held_out": len(measured)},
        "by_chance": precision_by_chance(targets),
        "steps": results["steps"],
        "seconds": round(results["train_runtime"], 1),
    }
    for name, segmenter in segmenters.items():
        report[name] = image_figures(scores[name], targets, precisions[name])
        if masks is not None:
            report[name] |= mask_figures(segmenter, masks)
    if labels:
        report["labels"] = _rows_of_labels(labels, train, measured, precisions)
        report["never_told_apart"] = confused_labels(scores["after"], targets, texts)
        report["always_together"] = labels_always_together(photos.photos)
    report["left_out"] = photos.left_out
    report["drawings"] = draw_examples(segmenters, measured, labels, output)
    report["advice"] = advice(report, len(photos.photos))
    report = without_nan(report)
    write_text(to_markdown(report, args), output / REPORT_NAME)
    write_json(report, output / JSON_NAME)
    return report


@torch.inference_mode()
def score_photos(
    segmenter: Segmenter,
    photos: LabelledPhotos,
    measured: Sequence[Record],
    texts: Sequence[str],
    are_labels: bool,
) -> tuple[np.ndarray, list[Record]]:
    """`logits_per_image` [photos, texts] of the photos, preprocessed as for segmentation, and the photos that could be
    read. The others are added to `photos.left_out`."""
    model, processor = segmenter.model, segmenter.processor
    if are_labels:
        embeds = segmenter.class_embeddings(texts)
    else:
        encoded = processor(text=list(texts), return_tensors="pt").to(model.device)
        embeds = model.get_text_features(encoded["input_ids"], encoded["attention_mask"]).pooler_output
    rows, read = [], []
    for photo in logging.tqdm(measured, desc="Measuring", unit="image"):
        try:
            image = load_image(photo.image)
        except ValueError:
            photos.left_out.setdefault("broken image", []).append(photo.name)
            continue
        pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixels.to(model.device))
        rows.append(model.get_logits(features, embeds)[0][0].float().cpu().numpy())
        read.append(photo)
    return np.array(rows).reshape(len(read), len(texts)), read


def average_precisions(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The average precision of each text over the photos, [texts]. NaN for a text that all photos have, or none."""
    order = np.argsort(-scores, axis=0, kind="stable")
    hits = np.take_along_axis(targets, order, axis=0)
    precision = np.cumsum(hits, axis=0) / np.arange(1, len(hits) + 1)[:, None]
    count = targets.sum(axis=0)
    is_judged = (count > 0) & (count < len(targets))
    return np.where(is_judged, (precision * hits).sum(axis=0) / np.maximum(count, 1), np.nan)


def precision_by_chance(targets: np.ndarray) -> float | None:
    """The mean average precision by chance, over the texts for which [`average_precisions`] is not NaN, else None."""
    is_judged = targets.any(axis=0) & ~targets.all(axis=0)
    return float(targets.mean(axis=0)[is_judged].mean()) if is_judged.any() else None


def image_figures(scores: np.ndarray, targets: np.ndarray, precisions: np.ndarray) -> dict[str, float]:
    """`mean_average_precision`, and `top1`: the share of photos whose best text is one of theirs. NaN without data."""
    judged = precisions[np.isfinite(precisions)]
    best = targets[np.arange(len(scores)), scores.argmax(axis=1)] if scores.size else np.zeros(0)
    return {
        "mean_average_precision": float(judged.mean()) if judged.size else float("nan"),
        "top1": float(best.mean()) if best.size else float("nan"),
    }


def find_masks(args: argparse.Namespace, held_out: Sequence[Record]) -> MaskDataset | None:
    """The masks from `--masks`, or those of the held-out photos if their folder has masks."""
    if args.masks is not None:
        return MaskFolder(args.masks)
    if find_metadata(args.photos) is None and not (args.photos / "masks").is_dir():
        return None
    try:
        folder = MaskFolder(args.photos)
    except ValueError as error:
        if (args.photos / "masks").is_dir():
            logger.warning(f"mIoU is not computed: {error}")
        return None
    names = {normpath(args.photos / photo.name) for photo in held_out}
    found = [each for each in folder.images if normpath(str(each.image)) in names]
    return folder.only(found) if found else None


def mask_figures(segmenter: Segmenter, masks: MaskDataset) -> dict[str, float]:
    """`mean_iou` and `pixel_accuracy`, with a background threshold of 0.5 if the masks have a background."""
    options = SegmentationOptions(background_threshold=None if masks.background is None else 0.5)
    found = evaluate_masks(segmenter, masks, MaskOptions(options, skip_broken=True)).to_dict()
    return {name: found[name] for name in ("mean_iou", "pixel_accuracy")}


def _rows_of_labels(
    labels: Sequence[str],
    train: Sequence[Record],
    measured: Sequence[Record],
    precisions: dict[str, np.ndarray],
) -> dict[str, dict[str, Any]]:
    counts = [Counter(label for photo in part for label in photo.tags) for part in (train, measured)]
    return {
        label: {
            "train": counts[0][label],
            "held_out": counts[1][label],
            **{name: float(of_model[number]) for name, of_model in precisions.items()},
        }
        for number, label in enumerate(labels)
    }


def confused_labels(
    scores: np.ndarray, targets: np.ndarray, labels: Sequence[str]
) -> list[tuple[str, str, float]]:
    """Pairs of labels that the scores barely distinguish, worst first. The third value is the share of photo pairs, one
    with only the first label and one with only the second, that the difference of the two scores orders correctly."""
    found = []
    for one, other in combinations(range(min(len(labels), MOST_COMPARED)), 2):
        ahead = scores[:, one] - scores[:, other]
        with_one = ahead[targets[:, one] & ~targets[:, other]]
        with_other = ahead[targets[:, other] & ~targets[:, one]]
        if min(len(with_one), len(with_other)) >= LEAST_TO_JUDGE:
            right = float((with_one[:, None] > with_other).mean())
            if right < TOLD_APART:
                found.append((labels[one], labels[other], right))
    return sorted(found, key=lambda pair: pair[2])


def labels_always_together(photos: Sequence[Record]) -> list[list[str]]:
    """Groups of labels that always occur together."""
    of_label: dict[str, list[str]] = {}
    for photo in photos:
        for label in photo.tags:
            of_label.setdefault(label, []).append(photo.name)
    groups: dict[tuple[str, ...], list[str]] = {}
    for label, names in of_label.items():
        groups.setdefault(tuple(names), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def draw_examples(
    segmenters: dict[str, Segmenter],
    measured: Sequence[Record],
    labels: Sequence[str],
    output: Path,
) -> list[str]:
    """Draws evenly spaced held-out photos, segmented before and after training; returns files relative to `output`."""
    names: list[str] = []
    count = min(_DRAWINGS, len(measured))
    most_common = labels[:_LABELS_OF_A_DRAWING]
    for photo in [measured[number * len(measured) // count] for number in range(count)]:
        # Keep the order of the labels, so that each has the same colour in all images.
        words = [label for label in labels if label in photo.tags or label in most_common]
        words = words or _known_words(photo, segmenters["before"])
        if not words:
            continue
        image = load_image(photo.image)
        image.thumbnail((640, 640))
        titles = [", ".join(photo.tags or photo.captions), *segmenters]
        drawn = [image, *_masks(segmenters.values(), image, words)]
        names.append(f"{DRAWINGS_NAME}/{len(names) + 1}.jpg")
        write_image(side_by_side(drawn, titles), output / names[-1])
    return names


def _masks(segmenters: Any, image: Image.Image, words: Sequence[str]) -> Iterator[Image.Image]:
    for segmenter in segmenters:
        # If the checkpoint has a vocabulary, its other words reveal what is not one of the labels.
        has_others = segmenter.processor.vocabulary and BACKGROUND not in map(str.casefold, words)
        result = segmenter(
            image, words, SegmentationOptions(background_threshold=0.5 if has_others else None)
        )
        assert isinstance(result, Segmentation)
        yield overlay(image, result.label_map, words, background=result.background)


def _known_words(photo: Record, segmenter: Segmenter) -> list[str]:
    """Words of the checkpoint's vocabulary that occur in a photo's captions."""
    text = f" {' '.join(photo.captions).casefold()} "
    return [word for word in segmenter.processor.vocabulary or () if f" {word.casefold()} " in text]


def advice(report: dict[str, Any], count: int) -> list[str]:
    """Sentences on how to improve the photos and labels for a better result."""
    found = []
    before, after = (report[name]["mean_average_precision"] for name in ("before", "after"))
    if not after > before:
        found.append(
            "Training did not improve the mean average precision: keep using the original checkpoint, or fix the "
            "problems below."
        )
    rows = report.get("labels", {})
    few = {label: row["train"] for label, row in rows.items() if row["train"] < FEW_PHOTOS}
    if few:
        named = _shown([f"{label} ({number})" for label, number in few.items()])
        found.append(f"Labels with fewer than {FEW_PHOTOS} training photos, add more: {named}.")
    if unmeasured := [label for label, row in rows.items() if not row["held_out"]]:
        found.append(f"Labels without a held-out photo, which cannot be evaluated: {_shown(unmeasured)}.")
    many = [label for label, row in rows.items() if row["train"] + row["held_out"] > NEARLY_ALL * count]
    if many:
        found.append(f"Labels on nearly every photo, add photos without them: {_shown(many)}.")
    if pairs := report.get("never_told_apart"):
        named = _shown([f"{one} and {other}" for one, other, _ in pairs])
        found.append(f"Labels that are confused, add more photos with only one of the two: {named}.")
    if groups := report.get("always_together"):
        named = _shown([" and ".join(group) for group in groups])
        found.append(f"Labels that always occur together, add photos with only one of them: {named}.")
    for reason, names in report["left_out"].items():
        found.append(f"Skipped, {reason}: {len(names)} ({_shown(names, 3)}).")
    if report["photos"]["held_out"] < 50:
        found.append(
            f"The metrics are based on only {report['photos']['held_out']} held-out photos, so they are imprecise."
        )
    return found


def _shown(names: Sequence[str], most: int = _SHOWN) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def to_markdown(report: dict[str, Any], args: argparse.Namespace) -> str:
    """The report as Markdown."""
    counts, kind = report["photos"], report["kind"]
    lines = [
        f"# {args.output.resolve().name}",
        "",
        f"Fine-tuned on {counts['train']:,} photos with {kind}, {report['steps']} steps in "
        f"{report['seconds'] / 60:.1f} minutes; evaluated on {counts['held_out']} held-out photos:",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    called = {
        "mean_average_precision": f"mean average precision of the {kind} "
        f"(chance: {_number(report['by_chance'])})",
        "top1": f"top-1 accuracy of the {kind}",
        "mean_iou": "mIoU",
        "pixel_accuracy": "pixel accuracy",
    }
    for name, words in called.items():
        if name in report["after"]:
            values = (_number(report[when][name]) for when in ("before", "after"))
            lines.append(f"| {words} | {' | '.join(values)} |")
    lines += ["", "Held-out photos. Regions without colour match other words better than the labels:", ""]
    lines += [f"![]({name})\n" for name in report["drawings"]]
    lines += [
        "## How to improve the result",
        "",
        *(f"- {each}" for each in report["advice"] or ["No problems found."]),
    ]
    if rows := report.get("labels"):
        lines += ["", "## Average precision of each label", ""]
        lines += ["| label | training photos | held out | before | after |", "|---|---|---|---|---|"]
        for label, row in rows.items():
            name = label.replace("|", "\\|")
            figures = f"{_number(row['before'])} | {_number(row['after'])}"
            lines.append(f"| {name} | {row['train']} | {row['held_out']} | {figures} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"
