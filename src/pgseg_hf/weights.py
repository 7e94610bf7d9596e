"""Checks for unusable weights, and a context manager that restores a model after evaluation."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SUFFIXES = (".safetensors", ".bin", ".json")
_LARGEST_HEADER = 100_000_000  # bytes, that of the safetensors library


def what_is_wrong_with(folder: str | os.PathLike, needed: str | None = None) -> str | None:
    """The likely reason why a checkpoint's folder cannot be read, and how to fix it. None if its files look complete,
    and for a Hub name. `needed` is the name of a required file."""
    if not os.path.isdir(folder):
        return None
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in _SUFFIXES and path.is_file() and (reason := what_is_wrong_with_file(path)):
            return f"{path} {reason}"
    if needed is not None and not (Path(folder) / needed).exists():
        return f"{folder} has no {needed}: copy the whole folder, or save a model there with save_pretrained."
    return None


def what_is_wrong_with_file(path: Path) -> str | None:
    """The same for a single file, worded to follow its name."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        if not start.strip():
            return f"is empty ({size} bytes): copy or download it again."
        if start.startswith(b"version https://git-lfs"):
            return "is a git-lfs pointer and not the file: run `git lfs pull` in the cloned repository."
        if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
            return "is a web page and not the file: the download needs a login or another URL."
        if path.suffix != ".safetensors":
            return None
        length = int.from_bytes(start[:8], "little")
        if length > _LARGEST_HEADER or not start[8:].lstrip().startswith(b"{"):
            return "is not a safetensors file: save the model with save_pretrained, or convert it with `pgseg convert`."
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            expected = 8 + length
    if size < expected:
        return f"is truncated, {size:,} of {expected:,} bytes: copy or download it again."
    return None


def refuse_bad_weights(model: Any, name: str) -> None:
    """Rejects weights and statistics that are not finite, were never loaded, or are missing from the checkpoint.

    Args:
        model: a model on any device.
        name: name of the model in the error.

    Raises:
        ValueError: if there are such tensors; names the first ones.
    """
    is_offloaded = getattr(model, "hf_device_map", None) is not None
    if missing := getattr(model, "random_weights", ()):
        raise ValueError(
            f"{name} is not a complete PGSeg checkpoint, these tensors are missing: {', '.join(missing)}."
        )
    bad, empty = [], []
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if type(tensor) not in (nn.Parameter, Tensor):
            continue  # quantised
        if tensor.is_meta:
            empty += [] if is_offloaded else [key]
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            bad.append(key)
    if bad:
        raise ValueError(
            f"{name} has NaN or infinite values in {_named(bad)}: training diverged before it was saved, or values "
            "were too large for float16; use an earlier checkpoint, or save in bfloat16 or float32."
        )
    if empty:
        raise ValueError(f"{name} has no values in {_named(empty)}: load the model with from_pretrained.")


def refuse_other_tokenizer(config: Any, tokenizer: Any, name: str) -> None:
    """Rejects a tokenizer that does not fit the model.

    Args:
        config: configuration of the whole model.
        tokenizer: tokenizer of its processor.
        name: name of the two in the error.

    Raises:
        ValueError: if the end tokens differ, or the tokenizer has more tokens than the model.
    """
    text = config.text_config
    # An end token of 2 means the largest id, as in CLIP's first configurations. Vocabularies may have spare rows.
    if text.eos_token_id not in (2, tokenizer.eos_token_id) or len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"{name} has a tokenizer with {len(tokenizer)} tokens and end token {tokenizer.eos_token_id}, but a model "
            f"with {text.vocab_size} and {text.eos_token_id}. Files of the processor are missing or belong to another "
            "model, or model.resize_token_embeddings was not called for new tokens."
        )


def _named(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more tensors"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[Any]:
    """Puts the model in evaluation mode inside the block. Then restores the mode of every module, `requires_grad`, the
    buffers (the released text prototypes change in evaluation too) and torch's random state."""
    modes = [(module, module.training) for module in model.modules()]
    learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    state = torch.get_rng_state()
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, learned in learns:
            parameter.requires_grad_(learned)
        for buffer, values in buffers:
            buffer.copy_(values)
        torch.set_rng_state(state)
