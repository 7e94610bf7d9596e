"""Baselines: one label everywhere, the position prior of the training tags, and an untrained model."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from ..data.augmentation import Augmentation, AugmentationOptions
from ..data.records import UnusableRecord
from ..data.sources import MapSource, SourceSpec, open_source
from ..images import load_image, load_label_map
from ..modeling_pgseg import PGSegModel
from ..segmentation import Segmenter
from .benchmarks.mask_dataset import MaskDataset
from .evaluator import MaskEvaluator, MaskOptions, SegmentedImage
from .metrics.confusion import ConfusionMatrix

# Size of the position prior's map, and the number of crops that it is computed from.
_GRID = (24, 32)
_CROPS = 12_800
# A crop has the tag of each label that covers more than this share of it, as in training.
_TAG_SHARE = 0.02


def measure_baselines(
    segmenter: Segmenter,
    dataset: MaskDataset,
    options: MaskOptions,
    seed: int = 0,
    prior_map: np.ndarray | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of the baselines, by name. Every process must call it; each evaluates a part of the images, and all
    return the same result.

    Args:
        segmenter: segmenter of the model.
        dataset: all images.
        options: evaluation options of the model.
        seed: seed of the untrained model.
        prior_map: result of [`position_prior`], to be evaluated too.
    """
    state = PartialState()
    part = dataset.part(state.process_index, state.num_processes)
    prior = ConfusionMatrix(len(dataset.labels), dataset.ignore_index)

    def count_prior(found: SegmentedImage) -> None:
        if prior_map is not None:
            prior.add(found.truth, _stretched(prior_map, found.truth.shape))

    torch.manual_seed(seed)
    plain = replace(options, oracle=True, groups=False, thresholds=())
    scores = MaskEvaluator(untrained(segmenter), part, plain, count_prior)(part.images)
    scores.sum_over_processes(state.device)
    assert scores.oracle is not None
    rows = {
        "untrained model": scores.confusion,
        "oracle: groups of the untrained model, named by the masks": scores.oracle,
    }
    pixels = scores.confusion.counts.sum(axis=1)
    best, background = best_label(pixels), dataset.background
    if background is not None:
        rows[f"{dataset.labels[background]} everywhere"] = everywhere(background, pixels)
    if best != background:
        rows[f"{dataset.labels[best]} everywhere, the best single label"] = everywhere(best, pixels)
    if prior_map is not None:
        rows["position prior of the training tags"] = prior.sum_over_processes(state.device)
    return {name: matrix.figures() for name, matrix in rows.items()}


def everywhere(label: int, pixels: np.ndarray) -> ConfusionMatrix:
    """Confusion matrix if one label is predicted everywhere, from the true pixels of each label, int64 [N]."""
    matrix = ConfusionMatrix(len(pixels), ignore_index=None)
    matrix.counts[:, label] = pixels
    return matrix


def best_label(pixels: np.ndarray) -> int:
    """The label with the highest mean IoU if predicted everywhere, the lowest one in case of a tie; `pixels` as in
    [`everywhere`]."""
    # Its IoU is its share of the pixels. The mean is over it and all labels in the ground truth.
    counted = (pixels > 0).sum() + (pixels == 0)
    return int((pixels / counted).argmax())


def _stretched(prior_map: np.ndarray, size: Any) -> np.ndarray:
    small = Image.fromarray(prior_map.astype(np.int32))
    return np.asarray(small.resize(size[::-1], Image.Resampling.NEAREST))


def position_prior(path: str, labels: list[str], options: AugmentationOptions, seed: int = 0) -> np.ndarray:
    """The most frequent tag of the training crops at each position, [24, 32]. As in training, a crop has the tags of
    its mask, or of the whole image if the record has no mask.

    Raises:
        ValueError: the source is a stream without random access, or there are more than 255 labels.
    """
    if len(labels) > 255:
        raise ValueError(f"there are {len(labels)} labels, expected at most 255 for the position prior.")
    source = open_source(SourceSpec(path=path))
    if not isinstance(source, MapSource):
        raise ValueError(f"{path} is a stream; expected a folder with metadata.")
    rng, augmentation = np.random.default_rng(seed), Augmentation(options)
    sums, counts = np.zeros((len(labels), *_GRID)), np.full(_GRID, 1e-6)
    crops = -(-_CROPS // len(source))
    for index in range(len(source)):
        try:
            record = source[index]
        except UnusableRecord:
            continue
        image, mask = load_image(record.image), None
        if record.mask is not None:
            mask = Image.fromarray(load_label_map(record.mask).astype(np.uint8))
        for _ in range(crops):
            crop = augmentation.draw_crop(image.size, rng)
            if mask is None:
                tags = np.array([label in record.tags for label in labels])
            else:
                values = augmentation.crop_mask(mask, crop).ravel()
                tags = np.bincount(values, minlength=256)[: len(labels)] > _TAG_SHARE * len(values)
            left, top, right, bottom = np.array(crop.box) / [*image.size, *image.size]
            rows = slice(int(top * _GRID[0]), int(np.ceil(bottom * _GRID[0])))
            columns = slice(int(left * _GRID[1]), int(np.ceil(right * _GRID[1])))
            sums[:, rows, columns] += tags[:, None, None]
            counts[rows, columns] += 1
    return (sums / counts).argmax(0)


def untrained(segmenter: Segmenter) -> Segmenter:
    """A segmenter with the same configuration and random weights."""
    model = PGSegModel(segmenter.model.config).to(segmenter.model.device, segmenter.model.dtype)
    return Segmenter(model, segmenter.processor, segmenter.options)
