"""Which parts of the prototypes (NPR) help? Trains every variant on the same synthetic scenes and evaluates it.

    python examples/ablate_npr.py --output ablation --threads 1

The runs are ordered by seed, and each runs `train_pgseg.py` in its own process. A run with a record in `records/` is
not repeated, so the same command resumes after a stop; a record of other settings, data or scenes is refused. At the
end the records are summarised in `table.md`, `table.json` and, with matplotlib, `curves.png`; `--table` does only that.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from ablation_report import COMPARED, FIGURES, GROUP_FIGURES, REFERENCE, draw_curves, summarize, table
from PIL import Image

import pgseg_hf
from pgseg_hf import Segmenter, load_segmenter
from pgseg_hf.command_line import CommandParser
from pgseg_hf.data.scenes import GROUNDS, SHAPES, SceneOptions, SceneSource
from pgseg_hf.data.sources import open_source
from pgseg_hf.evaluation.benchmarks.mask_dataset import LabelledImage, MaskDataset
from pgseg_hf.evaluation.evaluator import MaskOptions, evaluate_masks
from pgseg_hf.files import write_image, write_json, write_text
from pgseg_hf.run_records import differences, flat, hash_of
from pgseg_hf.segmentation import SegmentationOptions
from pgseg_hf.training.arguments import parse_arguments
from pgseg_hf.training.building import build_model, build_processor
from pgseg_hf.training.continuing import contents_of, hash_of_files
from pgseg_hf.training.evaluating import evaluation_mode
from pgseg_hf.training.reporting import read_log

HERE = Path(__file__).parent
WITHOUT: dict[str, dict[str, Any]] = {
    "no-matching": {"prototype_matching": "order"},
    "no-rejection": {"rejection_threshold": 0.0},
    "no-momentum": {"vision_config": {"prototype_momentum": 1.0}},
    "no-resolution-free": {"vision_config": {"prototype_mixing": "tokens"}},
    "no-text-prototypes": {"text_prototype_weight": 0.0},
    "no-image-prototypes": {"image_prototype_weight": 0.0},
}


def merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Fields with changes applied; those of a tower are merged field by field."""
    inner = {name: fields.get(name, {}) | value for name, value in changes.items() if isinstance(value, dict)}
    return fields | changes | inner


GROUPS, TIED = {"contrastive_pooling": "groups"}, {"assignment_weight": 0.2}
PATCHES: dict[str, Any] = {"vision_config": {"segment_source": "patches"}}
OURS = TIED | GROUPS | PATCHES
LIGHT = {"image_prototype_weight": 0.01, "text_prototype_weight": 0.001}
VARIANTS: dict[str, dict[str, Any]] = {
    "untrained": {},
    "none": {"npr_variant": "none"},
    "released": {"npr_variant": "released"},
    REFERENCE: {},
    "assignment": TIED,
    "group-pooling": GROUPS,
    "patches": PATCHES,
    "light": LIGHT,
    "ours": OURS,
    "ours-light": OURS | LIGHT | {"assignment_weight": 0.05},
    "ours-no-assignment": GROUPS | PATCHES,
    "ours-no-group-pooling": TIED | PATCHES,
    "ours-no-patches": TIED | GROUPS,
    "none-group-pooling": {"npr_variant": "none"} | GROUPS,
    "none-group-pooling-patches": {"npr_variant": "none"} | GROUPS | PATCHES,
    **WITHOUT,
    "no-prototype-losses": {"image_prototype_weight": 0.0, "text_prototype_weight": 0.0},
    **{f"ours-{name}": merged(OURS, changes) for name, changes in WITHOUT.items()},
}
"""Changes to `model_config` in the configuration file, whose variant is `corrected`. `assignment`, `group-pooling` and
`patches` each change one part of `corrected`; `ours` changes all three. `light` has a tenth of the weight of the
prototype losses, and `ours-light` also a quarter of the assignment weight of `ours`. `no-...` removes one part of
`corrected`, and `ours-no-...` one part of `ours`."""

# Seeds of the evaluation scenes; training uses 0.
EVALUATION_SEED, CURVE_SEED = 1, 2
CURVE_SCENES = 40


@dataclass
class Scenes:
    """A fixed set of scenes in memory: images with masks and a full caption."""

    dataset: MaskDataset
    captions: list[str]

    @property
    def images(self) -> list[Image.Image]:
        return [image.read() for image in self.dataset.images]


def make_scenes(split: str, size: int, count: int, seed: int = EVALUATION_SEED) -> Scenes:
    """Creates the first `count` scenes of a split."""
    source = SceneSource(SceneOptions(size=size, length=count, seed=seed, split=split))
    images = [
        LabelledImage(f"{split}-{index}", record.image, record.mask) for index, record in enumerate(source)
    ]
    captions = [source.describe(index) for index in range(count)]
    return Scenes(MaskDataset(f"scenes of {split}", source.labels, images), captions)


def write_scenes(scenes: Scenes, folder: Path) -> Path:
    """Writes the scenes to a folder for evaluation during training."""
    for each in scenes.dataset.images:
        write_image(each.image, folder / "images" / f"{each.name}.png")
        write_image(each.mask, folder / "masks" / f"{each.name}.png")
    write_json({"labels": scenes.dataset.labels}, folder / "labels.json")
    return folder


def measure(segmenter: Segmenter, scenes: Scenes) -> dict[str, float | None]:
    """Evaluates a model's segmentation, groups and retrieval."""
    options = MaskOptions(SegmentationOptions(batch_size=50), oracle=True, groups=True)
    with evaluation_mode(segmenter.model):
        scores = evaluate_masks(segmenter, scenes.dataset, options).to_dict()
        recalls = retrieval(segmenter, scenes)
    for name, labels in (("foreground_iou", SHAPES), ("background_iou", GROUNDS)):
        known = [value for label in labels if (value := scores["iou"][label]) is not None]
        scores[name] = mean(known) if known else None
    scores |= {name: scores["groups"][name] for name in GROUP_FIGURES}
    return {name: scores[name] for name in (*FIGURES, *GROUP_FIGURES)} | recalls


@torch.no_grad()
def retrieval(segmenter: Segmenter, scenes: Scenes) -> dict[str, float]:
    """Share of images whose full caption is the most similar, or among the five most similar ones. Equal captions count
    as the same."""
    model, processor = segmenter.model, segmenter.processor
    length, captions = model.config.text_config.max_position_embeddings, scenes.captions
    texts = processor.tokenizer(
        captions, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    pixels = processor.image_processor(scenes.images, return_tensors="pt")["pixel_values"]
    features = model.get_image_features(pixels)
    embeds = model.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output
    best = model.get_logits(features, embeds)[0].topk(min(5, len(captions)), dim=1).indices.tolist()
    ranked = [[captions[index] for index in row] for row in best]
    return {
        f"recall@{count}": mean(float(own in row[:count]) for own, row in zip(captions, ranked))
        for count in (1, 5)
    }


@dataclass
class Ablation:
    """The settings that all runs share.

    Args:
        output: folder of records and results.
        config: YAML file of the corrected variant.
        steps: number of steps per run; by default the file's.
        scenes: number of images per evaluation.
        threads: number of torch threads.
    """

    output: Path
    config: Path = HERE / "configs" / "scenes_cpu.yaml"
    steps: int | None = None
    scenes: int = 200
    threads: int = 1

    def __post_init__(self) -> None:
        self.settings: dict[str, Any] = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        self.steps = self.steps or self.settings["max_steps"]
        self.settings |= {"max_steps": self.steps, "threads": self.threads}
        size = self.settings["model_config"]["vision_config"]["image_size"]
        self.sets = {split: make_scenes(split, size, self.scenes) for split in ("test", "novel")}
        self.curve = make_scenes("test", size, CURVE_SCENES, CURVE_SEED)

    def settings_of(self, variant: str) -> dict[str, Any]:
        """The training options of a variant."""
        config = merged(self.settings["model_config"], VARIANTS[variant])
        return self.settings | {"model_config": config}

    def depends_on(self, variant: str) -> dict[str, Any]:
        """Everything that the results of a record depend on, by content."""
        return flat({"settings": self.settings_of(variant), "scenes": self.scenes}) | self._contents

    @cached_property
    def _contents(self) -> dict[str, Any]:
        with TemporaryDirectory(prefix="ablation-") as name:
            write_text(yaml.safe_dump(self.settings), Path(name) / "settings.yaml")
            data = parse_arguments([str(Path(name) / "settings.yaml"), "--output_dir", name])[1]
        try:
            sources = [contents_of(open_source(spec)) for spec in data.source_specs()]
        except ValueError as error:  # training raises it too
            sources = [str(error)]
        scenes = [image.tobytes().hex() for each in self.sets.values() for image in each.images]
        files = {
            f"files of {name}": hash_of_files(Path(str(value)))
            for name, value in self.settings.items()
            if name.endswith("_name_or_path") or name in ("synonyms", "mask_labels")
        }
        return {"contents of the sources": sources, "scenes to measure on": hash_of(scenes)} | files

    def record_path(self, variant: str, seed: int) -> Path:
        return self.output / "records" / f"{variant}-seed{seed}.json"

    def is_done(self, variant: str, seed: int) -> bool:
        """Whether a run has a record.

        Raises:
            ValueError: the record is of other settings, data or scenes.
        """
        path = self.record_path(variant, seed)
        if not path.exists():
            return False
        record = json.loads(path.read_text(encoding="utf-8"))
        if different := differences(record.get("depends_on", {}), self.depends_on(variant)):
            raise ValueError(f"{path} is from another run: {', '.join(different)}. Choose another --output.")
        if other := differences(record["versions"], _versions()):
            print(f"{path} is from other versions: {', '.join(other)}.", file=sys.stderr)
        return True

    def run(self, variant: str, seed: int) -> dict[str, Any]:
        """Trains and evaluates a variant and writes its record.

        Raises:
            subprocess.CalledProcessError: training failed; its output is in `failed/`.
        """
        start, settings = time.monotonic(), self.settings_of(variant)
        with TemporaryDirectory(prefix="ablation-") as name:
            folder = Path(name)
            write_text(yaml.safe_dump(settings), folder / "settings.yaml")
            options = [str(folder / "settings.yaml"), f"--seed={seed}", f"--output_dir={folder / 'model'}"]
            if variant == "untrained":
                segmenter, log = _untrained(options), []
            else:
                self._train(options, folder, f"{variant}-seed{seed}")
                segmenter = load_segmenter(str(folder / "model"))
                log = read_log(folder / "model" / "log.jsonl")
            trained = time.monotonic()
            figures = {split: measure(segmenter, scenes) for split, scenes in self.sets.items()}
        record = {
            "variant": variant,
            "seed": seed,
            "changes": VARIANTS[variant],
            "steps": 0 if variant == "untrained" else self.steps,
            "scenes": self.scenes,
            "figures": figures,
            "log": log,
            "seconds": {"training": trained - start, "measuring": time.monotonic() - trained},
            "settings": settings,
            "depends_on": self.depends_on(variant),
            "versions": _versions(),
            "command": shlex.join(["python", *sys.argv]),
        }
        write_json(record, self.record_path(variant, seed))
        return record

    def _train(self, options: list[str], folder: Path, name: str) -> None:
        write_scenes(self.curve, folder / "curve")
        options = [*options, "--eval_masks", str(folder / "curve"), "--num_drawings", "0"]
        options += ["--eval_steps", str(max(1, self.steps // 5))] if self.steps else []
        done = subprocess.run(
            [sys.executable, str(HERE / "train_pgseg.py"), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
        )
        if done.returncode:
            write_text(done.stdout, self.output / "failed" / f"{name}.txt")
            done.check_returncode()


def _versions() -> dict[str, str]:
    modules = (torch, transformers, np, pgseg_hf)
    return {"python": platform.python_version(), **{each.__name__: each.__version__ for each in modules}}


def _untrained(options: list[str]) -> Segmenter:
    model_arguments, data, run = parse_arguments(options)
    torch.manual_seed(run.seed)
    model = build_model(model_arguments).eval()
    return Segmenter(model, build_processor(model_arguments, data, model.config))


def read_records(output: Path) -> list[dict[str, Any]]:
    """Reads all records, in the order of `VARIANTS`."""
    paths = sorted((output / "records").glob("*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    order = list(VARIANTS)
    return sorted(records, key=lambda record: (order.index(record["variant"]), record["seed"]))


def write_results(output: Path, variants: Sequence[str] = tuple(VARIANTS)) -> None:
    """Writes the table and the curves of the variants' records.

    Raises:
        ValueError: there are no records.
    """
    records = read_records(output)
    rows = {variant: row for variant, row in summarize(records).items() if variant in variants}
    if not rows:
        raise ValueError(f"{output} has no records of {', '.join(variants)}; run without --table first.")
    text = table(rows)
    write_json(rows, output / "table.json")
    write_text(text, output / "table.md")
    print(text)
    try:
        draw_curves([record for record in records if record["variant"] in rows], output / "curves.png")
    except ValueError as error:
        print(error, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of records and results")
    parser.add_argument("--config", type=Path, default=Ablation.config, help="YAML file of `corrected`")
    variants: dict[str, Any] = {
        "nargs": "+",
        "choices": VARIANTS,
        "default": list(VARIANTS),
        "metavar": "VARIANT",
    }
    parser.add_argument(
        "--variants", **variants, help="variants to run and to show in the results (default: all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="steps per run (default: the configuration file's)")
    parser.add_argument("--scenes", type=int, default=200, help="images per evaluation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only write the results of existing records")
    arguments = parser.parse_args(argv)
    failed = []
    if not arguments.table:
        torch.set_num_threads(arguments.threads)
        ablation = Ablation(
            arguments.output, arguments.config, arguments.steps, arguments.scenes, arguments.threads
        )
        runs = [(variant, seed) for seed in arguments.seeds for variant in arguments.variants]
        for variant, seed in [run for run in runs if not ablation.is_done(*run)]:
            try:
                record = ablation.run(variant, seed)
            except subprocess.CalledProcessError as error:
                failed.append(f"{variant}, seed {seed}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            found = record["figures"]["test"]
            shown = ", ".join(f"{name} {found[name]:.3f}" for name in COMPARED)
            print(f"{variant}, seed {seed}: {shown}, {record['seconds']['training']:.0f} s", flush=True)
    write_results(arguments.output, arguments.variants)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
