"""Measure a checkpoint of `train_small.py` on pictures with masks, beside trivial baselines.

    python examples/evaluate_small.py --model checkpoint --data camvid/val --train camvid/train

`--data` holds `metadata.jsonl` with `file_name` and `mask_file_name`; masks hold indices of `labels.json` in the
folder above, 255 is ignored. Prints Markdown: mean IoU over the labels that are in the masks or predicted, and the
share of pixels that are right.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from train_small import Recipe, crop_tags, load_photos, random_boxes, sampling_grid

from pgseg_hf import DEFAULT_CHECKPOINT, PGSegModel, Segmenter, load_segmenter
from pgseg_hf.scoring import WindowScores, best_labels, merge_windows

IGNORED = 255


class Confusion:
    """Counts [true, predicted] of pixels."""

    def __init__(self, num_labels: int):
        self.counts = np.zeros((num_labels, num_labels), dtype=np.int64)

    def add(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        known = truth != IGNORED
        pairs = truth[known].astype(np.int64) * len(self.counts) + predicted[known]
        self.counts += np.bincount(pairs, minlength=self.counts.size).reshape(self.counts.shape)

    def iou(self) -> np.ndarray:
        """IoU of each label, NaN where it is neither in the masks nor predicted."""
        hits = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return np.where(union > 0, hits / np.maximum(union, 1), np.nan)

    def row(self, name: str) -> str:
        right = np.diag(self.counts).sum() / self.counts.sum()
        return f"| {name} | {np.nanmean(self.iou()):.3f} | {right:.3f} |"


def position_prior(folder: Path, recipe: Recipe, batches: int = 200) -> np.ndarray:
    """The label whose tag is most frequent among training crops over each place, [24, 32]; knows crop tags only."""
    photos = load_photos(folder, recipe.short_side)
    height, width = 24, 32
    sums, counts = np.zeros((len(photos.words), height, width)), np.full((height, width), 1e-6)
    for _ in range(batches):
        chosen = torch.randint(len(photos.pixels), (recipe.batch_size,))
        scale, shift = random_boxes(photos, recipe)
        tags = crop_tags(photos, chosen, sampling_grid(scale, shift, recipe.crop))
        sides = torch.tensor([width, height])
        low = ((shift - scale + 1) / 2 * sides).floor().long().tolist()
        high = ((shift + scale + 1) / 2 * sides).ceil().long().tolist()
        for tag, (left, top), (right, bottom) in zip(tags.numpy(), low, high, strict=True):
            sums[:, top:bottom, left:right] += tag[:, None, None]
            counts[top:bottom, left:right] += 1
    return (sums / counts).argmax(0)


def stretched(label_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(label_map.astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
    return np.asarray(picture)


def oracle_map(
    windows: list[WindowScores], truth: np.ndarray, resized: tuple[int, int], num_labels: int
) -> np.ndarray:
    """What a perfect namer would make of the groups: in each window each group takes its majority label."""
    small = torch.from_numpy(stretched(truth, resized).astype(np.int64))
    named = []
    for window in windows:
        height, width = window.groups.shape
        part = small[window.top : window.top + height, window.left : window.left + width]
        known = part != IGNORED
        pairs = window.groups[known].long() * num_labels + part[known]
        votes = pairs.bincount(minlength=len(window.scores) * num_labels).view(-1, num_labels)
        scores = torch.nn.functional.one_hot(votes.argmax(1), num_labels).float()
        named.append(WindowScores(window.groups, scores, window.top, window.left))
    scores, channels, count = merge_windows(named, resized)
    return best_labels(scores, channels, count, truth.shape)[0].numpy()


def evaluate(
    folder: Path, rows: list[dict], predict: Callable[[Path, np.ndarray], np.ndarray], size: int
) -> Confusion:
    confusion = Confusion(size)
    for row in rows:
        truth = np.asarray(Image.open(folder / row["mask_file_name"]))
        confusion.add(truth, predict(folder / row["file_name"], truth))
    return confusion


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=Path, help="the training folder, for the baselines")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = time.monotonic()
    labels = json.loads((args.data.parent / "labels.json").read_text(encoding="utf-8"))["labels"]
    rows = [
        json.loads(line) for line in (args.data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    segmenter = load_segmenter(args.model)
    untrained = Segmenter(PGSegModel(segmenter.model.config), segmenter.processor)

    def by_model(model: Segmenter) -> Callable[[Path, np.ndarray], np.ndarray]:
        return lambda path, truth: model(path, labels).label_map

    def by_oracle(model: Segmenter) -> Callable[[Path, np.ndarray], np.ndarray]:
        def predict(path: Path, truth: np.ndarray) -> np.ndarray:
            (image,) = model.encode([path], labels)
            return oracle_map(image.windows, truth, image.resized, len(labels))

        return predict

    results = {
        "model": evaluate(args.data, rows, by_model(segmenter), len(labels)),
        "oracle: the model's groups, named by the masks": evaluate(
            args.data, rows, by_oracle(segmenter), len(labels)
        ),
        "untrained model": evaluate(args.data, rows, by_model(untrained), len(labels)),
        "oracle: untrained groups, named by the masks": evaluate(
            args.data, rows, by_oracle(untrained), len(labels)
        ),
    }
    for label in range(len(labels)):
        everywhere = evaluate(
            args.data, rows, lambda path, truth, value=label: np.full_like(truth, value), len(labels)
        )
        best = results.setdefault("best single label everywhere", everywhere)
        if np.nanmean(everywhere.iou()) > np.nanmean(best.iou()):
            results["best single label everywhere"] = everywhere
    if args.train is not None:
        prior = position_prior(args.train, Recipe(data="", output=""))
        results["position prior of the crop tags"] = evaluate(
            args.data, rows, lambda path, truth: stretched(prior, truth.shape), len(labels)
        )
    print("| | mIoU | pixels right |\n|---|---|---|")
    print("\n".join(confusion.row(name) for name, confusion in results.items()))
    per_label = zip(labels, results["model"].iou(), strict=True)
    print("\nIoU of each label: " + ", ".join(f"{label} {value:.2f}" for label, value in per_label))
    print(f"\n{len(rows)} pictures in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
