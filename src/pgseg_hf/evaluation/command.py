"""Implementation of `pgseg evaluate` and `pgseg prepare`."""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from .. import DEFAULT_CHECKPOINT
from ..checkpoint import load_segmenter
from ..data.augmentation import AugmentationOptions
from ..files import refuse_missing_folder
from ..run_records import model_record
from ..segmentation import Segmenter
from .arguments import parse_thresholds
from .baselines import measure_baselines, position_prior
from .benchmarks import preparing
from .benchmarks.catalogue import BENCHMARKS, open_benchmark
from .benchmarks.hub_masks import hub_images
from .benchmarks.mask_dataset import MaskDataset, parse_mask_values
from .classification import Classes, Classifier, open_imagenet, template_sets
from .evaluator import MaskOptions, without_nan
from .metrics.refinement import PixelAdaptiveRefinement
from .metrics.sums import ImageSums
from .protocols import Protocol, load_protocol
from .reports import write_report
from .running import CLASSIFICATION_CHUNK, Output, checkpoint_hash, evaluate_in_parts, versions


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs `pgseg evaluate`; every process of a distributed launch must call it.

    Args:
        args: parsed options of `add_evaluate_arguments`.

    Returns:
        the content of `results.json`.

    Raises:
        ValueError: an option or the data are invalid.
    """
    start = time.monotonic()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.checkpoint = args.checkpoint or DEFAULT_CHECKPOINT
    path = Path(args.checkpoint)
    name = path.resolve().name if path.is_dir() else path.name
    folder = args.output or Path(f"{name}-{args.benchmark}-{args.split or 'val'}")
    if args.benchmark != "folder":
        args.split = args.split or "val"
    # Without an accelerator, `accelerate` only distributes work if it is told to use the CPU.
    state = PartialState(cpu=args.device == "cpu" or not torch.accelerator.is_available())
    device = args.device or state.device
    classifies = args.benchmark == "imagenet"
    protocol = None if classifies else _protocol(args)
    refuse_missing_folder(args.checkpoint)
    data: Any = open_imagenet(args.data, args.split, args.label_column) if classifies else _open(args)
    segmenter = load_segmenter(args.checkpoint, device=device, dtype=getattr(torch, args.dtype))
    if protocol is None:
        content = _classify(args, data, segmenter, folder, name)
    else:
        content = _segment(args, data, protocol, segmenter, folder, name)
    if not content["images"]:
        raise ValueError(f"no image of {args.data} could be read.")
    content["settings"] |= {
        "checkpoint": args.checkpoint if args.checkpoint != DEFAULT_CHECKPOINT else f"{name}, which ships",
        "weights_sha256": checkpoint_hash(args.checkpoint),
        "dtype": args.dtype,
        "processes": state.num_processes,
        **versions(device),
        "seconds": round(time.monotonic() - start, 1),
    }
    content = without_nan(content)
    if state.is_main_process:
        content["markdown"] = write_report(content, folder)
    return {**content, "folder": str(folder)}


def _segment(
    args: argparse.Namespace,
    dataset: MaskDataset,
    protocol: Protocol,
    segmenter: Segmenter,
    folder: Path,
    name: str,
) -> dict[str, Any]:
    protocol = protocol.resolved(segmenter.processor)
    threshold = protocol.threshold(args.benchmark, dataset)
    options = MaskOptions(
        segmentation=replace(
            protocol.segmentation, background_threshold=threshold, batch_size=args.batch_size
        ),
        thresholds=parse_thresholds(args.thresholds) if args.thresholds else (),
        synonyms=protocol.synonyms,
        released_names=protocol.class_names == "released",
        oracle=args.analysis,
        groups=args.analysis,
        refinement=PixelAdaptiveRefinement() if protocol.refinement == "pamr" else None,
        skip_broken=args.skip_broken,
        readers=args.readers,
    )
    asked = {
        "benchmark": args.benchmark,
        "protocol": protocol.to_dict(),
        "background_threshold": threshold,
        **({"refinement": str(options.refinement)} if options.refinement else {}),
        **_source_of_masks(args),
    }
    more = {"thresholds": options.thresholds, "analysis": args.analysis}
    prior_map = _prior_map(args, segmenter, dataset)
    output = _output(args, segmenter, folder, asked | more, dataset.fingerprint)
    scores = evaluate_in_parts(
        segmenter, dataset, options, output, args.save_predictions, args.visualize or 0
    )
    rows = {"model": scores.confusion.figures()}
    if scores.oracle is not None:
        rows["oracle: its groups, named by the masks"] = scores.oracle.figures()
    if args.baselines:
        whole = dataset.only(each for each in dataset.images if each.name not in scores.broken)
        rows |= measure_baselines(segmenter, whole, options, args.seed, prior_map)
    found = scores.to_dict()
    names = ("thresholds", "best_threshold", "groups", "iou", "mean_iou_absent_as_zero", "ignored_share")
    return {
        "title": f"{name} on {dataset.name}, protocol {protocol.name}",
        "rows": rows,
        **{key: found[key] for key in names if key in found},
        "warnings": scores.doubts(dataset),
        **_counted(scores),
        "settings": {
            **asked,
            "data": f"{dataset.name}, {len(dataset)} images, {len(dataset.labels)} labels",
            **({"mask_values": args.mask_values} if args.mask_values else {}),
            "seconds_of_all_calls": round(scores.seconds, 1),
        },
    }


def _output(
    args: argparse.Namespace,
    segmenter: Segmenter,
    folder: Path,
    asked: dict[str, Any],
    fingerprint: Callable[[], str],
) -> Output:
    """The output folder, prepared by the main process, which reads all images for their fingerprint."""
    output, state = Output(folder, asked, args.overwrite), PartialState()
    if state.is_main_process:
        output.record |= {**model_record(segmenter), "dtype": args.dtype, "images": fingerprint()}
        output.prepare()
    state.wait_for_everyone()
    return output


def _counted(scores: ImageSums) -> dict[str, Any]:
    return {"broken": scores.broken, "images": scores.images, "reused": scores.reused}


def _source_of_masks(args: argparse.Namespace) -> dict[str, str]:
    """The source of COCO-Object's masks, if `pgseg prepare` made them."""
    if args.benchmark != "coco_object" or args.data.startswith("hub:"):
        return {}
    benchmark = BENCHMARKS["coco_object"]
    split = benchmark.splits[args.split]
    found = [preparing.source_of_coco_object(Path(args.data) / root, split) for root in benchmark.roots]
    return {"masks": next((source for source in found if source), "not made by pgseg prepare")}


def _open(args: argparse.Namespace) -> MaskDataset:
    if args.data.startswith("hub:"):
        if args.benchmark == "folder":
            raise ValueError(
                "hub:NAME has no labels of its own; pass the --benchmark that its masks belong to."
            )
        if args.background is not None:
            raise ValueError(
                f"background is {args.background!r}, but {args.benchmark} defines its own; omit --background."
            )
        columns = (args.image_column, args.mask_column or "mask")
        images, fingerprint = hub_images(args.data.removeprefix("hub:"), args.split, *columns)
        title = f"{args.benchmark} {args.split} of {args.data}"
        dataset = BENCHMARKS[args.benchmark].over(images, title, origin=fingerprint)
    else:
        if args.image_column or args.mask_column:
            raise ValueError("--image-column and --mask-column only apply to hub:NAME; omit them.")
        values = parse_mask_values(args.mask_values) if args.mask_values else None
        dataset = open_benchmark(args.benchmark, args.data, args.split, args.background, values)
    dataset.check_threshold(args.background_threshold)
    return dataset.spread(args.limit) if args.limit is not None else dataset


def _protocol(args: argparse.Namespace) -> Protocol:
    protocol = load_protocol(args.protocol or ("checkpoint" if args.benchmark == "folder" else "pgseg"))
    changes: dict[str, Any] = {
        name: value
        for name, value in (("synonyms", args.synonyms), ("refinement", args.refinement))
        if value is not None and value != getattr(protocol, name)
    }
    if args.background_threshold is not None:
        segmentation = replace(protocol.segmentation, background_threshold=args.background_threshold)
        changes |= {"segmentation": segmentation, "background_thresholds": {}}
    return replace(protocol, name=f"{protocol.name}, changed", **changes) if changes else protocol


def _prior_map(args: argparse.Namespace, segmenter: Segmenter, dataset: MaskDataset) -> np.ndarray | None:
    if not args.train:
        return None
    crops = AugmentationOptions(
        image_size=segmenter.model.config.vision_config.image_size,
        crop_sides=tuple(args.crop_sides) if args.crop_sides else None,
        short_side=segmenter.processor.image_processor.size["shortest_edge"],
        horizontal_flip=0.0,
    )
    return position_prior(args.train, dataset.labels, crops, args.seed)


def _classify(
    args: argparse.Namespace, classes: Classes, segmenter: Segmenter, folder: Path, name: str
) -> dict[str, Any]:
    kind = args.templates or "subset"
    classifier = Classifier(
        segmenter.model,
        segmenter.processor,
        classes.labels,
        template_sets()[kind],
        batch_size=args.batch_size,
        skip_broken=args.skip_broken,
        readers=args.readers,
    )
    side = segmenter.model.config.vision_config.image_size
    settings = {
        "benchmark": classes.name,
        "templates": f"{kind}, {len(classifier.templates)}",
        "size": f"short side {round(side * 256 / 224)}, centre {side} px",
    }
    asked = settings | {"label_column": args.label_column}
    output = _output(args, segmenter, folder, asked, classes.fingerprint)
    scores = output.count(classifier, classes.images(), CLASSIFICATION_CHUNK)
    return {
        "title": f"{name} on {classes.name}, zero-shot classification",
        "rows": {"model": {key: value for key, value in scores.to_dict().items() if key != "images"}},
        **_counted(scores),
        "settings": {**settings, "data": f"{scores.images} images, {len(classes.labels)} classes"},
    }


def prepare(args: argparse.Namespace) -> preparing.PreparationSummary:
    """Runs `pgseg prepare`. The folder may contain the benchmark's folder, as for `pgseg evaluate`.

    Raises:
        ValueError: a needed file is missing or broken.
    """
    benchmark = BENCHMARKS[args.what.removesuffix("_from_stuff")]
    places = (args.folder / name for name in benchmark.roots)
    root = next((place for place in places if place.is_dir()), args.folder)
    make = getattr(preparing, f"prepare_{args.what}")
    if args.split is None:
        return make(root)
    if args.what == "context":
        raise ValueError("context has no --split: its annotations contain both splits.")
    return make(root, f"lvis_v1_{args.split}.json" if args.what == "lvis" else args.split)
