"""The options of `pgseg train`."""

import argparse
from pathlib import Path

from ... import DEFAULT_CHECKPOINT
from ...files import refuse_missing_folder

TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet")
RECORD_NAME = "fine_tuning.json"


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `pgseg train`."""
    parser.add_argument("photos", type=Path, help="folder with the photos, may have subfolders")
    parser.add_argument(
        "--labels-from",
        type=Path,
        metavar="FILE",
        help="CSV, JSON or Parquet file with the columns file_name and tags (or labels, or caption); default: "
        "metadata.csv or .jsonl in the folder, otherwise the names of the subfolders are the labels",
    )
    parser.add_argument(
        "--output", "--output-dir", type=Path, required=True, help="folder for the new model and its report"
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_CHECKPOINT,
        help="model to fine-tune: a folder or a name on the Hub (default: the included checkpoint)",
    )
    parser.add_argument("--steps", type=int, help="training steps; default: depends on the number of photos")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of the photos used only for evaluation, at most 500 photos (default: 0.2)",
    )
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="FOLDER",
        help="other photos with masks and labels.json, for mIoU; default: the masks of the held-out photos, if any",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of training and of the held-out split")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available, otherwise cpu")
    parser.add_argument(
        "--overwrite", action="store_true", help="overwrite another model in the output folder"
    )


def check_train_arguments(args: argparse.Namespace) -> None:
    """Raises a ValueError if a path is missing, a number is out of range, or the output folder is in use."""
    for option, folder in (("photos", args.photos), ("--masks", args.masks)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{option} is {folder}, which is not a folder.")
    table = args.labels_from
    if table is not None and not table.is_file():
        raise ValueError(f"--labels-from is {table}, which is not a file.")
    if table is not None and table.suffix.lower() not in TABLES:
        raise ValueError(f"--labels-from is {table}, expected one of the file types {', '.join(TABLES)}.")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps is {args.steps}, expected at least 1.")
    if not 0 < args.held_out < 1:
        raise ValueError(f"--held-out is {args.held_out}, expected a share between 0 and 1, such as 0.2.")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}, expected 0 or more.")
    refuse_missing_folder(args.model)
    _check_output(args.output, args.photos, args.overwrite)


def features_folder(output: Path) -> Path:
    """The temporary folder for the features of a run."""
    return output.with_name(f"{output.name}-features")


def _check_output(output: Path, photos: Path, overwrite: bool) -> None:
    here = output.resolve()
    if photos.resolve().is_relative_to(here):
        raise ValueError(f"--output is {output}, which contains the photos; choose another folder.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output is {output}, which is a file; choose a folder.")
    if (output / RECORD_NAME).is_file() or overwrite:
        return
    for folder in (output, features_folder(output)):
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} contains other files; choose another --output, or pass --overwrite.")
