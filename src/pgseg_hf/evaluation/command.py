"""What `pgseg evaluate` and `pgseg prepare` do."""

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
from ..run_records import model_record
from ..segmentation import Segmenter
from .arguments import parse_thresholds
from .baselines import count_baselines, position_prior, untrained
from .benchmarks import preparing
from .benchmarks.catalogue import BENCHMARKS, open_benchmark
from .benchmarks.hub_masks import hub_pictures
from .benchmarks.mask_dataset import MaskDataset, parse_mask_values
from .classification import Classifier, open_imagenet, template_sets
from .evaluator import MaskEvaluator, MaskOptions, MaskScores, without_nan
from .metrics.confusion import ConfusionMatrix
from .protocols import Protocol, load_protocol
from .reports import write_report
from .running import Output, checkpoint_hash, classify_in_parts, evaluate_in_parts, versions


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs `pgseg evaluate` on this process; every process of a launch has to call it.

    Args:
        args: of `add_evaluate_arguments`.

    Returns:
        the content of `results.json`.

    Raises:
        ValueError: anything that was asked for and cannot be.
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
    # Without an accelerator, `accelerate` shares the work among processes only where it is told to use the CPU.
    state = PartialState(cpu=args.device == "cpu" or not torch.accelerator.is_available())
    device = args.device or state.device
    run = _classify if args.benchmark == "imagenet" else _segment
    segmenter = load_segmenter(args.checkpoint, device=device, dtype=getattr(torch, args.dtype))
    content = run(args, segmenter, folder, name)
    if not content["pictures"]:
        raise ValueError(f"none of the pictures of {args.data} could be read.")
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


def _segment(args: argparse.Namespace, segmenter: Segmenter, folder: Path, name: str) -> dict[str, Any]:
    dataset, protocol = _open(args), _protocol(args).resolved(segmenter.processor)
    thresholds = parse_thresholds(args.thresholds) if args.thresholds else ()
    threshold = args.background_threshold
    if threshold is None:
        threshold = protocol.threshold(args.benchmark, dataset)
    dataset.check_threshold(threshold)
    options = MaskOptions(
        segmentation=protocol.segmentation(threshold, args.batch_size),
        thresholds=thresholds,
        synonyms=protocol.synonyms,
        released_names=protocol.class_names == "released",
        oracle=args.analysis,
        groups=args.analysis,
        refinement=protocol.make_refinement(),
        skip_broken=args.skip_broken,
        readers=args.readers,
    )
    settings = {
        "benchmark": args.benchmark,
        "data": f"{dataset.name}, {len(dataset)} pictures, {len(dataset.labels)} labels",
        "protocol": protocol.to_dict(),
        "background_threshold": threshold,
        **({"refinement": str(options.refinement)} if options.refinement else {}),
        **({"mask_values": args.mask_values} if args.mask_values else {}),
        **_source_of_masks(args),
    }
    record = {
        # What these two stand for is in the fingerprint, whatever the name of the folder.
        **{key: value for key, value in settings.items() if key not in ("data", "mask_values")},
        **model_record(segmenter),
        "dtype": args.dtype,
        "pictures": _on_main_process(dataset.fingerprint),
        "thresholds": options.thresholds,
        "analysis": args.analysis,
    }
    prior_map = _prior_map(args, segmenter, dataset) if args.baselines and args.train else None
    output = _prepared(Output(folder, record, args.overwrite))
    scores = evaluate_in_parts(segmenter, dataset, options, output, args.save_predictions, args.visualize)
    found = scores.to_dict()
    rows = {"model": _figures(scores.confusion)}
    if scores.oracle is not None:
        rows["oracle: its groups, named by the masks"] = _figures(scores.oracle)
    if args.baselines:
        whole = dataset.only(each for each in dataset.pictures if each.name not in scores.broken)
        rows |= _baselines(args, segmenter, whole, options, prior_map)
    return {
        "title": f"{name} on {dataset.name}, protocol {protocol.name}",
        "rows": rows,
        **{
            key: found[key]
            for key in ("thresholds", "best_threshold", "groups", "iou", "broken")
            if key in found
        },
        "mean_iou_absent_as_zero": found["mean_iou_absent_as_zero"],
        "ignored_share": found["ignored_share"],
        "warnings": scores.doubts(dataset),
        "pictures": scores.pictures,
        "reused": scores.reused,
        "settings": {**settings, "seconds_of_all_calls": round(scores.seconds, 1)},
    }


def _on_main_process(fingerprint: Callable[[], str]) -> str:
    """Of pictures, which are all read for it; the record is the main process's affair."""
    return fingerprint() if PartialState().is_main_process else ""


def _prepared(output: Output) -> Output:
    if PartialState().is_main_process:
        output.prepare()
    PartialState().wait_for_everyone()
    return output


def _source_of_masks(args: argparse.Namespace) -> dict[str, str]:
    """What COCO-Object's masks were made from, where `pgseg prepare` made them."""
    if args.benchmark != "coco_object" or args.data.startswith("hub:"):
        return {}
    benchmark = BENCHMARKS["coco_object"]
    split = benchmark.splits[args.split]
    found = [preparing.source_of_coco_object(Path(args.data) / root, split) for root in benchmark.roots]
    return {"masks": next((source for source in found if source), "not made by pgseg prepare")}


def _open(args: argparse.Namespace) -> MaskDataset:
    """The pictures that were asked for."""
    if args.data.startswith("hub:"):
        if args.benchmark == "folder":
            raise ValueError("hub:NAME has no labels of its own; give the --benchmark that its masks are of.")
        if args.background is not None:
            raise ValueError(
                f"background is {args.background!r}, but {args.benchmark} has its own; leave it out."
            )
        mask_column = args.mask_column or "mask"
        pictures, fingerprint = hub_pictures(
            args.data.removeprefix("hub:"), args.split, args.image_column, mask_column
        )
        title = f"{args.benchmark} {args.split} of {args.data}"
        dataset = BENCHMARKS[args.benchmark].over(pictures, title, origin=fingerprint)
    else:
        if args.image_column or args.mask_column:
            raise ValueError("--image-column and --mask-column are for hub:NAME; leave them out.")
        values = parse_mask_values(args.mask_values) if args.mask_values else None
        dataset = open_benchmark(args.benchmark, args.data, args.split, args.background, values)
    return dataset.spread(args.limit) if args.limit is not None else dataset


def _protocol(args: argparse.Namespace) -> Protocol:
    """The protocol with what the command line changes."""
    protocol = load_protocol(args.protocol or ("checkpoint" if args.benchmark == "folder" else "pgseg"))
    changes = {
        name: value
        for name, value in (("synonyms", args.synonyms), ("refinement", args.refinement))
        if value is not None and value != getattr(protocol, name)
    }
    if args.background_threshold is not None:
        changes |= {"background_threshold": args.background_threshold, "background_thresholds": {}}
    return replace(protocol, name=f"{protocol.name}, changed", **changes) if changes else protocol


def _figures(confusion: ConfusionMatrix) -> dict[str, float]:
    return {
        "mean_iou": confusion.mean_iou(),
        "pixel_accuracy": confusion.pixel_accuracy(),
        "mean_accuracy": confusion.mean_accuracy(),
        "frequency_weighted_iou": confusion.frequency_weighted_iou(),
    }


def _prior_map(args: argparse.Namespace, segmenter: Segmenter, dataset: MaskDataset) -> np.ndarray:
    crops = AugmentationOptions(
        image_size=segmenter.model.config.vision_config.image_size,
        crop_sides=tuple(args.crop_sides) if args.crop_sides else None,
        short_side=segmenter.processor.image_processor.size["shortest_edge"],
        horizontal_flip=0.0,
    )
    return position_prior(args.train, dataset.labels, crops, args.seed)


def _baselines(
    args: argparse.Namespace,
    segmenter: Segmenter,
    dataset: MaskDataset,
    options: MaskOptions,
    prior_map: np.ndarray | None,
) -> dict[str, dict[str, float]]:
    """Figures of what a model has to beat; the same on every process, which each count a part of the pictures."""
    state = PartialState()
    part = dataset.part(state.process_index, state.num_processes)
    torch.manual_seed(args.seed)
    plain = replace(options, oracle=True, groups=False, thresholds=())
    scores = MaskEvaluator(untrained(segmenter), part, plain)(part.pictures)
    scores.sum_over_processes(state.device)
    rows = {
        "untrained model": _figures(scores.confusion),
        "oracle: groups of the untrained model, named by the masks": _figures(_oracle(scores)),
    }
    baselines = count_baselines(part, prior_map).sum_over_processes(state.device)
    best = baselines.best_label()
    if dataset.background is not None:
        rows[f"{dataset.labels[dataset.background]} everywhere"] = _figures(
            baselines.everywhere(dataset.background)
        )
    if best != dataset.background:
        rows[f"{dataset.labels[best]} everywhere, the best single label"] = _figures(
            baselines.everywhere(best)
        )
    if baselines.prior is not None:
        rows["position prior of the training tags"] = _figures(baselines.prior)
    return rows


def _oracle(scores: MaskScores) -> ConfusionMatrix:
    assert scores.oracle is not None
    return scores.oracle


# Options that only one kind of benchmark has, with what they are when they are not given.
def _classify(args: argparse.Namespace, segmenter: Segmenter, folder: Path, name: str) -> dict[str, Any]:
    classes = open_imagenet(args.data, args.split, args.label_column)
    kind = args.templates or "subset"
    classifier = Classifier(
        segmenter.model,
        segmenter.processor,
        classes.labels,
        template_sets()[kind],
        batch_size=args.batch_size,
        skip_broken=args.skip_broken,
    )
    side = segmenter.model.config.vision_config.image_size
    settings = {
        "benchmark": classes.name,
        "templates": f"{kind}, {len(classifier.templates)}",
        "size": f"short side {round(side * 256 / 224)}, centre {side} px",
    }
    record = {
        **settings,
        **model_record(segmenter),
        "dtype": args.dtype,
        "label_column": args.label_column,
        "pictures": _on_main_process(classes.fingerprint),
    }
    scores = classify_in_parts(classifier, classes, _prepared(Output(folder, record, args.overwrite)))
    return {
        "title": f"{name} on {classes.name}, zero-shot classification",
        "rows": {"model": {key: value for key, value in scores.to_dict().items() if key != "pictures"}},
        "broken": scores.broken,
        "pictures": scores.pictures,
        "reused": scores.reused,
        "settings": {**settings, "data": f"{scores.pictures} pictures, {len(classes.labels)} classes"},
    }


PREPARERS: dict[str, Callable[..., preparing.PreparationSummary]] = {
    "coco_object": preparing.prepare_coco_object,
    "coco_object_from_stuff": preparing.prepare_coco_object_from_stuff,
    "coco_stuff": preparing.prepare_coco_stuff,
    "context": preparing.prepare_context,
    "cityscapes": preparing.prepare_cityscapes,
    "lvis": preparing.prepare_lvis,
}


def prepare(args: argparse.Namespace) -> preparing.PreparationSummary:
    """Runs `pgseg prepare`. The folder may be one above that of the benchmark, as for `pgseg evaluate`.

    Raises:
        ValueError: what it needs is missing or broken.
    """
    benchmark = BENCHMARKS[args.what.removesuffix("_from_stuff")]
    places = (args.folder / name for name in benchmark.roots)
    root = next((place for place in places if place.is_dir()), args.folder)
    chosen: dict[str, Any] = {}
    if args.split is not None:
        if args.what == "context":
            raise ValueError("context has no --split: both are in its annotations.")
        if args.what == "lvis":
            chosen["annotations"] = f"lvis_v1_{args.split}.json"
        else:
            chosen["split"] = args.split
    return PREPARERS[args.what](root, **chosen)
