"""Checkpoints of a training run, of which a kill at any moment leaves the last whole one usable.

A checkpoint is a folder `checkpoint-00001000` in the run's output folder, which all processes must see: what
`Accelerator.save_state` writes (weights, optimizer, schedule, gradient scaler, random states of each process), the
averaged weights in `ema.safetensors`, each process's position in its data in `position-RANK.json`, and `progress.json`.
It is written under a hidden name and renamed when it is whole; old ones are renamed before they are deleted.
`progress.json` has the SHA-256 of the other files: a latest checkpoint that is damaged gives way to the one before.

Load only checkpoints of your own. Accelerate reads the optimizer's, schedule's and random states with torch's
`weights_only` unpickler, which builds tensors and numbers only; objects registered with
`Accelerator.register_for_checkpointing` would be unpickled without that guard, so nothing is registered here.
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
# What a run leaves in its folder, with checkpoints or without.
RUN_FILES = ("all_results.json", "log.jsonl")
_RUN_FOLDERS = ("best", "pictures")
_NAME = re.compile(r"checkpoint-\d{8,}")
_PARTIAL, _REMOVED, _DAMAGED = ".partial-", ".removed-", "damaged-"
# What torch, safetensors and Accelerate raise on broken files and on states of another model.
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
    """Writes `checkpoint-STEP` into `output_dir`; every process has to call it. A step that has a checkpoint already
    keeps that one.

    Args:
        accelerator: with the model, optimizer and schedule prepared, and nothing registered for checkpointing.
        output_dir: the run's folder, seen by all processes.
        step: optimizer steps that are done.
        stream_state: where this process is in its data, as JSON.
        extra: further JSON for `progress.json` (best metric, counts); the main process's counts.
        keep: how many checkpoints to keep, the newest; None for all.
        ema: averaged weights, any module.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: `keep` below 1.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep is {keep}, expected None (keep all checkpoints) or at least 1.")
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{step:08d}"
    partial = output_dir / f"{_PARTIAL}{final.name}"
    if final.exists():
        logger.warning(f"{final} exists already and stays as it is.")
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
        # On disk before older ones go: a machine that loses power may otherwise be left with empty files only.
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
    """Brings the prepared model, optimizer, schedule, the random states and `ema` to where a checkpoint left them;
    every process has to call it.

    Args:
        depends_on: values that have to equal the entry of this name in `progress.json`, if it has one.

    Returns:
        The content of `progress.json` without the hashes, and this process's `stream_state`.

    Raises:
        ValueError: no checkpoint or a broken one, another number of processes, averaged weights on one side only, or
            one of `depends_on` differs.
    """
    path = Path(path)
    progress = _read_json(path / PROGRESS_NAME)
    progress.pop("files", None)
    if progress.get("world_size") != accelerator.num_processes:
        raise ValueError(
            f"{path} was written by {progress.get('world_size')} processes, this run has {accelerator.num_processes}; "
            "start as many, or start anew from its weights."
        )
    if (path / AVERAGE_NAME).exists() != (ema is not None):
        has, wants = ("lacks", "needs them") if ema is not None else ("has", "does not average")
        raise ValueError(f"{path} {has} averaged weights, this run {wants}; resume with the same settings.")
    known = progress.get("depends_on")
    if depends_on is not None and known is not None and (different := differences(known, depends_on)):
        raise ValueError(
            f"{path} is of another run: {', '.join(different)}. Change this back, or start a run of its own in another "
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
            f"{path} cannot be loaded: {error}. Resume with the settings it was trained with."
        ) from error
    return progress, stream_state


def find_latest(output_dir: str | os.PathLike) -> Path | None:
    """The checkpoint of the highest step, None where there is none. Checkpoints that were being written or deleted
    when a run was killed do not count."""
    return next(reversed(_checkpoints(Path(output_dir))), None)


def resolve_resume(output_dir: str | os.PathLike, argument: str | None) -> Path | None:
    """What `--resume_from_checkpoint` means: a checkpoint's folder, or None to start anew. Changes nothing.

    Args:
        output_dir: the run's folder; need not exist.
        argument: `"latest"`, a checkpoint's folder, or None where the option was not given.

    Raises:
        ValueError: a path that is no checkpoint; or `output_dir` holds checkpoints that the run would mix with.
    """
    output_dir = Path(output_dir)
    latest = find_latest(output_dir)
    if argument is None:
        if latest is not None:
            raise ValueError(
                f"{output_dir} holds checkpoints, the last is {latest.name}; pass --resume_from_checkpoint latest to "
                "go on, or --overwrite_output_dir to delete them."
            )
        left = [name for name in RUN_FILES if (output_dir / name).exists()]
        if left:
            raise ValueError(
                f"{output_dir} holds another run's {left[0]}; choose another output folder, or pass "
                "--overwrite_output_dir."
            )
        return None
    if argument == "latest":
        if latest is None and (output_dir / RUN_FILES[0]).exists():
            raise ValueError(
                f"{output_dir} holds a run that has ended, without checkpoints; choose another output folder, or pass "
                "--overwrite_output_dir."
            )
        if latest is None:
            logger.warning(f"{output_dir} holds no checkpoint to resume from: training starts anew.")
        return latest
    path = Path(argument)
    if not (path / PROGRESS_NAME).is_file():
        raise ValueError(
            f"{path} is no checkpoint of training, expected 'latest' or a folder such as checkpoint-00001000 with "
            f"{PROGRESS_NAME} in it."
        )
    if latest is not None and latest.resolve() != path.resolve():
        raise ValueError(
            f"{output_dir} holds {latest.name}, which resuming from {path} would mix with; choose another output "
            "folder, or move the other checkpoints away."
        )
    return path


def prepare_output_dir(
    accelerator: Accelerator,
    output_dir: str | os.PathLike,
    resume: str | None = None,
    overwrite: bool = False,
) -> Path | None:
    """Makes the run's folder ready: what a kill left half written or half deleted goes, with `overwrite` also the
    checkpoints. Where the latest checkpoint is wanted and damaged, it is set aside under another name, which a warning
    says, and the one before it is the latest. Every process has to call it.

    Args:
        resume: the argument of [`resolve_resume`], whose result is returned.
        overwrite: `--overwrite_output_dir`.

    Raises:
        ValueError: as [`resolve_resume`], for `resume` together with `overwrite`, and where every checkpoint or the
            one that is asked for is damaged.
    """
    output_dir = Path(output_dir)
    if overwrite and resume is not None:
        raise ValueError(
            f"resuming from {resume} and overwriting {output_dir} exclude each other; choose one."
        )
    path = None if overwrite else resolve_resume(output_dir, resume)
    if path is not None and resume == "latest":
        if accelerator.is_main_process:
            _set_damaged_aside(output_dir)
        accelerator.wait_for_everyone()
        path = resolve_resume(output_dir, resume)
    if path is not None and accelerator.is_main_process and (damage := _damage_of(path)):
        raise ValueError(
            f"{path} is damaged: {damage}. Resume from another checkpoint, or start anew with --overwrite_output_dir."
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
    """Whole checkpoints, the lowest step first. Other programs' folders of such a name have no progress.json."""
    if not output_dir.is_dir():
        return []
    named = [path for path in output_dir.iterdir() if _NAME.fullmatch(path.name)]
    whole = [path for path in named if (path / PROGRESS_NAME).is_file()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _set_damaged_aside(output_dir: Path) -> None:
    """Renames the newest checkpoints that are damaged, if there is a whole one before them."""
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(_checkpoints(output_dir)):
        damage = _damage_of(checkpoint)
        if damage is None:
            for path, why in damaged.items():
                aside = path.with_name(f"{_DAMAGED}{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                logger.warning(
                    f"{path} is damaged: {why}. It is {aside.name} now, and {checkpoint.name} the latest."
                )
            return
        damaged[checkpoint] = damage


def _damage_of(checkpoint: Path) -> str | None:
    """What of a checkpoint is not as it was written, None if nothing is."""
    try:
        files = _read_json(checkpoint / PROGRESS_NAME).get("files", {})
        for name, known in files.items():
            if sha256(checkpoint / name) != known:
                return f"{name} is not as it was written"
    except (ValueError, OSError, AttributeError) as error:
        return str(error)
    return None


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, which is none any more from the first moment on."""
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
        logger.warning(f"{folder} cannot be deleted and takes up space: {error}.")


def _flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _require_random_states(path: Path) -> None:
    """Accelerate goes on without a word where it cannot restore random states; the GPU's come last."""
    saved = load_weights_only(path)
    if not torch.equal(torch.get_rng_state(), saved["torch_manual_seed"]):
        raise ValueError(f"the random states in {path.name} could not be restored")
    if torch.cuda.is_available():
        states, wanted = torch.cuda.get_rng_state_all(), saved.get("torch_cuda_manual_seed", [])
        if [state.tolist() for state in states] != [state.tolist() for state in wanted]:
            logger.warning(f"{path} is of other GPUs: random numbers drawn on a GPU will not repeat.")


def _position_name(accelerator: Accelerator) -> str:
    return f"position-{accelerator.process_index}.json"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.parent} is no whole checkpoint, {path.name}: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a JSON object.")
    return content
