"""What the commands of `pgseg` do, each with the arguments that `cli` has checked; returns are exit codes."""

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .checkpoint import load_segmenter
from .conversion import convert_released, read_overrides, read_state_dict, write_backbone, write_converted
from .efficientnet_lite import convert_efficientnet_lite, is_efficientnet_lite
from .files import write_image
from .folders import segment_folder
from .segmentation import Segmentation, Segmenter
from .visualization import indexed_png, overlay

OPTIONAL = ("accelerate", "datasets", "evaluate", "fsspec", "pyarrow", "yaml")


def run(args: argparse.Namespace) -> int:
    logging.set_verbosity_warning()
    return {
        "segment": segment,
        "train": train,
        "convert": convert,
        "evaluate": evaluate,
        "prepare": prepare,
    }[args.command](args)


def segment(args: argparse.Namespace) -> int:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    segmenter = load_segmenter(args.model, args.options, device=device, dtype=getattr(torch, args.dtype))
    if args.picture is None:
        return _segment_folder(args, segmenter)
    start = time.monotonic()
    result = segmenter(args.picture, args.labels)
    assert isinstance(result, Segmentation)
    if args.mask is not None:
        mask = indexed_png(result.label_map, num_labels=len(args.labels), background=result.background)
        write_image(mask, args.mask)
    drawn = overlay(args.picture, result.label_map, args.labels, background=result.background)
    write_image(drawn, args.output)
    print(_table(result))
    width, height = args.picture.size
    seconds = time.monotonic() - start
    print(f"{Path(args.image).name}: {width} x {height} pixels in {seconds:.1f} s -> {args.output}")
    return 0


def _table(result: Segmentation) -> str:
    """Label, share of pixels and score of each label, largest first."""
    segments = sorted(result.segments(include_absent=True), key=lambda segment: -segment.area)
    width = max(len("label"), *(len(segment.label) for segment in segments))
    rows = [f"{'label':<{width}}   share   score"]
    for segment in segments:
        score = "-" if segment.score is None else f"{segment.score:.3f}"
        rows.append(f"{segment.label:<{width}}  {segment.area:6.1%}   {score:>5}")
    return "\n".join(rows)


def _segment_folder(args: argparse.Namespace, segmenter: Segmenter) -> int:
    summary = segment_folder(segmenter, args.image, args.output, args.labels)
    total = sum(summary.pixels.values())
    for label, pixels in summary.pixels.most_common():
        print(f"{label}: {pixels / total:.1%}")
    for name, reason in summary.broken.items():
        print(f"broken: {name}: {reason}", file=sys.stderr)
    renewed = f"{summary.renewed} had changed since they were done, " if summary.renewed else ""
    print(
        f"{summary.segmented} pictures segmented, {summary.skipped} done before, {len(summary.broken)} broken, "
        f"{renewed}in {summary.seconds:.1f} s -> {args.output}"
    )
    return 1 if summary.broken else 0


def train(args: argparse.Namespace) -> int:
    report = _needing_extra("training.fine_tuning").fine_tune(args)
    for name in ("before", "after"):
        figures = ", ".join(
            f"{figure.replace('_', ' ')} {value:.3f}"
            for figure, value in report[name].items()
            if value is not None
        )
        print(f"{name}: {figures}")
    for sentence in report["advice"]:
        print(f"- {sentence}")
    done = "was done before (--overwrite trains anew)" if report["done_before"] else "is done"
    print(f"{args.output} {done}; its report: {args.output / 'report.md'}")
    return 0


def convert(args: argparse.Namespace) -> int:
    start = time.monotonic()
    overrides = read_overrides(args.config) if args.config is not None else None
    tensors = read_state_dict(args.checkpoint)
    model: Any
    if is_efficientnet_lite(tensors):
        if overrides is not None:
            raise ValueError(
                "--config is for checkpoints of PGSeg; EfficientNet-Lite's shapes tell everything."
            )
        model, head = convert_efficientnet_lite(tensors)
        write_backbone(model, args.output)
        print(f"a backbone, without the classifier's {len(head)} tensors")
    else:
        model, report = convert_released(tensors, overrides)
        write_converted(model, args.output)
        for name in report.unknown:
            print(f"unknown, left out: {name}")
        for name in report.dropped:
            print(f"not used by the method, dropped: {name}")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{args.checkpoint.name}: {count:,} parameters in {time.monotonic() - start:.1f} s -> {args.output}"
    )
    return 0


def evaluate(args: argparse.Namespace) -> int:
    content = _needing_extra("evaluation.command").evaluate(args)
    if "markdown" in content:
        print(content["markdown"].split("## IoU of each label")[0].strip())
        for name, reason in content["broken"].items():
            print(f"broken: {name}: {reason}", file=sys.stderr)
        reused = f", {content['reused']} of them counted by an earlier run," if content["reused"] else ""
        seconds = content["settings"]["seconds"]
        print(f"\n{content['pictures']} pictures{reused} in {seconds} s -> {content['folder']}")
    return 1 if content["broken"] else 0


def prepare(args: argparse.Namespace) -> int:
    summary = _needing_extra("evaluation.command").prepare(args)
    print(
        f"{summary.written} masks written, {summary.skipped} were there, in {summary.seconds:.1f} s -> {args.folder}"
    )
    return 0


def _needing_extra(module: str) -> Any:
    """A module of this package that the optional dependencies are for."""
    try:
        return import_module(f".{module}", __package__)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        raise ValueError(f"{error.name} is not installed, expected pip install 'pgseg-hf[train]'.") from error
