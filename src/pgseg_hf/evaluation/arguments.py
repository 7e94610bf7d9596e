"""The options of `pgseg evaluate` and `pgseg prepare`."""

import argparse
import math
from pathlib import Path
from typing import Any

from ..files import refuse_missing_folder

# Of `benchmarks`, by their names: it imports torch.
BENCHMARK_NAMES = (
    *("voc", "voc20", "context", "context59", "coco_object", "coco_stuff", "ade20k", "cityscapes"),
    *("imagenet_s50", "imagenet_s300", "imagenet_s919", "lvis", "imagenet", "folder"),
)
PREPARATIONS = ("coco_object", "coco_object_from_stuff", "coco_stuff", "context", "cityscapes", "lvis")
MAX_THRESHOLDS = 100
TEMPLATE_SETS = ("simple", "subset", "full")


_SWITCH = {"action": "store_true"}
# Options by group; of those in `_OF_MASKS` and `_OF_CLASSES` only one kind of benchmark takes notice.
_EVALUATE: dict[str, dict[str, dict[str, Any]]] = {
    "images": {
        "--benchmark": {"required": True, "choices": BENCHMARK_NAMES, "metavar": "NAME"}
        | {"help": ", ".join(BENCHMARK_NAMES)},
        "--data": {"required": True, "help": "the benchmark's folder, or hub:NAME for a data set of the Hub"},
        "--split": {"help": "default: val; of a folder one of its subfolders, by default the folder itself"},
        "--limit": {"type": int, "metavar": "N", "help": "only N images, spread over all"},
        "--background": {"metavar": "LABEL", "help": "of a folder: the label that means background"},
        "--mask-values": {
            "metavar": "VALUE=LABEL,...",
            "help": "of a folder: what the masks' values or colours mean, such as 0=background,255=sky or "
            "#ff8000=sky; VALUE= for what does not count",
        },
        "--image-column": {"help": "of a hub:NAME; default: the usual names"},
        "--mask-column": {"help": "of a hub:NAME; default: mask"},
        "--label-column": {"help": "for imagenet in shards or hub:NAME; default: cls or label"},
        "--skip-broken": {**_SWITCH, "help": "name images that cannot be decoded and go on"},
    },
    "protocol": {
        "--protocol": {
            "help": "pgseg, groupvit, unified, checkpoint (its own sizes) or a YAML file; default: checkpoint for a "
            "folder, else pgseg"
        },
        "--background-threshold": {"type": float, "metavar": "T", "help": "instead of the protocol's"},
        "--thresholds": {"metavar": "FROM:TO:STEP", "help": "also count these background thresholds"},
        "--synonyms": {"choices": ("none", "average", "merge"), "help": "instead of the protocol's"},
        "--refinement": {"choices": ("none", "pamr"), "help": "instead of the protocol's"},
        "--templates": {"choices": TEMPLATE_SETS, "help": "for imagenet: 1, 7 (default) or 80 prompts"},
    },
    "more figures and files": {
        "--analysis": {**_SWITCH, "help": "the groups: oracle, purity, coverage, redundancy ..."},
        "--baselines": {**_SWITCH, "help": "one label everywhere, and a model without training"},
        "--train": {"help": "training folder: with --baselines also the position prior of its tags"},
        "--crop-sides": {"type": float, "nargs": 2, "metavar": "PX"}
        | {"help": "of training, for the position prior"},
        "--seed": {"type": int, "default": 0, "help": "of the untrained model and the position prior"},
        "--save-predictions": {**_SWITCH, "help": "write every label map as an indexed PNG"},
        "--visualize": {"type": int, "metavar": "N", "help": "draw N images beside their truth"},
        "--output": {"type": Path, "help": "folder of the results; default: CHECKPOINT-BENCHMARK-SPLIT"},
        "--overwrite": {**_SWITCH, "help": "drop what another evaluation counted there"},
    },
    "machine": {
        "--batch-size": {"type": int, "default": 8, "help": "windows in one pass of the image encoder"},
        "--readers": {"type": int, "default": 2, "help": "threads that read images ahead"},
        "--device": {"help": "default: the process's GPU, else cpu"},
        "--dtype": {"choices": ("float32", "bfloat16", "float16", "int8"), "default": "float32"},
        "--threads": {"type": int, "help": "of torch on a CPU"},
    },
}
_OF_MASKS = (
    *("limit", "background", "image_column", "mask_column", "protocol", "background_threshold"),
    *("thresholds", "synonyms", "refinement", "analysis", "baselines", "train", "crop_sides"),
    *("save_predictions", "visualize"),
)
_OF_CLASSES = ("templates", "label_column")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """What `pgseg evaluate` takes; the benchmark's images, the protocol, and what to make of them."""
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub name (default: the shipped model)")
    for title, options in _EVALUATE.items():
        group = parser.add_argument_group(title)
        for name, how in options.items():
            group.add_argument(name, *(["--output-dir"] if name == "--output" else []), **how)


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """What `pgseg prepare` takes."""
    parser.add_argument("what", choices=PREPARATIONS, metavar="WHAT", help=", ".join(PREPARATIONS))
    parser.add_argument("folder", type=Path, help="of the benchmark's raw download")
    parser.add_argument("--split", help="default: val2017, val or what the annotations hold")


def check_evaluate_arguments(args: argparse.Namespace) -> None:
    """Raises a ValueError for options without effect, thresholds that are none, and missing folders."""
    idle = _OF_MASKS if args.benchmark == "imagenet" else _OF_CLASSES
    given = [name for name in idle if getattr(args, name) is not None and getattr(args, name) is not False]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} has no effect on {args.benchmark}; leave it out.")
    if args.mask_values and args.benchmark != "folder":
        raise ValueError(
            f"--mask_values is {args.mask_values!r}, but {args.benchmark} has its own; leave it out."
        )
    if (args.train or args.crop_sides) and not args.baselines:
        raise ValueError("--train and --crop-sides are for the position prior; add --baselines.")
    if args.thresholds:
        parse_thresholds(args.thresholds)
    if args.checkpoint is not None:
        refuse_missing_folder(args.checkpoint)
    if args.benchmark != "imagenet" and not args.data.startswith("hub:"):
        _refuse_missing_data(Path(args.data))


def check_prepare_arguments(args: argparse.Namespace) -> None:
    """Raises a ValueError for a folder that is missing."""
    _refuse_missing_data(args.folder)


def _refuse_missing_data(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")


def parse_thresholds(text: str) -> tuple[float, ...]:
    """`0.1:0.9:0.1`, or numbers separated by commas.

    Raises:
        ValueError: something else.
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
            f"thresholds are {text!r}, expected FROM:TO:STEP or numbers with commas: {error}"
        ) from error
