"""Mean IoU as a metric of the `evaluate` library, without the Hub."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from transformers.utils import logging

from .confusion import IGNORE_INDEX, AbsentRule, ConfusionMatrix

logger = logging.get_logger(__name__)

_DESCRIPTION = """Mean intersection over union of label maps, with pixel accuracy, frequency-weighted IoU and each
label's figures, from one confusion matrix over all images; equal to mmsegmentation's."""
_INPUTS = """Args:
    predictions: label maps, int [H, W] each.
    references: label maps of the same sizes; pixels of `ignore_index` do not count."""


class MeanIoU(evaluate.Metric):
    """Mean IoU and its relatives, by a streaming confusion matrix: label maps are counted as they come and not kept.

    A stand-in for `evaluate.load("mean_iou")` that needs no Hub and has its names; that one takes `num_labels` and the
    rest in `compute`. In several processes of `torch.distributed` each one adds its own images, all of them call
    `compute`, and all get the figures of all images.

    Args:
        num_labels: N; values are 0 to N - 1, a background among them where there is one.
        ignore_index: value of the references that does not count; None for none.
        absent: labels that are neither in the references nor predicted are left out of means (`"skip"`, as
            mmsegmentation does) or count as 0 (`"zero"`).
        reduce_labels: references have 0 for unknown and k for label k - 1, as ADE20K does.
        device: where counts are summed over processes, as the backend needs it.
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
            raise ValueError("reduce_labels needs an ignore_index to put in the place of 0, got None.")
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
        """Counts one label map, int [H, W] as array, tensor or nested lists.

        Raises:
            ValueError: of other sizes, or with values that are no labels.
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
        """Counts several label maps, which may be of different sizes."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(
        self,
        *,
        predictions: Iterable[Any] | None = None,
        references: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The figures of all that was added (and of what is given here), and starts afresh.

        Returns:
            `mean_iou`, `mean_accuracy`, `overall_accuracy`, `frequency_weighted_iou`, and arrays `per_category_iou`
            and `per_category_accuracy` [N], NaN where a label is absent.
        """
        if kwargs:
            raise ValueError(f"unknown arguments {', '.join(kwargs)}; give them when the metric is made.")
        if predictions is not None or references is not None:
            # A missing one is empty, so that the lengths differ; arrays have no truth value.
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
            f"a label map has the shape {values.shape} and type {values.dtype}, expected integers [H, W]."
        )
    return values.astype(np.int64)
