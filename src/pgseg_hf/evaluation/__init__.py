"""How good masks and names are: benchmarks, protocols, IoU, figures of the groups, zero-shot classification.

Reading folders needs the core package alone; the `evaluate` metric, YAML, data sets of the Hub and shards need
`pgseg-hf[train]`.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .benchmarks.mask_dataset import MaskDataset as MaskDataset
    from .benchmarks.mask_dataset import MaskFolder as MaskFolder
    from .benchmarks.reading import BrokenImage as BrokenImage
    from .benchmarks.reading import LabelledImage as LabelledImage
    from .evaluator import MaskOptions as MaskOptions
    from .evaluator import MaskScores as MaskScores
    from .evaluator import evaluate_masks as evaluate_masks
    from .metrics.confusion import IGNORE_INDEX as IGNORE_INDEX
    from .metrics.confusion import ConfusionMatrix as ConfusionMatrix
    from .metrics.oracle import oracle_map as oracle_map
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
