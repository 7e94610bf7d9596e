"""Measure a checkpoint on pictures with masks, beside trivial baselines and the oracle of its groups.

    python examples/evaluate_small.py --model street --data camvid/val --train camvid/train --crop-sides 24 96

`--data` is a folder with masks (see `pgseg_hf.evaluation.MaskFolder`). Prints Markdown: mean IoU over the labels that
are in the masks or predicted, and the share of pixels that are right.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pgseg_hf import DEFAULT_CHECKPOINT, PGSegModel, SegmentationOptions, Segmenter, load_segmenter
from pgseg_hf.evaluation import ConfusionMatrix, MaskFolder, evaluate_masks
from pgseg_hf.images import load_image, load_label_map
from pgseg_hf.training.augmentation import Augmentation, AugmentationOptions
from pgseg_hf.training.sources import MapSource, SourceSpec, open_source

PRIOR_SHAPE = (24, 32)
PRIOR_CROPS = 12_800
CROP_TAG_SHARE = 0.02


def position_prior(path: str, labels: list[str], options: AugmentationOptions, seed: int) -> np.ndarray:
    """The label whose tag is most frequent among training crops over each place, [24, 32]; it knows what training
    knows: a crop's tags where records have masks, else the picture's."""
    rng, source, augmentation = (
        np.random.default_rng(seed),
        open_source(SourceSpec(path=path)),
        Augmentation(options),
    )
    if not isinstance(source, MapSource):
        raise ValueError(f"{path} is a stream, expected a folder with metadata.")
    height, width = PRIOR_SHAPE
    sums, counts = np.zeros((len(labels), height, width)), np.full((height, width), 1e-6)
    crops = -(-PRIOR_CROPS // len(source))
    for index in range(len(source)):
        record = source[index]
        image = load_image(record.image)
        mask = None
        if record.mask is not None:
            mask = Image.fromarray(load_label_map(record.mask).astype(np.uint8))
        for _ in range(crops):
            crop = augmentation.draw_crop(image.size, rng)
            if mask is None:
                tags = np.array([label in record.tags for label in labels])
            else:
                shown = np.bincount(augmentation.crop_mask(mask, crop).ravel(), minlength=256)[: len(labels)]
                tags = shown > CROP_TAG_SHARE * options.image_size**2
            left, top, right, bottom = np.array(crop.box) / [*image.size, *image.size]
            rows = slice(int(top * height), int(np.ceil(bottom * height)))
            columns = slice(int(left * width), int(np.ceil(right * width)))
            sums[:, rows, columns] += tags[:, None, None]
            counts[rows, columns] += 1
    return (sums / counts).argmax(0)


def by_fixed_map(folder: MaskFolder, label_map: np.ndarray) -> ConfusionMatrix:
    """Of the same map for every picture, stretched over it."""
    confusion = ConfusionMatrix(len(folder.labels), folder.ignore_index)
    small = Image.fromarray(label_map.astype(np.uint8))
    for _, mask in folder.pictures:
        truth = load_label_map(mask)
        confusion.add(truth, np.asarray(small.resize(truth.shape[::-1], Image.Resampling.NEAREST)))
    return confusion


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", help="the training folder, for the position prior")
    parser.add_argument("--crop-sides", type=float, nargs=2, help="of training, for the position prior")
    parser.add_argument("--background", help="the label that means background, if labels.json does not say")
    parser.add_argument("--background-threshold", type=float)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = time.monotonic()
    folder = MaskFolder(args.data, args.background)
    options = SegmentationOptions(background_threshold=args.background_threshold)
    segmenter = load_segmenter(args.model)
    untrained = Segmenter(PGSegModel(segmenter.model.config), segmenter.processor)
    results = {}
    for name, each in (("model", segmenter), ("untrained model", untrained)):
        scores = evaluate_masks(each, folder, options, oracle=True)
        results[name] = scores.confusion
        results[f"oracle: groups of the {name}, named by the masks"] = scores.oracle
    singles = [by_fixed_map(folder, np.full((1, 1), value)) for value in range(len(folder.labels))]
    best = max(range(len(singles)), key=lambda value: singles[value].mean_iou())
    results[f"{folder.labels[best]} everywhere, the best single label"] = singles[best]
    if args.train:
        crops = AugmentationOptions(
            image_size=segmenter.model.config.vision_config.image_size,
            crop_sides=args.crop_sides,
            short_side=segmenter.processor.image_processor.size["shortest_edge"],
            horizontal_flip=0.0,
        )
        prior = position_prior(args.train, folder.labels, crops, args.seed)
        results["position prior of the training tags"] = by_fixed_map(folder, prior)
    print("| | mIoU | pixels right |\n|---|---|---|")
    for name, confusion in results.items():
        print(f"| {name} | {confusion.mean_iou():.3f} | {confusion.pixel_accuracy():.3f} |")
    per_label = zip(folder.labels, results["model"].iou(), strict=True)
    print("\nIoU of each label: " + ", ".join(f"{label} {value:.2f}" for label, value in per_label))
    print(f"\n{len(folder)} pictures in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
