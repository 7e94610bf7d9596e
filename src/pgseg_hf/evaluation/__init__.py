"""Evaluation: benchmarks, protocols, IoU, group statistics and zero-shot classification.

Folders can be evaluated with the core package. The `evaluate` metric, YAML protocols, datasets on the Hub and tar
shards need `pgseg-hf[train]`.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .benchmarks.mask_dataset import MaskDataset, MaskFolder
    from .benchmarks.reading import BrokenImage, LabelledImage
    from .evaluator import MaskOptions, MaskScores, evaluate_masks
    from .metrics.confusion import IGNORE_INDEX, ConfusionMatrix
    from .metrics.oracle import oracle_map
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "metrics.confusion": ["IGNORE_INDEX", "ConfusionMatrix"],
            "benchmarks.mask_dataset": ["MaskDataset", "MaskFolder"],
            "benchmarks.reading": ["BrokenImage", "LabelledImage"],
            "evaluator": ["MaskOptions", "MaskScores", "evaluate_masks"],
            "metrics.oracle": ["oracle_map"],
        },
    )

__all__ = [
    "IGNORE_INDEX",
    "BrokenImage",
    "ConfusionMatrix",
    "LabelledImage",
    "MaskDataset",
    "MaskFolder",
    "MaskOptions",
    "MaskScores",
    "evaluate_masks",
    "oracle_map",
]
