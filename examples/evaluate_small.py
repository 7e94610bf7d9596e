"""Measure a checkpoint of `train_small.py` on photos with masks, beside trivial baselines.

    python examples/evaluate_small.py --model pgseg-small-ccp --data ccp/test --train ccp/train

`--data` holds `metadata.jsonl` with `file_name`, `mask_file_name` and `tags`; masks index `labels.json` in the folder
above. Without masks it prints how well the labels in the predicted maps agree with the photos' tags, which is all that
may be used to choose a recipe.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from train_small import GROUPS, group_of, read_metadata, shuffled

from pgseg_hf.images import load_image
from pgseg_hf.modeling_pgseg import PGSegModel
from pgseg_hf.scoring import group_map
from pgseg_hf.segmentation import SegmentationOptions, Segmenter

LABELS = list(GROUPS)
NAMES = ["background", *LABELS]
IGNORED = 255
# A label counts as predicted for a photo where its map covers this share of the pixels.
PRESENT_SHARE = 0.003


def predicted_maps(
    segmenter: Segmenter, paths: Iterable[Path], options: SegmentationOptions
) -> Iterator[np.ndarray]:
    """Label maps: 0 is background, i + 1 is `LABELS[i]`."""
    for segmentation in segmenter.stream(paths, LABELS, options):
        yield segmentation.label_map


def read_mask(path: Path, names: list[str]) -> np.ndarray:
    """A mask with its labels merged to `LABELS` (i + 1), 0 background, `IGNORED` for a label in no group."""
    table = np.full(256, IGNORED, dtype=np.uint8)
    table[0] = 0
    for index, name in enumerate(names[1:], start=1):
        if group_of(name) in LABELS:
            table[index] = LABELS.index(group_of(name)) + 1
    return table[np.asarray(Image.open(path))]


class Confusion:
    """Counts of (true, predicted) labels over all pixels."""

    def __init__(self) -> None:
        self.size = len(NAMES)
        self.counts = np.zeros((self.size, self.size), dtype=np.int64)

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        known = truth != IGNORED
        pairs = truth[known].astype(np.int64) * self.size + prediction[known]
        self.counts += np.bincount(pairs, minlength=self.size**2).reshape(self.size, self.size)

    def ious(self) -> dict[str, float]:
        """Intersection over union of each label that is in the masks."""
        hits, truths = self.counts.diagonal(), self.counts.sum(1)
        unions = truths + self.counts.sum(0) - hits
        return {NAMES[i]: hits[i] / unions[i] for i in range(self.size) if truths[i]}

    def summary(self) -> str:
        values = self.ious()
        without = [value for name, value in values.items() if name != "background"]
        accuracy = self.counts.diagonal().sum() / self.counts.sum()
        return (
            f"mIoU {np.mean(list(values.values())):.4f}   without background {np.mean(without):.4f}   "
            f"pixels right {accuracy:.3f}"
        )


def stretched(label_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest-neighbour resize to (height, width)."""
    return np.asarray(
        Image.fromarray(label_map.astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
    )


def position_prior(maps: Iterable[np.ndarray], side: tuple[int, int] = (192, 128)) -> np.ndarray:
    """The most frequent label at each place over many maps."""
    votes = np.zeros((len(NAMES), *side), dtype=np.int32)
    rows, columns = np.indices(side)
    for label_map in maps:
        np.add.at(votes, (stretched(label_map, side), rows, columns), 1)
    return votes.argmax(0)


@torch.inference_mode()
def oracle_map(segmenter: Segmenter, path: Path, truth: np.ndarray) -> np.ndarray:
    """What the model's groups could reach: each takes the label that most of its pixels have."""
    pixel_values = segmenter.processor.image_processor(load_image(path), return_tensors="pt")["pixel_values"]
    grouping = segmenter.model.get_image_features(pixel_values).grouping[0]
    groups = group_map(grouping, truth.shape).numpy()
    result = np.zeros_like(truth)
    for group in np.unique(groups):
        inside = truth[(groups == group) & (truth != IGNORED)]
        result[groups == group] = np.bincount(inside).argmax() if inside.size else 0
    return result


def untrained(segmenter: Segmenter, seed: int) -> Segmenter:
    """The same model at its random initialisation."""
    torch.manual_seed(seed)
    return Segmenter(PGSegModel(segmenter.model.config), segmenter.processor, segmenter.options)


def report_masks(
    segmenter: Segmenter, folder: Path, train: Path | None, options: SegmentationOptions, seed: int
) -> None:
    rows = read_metadata(folder)
    paths = [folder / row["file_name"] for row in rows]
    names = json.loads((folder.parent / "labels.json").read_text(encoding="utf-8"))["labels"]
    truths = [read_mask(folder / row["mask_file_name"], names) for row in rows]

    def measure(title: str, maps: Iterable[np.ndarray]) -> Confusion:
        confusion = Confusion()
        for truth, label_map in zip(truths, maps, strict=True):
            confusion.add(truth, stretched(label_map, truth.shape))
        print(f"{title:46s}{confusion.summary()}", flush=True)
        return confusion

    model = measure("model", predicted_maps(segmenter, paths, options))
    measure("all background", (np.zeros_like(truth) for truth in truths))
    frequent = most_frequent_tag(read_metadata(train) if train else rows)
    measure(
        f"most frequent tag ({frequent}) everywhere",
        (np.full_like(truth, LABELS.index(frequent) + 1) for truth in truths),
    )
    if train:
        train_paths = [train / row["file_name"] for row in read_metadata(train)]
        prior = position_prior(predicted_maps(segmenter, train_paths, options))
        measure("position prior: model's mean map on train", (prior for _ in truths))
    ideal = position_prior(np.where(truth == IGNORED, 0, truth) for truth in truths)
    measure("position prior of the test masks (cheats)", (ideal for _ in truths))
    random_model = untrained(segmenter, seed)
    measure("random initialisation", predicted_maps(random_model, paths, options))
    pairs = list(zip(paths, truths, strict=True))
    measure("oracle of random initialisation (cheats)", (oracle_map(random_model, *pair) for pair in pairs))
    measure("oracle of the model's groups (cheats)", (oracle_map(segmenter, *pair) for pair in pairs))
    print("\n".join(f"  {name:14s}{value:.3f}" for name, value in model.ious().items()))


def most_frequent_tag(rows: list[dict]) -> str:
    groups = [group for row in rows for group in {group_of(tag) for tag in row["tags"]} & set(LABELS)]
    return max(LABELS, key=groups.count)


def report_tags(segmenter: Segmenter, folder: Path, rows: list[dict], options: SegmentationOptions) -> None:
    """Agreement of the labels in the maps with the photos' tags; hair and skin, which nearly all have, left out."""
    counted = [label for label in LABELS if label not in ("hair", "skin")]
    hits = predicted = true = 0
    right_pixels, background = [], []
    maps = predicted_maps(segmenter, [folder / row["file_name"] for row in rows], options)
    for row, label_map in zip(rows, maps, strict=True):
        shares = np.bincount(label_map.ravel(), minlength=len(NAMES))[1:] / label_map.size
        background.append(1 - shares.sum())
        found = {label for label, share in zip(LABELS, shares, strict=True) if share > PRESENT_SHARE}
        tags = {group_of(tag) for tag in row["tags"]}
        found, tagged = found & set(counted), tags & set(counted)
        hits, predicted, true = hits + len(found & tagged), predicted + len(found), true + len(tagged)
        total = sum(shares[LABELS.index(label)] for label in counted)
        if total:
            right_pixels.append(sum(shares[LABELS.index(label)] for label in found & tagged) / total)
    precision, recall = hits / max(predicted, 1), hits / true
    print(
        f"tags in the maps: precision {precision:.3f}, recall {recall:.3f}, "
        f"F1 {2 * precision * recall / max(precision + recall, 1e-9):.3f}; "
        f"labelled pixels with a tag of the photo {np.mean(right_pixels or [0]):.3f}; "
        f"background {np.mean(background):.3f} of the pixels"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=Path, help="training photos, for the position prior")
    parser.add_argument("--threshold", type=float, default=0.5, help="background threshold")
    parser.add_argument("--short-side", type=int, help="instead of the processor's")
    parser.add_argument("--photos", type=int, help="only the first of them, as shuffled by train_small.py")
    parser.add_argument("--seed", type=int, default=0, help="of the random initialisation")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    segmenter = Segmenter.from_pretrained(arguments.model, dtype=torch.float32)
    if arguments.short_side:
        segmenter.processor.image_processor.size = {
            "shortest_edge": arguments.short_side,
            "longest_edge": 2048,
        }
    options = replace(segmenter.options, background_threshold=arguments.threshold)
    rows = read_metadata(arguments.data)
    if "mask_file_name" in rows[0]:
        report_masks(segmenter, arguments.data, arguments.train, options, arguments.seed)
    else:
        report_tags(segmenter, arguments.data, shuffled(rows)[: arguments.photos], options)


if __name__ == "__main__":
    main()
