"""How good masks and names are: benchmarks, protocols, IoU, figures of the groups, zero-shot classification.

Reading folders needs the core package alone; the `evaluate` metric, YAML, data sets of the Hub and shards need
`pgseg-hf[train]`.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .confusion import IGNORE_INDEX, ConfusionMatrix
    from .mask_dataset import BrokenPicture, MaskDataset, MaskFolder, Picture
    from .masks import MaskOptions, MaskScores, evaluate_masks
    from .oracle import oracle_map
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "confusion": ["IGNORE_INDEX", "ConfusionMatrix"],
            "mask_dataset": ["BrokenPicture", "MaskDataset", "MaskFolder", "Picture"],
            "masks": ["MaskOptions", "MaskScores", "evaluate_masks"],
            "oracle": ["oracle_map"],
        },
    )

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
