"""Checkpoints of a training run. If the run is killed at any moment, the last complete checkpoint stays usable.

A checkpoint is a folder such as `checkpoint-00001000` in the run's output folder, which all processes must share. It
contains the output of `Accelerator.save_state` (weights, optimizer, schedule, gradient scaler, random states of each
process), the averaged weights in `ema.safetensors`, the data position of each process in `position-RANK.json`, and
`progress.json` with the SHA-256 of the other files, to detect damage. A checkpoint is written under a hidden name and
renamed once it is complete; old checkpoints are renamed before they are deleted.

Load only your own checkpoints. Accelerate reads the states of optimizer, schedule and random generators with torch's
`weights_only` unpickler, which creates only tensors and numbers. Objects registered with
`Accelerator.register_for_checkpointing` would be unpickled without this protection, so nothing is registered here.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME
from accelerate.utils import load as load_weights_only
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from transformers.utils import logging

from ..files import write_json
from ..run_records import differences, sha256
from .continuing import file_hashes

logger = logging.get_logger(__name__)

PROGRESS_NAME = "progress.json"
AVERAGE_NAME = "ema.safetensors"
# Files that every run writes to its output folder, with or without checkpoints.
RUN_FILES = ("all_results.json", "log.jsonl")
_RUN_FOLDERS = ("best", "drawings")
_NAME = re.compile(r"checkpoint-\d{8,}")
_PARTIAL, _REMOVED, _DAMAGED = ".partial-", ".removed-", "damaged-"
# Errors of torch, safetensors and Accelerate for broken files and for states of another model.
_LOADING_ERRORS = (OSError, EOFError, RuntimeError, KeyError, ValueError, SafetensorError, UnpicklingError)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | os.PathLike,
    step: int,
    stream_state: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    keep: int | None = None,
    ema: nn.Module | None = None,
) -> Path:
    """Writes `checkpoint-STEP` to `output_dir`. All processes must call it. An existing checkpoint of the same step is
    kept unchanged.

    Args:
        accelerator: has prepared the model, optimizer and schedule; nothing may be registered for checkpointing.
        output_dir: the run's folder, shared by all processes.
        step: number of completed optimizer steps.
        stream_state: this process's position in its data, as JSON values.
        extra: more JSON values for `progress.json`, such as the best metric. Those of the main process are written.
        keep: number of newest checkpoints to keep; None keeps all.
        ema: a module with the averaged weights.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: if `keep` is below 1.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1, or None to keep all checkpoints.")
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{step:08d}"
    partial = output_dir / f"{_PARTIAL}{final.name}"
    if final.exists():
        logger.warning(f"{final} already exists and is not overwritten.")
        return final
    if accelerator.is_main_process:
        _remove_leftovers(output_dir)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    write_json(dict(stream_state), partial / _position_name(accelerator))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            save_model(ema, str(partial / AVERAGE_NAME))
        progress = {**(extra or {}), "step": step, "world_size": accelerator.num_processes}
        progress["files"] = file_hashes(partial)
        write_json(progress, partial / PROGRESS_NAME)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # Flush before deleting older checkpoints: a power failure could otherwise leave only empty files.
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        os.replace(partial, final)
        _flush(output_dir)
        for path in _checkpoints(output_dir)[: -keep if keep else 0]:
            _remove(path)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    accelerator: Accelerator,
    path: str | os.PathLike,
    ema: nn.Module | None = None,
    depends_on: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restores the prepared model, optimizer, schedule, the random states and `ema` from a checkpoint. All processes
    must call it.

    Args:
        depends_on: values that must equal the `depends_on` entry of `progress.json`, if it has one.

    Returns:
        The content of `progress.json` without the hashes, and this process's `stream_state`.

    Raises:
        ValueError: if the checkpoint is missing or broken, the number of processes or a value of `depends_on` differs,
            or only one of run and checkpoint has averaged weights.
    """
    path = Path(path)
    progress = _read_json(path / PROGRESS_NAME)
    progress.pop("files", None)
    if progress.get("world_size") != accelerator.num_processes:
        raise ValueError(
            f"{path} was written by {progress.get('world_size')} processes, but this run has "
            f"{accelerator.num_processes}; start the same number, or start a new run from its weights."
        )
    if (path / AVERAGE_NAME).exists() != (ema is not None):
        has, wants = ("lacks", "needs them") if ema is not None else ("has", "does not use them")
        raise ValueError(
            f"{path} {has} averaged weights, but this run {wants}; resume with the same ema_decay."
        )
    known = progress.get("depends_on")
    if depends_on is not None and known is not None and (different := differences(known, depends_on)):
        raise ValueError(
            f"{path} belongs to another run: {', '.join(different)}. Change this back, or start a new run in another "
            "output folder."
        )
    stream_state = _read_json(path / _position_name(accelerator))
    try:
        accelerator.load_state(str(path))
        if ema is not None:
            load_model(ema, path / AVERAGE_NAME)
        _require_random_states(path / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")
    except _LOADING_ERRORS as error:
        raise ValueError(
            f"{path} cannot be loaded: {error}. Resume with the settings that it was trained with."
        ) from error
    return progress, stream_state


def find_latest(output_dir: str | os.PathLike) -> Path | None:
    """The checkpoint with the highest step, or None. Partly written or partly deleted checkpoints do not count."""
    return next(reversed(_checkpoints(Path(output_dir))), None)


def resolve_resume(output_dir: str | os.PathLike, argument: str | None) -> Path | None:
    """Resolves `--resume_from_checkpoint` to a checkpoint folder, or to None to start from scratch. Changes no files.

    Args:
        output_dir: the run's folder, which does not have to exist.
        argument: `"latest"`, a checkpoint's folder, or None if the option was not given.

    Raises:
        ValueError: if the path is not a checkpoint, or `output_dir` contains checkpoints of another run.
    """
    output_dir = Path(output_dir)
    latest = find_latest(output_dir)
    if argument is None:
        if latest is not None:
            raise ValueError(
                f"{output_dir} already contains checkpoints up to {latest.name}; pass --resume_from_checkpoint latest "
                "to resume, or --overwrite_output_dir to delete them."
            )
        left = [name for name in RUN_FILES if (output_dir / name).exists()]
        if left:
            raise ValueError(
                f"{output_dir} already contains {left[0]} of another run; choose another output folder, or pass "
                "--overwrite_output_dir."
            )
        return None
    if argument == "latest":
        if latest is None and (output_dir / RUN_FILES[0]).exists():
            raise ValueError(
                f"{output_dir} contains a finished run without checkpoints; choose another output folder, or pass "
                "--overwrite_output_dir."
            )
        if latest is None:
            logger.warning(f"{output_dir} has no checkpoint to resume from; training starts from scratch.")
        return latest
    path = Path(argument)
    if not (path / PROGRESS_NAME).is_file():
        raise ValueError(
            f"{path} is not a training checkpoint, expected 'latest' or a folder such as checkpoint-00001000 that "
            f"contains {PROGRESS_NAME}."
        )
    if latest is not None and latest.resolve() != path.resolve():
        raise ValueError(
            f"{output_dir} contains {latest.name}, which would be mixed with a run resumed from {path}; choose another "
            "output folder, or move the other checkpoints."
        )
    return path


def prepare_output_dir(
    accelerator: Accelerator,
    output_dir: str | os.PathLike,
    resume: str | None = None,
    overwrite: bool = False,
) -> Path | None:
    """Prepares the run's folder: removes partly written or deleted checkpoints and, with `overwrite`, all checkpoints.
    All processes must call it.

    When resuming from the latest checkpoint, damaged ones are renamed with a warning, and the newest intact one counts.

    Args:
        resume: argument of [`resolve_resume`], whose result is returned.
        overwrite: `--overwrite_output_dir`.

    Raises:
        ValueError: as in [`resolve_resume`], if both `resume` and `overwrite` are given, or if the requested checkpoint
            or all checkpoints are damaged.
    """
    output_dir = Path(output_dir)
    if overwrite and resume is not None:
        raise ValueError(
            f"resuming from {resume} and overwriting {output_dir} are mutually exclusive; choose one."
        )
    path = None if overwrite else resolve_resume(output_dir, resume)
    if path is not None and resume == "latest":
        if accelerator.is_main_process:
            _set_damaged_aside(output_dir)
        accelerator.wait_for_everyone()
        path = resolve_resume(output_dir, resume)
    if path is not None and accelerator.is_main_process and (damage := _damage_of(path)):
        raise ValueError(
            f"{path} is damaged: {damage}. Resume from another checkpoint, or start from scratch with "
            "--overwrite_output_dir."
        )
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output_dir)
        if overwrite:
            for checkpoint in _checkpoints(output_dir):
                _remove(checkpoint)
            for damaged in output_dir.glob(f"{_DAMAGED}checkpoint-*"):
                _delete(damaged)
            for name in _RUN_FOLDERS:
                shutil.rmtree(output_dir / name, ignore_errors=True)
            for name in RUN_FILES:
                (output_dir / name).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return path


def _checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, lowest step first. Similarly named folders without a progress.json are ignored."""
    if not output_dir.is_dir():
        return []
    named = [path for path in output_dir.iterdir() if _NAME.fullmatch(path.name)]
    whole = [path for path in named if (path / PROGRESS_NAME).is_file()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _set_damaged_aside(output_dir: Path) -> None:
    """Renames the newest checkpoints if they are damaged and there is an intact one before them."""
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(_checkpoints(output_dir)):
        damage = _damage_of(checkpoint)
        if damage is None:
            for path, why in damaged.items():
                aside = path.with_name(f"{_DAMAGED}{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                logger.warning(
                    f"{path} is damaged: {why}. It was renamed to {aside.name}; {checkpoint.name} is now the latest."
                )
            return
        damaged[checkpoint] = damage


def _damage_of(checkpoint: Path) -> str | None:
    """Describes the damage of a checkpoint, None if it is intact."""
    try:
        files = _read_json(checkpoint / PROGRESS_NAME).get("files", {})
        for name, known in files.items():
            if sha256(checkpoint / name) != known:
                return f"the SHA-256 of {name} does not match"
    except (ValueError, OSError, AttributeError) as error:
        return str(error)
    return None


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint. It is renamed first, so that a partly deleted one is never loaded."""
    target = checkpoint.with_name(f"{_REMOVED}{checkpoint.name}")
    os.replace(checkpoint, target)
    _delete(target)


def _remove_leftovers(output_dir: Path) -> None:
    for path in output_dir.glob(".*"):
        if path.name.startswith((f"{_PARTIAL}checkpoint-", f"{_REMOVED}checkpoint-")):
            _delete(path)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning(f"{folder} cannot be deleted and still takes up space: {error}.")


def _flush(path: Path) -> None:
    """Waits until a file's content or a folder's entries are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _require_random_states(path: Path) -> None:
    """Checks that random states were restored: Accelerate skips failures silently, and restores GPU states last."""
    saved = load_weights_only(path)
    if not torch.equal(torch.get_rng_state(), saved["torch_manual_seed"]):
        raise ValueError(f"the random states in {path.name} could not be restored")
    if torch.cuda.is_available():
        states, wanted = torch.cuda.get_rng_state_all(), saved.get("torch_cuda_manual_seed", [])
        if [state.tolist() for state in states] != [state.tolist() for state in wanted]:
            logger.warning(f"{path} has other GPU random states: random numbers drawn on a GPU will differ.")


def _position_name(accelerator: Accelerator) -> str:
    return f"position-{accelerator.process_index}.json"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.parent} is not a complete checkpoint, {path.name}: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a {type(content).__name__}, expected a JSON object.")
    return content
