"""How good masks and names are: benchmarks, protocols, IoU, figures of the groups, zero-shot classification.

Reading folders needs the core package alone; the `evaluate` metric, YAML, data sets of the Hub and shards need
`pgseg-hf[train]`.
"""

from .confusion import IGNORE_INDEX, ConfusionMatrix
from .mask_dataset import BrokenPicture, MaskDataset, MaskFolder, Picture
from .masks import MaskOptions, MaskScores, evaluate_masks
from .oracle import oracle_map

__all__ = [
    "IGNORE_INDEX",
    "BrokenPicture",
    "ConfusionMatrix",
    "MaskDataset",
    "MaskFolder",
    "MaskOptions",
    "MaskScores",
    "Picture",
    "evaluate_masks",
    "oracle_map",
]
