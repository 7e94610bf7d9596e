"""The command line: `pgseg segment`, `convert`, `evaluate` and `prepare`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers.utils import logging

from . import DEFAULT_CHECKPOINT, __version__
from .checkpoint import load_segmenter
from .command_line import CommandParser
from .conversion import convert_released, read_overrides, read_state_dict, write_backbone, write_converted
from .efficientnet_lite import convert_efficientnet_lite, is_efficientnet_lite
from .evaluation.arguments import add_evaluate_arguments, add_prepare_arguments
from .files import image_format, write_image
from .folders import segment_folder
from .images import is_web_address, load_image
from .segmentation import Segmentation, SegmentationOptions, Segmenter
from .visualization import indexed_png, overlay

OPTIONAL = ("accelerate", "datasets", "evaluate", "fsspec", "pyarrow", "yaml")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        the exit code: 0, or 1 where some pictures of a folder were broken, or 2 for an error in what was asked for.
    """
    args = build_parser().parse_args(arguments)
    logging.set_verbosity_warning()
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"pgseg {args.command}: error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = CommandParser(prog="pgseg", description="Segment anything you can name, with PGSeg.")
    parser.add_argument("--version", action="version", version=f"pgseg_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_segment(commands)
    _add_convert(commands)
    evaluating = commands.add_parser(
        "evaluate", help="measure a checkpoint on a benchmark, or on your own masks"
    )
    evaluating.set_defaults(run=_evaluate)
    add_evaluate_arguments(evaluating)
    preparing = commands.add_parser("prepare", help="make masks of a benchmark that its download lacks")
    preparing.set_defaults(run=_prepare)
    add_prepare_arguments(preparing)
    return parser


def _add_segment(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("segment", help="segment a picture or a folder of pictures by words")
    parser.set_defaults(run=_segment)
    parser.add_argument("image", help="a picture, its http(s) address, or a folder of pictures")
    parser.add_argument(
        "--labels", required=True, help='words separated by commas, for instance "hair, coat, shoes"'
    )
    parser.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, help="folder or Hub name (default: the shipped model)"
    )
    parser.add_argument(
        "--output",
        "--output-dir",
        type=Path,
        help="the overlay, or the folder of results for a folder of pictures",
    )
    parser.add_argument(
        "--mask", type=Path, help="also write the label map as an indexed PNG or TIFF (one picture only)"
    )
    parser.add_argument(
        "--background-threshold",
        type=float,
        metavar="T",
        help="0 to 1: where no label scores T there is background; without it a single label covers everything",
    )
    windows = parser.add_mutually_exclusive_group()
    windows.add_argument("--whole", action="store_true", help="the whole picture at once, no sliding window")
    windows.add_argument(
        "--window", type=int, metavar="PX", help="side of the sliding window on the resized picture"
    )
    parser.add_argument("--stride", type=int, metavar="PX", help="from one window to the next")
    parser.add_argument(
        "--template", action="append", help='a prompt such as "a photo of a {}."; may be repeated'
    )
    parser.add_argument("--batch-size", type=int, default=8, help="windows in one pass of the image encoder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="int8 is for a CPU")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert", help="turn a released PGSeg or EfficientNet-Lite .pth into a folder for from_pretrained"
    )
    parser.set_defaults(run=_convert)
    parser.add_argument("checkpoint", type=Path, help="the released .pth; nothing in it is executed")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument(
        "--config", type=Path, help="JSON with fields of PGSegConfig that tensor shapes do not tell"
    )


def _segment(args: argparse.Namespace) -> int:
    labels = [label.strip() for label in args.labels.split(",")]
    options = SegmentationOptions(
        window_size=None if args.whole else ("auto" if args.window is None else args.window),
        window_stride="auto" if args.stride is None else args.stride,
        background_threshold=args.background_threshold,
        templates=tuple(args.template) if args.template else None,
        batch_size=args.batch_size,
    )
    is_folder = Path(args.image).is_dir()
    stem = Path(urlsplit(args.image).path).stem if is_web_address(args.image) else Path(args.image).stem
    output = args.output or Path(f"{stem}-segmented.png")
    if not is_folder:
        _check_places(Path(args.image), output, args.mask)
    elif args.mask is not None:
        raise ValueError("--mask is for one picture; a folder's masks are in OUTPUT/masks.")
    segmenter = load_segmenter(args.model, options, device=args.device, dtype=DTYPES[args.dtype])
    if is_folder:
        return _segment_folder(args, segmenter, labels)
    start = time.monotonic()
    image = load_image(args.image)
    result = segmenter(image, labels)
    assert isinstance(result, Segmentation)
    if args.mask is not None:
        mask = indexed_png(result.label_map, num_labels=len(labels), background=result.background)
        write_image(mask, args.mask)
    write_image(overlay(image, result.label_map, labels, background=result.background), output)
    print(_table(result))
    seconds = time.monotonic() - start
    print(f"{Path(args.image).name}: {image.width} x {image.height} pixels in {seconds:.1f} s -> {output}")
    return 0


def _check_places(image: Path, output: Path, mask: Path | None) -> None:
    """Refuses files that could not be written, or would lie over one another, before any work starts."""
    image_format(output)
    if mask is not None:
        image_format(mask, is_mask=True)
        if _same_file(mask, output):
            raise ValueError(f"--output and --mask are both {mask}; give them different names.")
    for place in (output, mask):
        if place is not None and _same_file(place, image):
            raise ValueError(f"{place} is the picture itself; choose another output path.")


def _same_file(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _table(result: Segmentation) -> str:
    """Label, share of pixels and score of each label, largest first."""
    segments = sorted(result.segments(include_absent=True), key=lambda segment: -segment.area)
    width = max(len("label"), *(len(segment.label) for segment in segments))
    rows = [f"{'label':<{width}}   share   score"]
    for segment in segments:
        score = "-" if segment.score is None else f"{segment.score:.3f}"
        rows.append(f"{segment.label:<{width}}  {segment.area:6.1%}   {score:>5}")
    return "\n".join(rows)


def _segment_folder(args: argparse.Namespace, segmenter: Segmenter, labels: list[str]) -> int:
    output = args.output or Path(f"{Path(args.image).resolve().name}-segmented")
    summary = segment_folder(segmenter, args.image, output, labels)
    total = sum(summary.pixels.values())
    for label, pixels in summary.pixels.most_common():
        print(f"{label}: {pixels / total:.1%}")
    for name, reason in summary.broken.items():
        print(f"broken: {name}: {reason}", file=sys.stderr)
    renewed = f"{summary.renewed} had changed since they were done, " if summary.renewed else ""
    print(
        f"{summary.segmented} pictures segmented, {summary.skipped} done before, {len(summary.broken)} broken, "
        f"{renewed}in {summary.seconds:.1f} s -> {output}"
    )
    return 1 if summary.broken else 0


def _convert(args: argparse.Namespace) -> int:
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


def _evaluate(args: argparse.Namespace) -> int:
    content = _command_module().evaluate(args)
    if "markdown" in content:
        print(content["markdown"].split("## IoU of each label")[0].strip())
        for name, reason in content["broken"].items():
            print(f"broken: {name}: {reason}", file=sys.stderr)
        reused = f", {content['reused']} of them counted by an earlier run," if content["reused"] else ""
        seconds = content["settings"]["seconds"]
        print(f"\n{content['pictures']} pictures{reused} in {seconds} s -> {content['folder']}")
    return 1 if content["broken"] else 0


def _prepare(args: argparse.Namespace) -> int:
    summary = _command_module().prepare(args)
    print(
        f"{summary.written} masks written, {summary.skipped} were there, in {summary.seconds:.1f} s -> {args.folder}"
    )
    return 0


def _command_module() -> Any:
    """What the optional dependencies are for."""
    try:
        from .evaluation import command
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in (
            "accelerate",
            "datasets",
            "evaluate",
            "fsspec",
            "pyarrow",
            "yaml",
        ):
            raise
        raise ValueError(f"{error.name} is not installed, expected pip install 'pgseg-hf[train]'.") from error
    return command
