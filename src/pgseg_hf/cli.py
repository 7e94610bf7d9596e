"""The command line: `pgseg segment`, `train`, `convert`, `evaluate` and `prepare`.

The commands themselves are in `commands`, which imports torch; help texts and usage errors do not wait for it.
"""

import argparse
import glob
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import DEFAULT_CHECKPOINT, __version__
from .command_line import CommandParser, process_rank
from .evaluation.arguments import (
    add_evaluate_arguments,
    add_prepare_arguments,
    check_evaluate_arguments,
    check_prepare_arguments,
)
from .files import image_format, is_web_address, refuse_missing_folder
from .options import FORMATS, SegmentationOptions
from .prompts import SYNONYM, LabelList, parse_labels, read_labels, validate_templates
from .suggestions import MIN_AREA, everyday_words
from .training.fine_tuning.options import add_train_arguments, check_train_arguments
from .values import whole_number

# Options whose names differ in the library.
_OPTIONS = {
    "window_size": "--window",
    "window_stride": "--stride",
    "background_threshold": "--background-threshold",
    "batch_size": "--batch-size",
    "patch_weight": "--patch-weight",
    "shortest_edge": "--short-side",
    "min_area": "--min-area",
    "templates": "--template",
}
DTYPES = ("float32", "bfloat16", "float16", "int8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0 on success, 1 if some images of a folder are broken, 2 for an error in the request, 130 after
        Ctrl-C.
    """
    args = build_parser().parse_args(arguments)
    if isinstance(sys.stdout, TextIOWrapper):  # names that the terminal cannot encode must not end the run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args.check(args)
        from .commands import run  # imports torch

        return run(args)
    except (ValueError, OSError) as error:
        print(f"pgseg {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "; run the same command again to resume" if getattr(args, "paths", None) else ""
        print(f"pgseg {args.command}: stopped. Finished files are kept{goes_on}.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands."""
    parser = CommandParser(prog="pgseg", description="Segment anything you can name with PGSeg.")
    parser.add_argument("--version", action="version", version=f"pgseg_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_segment(commands)
    training = commands.add_parser("train", help="fine-tune a checkpoint on a folder of labelled photos")
    training.set_defaults(check=check_train_arguments)
    add_train_arguments(training)
    _add_convert(commands)
    evaluating = commands.add_parser(
        "evaluate", help="evaluate a checkpoint on a benchmark or on your own masks"
    )
    evaluating.set_defaults(check=check_evaluate_arguments)
    add_evaluate_arguments(evaluating)
    preparing = commands.add_parser("prepare", help="create the masks that a benchmark's download lacks")
    preparing.set_defaults(check=check_prepare_arguments)
    add_prepare_arguments(preparing)
    return parser


def _add_segment(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("segment", help="segment images, folders or a video by text labels")
    parser.set_defaults(check=_check_segment, video=None, image=None, paths=None)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help='an image, an http(s) URL, - for standard input, or any number of images, patterns ("*.jpg") and folders',
    )
    _add_words(parser)
    _add_results(parser)
    _add_recipe(parser.add_argument_group("model and inference"))
    _add_folders(parser.add_argument_group("folders and large images"))
    _add_video(
        parser.add_argument_group("videos", "for a video, --output is a video and --mask a folder of PNGs")
    )


def _add_words(parser: argparse.ArgumentParser) -> None:
    words = parser.add_mutually_exclusive_group(required=True)
    words.add_argument(
        "--labels",
        help='labels separated by commas, for example "hair, coat|jacket:red:0.4, shoes" (| separates synonyms; a '
        "colour and a minimum score are optional), or a file: @labels.txt or @labels.json",
    )
    words.add_argument(
        "--vocabulary",
        help="find which words of a vocabulary are in the image: everyday (256 words that ship with the package), or "
        "your own as for --labels",
    )
    parser.add_argument(
        "--min-area",
        type=float,
        metavar="SHARE",
        help=f"share of the image that a word of --vocabulary must cover, 0 to 1 (default: {MIN_AREA})",
    )
    parser.add_argument(
        "--synonyms",
        choices=("average", "best"),
        help="score a label by the average of its synonyms (default) or, at each position, by the best one",
    )
    parser.add_argument(
        "--template", action="append", help='prompt template such as "a photo of a {}."; can be repeated'
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        "--output-dir",
        type=Path,
        help="overlay file; for several images or with --format, the folder for the results",
    )
    parser.add_argument(
        "--format",
        action="append",
        choices=FORMATS,
        default=[],
        help="format of the results in OUTPUT: png (indexed masks and overlays, always written), masks (one PNG per "
        "label), coco (RLE), coco-polygons, coco-panoptic, yolo and labelme (polygons), csv (areas and scores); can be "
        "repeated",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing overlay, mask, video or --format result"
    )
    parser.add_argument("--json", action="store_true", help="print areas, scores and file names as JSON")
    parser.add_argument("--quiet", action="store_true", help="print errors and --json output only")
    parser.add_argument(
        "--mask", type=Path, help="also write the label map as an indexed PNG or TIFF (single image only)"
    )


def _add_recipe(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", default=DEFAULT_CHECKPOINT, help="folder or Hub name (default: the included checkpoint)"
    )
    group.add_argument(
        "--background-threshold",
        type=float,
        metavar="T",
        help="pixels where no label scores at least T (0 to 1) are background (default: no background; a single label "
        "then covers everything)",
    )
    windows = group.add_mutually_exclusive_group()
    windows.add_argument("--whole", action="store_true", help="use the whole image at once, without windows")
    windows.add_argument(
        "--window", type=int, metavar="PX", help="side of the sliding window on the resized image"
    )
    group.add_argument("--stride", type=int, metavar="PX", help="step from one window to the next")
    group.add_argument(
        "--patch-weight",
        type=float,
        metavar="W",
        help="weight of patch scores against group scores, 0 to 1 (default: the checkpoint's)",
    )
    group.add_argument("--batch-size", type=int, default=8, help="windows per encoder pass (default: 8)")
    group.add_argument("--device", help="default: cuda if available, otherwise cpu")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="int8 runs on a CPU only")


def _add_folders(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads that read images and write results while the model runs (default: 2; 0 for none)",
    )
    group.add_argument(
        "--max-pixels",
        type=int,
        default=500_000_000,
        metavar="N",
        help="largest image or video frame to accept, in pixels (default: 500,000,000); a decoded image takes 3 bytes "
        "per pixel",
    )
    group.add_argument(
        "--short-side",
        type=int,
        metavar="PX",
        help="length to which the short side is resized for the model (default: the checkpoint's); a larger one, "
        "with --window, finds small objects in large images",
    )


def _add_video(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--smooth",
        type=int,
        metavar="N",
        help="average scores over N frames so that labels do not flicker (default: 5; 1 for no averaging)",
    )
    group.add_argument(
        "--every",
        type=int,
        metavar="N",
        help="run the model on one of every N frames and use its labels for all N (default: 1)",
    )


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert", help="convert a released PGSeg or EfficientNet-Lite .pth to a folder for from_pretrained"
    )
    parser.set_defaults(check=_check_convert)
    parser.add_argument("checkpoint", type=Path, help="the released .pth; no code in it is executed")
    parser.add_argument("output", type=Path, help="new folder to write")
    parser.add_argument(
        "--config", type=Path, help="JSON file of PGSegConfig fields that the tensor shapes do not determine"
    )


def _check_segment(args: argparse.Namespace) -> None:
    """Reads labels, options, output and image, and refuses bad ones before torch is imported."""
    formats = args.format
    if process_rank():  # Only rank 0 of `accelerate launch` reports errors and writes shared files.
        args.overwrite, args.quiet, args.format = True, True, []
    asked = _read_words(args)
    args.words = asked.words
    args.options = _read_options(args, asked)
    whole_number(args.max_pixels, "--max-pixels")
    args.options.check_labels(asked.names)
    refuse_missing_folder(args.model)
    places, source = _find_places(args.images)
    if _check_video(args, places):
        return
    from .images import load_image  # imports transformers, though not torch

    path = Path("stdin" if source == "-" else urlsplit(source).path if source else places[0])
    is_one = source is not None or (len(places) == 1 and path.is_file())
    if is_one:
        args.name = source or str(path)
        args.image = load_image(sys.stdin.buffer if source == "-" else source or path, args.max_pixels)
    if is_one and not args.format:
        if not formats:
            _refuse(args, "there is only one image; expected a folder or several images", "workers")
        args.output = args.output or Path(f"{path.stem}-segmented.png")
        _check_places(path, args.output, args.mask, args.overwrite)
        return
    _refuse(args, "it works for a single image only; a folder's masks are in OUTPUT/masks", "mask")
    args.workers = whole_number(2 if args.workers is None else args.workers, "--workers", least=0)
    if source is None and set(args.format) <= {"png"} and not process_rank():
        _refuse(
            args,
            "a folder run resumes and repeats only images that have changed; for a new run choose another --output",
            "overwrite",
        )
    stem = path.stem if is_one else path.resolve().name
    args.output = args.output or Path("segmented" if len(places) > 1 else f"{stem}-segmented")
    _check_folder(args, places, None if source is None else path)


def _refuse(args: argparse.Namespace, reason: str, *options: str) -> None:
    """Refuses options that would have no effect."""
    for option in options:
        value = getattr(args, option)
        if value is not None and value is not False and value != []:
            said = "given" if value is True else value
            raise ValueError(f"--{option.replace('_', '-')} is {said}, but {reason}.")


def _read_options(args: argparse.Namespace, asked: LabelList) -> SegmentationOptions:
    """The library's options; errors use the names of the command line."""
    if args.whole:
        _refuse(args, "--whole uses no window; leave out one of them", "stride")
    if not any(SYNONYM in words for words in asked.words):
        _refuse(args, "no label has synonyms; add some, such as cat|kitten, or leave it out", "synonyms")
    given: dict[str, Any] = {
        "window_size": args.window,
        "window_stride": args.stride,
        "background_threshold": args.background_threshold,
        "batch_size": args.batch_size,
        "patch_weight": args.patch_weight,
        "shortest_edge": args.short_side,
        "min_area": args.min_area,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.whole:
        given["window_size"] = None
    try:
        return SegmentationOptions(
            templates=tuple(validate_templates(args.template)) if args.template else None,
            synonyms=args.synonyms or "average",
            thresholds=asked.thresholds,
            colours=asked.colours,
            **given,
        )
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"{_OPTIONS.get(name.partition('[')[0], name)} {rest}") from error


def _check_video(args: argparse.Namespace, places: list[Path]) -> bool:
    """Whether the input is a video; checks its arguments if so."""
    from .video import SMOOTH, VIDEO_EXTENSIONS, WRITTEN, check_video  # imports transformers

    video = next((place for place in places if place.suffix.lower() in VIDEO_EXTENSIONS), None)
    if video is None or video.is_dir():
        _refuse(args, "the input is not a video", "smooth", "every")
        return False
    if len(places) > 1:
        raise ValueError(f"{video} is one of {len(places)} inputs; expected a video alone.")
    _refuse(args, f"{video} is a video; expected images", "format", "workers")
    _refuse(args, f"{video} is a video, whose frames all have the same labels; use --labels", "vocabulary")
    ending = video.suffix.lower() if video.suffix.lower() in WRITTEN else ".mp4"
    args.video, args.output = video, args.output or Path(f"{video.stem}-segmented{ending}")
    args.smooth = whole_number(SMOOTH if args.smooth is None else args.smooth, "--smooth")
    args.every = whole_number(1 if args.every is None else args.every, "--every")
    check_video(video, args.output, args.mask, args.overwrite, args.max_pixels)
    return True


def _read_words(args: argparse.Namespace) -> LabelList:
    """The labels, or the words of a vocabulary; the latter also sets `min_area`."""
    if args.labels is not None:
        _refuse(args, "there is no --vocabulary; use both or neither", "min_area")
        return read_labels(args.labels)
    args.min_area = MIN_AREA if args.min_area is None else args.min_area
    if args.vocabulary.strip() == "everyday":
        return parse_labels(everyday_words())
    return read_labels(args.vocabulary)


def _check_folder(args: argparse.Namespace, places: list[Path], source: Path | None) -> None:
    """Finds the images of a folder run; an image from a URL or standard input goes to OUTPUT/images."""
    from .images import IMAGE_EXTENSIONS, images_apart_from
    from .outputs import check_formats

    output = args.output
    if output.is_file() or output.suffix.lower() in IMAGE_EXTENSIONS:
        raise ValueError(
            f"--output is {output}, expected a folder for the results of several images or of --format."
        )
    check_formats(args.format, output, args.overwrite)
    if source is not None:
        args.root = output / "images"
        args.paths = [args.root / f"{source.stem or 'image'}.png"]
        if args.paths[0].exists() and not args.overwrite:
            raise ValueError(f"{args.paths[0]} already exists; use --overwrite to replace it.")
        return
    if len(places) == 1 and places[0].is_dir():
        args.root, args.paths = places[0], images_apart_from(places[0], output)
        return
    found = [images_apart_from(place, output) if place.is_dir() else [place] for place in places]
    args.paths = list(dict.fromkeys(Path(os.path.abspath(path)) for paths in found for path in paths))
    args.root = Path(os.path.commonpath([path.parent for path in args.paths]))


def _find_places(given: list[str]) -> tuple[list[Path], str | None]:
    """The input files and folders, with patterns expanded, or a single URL or "-" for standard input."""
    places: list[Path] = []
    for text in given:
        if text == "-" or is_web_address(text):
            if len(given) > 1:
                raise ValueError(
                    f"{text!r} is one of {len(given)} inputs; expected a URL or - alone, without other images."
                )
            return [], text
        if Path(text).exists():
            places.append(Path(text))
            continue
        if not glob.has_magic(text):
            raise ValueError(f"{text!r} cannot be read as an image file: there is no such file.")
        from .images import IMAGE_EXTENSIONS  # imports transformers

        matches = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
        matches = [path for path in matches if path.is_dir() or path.suffix.lower() in IMAGE_EXTENSIONS]
        if not matches:
            raise ValueError(f"{text!r} matches no images or folders.")
        # A pattern such as `photos/**` matches a folder's images along with the folder.
        places += [path for path in matches if path.is_file()] or matches
    return places, None


def _check_places(image: Path, output: Path, mask: Path | None, overwrite: bool) -> None:
    """Refuses outputs that cannot be written or would overwrite one another, before any work starts."""
    image_format(output)
    if mask is not None:
        image_format(mask, is_mask=True)
        if _same_file(mask, output):
            raise ValueError(f"--output and --mask are both {mask}; give them different names.")
    for place in (output, mask):
        if place is not None and _same_file(place, image):
            raise ValueError(f"{place} is the input image; choose another output path.")
        if place is not None and place.exists() and not overwrite:
            raise ValueError(f"{place} already exists; use --overwrite to replace it.")


def _same_file(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _check_convert(args: argparse.Namespace) -> None:
    if not args.checkpoint.is_file():
        raise ValueError(f"{args.checkpoint} is not a file; expected a released checkpoint (.pth).")
