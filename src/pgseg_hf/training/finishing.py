"""Writes the result of a run: a `from_pretrained` folder with a model card and metrics."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..files import folder_written_whole, write_json, write_text
from ..model_cards import generate_model_card
from ..modeling_pgseg import PGSegModel
from ..processing_pgseg import PGSegProcessor
from .arguments import Arguments

RESULTS_NAME = "all_results.json"


def save_weights(model: PGSegModel, processor: PGSegProcessor, folder: Path) -> None:
    """Writes a `from_pretrained` folder, replacing an existing one."""
    with folder_written_whole(folder, replace=True) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def publish(weights: Path, output_dir: Path, card: str, results: Mapping[str, Any]) -> None:
    """Moves a `from_pretrained` folder's files to `output_dir` (config.json last), adds the model card and metrics."""
    files = sorted(weights.iterdir(), key=lambda path: path.name == "config.json")
    for path in files:
        os.replace(path, output_dir / path.name)
    weights.rmdir()
    write_text(card, output_dir / "README.md")
    write_json(dict(results), output_dir / RESULTS_NAME)


def model_card(
    model: PGSegModel, arguments: Arguments, results: Mapping[str, Any], repo_id: str | None
) -> str:
    """The model card with the data, recipe and metrics of this run."""
    chosen, data, run = arguments
    given = (chosen.model_name_or_path, chosen.groupvit_name_or_path)
    starts = [start for start in (*given, chosen.backbone_name_or_path, chosen.text_name_or_path) if start]
    rows = {
        "data": ", ".join(
            f"`{_public_name(spec.path)}` (weight {spec.weight:g})" for spec in data.source_specs()
        ),
        "start": ", ".join(f"`{_public_name(start)}`" for start in starts) or "random weights",
        "loss": f"`{model.config.contrastive_loss}`, pooling `{model.config.contrastive_pooling}`",
        "batch": f"{results['global_batch_size']}",
        "steps": f"{results['steps']} ({results['epoch']:.1f} epochs)",
        "learning rate": f"{run.learning_rate:g}, cosine, {run.warmup_ratio:.0%} warm-up",
        "precision": results["mixed_precision"],
        "seed": f"{run.seed}",
        "time": f"{results['train_runtime'] / 60:.1f} minutes on {results['num_processes']} x {results['device']}",
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    figures = {
        name.removeprefix("eval_"): value for name, value in results.items() if name.startswith("eval_")
    }
    if figures:
        where = ", ".join(f"`{_public_name(path)}`" for path in (run.eval_masks, run.eval_tags) if path)
        lines += ["", f"Evaluated on {where} with the processor's settings:", "", "| metric | |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in figures.items()]
    name = repo_id or "path/to/this/folder"
    return str(generate_model_card(model.config, name, training="\n".join(lines), starts=starts))


def upload(output_dir: Path, repo_id: str) -> str:
    """Uploads the result, without checkpoints and images, to an existing repository; returns its URL."""
    files = [path.name for path in output_dir.iterdir() if path.is_file() and not path.name.startswith(".")]
    return str(HfApi().upload_folder(repo_id=repo_id, folder_path=output_dir, allow_patterns=files).repo_url)


def _public_name(path: str) -> str:
    """The last two parts of a local path, so that the card does not reveal where it is; a Hub name as it is."""
    return "/".join(Path(path).parts[-2:]) if os.path.isabs(path) or os.path.exists(path) else path
