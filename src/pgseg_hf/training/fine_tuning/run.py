"""Fine-tunes a checkpoint for `pgseg train` on labelled photos and evaluates it on held-out ones before and after."""

import argparse
import hashlib
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...configuration_pgseg import PGSegConfig
from ...data.photos import LabelledPhotos, read_photos, row_of
from ...data.records import Record
from ...files import write_json, write_text
from ...processing_pgseg import PGSegProcessor
from ...run_records import is_same_run
from ...text_files import read_json
from ..arguments import Arguments, DataArguments, ModelArguments, RunArguments
from ..batches.feature_cache import CachedSource
from ..checkpoints import RUN_FILES
from ..run import Run
from .options import RECORD_NAME, features_folder
from .report import DRAWINGS_NAME, JSON_NAME, REPORT_NAME, find_masks, write_report

LEAST_PHOTOS = 8
MOST_HELD_OUT = 500
LARGEST_BATCH = 48
LEARNING_RATE = 3e-4
_SPLIT = "split"


def fine_tune(args: argparse.Namespace) -> dict[str, Any]:
    """Trains or resumes training, and writes the model and its report to the output folder.

    Args:
        args: checked arguments of `pgseg train`.

    Returns:
        The content of `report.json`, and `done_before`: whether it had been written by an earlier call.

    Raises:
        ValueError: if the photos or labels cannot be used, or the output folder contains another model.
    """
    output = args.output
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no GPU; omit it to use the CPU.")
    photos = read_photos(args.photos, args.labels_from, leave_out=output)
    _refuse_too_few(photos)
    config = PGSegConfig.from_pretrained(args.model)
    record = _record(args, photos)
    if _is_known(record, output, args.overwrite):
        _clean_up(output)
        return read_json(output / JSON_NAME) | {"done_before": True}
    train, held_out = split_photos(photos.photos, args.held_out, args.seed)
    masks = find_masks(args, held_out)  # raises for an invalid folder, so call it before training
    resume = "latest" if (output / RECORD_NAME).is_file() else None
    write_json(record, output / RECORD_NAME)
    for name, part in (("train", train), ("held-out", held_out)):
        rows = (json.dumps(row_of(photo), ensure_ascii=False) for photo in part)
        write_text("".join(f"{row}\n" for row in rows), output / _SPLIT / f"{name}.jsonl")
    labels = list(photos.count_labels())
    names = [*labels, *competing_words(args.model, config)] if labels else []
    write_json({"names": {name: [] for name in names}}, output / _SPLIT / "labels.json")
    run = Run(choose_arguments(args, config, len(train), bool(labels), resume))
    if run.processor.vocabulary is not None:
        run.processor.vocabulary = list(dict.fromkeys([*run.processor.vocabulary, *labels]))
    results = run.train()
    caches = [source for source in run.stream.sources if isinstance(source, CachedSource)]
    broken = [train[index].name for source in caches for index in source.unusable()]
    if broken:
        photos.left_out["broken image"] = broken
    report = write_report(args, photos, train, held_out, masks, results)
    _clean_up(output)
    return report | {"done_before": False}


def competing_words(model: str, config: PGSegConfig) -> list[str]:
    """The checkpoint's vocabulary. Its words compete for the patches, as in segmentation, but have no loss themselves.
    Without them, the only label of an image would learn to cover all of it."""
    if not config.pooling.words_compete:
        return []
    return PGSegProcessor.from_pretrained(model).vocabulary or []


def _refuse_too_few(photos: LabelledPhotos) -> None:
    count, labels = len(photos.photos), photos.count_labels()
    if count < LEAST_PHOTOS:
        raise ValueError(
            f"{photos.folder} has {count} photos with a label (from {photos.source}), expected at least {LEAST_PHOTOS} "
            "in total, and preferably 20 or more per label."
        )
    if len(labels) == 1 and not any(photo.captions for photo in photos.photos):
        raise ValueError(
            f"{photos.folder}: all {count} photos have the same label {next(iter(labels))!r} (from {photos.source}), "
            "expected at least two labels: a label is learned by comparison with others."
        )


def split_photos(photos: list[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Splits the photos into training and held-out photos. A share of each label's photos is held out, rare labels
    first. If a label has only one photo, that photo is used for training."""
    order = np.random.default_rng(seed).permutation(len(photos)).tolist()
    most = max(1, min(round(share * len(photos)), MOST_HELD_OUT))
    wanted = most / len(photos)
    of_label: dict[str, list[int]] = {}
    for index in order:
        for label in photos[index].tags:
            of_label.setdefault(label, []).append(index)
    left = Counter({label: len(indices) for label, indices in of_label.items()})
    held: dict[int, None] = {}

    def hold(indices: list[int], count: int) -> None:
        count -= sum(index in held for index in indices)
        for index in indices:
            own = photos[index].tags
            if count <= 0 or len(held) >= most:
                return
            if index not in held and all(left[label] > 1 for label in own):
                held[index] = None
                left.subtract(own)
                count -= 1

    for indices in sorted(of_label.values(), key=len):
        hold(indices, max(1, round(wanted * len(indices))))
    hold(order, most)
    train = [photo for index, photo in enumerate(photos) if index not in held]
    return train, [photos[index] for index in sorted(held)]


def choose_arguments(
    args: argparse.Namespace, config: PGSegConfig, count: int, has_labels: bool, resume: str | None
) -> Arguments:
    """Training arguments for `count` photos. A frozen backbone's features are cached."""
    batch = max(2, min(LARGEST_BATCH, count // 3))
    steps = args.steps or max(60, min(1500, math.ceil(15 * count / batch)))
    frozen = config.vision_config.backbone_config is not None and config.vision_config.freeze_backbone
    cached = {
        "cache_features": str(features_folder(args.output)),
        "cache_views": max(1, min(8, 2000 // count)),
        "cache_patch_stride": 2,
    }
    split = args.output / _SPLIT
    source = {"path": str(args.photos), "metadata": str(split / "train.jsonl"), "tags_column": "tags"}
    return (
        ModelArguments(
            model_name_or_path=args.model,
            contrastive_loss="sigmoid" if has_labels and config.pooling.by_share else "multi_positive",
        ),
        DataArguments(
            sources=[source | {"caption_column": "captions"}],  # type: ignore[list-item]
            synonyms=str(split / "labels.json") if has_labels else None,
            min_scale=0.3,
            num_workers=0 if frozen else 2,
            **(cached if frozen else {}),  # type: ignore[arg-type]
        ),
        RunArguments(
            output_dir=str(args.output),
            resume_from_checkpoint=resume,
            seed=args.seed,
            batch_size=batch,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            warmup_ratio=0.1,
            max_grad_norm=1.0,
            mixed_precision="no",
            cpu=args.device == "cpu" or not torch.cuda.is_available(),
            checkpoint_steps=max(10, steps // 8),
            keep_checkpoints=1,
        ),
    )


def _record(args: argparse.Namespace, photos: LabelledPhotos) -> dict[str, Any]:
    """Everything that a run depends on."""
    digest = hashlib.sha256()
    for photo in photos.photos:
        state = (photos.folder / photo.name).stat()
        digest.update(json.dumps([row_of(photo), state.st_size, state.st_mtime_ns]).encode())
    return {
        "photos": str(args.photos.resolve()),
        "number of photos": len(photos.photos),
        "photos and labels": digest.hexdigest()[:16],
        "model": str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model,
        "masks": args.masks and str(args.masks.resolve()),
        **{name: getattr(args, name) for name in ("steps", "held_out", "seed")},
    }


def _is_known(record: dict[str, Any], output: Path, overwrite: bool) -> bool:
    """Whether the output folder already has the result. With `overwrite`, the files of another or a
    finished run are deleted; an unfinished run with the same record is resumed.

    Raises:
        ValueError: if the folder belongs to another run.
    """
    way_out = "Choose another --output, or pass --overwrite."
    is_same = is_same_run(output / RECORD_NAME, record, way_out, overwrite)
    is_finished = (output / JSON_NAME).is_file()
    if overwrite and (not is_same or is_finished):
        _clean_up(output)
        shutil.rmtree(output / DRAWINGS_NAME, ignore_errors=True)
        for name in (*RUN_FILES, JSON_NAME, REPORT_NAME, RECORD_NAME):
            (output / name).unlink(missing_ok=True)
        return False
    return bool(is_same) and is_finished


def _clean_up(output: Path) -> None:
    """Deletes the files that are only needed to resume."""
    folder = features_folder(output)
    for path in (*folder.glob("[0-9][0-9]-*"), *output.glob("checkpoint-*")):
        shutil.rmtree(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
