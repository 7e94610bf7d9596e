"""The commands of `pgseg`. Each takes the arguments that `cli` has checked and returns an exit code."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .checkpoint import load_segmenter
from .command_line import process_rank
from .conversion import convert_released, read_overrides, write_backbone, write_converted
from .efficientnet_lite import convert_efficientnet_lite, is_efficientnet_lite
from .files import write_image
from .folders import FolderSummary, segment_folder
from .label_maps import Segment, Segmentation
from .outputs import MaskResult, write_formats
from .segmentation import Segmenter
from .torch_files import read_state_dict
from .video import segment_video
from .visualization import indexed_png, label_colours, overlay
from .weights import refuse_bad_weights

OPTIONAL = ("accelerate", "datasets", "evaluate", "fsspec", "pyarrow", "yaml")


def run(args: argparse.Namespace) -> int:
    quiet = getattr(args, "quiet", False)
    logging.set_verbosity(logging.ERROR if quiet else logging.WARNING)
    logging.get_logger(__package__).setLevel(logging.ERROR if quiet else logging.NOTSET)
    if quiet:
        logging.disable_progress_bar()
    work = {"segment": segment, "train": train, "convert": convert, "evaluate": evaluate, "prepare": prepare}
    return work[args.command](args)


def segment(args: argparse.Namespace) -> int:
    if process_rank() and args.paths is None:
        return 0  # Processes can share a folder, but not an image or a video.
    device = args.device or (f"cuda:{process_rank('LOCAL_RANK')}" if torch.cuda.is_available() else "cpu")
    segmenter = load_segmenter(args.model, args.options, device=device, dtype=getattr(torch, args.dtype))
    if args.stride is not None and args.window is None and segmenter.processor.window_size is None:
        raise ValueError(
            f"--stride is {args.stride}, but {args.model} processes the whole image at once; add --window."
        )
    if args.video is not None:
        return _segment_video(args, segmenter)
    if args.paths is not None:
        return _segment_folder(args, segmenter)
    start = time.monotonic()
    result = segmenter(args.image, args.words)
    assert isinstance(result, Segmentation)
    if args.vocabulary is not None:
        result = result.without_absent()
    if args.mask is not None:
        colours = label_colours(result.labels, result.colours)
        mask = indexed_png(result.label_map, len(result.labels), result.background, colours)
        write_image(mask, args.mask)
    shown = (result.label_map, result.labels, result.background)
    write_image(overlay(args.image, *shown, colours=result.colours), args.output)
    width, height = args.image.size
    seconds = time.monotonic() - start
    if args.json:
        segments = [
            asdict(segment) | {"pixels": round(segment.area * width * height)}
            for segment in result.segments(include_absent=True)
        ]
        found = {"image": args.name, "width": width, "height": height, "segments": segments, **_files(args)}
        _print_json([found], {}, [])
    elif not args.quiet:
        print(_table(result.segments(include_absent=True)))
        print(f"{Path(args.name).name}: {width} x {height} pixels in {seconds:.1f} s -> {args.output}")
    return 0


def _files(args: argparse.Namespace) -> dict[str, str]:
    return {"overlay": str(args.output)} | ({"mask": str(args.mask)} if args.mask else {})


def _segment_video(args: argparse.Namespace, segmenter: Segmenter) -> int:
    settings = {"smooth": args.smooth, "every": args.every, "overwrite": args.overwrite}
    settings["max_pixels"] = args.max_pixels
    summary = segment_video(segmenter, args.video, args.words, args.output, args.mask, **settings)
    (width, height), rate = summary.size, summary.frames / summary.seconds
    names = [each.label for each in summary.segments if each.value or not args.options.has_background]
    rows = label_colours(names, args.options.colours).tolist()
    colours = {name: f"#{bytes(row).hex()}" for name, row in zip(names, rows)}  # frames have no legend
    if args.json:
        segments = [asdict(each) | {"colour": colours.get(each.label)} for each in summary.segments]
        found = {"video": str(args.video), "width": width, "height": height, "frames": summary.frames}
        found |= {"frame_rate": summary.rate, "segments": segments, **_files(args)}
        print(json.dumps({"videos": [found]}, indent=2))
    elif not args.quiet:
        print(_table(summary.segments))
        print(f"colours: {', '.join(f'{name} {colour}' for name, colour in colours.items())}")
        print(
            f"{args.video.name}: {summary.frames} frames of {width} x {height} pixels in {summary.seconds:.1f} s, "
            f"{rate:.1f} frames/s -> {', '.join(_files(args).values())}"
        )
    return 0


def _print_json(images: list[dict], broken: dict[str, str], files: list[Path]) -> None:
    """Prints one JSON object, of the same form for one image and for many."""
    print(json.dumps({"images": images, "broken": broken, "files": [str(path) for path in files]}, indent=2))


def _table(segments: Sequence[Segment]) -> str:
    """A text table of each label's share of pixels and score, largest first."""
    segments = sorted(segments, key=lambda segment: -segment.area)
    width = max(len("label"), *(len(segment.label) for segment in segments))
    rows = [f"{'label':<{width}}   share   score"]
    for segment in segments:
        score = "-" if segment.score is None else f"{segment.score:.3f}"
        rows.append(f"{segment.label:<{width}}  {segment.area:6.1%}   {score:>5}")
    return "\n".join(rows)


def _segment_folder(args: argparse.Namespace, segmenter: Segmenter) -> int:
    if args.image is not None:  # from a URL or standard input: the formats need a file
        write_image(args.image, args.paths[0])
    start = time.monotonic()
    settings = {"images": args.paths, "workers": args.workers, "max_pixels": args.max_pixels}
    summary = segment_folder(segmenter, args.root, args.output, args.words, **settings)
    if process_rank():
        return 0  # Rank 0 reports for all processes.
    files = write_formats(summary.results, args.format, args.output)
    for name, reason in summary.broken.items():
        print(f"broken: {name}: {reason}", file=sys.stderr)
    if args.json:
        _print_json([_json_of(result, args.output) for result in summary.results], summary.broken, files)
    elif not args.quiet:
        _print_summary(summary, time.monotonic() - start, [args.output, *files])
    return 1 if summary.broken else 0


def _json_of(result: MaskResult, output: Path) -> dict[str, Any]:
    width, height, segments = result.segments()
    places = {"overlay": str(output / "overlays" / result.mask_name), "mask": str(result.mask)}
    return {"image": str(result.image), "width": width, "height": height, "segments": segments, **places}


def _print_summary(summary: FolderSummary, seconds: float, places: list[Path]) -> None:
    total = sum(summary.pixels.values())
    for label, pixels in summary.pixels.most_common():
        print(f"{label}: {pixels / total:.1%}")
    renewed = f"{summary.renewed} repeated because they had changed, " if summary.renewed else ""
    count = summary.segmented + summary.elsewhere
    others = f" ({summary.elsewhere} by other processes)" if summary.elsewhere else ""
    speed = f" ({count / seconds:.1f} images/s)" if count else ""
    print(
        f"{count} images segmented{others}, {summary.skipped} done before, {len(summary.broken)} broken, "
        f"{renewed}in {seconds:.1f} s{speed} -> {', '.join(map(str, places))}"
    )


def train(args: argparse.Namespace) -> int:
    report = _needing_extra("training.fine_tuning.run").fine_tune(args)
    for name in ("before", "after"):
        figures = ", ".join(
            f"{figure.replace('_', ' ')} {value:.3f}"
            for figure, value in report[name].items()
            if value is not None
        )
        print(f"{name}: {figures}")
    for sentence in report["advice"]:
        print(f"- {sentence}")
    done = "was trained before (use --overwrite to train again)" if report["done_before"] else "is trained"
    print(f"{args.output} {done}; report: {args.output / 'report.md'}")
    return 0


def convert(args: argparse.Namespace) -> int:
    start = time.monotonic()
    overrides = read_overrides(args.config) if args.config is not None else None
    tensors = read_state_dict(args.checkpoint)
    model: Any
    if is_efficientnet_lite(tensors):
        if overrides is not None:
            raise ValueError(
                "--config works for PGSeg checkpoints only; the shapes of EfficientNet-Lite determine everything."
            )
        model, head = convert_efficientnet_lite(tensors)
        refuse_bad_weights(model, str(args.checkpoint))
        write_backbone(model, args.output)
        print(f"converted a backbone, without the classifier's {len(head)} tensors")
    else:
        model, report = convert_released(tensors, overrides)
        refuse_bad_weights(model, str(args.checkpoint))
        write_converted(model, args.output)
        for name in report.unknown:
            print(f"skipped an unknown tensor: {name}")
        for name in report.dropped:
            print(f"dropped a tensor that the method does not use: {name}")
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
        reused = f", {content['reused']} of them from an earlier run," if content["reused"] else ""
        seconds = content["settings"]["seconds"]
        print(f"\n{content['images']} images{reused} in {seconds} s -> {content['folder']}")
    return 1 if content["broken"] else 0


def prepare(args: argparse.Namespace) -> int:
    summary = _needing_extra("evaluation.command").prepare(args)
    print(
        f"{summary.written} masks written, {summary.skipped} already there, in {summary.seconds:.1f} s -> {args.folder}"
    )
    return 0


def _needing_extra(module: str) -> Any:
    """Imports a module of this package that needs optional dependencies."""
    try:
        return import_module(f".{module}", __package__)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        raise ValueError(f"{error.name} is not installed; run pip install 'pgseg-hf[train]'.") from error
