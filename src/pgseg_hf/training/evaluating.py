"""Evaluation and visualization during training."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers.utils import logging

from ..data.sources import MapSource, SourceSpec, open_source
from ..distributed import sum_over_processes
from ..evaluation.benchmarks.mask_dataset import MaskFolder
from ..evaluation.classification import zero_shot_accuracy
from ..evaluation.evaluator import MaskEvaluator, MaskOptions, SegmentedImage, evaluate_masks
from ..files import write_image
from ..modeling_pgseg import PGSegModel
from ..processing_pgseg import PGSegProcessor
from ..segmentation import SegmentationOptions, Segmenter
from ..visualization import draw_groups, overlay, side_by_side
from ..weights import evaluation_mode
from .arguments import RunArguments
from .continuing import contents_of

logger = logging.get_logger(__name__)

BEST_METRICS = ("mean_iou", "top1")
"""The best checkpoint is chosen by the first of these metrics that is available."""


class Evaluator:
    """Evaluates a model on the data in the arguments: mIoU (also of the oracle) on images with masks, and zero-shot
    accuracy on images with one tag each. The images are split among the processes.

    Raises:
        ValueError: if a folder cannot be read.
    """

    def __init__(self, run: RunArguments, processor: PGSegProcessor, accelerator: Accelerator):
        self.run, self.processor, self.accelerator = run, processor, accelerator
        self.masks = MaskFolder(run.eval_masks, run.eval_background) if run.eval_masks else None
        self.options = SegmentationOptions(background_threshold=run.eval_background_threshold)
        if self.masks is not None:
            self.masks.images[0].read()
            self.masks.truth(self.masks.images[0])
            self.masks.check_threshold(self.options.background_threshold)
        self.tagged: list[tuple[Any, str]] = []
        self.tags: list[str] = []
        if run.eval_tags:
            self.tagged = list(_one_tag_each(run.eval_tags))
            self.tags = sorted({tag for _, tag in self.tagged})

    @cached_property
    def measured_with(self) -> dict[str, Any]:
        """The evaluation data and settings. Metrics are comparable only if these are equal."""
        names = ("eval_limit", "eval_background", "eval_background_threshold")
        return {name: getattr(self.run, name) for name in names} | {
            "eval_masks": self.masks and self.masks.fingerprint(),
            "eval_tags": self.run.eval_tags and contents_of(open_source(SourceSpec(path=self.run.eval_tags))),
        }

    def __bool__(self) -> bool:
        return self.masks is not None or bool(self.tagged)

    def __call__(self, model: PGSegModel, limit: int | None = None) -> dict[str, float]:
        """Metrics of the unwrapped model by name. All processes must call it.

        Args:
            limit: maximum number of images with masks, and of images with tags.
        """
        figures: dict[str, float] = {}
        device = self.accelerator.device
        with evaluation_mode(model):
            if self.masks is not None:
                folder = self.masks.spread(limit) if limit else self.masks
                part = folder.part(self.accelerator.process_index, self.accelerator.num_processes)
                options = MaskOptions(self.options, oracle=True)
                scores = evaluate_masks(Segmenter(model, self.processor), part, options)
                found = scores.sum_over_processes(device).to_dict()
                # A single process already logs these warnings in `evaluate_masks`.
                several = self.accelerator.num_processes > 1
                for doubt in scores.doubts(folder) if several and self.accelerator.is_main_process else ():
                    logger.warning_once(doubt)
                names = ("mean_iou", "pixel_accuracy", "oracle_mean_iou", "oracle_pixel_accuracy")
                figures |= {name: found[name] for name in names}
            if self.tagged:
                chosen = self.tagged[:: max(1, len(self.tagged) // limit)][:limit] if limit else self.tagged
                part_of_tagged = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
                found = zero_shot_accuracy(model, self.processor, part_of_tagged, self.tags)
                hits = [
                    found[name] * found["images"] if found["images"] else 0.0 for name in ("top1", "top5")
                ]
                total = sum_over_processes(torch.tensor(hits, device=device)) / len(chosen)
                figures |= {"top1": float(total[0]), "top5": float(total[1])}
        return figures

    def draw(self, model: PGSegModel, folder: Path, step: int) -> dict[str, np.ndarray]:
        """Draws the groups and predicted labels of images into `folder`; returns arrays [H, W, 3] by name."""
        masks = self.masks
        if masks is None or not self.run.num_drawings:
            return {}
        chosen = masks.spread(self.run.num_drawings)
        whole = replace(self.options, window_size=None)
        drawn: dict[str, np.ndarray] = {}

        def draw(found: SegmentedImage) -> None:
            (window,) = found.encoded.windows
            features: Any = window.features
            drawing = side_by_side(
                [
                    found.image,
                    draw_groups(
                        found.image, window.groups.cpu().numpy(), features.grouping.shape[1], legend=False
                    ),
                    overlay(found.image, found.predicted, masks.labels),
                ],
                ["photo", "groups", "labels"],
            )
            name = found.labelled.name.rsplit("/", 1)[-1]
            write_image(drawing, folder / f"step-{step:08d}-{name}.jpg")
            drawn[name] = np.asarray(drawing.convert("RGB"))

        with evaluation_mode(model):
            segmenter = Segmenter(model, self.processor)
            MaskEvaluator(segmenter, chosen, MaskOptions(whole), on_image=draw)(chosen.images)
        return drawn


def _one_tag_each(path: str) -> Iterator[tuple[Any, str]]:
    source = open_source(SourceSpec(path=path))
    if not isinstance(source, MapSource):
        raise ValueError(f"eval_tags is {path}, expected a folder with metadata.")
    for index in range(len(source)):
        record = source[index]
        if len(record.tags) != 1:
            raise ValueError(f"{record.name} has the tags {record.tags}, expected exactly one tag per image.")
        yield record.image, record.tags[0]


def best_metric(figures: dict[str, float]) -> tuple[str, float] | None:
    """Name and value of the metric that checkpoints are compared by; higher is better."""
    found = ((name, figures[name]) for name in BEST_METRICS if name in figures)
    return next(((name, value) for name, value in found if math.isfinite(value)), None)
