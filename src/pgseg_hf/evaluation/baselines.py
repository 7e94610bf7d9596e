"""What a model has to beat: one label everywhere, the position prior of the training tags, groups at random."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from .. import distributed
from ..data.augmentation import Augmentation, AugmentationOptions
from ..data.records import Record, UnusableRecord
from ..data.sources import MapSource, SourceSpec, open_source
from ..images import load_image, load_label_map
from ..modeling_pgseg import PGSegModel
from ..segmentation import Segmenter
from .benchmarks.mask_dataset import MaskDataset
from .metrics.confusion import ConfusionMatrix

# Of the position prior: cells of its map, and how many crops it is made of.
_GRID = (24, 32)
_CROPS = 12_800
# A crop has the tag of what covers more than this share of it, as in training.
_TAG_SHARE = 0.02


@dataclass
class Baselines:
    """What maps give that do not look at the picture.

    Args:
        pixels: int64 [N], true pixels of each label.
        prior: confusion of the same map of the most frequent tags for all pictures; None without training data.
    """

    pixels: np.ndarray
    prior: ConfusionMatrix | None = None

    def everywhere(self, label: int) -> ConfusionMatrix:
        """Confusion of the map that is one label everywhere."""
        matrix = ConfusionMatrix(len(self.pixels), ignore_index=None)
        matrix.counts[:, label] = self.pixels
        return matrix

    def sum_over_processes(self, device: str | torch.device = "cpu") -> "Baselines":
        """Adds what all processes counted, each on its part of the pictures; every process has to call it."""
        if distributed.world_size() > 1:
            total = distributed.sum_over_processes(torch.from_numpy(self.pixels).to(device))
            self.pixels = total.cpu().numpy()
            if self.prior is not None:
                self.prior.sum_over_processes(device)
        return self

    def best_label(self) -> int:
        """The label that has the largest mean IoU when it is everywhere, the first of equal ones."""
        # Its IoU is its share of the pixels; the mean is over it and all labels that are in the truth.
        counted = (self.pixels > 0).sum() + (self.pixels == 0)
        return int((self.pixels / counted).argmax())


def count_baselines(dataset: MaskDataset, prior_map: np.ndarray | None = None) -> Baselines:
    """Counts the pixels of each label, and `prior_map` (labels [h, w]) stretched over each picture."""
    num_labels = len(dataset.labels)
    pixels = np.zeros(num_labels, dtype=np.int64)
    prior = None if prior_map is None else ConfusionMatrix(num_labels, dataset.ignore_index)
    for picture in dataset.pictures:
        truth = dataset.truth(picture)
        known = truth if dataset.ignore_index is None else truth[truth != dataset.ignore_index]
        pixels += np.bincount(known.ravel(), minlength=num_labels)
        if prior is not None and prior_map is not None:
            small = Image.fromarray(prior_map.astype(np.int32))
            prior.add(truth, np.asarray(small.resize(truth.shape[::-1], Image.Resampling.NEAREST)))
    return Baselines(pixels, prior)


def position_prior(path: str, labels: list[str], options: AugmentationOptions, seed: int = 0) -> np.ndarray:
    """The label whose tag is most frequent among training crops over each place, [24, 32]. It knows what training
    knows: a crop's tags where records have masks, else the picture's.

    Raises:
        ValueError: a stream, which has no random access, or more labels than a mask of 8 bits holds.
    """
    if len(labels) > 255:
        raise ValueError(f"there are {len(labels)} labels, expected at most 255 for the position prior.")
    source = open_source(SourceSpec(path=path))
    if not isinstance(source, MapSource):
        raise ValueError(f"{path} is a stream, expected a folder with metadata.")
    rng, augmentation = np.random.default_rng(seed), Augmentation(options)
    sums, counts = np.zeros((len(labels), *_GRID)), np.full(_GRID, 1e-6)
    crops = -(-_CROPS // len(source))
    for index in range(len(source)):
        try:
            record = source[index]
        except UnusableRecord:
            continue
        _add_crops(record, labels, augmentation, crops, rng, (sums, counts))
    return (sums / counts).argmax(0)


def _add_crops(
    record: Record,
    labels: list[str],
    augmentation: Augmentation,
    crops: int,
    rng: np.random.Generator,
    totals: tuple[np.ndarray, np.ndarray],
) -> None:
    sums, counts = totals
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


def untrained(segmenter: Segmenter) -> Segmenter:
    """A model of the same shape with random weights, whose groups are what the architecture gives for nothing."""
    model = PGSegModel(segmenter.model.config).to(segmenter.model.device, segmenter.model.dtype)
    return Segmenter(model, segmenter.processor, segmenter.options)
