"""The options of `pgseg evaluate` and `pgseg prepare`."""

import argparse
import math
from pathlib import Path
from typing import Any

from ..files import refuse_missing_folder

# The names of `BENCHMARKS`, repeated because `benchmarks` imports torch.
BENCHMARK_NAMES = (
    *("voc", "voc20", "context", "context59", "coco_object", "coco_stuff", "ade20k", "cityscapes"),
    *("imagenet_s50", "imagenet_s300", "imagenet_s919", "lvis", "imagenet", "folder"),
)
PREPARATIONS = ("coco_object", "coco_object_from_stuff", "coco_stuff", "context", "cityscapes", "lvis")
MAX_THRESHOLDS = 100
TEMPLATE_SETS = ("simple", "subset", "full")


_SWITCH = {"action": "store_true"}
# Options by group. Those in `_OF_MASKS` only apply to segmentation, those in `_OF_CLASSES` to classification.
_EVALUATE: dict[str, dict[str, dict[str, Any]]] = {
    "images": {
        "--benchmark": {"required": True, "choices": BENCHMARK_NAMES, "metavar": "NAME"}
        | {"help": ", ".join(BENCHMARK_NAMES)},
        "--data": {"required": True, "help": "the benchmark's folder, or hub:NAME for a dataset on the Hub"},
        "--split": {"help": "split (default: val); for folder: a subfolder (default: the folder itself)"},
        "--limit": {"type": int, "metavar": "N", "help": "evaluate only N evenly spaced images"},
        "--background": {"metavar": "LABEL", "help": "for folder: the label that means background"},
        "--mask-values": {
            "metavar": "VALUE=LABEL,...",
            "help": "for folder: the labels of the masks' values or colours, such as 0=background,255=sky or "
            "#ff8000=sky; VALUE= to ignore a value",
        },
        "--image-column": {"help": "for hub:NAME: image column (default: the usual names)"},
        "--mask-column": {"help": "for hub:NAME: mask column (default: mask)"},
        "--label-column": {"help": "for imagenet: class column (default: cls in shards, otherwise label)"},
        "--skip-broken": {**_SWITCH, "help": "log and skip images that cannot be decoded"},
    },
    "protocol": {
        "--protocol": {
            "help": "pgseg, groupvit, unified, checkpoint (its own sizes) or a YAML file (default: checkpoint for "
            "folder, otherwise pgseg)"
        },
        "--background-threshold": {"type": float, "metavar": "T", "help": "overrides the protocol"},
        "--thresholds": {"metavar": "FROM:TO:STEP", "help": "also evaluate these background thresholds"},
        "--synonyms": {"choices": ("none", "average", "merge"), "help": "overrides the protocol"},
        "--refinement": {"choices": ("none", "pamr"), "help": "overrides the protocol"},
        "--templates": {"choices": TEMPLATE_SETS, "help": "for imagenet: 1, 7 (default) or 80 prompts"},
    },
    "additional results": {
        "--analysis": {**_SWITCH, "help": "group statistics: oracle, purity, coverage, redundancy ..."},
        "--baselines": {**_SWITCH, "help": "also evaluate one label everywhere and an untrained model"},
        "--train": {"help": "with --baselines: training folder for the position prior of its tags"},
        "--crop-sides": {"type": float, "nargs": 2, "metavar": "PX"}
        | {"help": "crop sides used in training, for the position prior"},
        "--seed": {"type": int, "default": 0, "help": "seed of the untrained model and the position prior"},
        "--save-predictions": {**_SWITCH, "help": "write every label map as an indexed PNG"},
        "--visualize": {"type": int, "metavar": "N", "help": "draw N images beside their ground truth"},
        "--output": {"type": Path, "help": "output folder (default: CHECKPOINT-BENCHMARK-SPLIT)"},
        "--overwrite": {**_SWITCH, "help": "delete the results of another evaluation in the folder"},
    },
    "machine": {
        "--batch-size": {"type": int, "default": 8, "help": "windows per forward pass of the image encoder"},
        "--readers": {"type": int, "default": 2, "help": "number of threads that prefetch images"},
        "--device": {"help": "device (default: the process's GPU, otherwise cpu)"},
        "--dtype": {"choices": ("float32", "bfloat16", "float16", "int8"), "default": "float32"},
        "--threads": {"type": int, "help": "number of torch threads on a CPU"},
    },
}
_OF_MASKS = (
    *("limit", "background", "image_column", "mask_column", "protocol", "background_threshold"),
    *("thresholds", "synonyms", "refinement", "analysis", "baselines", "train", "crop_sides"),
    *("save_predictions", "visualize"),
)
_OF_CLASSES = ("templates", "label_column")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `pgseg evaluate`."""
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub name (default: the included checkpoint)")
    for title, options in _EVALUATE.items():
        group = parser.add_argument_group(title)
        for name, how in options.items():
            group.add_argument(name, *(["--output-dir"] if name == "--output" else []), **how)


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `pgseg prepare`."""
    parser.add_argument("what", choices=PREPARATIONS, metavar="WHAT", help=", ".join(PREPARATIONS))
    parser.add_argument("folder", type=Path, help="folder of the benchmark's raw download")
    parser.add_argument("--split", help="split (default: val2017 or val; context always makes both)")


def check_evaluate_arguments(args: argparse.Namespace) -> None:
    """Raises a ValueError for options without effect, invalid thresholds and missing folders."""
    idle = _OF_MASKS if args.benchmark == "imagenet" else _OF_CLASSES
    given = [name for name in idle if getattr(args, name) is not None and getattr(args, name) is not False]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} has no effect on {args.benchmark}; omit it.")
    if args.mask_values and args.benchmark != "folder":
        raise ValueError(
            f"--mask-values is {args.mask_values!r}, but {args.benchmark} defines its own; omit it."
        )
    if (args.train or args.crop_sides) and not args.baselines:
        raise ValueError("--train and --crop-sides only apply to the position prior; add --baselines.")
    if args.thresholds:
        parse_thresholds(args.thresholds)
    if args.checkpoint is not None:
        refuse_missing_folder(args.checkpoint)
    if args.benchmark != "imagenet" and not args.data.startswith("hub:"):
        _refuse_missing_data(Path(args.data))


def check_prepare_arguments(args: argparse.Namespace) -> None:
    """Raises a ValueError if the folder is missing."""
    _refuse_missing_data(args.folder)


def _refuse_missing_data(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")


def parse_thresholds(text: str) -> tuple[float, ...]:
    """Parses `0.1:0.9:0.1`, or numbers separated by commas.

    Raises:
        ValueError: the text has neither form.
    """
    try:
        if ":" not in text:
            return tuple(float(part) for part in text.split(","))
        first, last, step = (float(part) for part in text.split(":"))
        if not all(map(math.isfinite, (first, last, step))) or abs(last - first) > MAX_THRESHOLDS * abs(step):
            raise ValueError(f"there are more than {MAX_THRESHOLDS}")
        count = int((last - first) / step + 1e-9) + 1
        if count < 1:
            raise ValueError("there are none")
        return tuple(round(first + number * step, 10) for number in range(count))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"thresholds are {text!r}, expected FROM:TO:STEP or numbers separated by commas: {error}"
        ) from error
