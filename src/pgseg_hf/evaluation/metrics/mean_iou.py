"""Mean IoU as a metric of the `evaluate` library that works offline."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from transformers.utils import logging

from .confusion import IGNORE_INDEX, AbsentRule, ConfusionMatrix

logger = logging.get_logger(__name__)

_DESCRIPTION = """Mean intersection over union of label maps, pixel accuracy, frequency-weighted IoU and metrics of each
label, from one confusion matrix over all images; the same values as in mmsegmentation."""
_INPUTS = """Args:
    predictions: label maps, int [H, W] each.
    references: label maps of the same sizes; pixels with `ignore_index` are ignored."""


class MeanIoU(evaluate.Metric):
    """Mean IoU and related metrics from a streaming confusion matrix: label maps are counted and not stored.

    An offline replacement for `evaluate.load("mean_iou")` with the same names, except that the options are passed here
    and not to `compute`. With `torch.distributed`, each process adds its own images, every process must call `compute`,
    and each gets the metrics over all images.

    Args:
        num_labels: N, including a background; values are 0 to N - 1.
        ignore_index: value of the references that is ignored; None if there is none.
        absent: whether labels that are neither in the references nor predicted are left out of means (`"skip"`, as
            in mmsegmentation) or count as 0 (`"zero"`).
        reduce_labels: whether references have 0 for unknown and k for label k - 1, as in ADE20K.
        device: device on which the backend sums counts over processes.
    """

    def __init__(
        self,
        num_labels: int,
        ignore_index: int | None = IGNORE_INDEX,
        absent: AbsentRule = "skip",
        reduce_labels: bool = False,
        device: str | torch.device = "cpu",
    ):
        if reduce_labels and ignore_index is None:
            raise ValueError("reduce_labels needs an ignore_index to replace 0, got None.")
        super().__init__()
        self.absent, self.reduce_labels, self.device = absent, reduce_labels, device
        self.confusion = ConfusionMatrix(num_labels, ignore_index)

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Adds one label map, int [H, W], as an array, tensor or nested list.

        Raises:
            ValueError: the sizes differ, or values are out of range.
        """
        truth = _array(reference)
        if self.reduce_labels:
            unknown = (truth == 0) | (truth == self.confusion.ignore_index)
            truth = truth - 1
            truth[unknown] = self.confusion.ignore_index
        self.confusion.add(truth, _array(prediction))

    def add_batch(
        self, *, predictions: Iterable[Any] = (), references: Iterable[Any] = (), **kwargs: Any
    ) -> None:
        """Adds several label maps, which may differ in size."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(
        self,
        *,
        predictions: Iterable[Any] | None = None,
        references: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Computes the metrics over all label maps added so far and passed here, and resets the counts.

        Returns:
            `mean_iou`, `mean_accuracy`, `overall_accuracy`, `frequency_weighted_iou`, and arrays `per_category_iou`
            and `per_category_accuracy` [N], NaN for absent labels.
        """
        if kwargs:
            raise ValueError(f"unknown arguments {', '.join(kwargs)}; pass options to the constructor.")
        if predictions is not None or references is not None:
            # A missing one becomes empty, so that zip raises for different lengths; `or` fails for arrays.
            maps = [() if given is None else given for given in (predictions, references)]
            self.add_batch(predictions=maps[0], references=maps[1])
        counted = self.confusion
        self.confusion = ConfusionMatrix(len(counted.counts), counted.ignore_index)
        counted.sum_over_processes(self.device)
        for doubt in counted.doubts([f"label {number}" for number in range(len(counted.counts))]):
            logger.warning_once(doubt)
        return {
            "mean_iou": counted.mean_iou(self.absent),
            "mean_accuracy": counted.mean_accuracy(self.absent),
            "overall_accuracy": counted.pixel_accuracy(),
            "frequency_weighted_iou": counted.frequency_weighted_iou(),
            "per_category_iou": counted.iou(),
            "per_category_accuracy": counted.accuracy(),
        }


def _array(label_map: Any) -> np.ndarray:
    values = label_map.cpu().numpy() if isinstance(label_map, torch.Tensor) else np.asarray(label_map)
    if values.dtype.kind not in "iu" or values.ndim != 2:
        raise ValueError(
            f"a label map has shape {values.shape} and dtype {values.dtype}, expected integers [H, W]."
        )
    return values.astype(np.int64)
