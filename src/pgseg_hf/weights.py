"""Weights that are no weights, in words; and a model that is as it was after it was used."""

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
    """The likely reason why a checkpoint's folder cannot be read, and the way out; None where its files look whole, and
    for a name on the Hub. `needed` is a file that it must have."""
    if not os.path.isdir(folder):
        return None
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in _SUFFIXES and path.is_file() and (reason := what_is_wrong_with_file(path)):
            return f"{path} {reason}"
    if needed is not None and not (Path(folder) / needed).exists():
        return f"{folder} has no {needed}: copy the whole folder, or save a model there by save_pretrained."
    return None


def what_is_wrong_with_file(path: Path) -> str | None:
    """The same of one file, to be put behind its name."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
        if not start.strip():
            return f"holds nothing ({size} bytes): copy or download it again."
        if start.startswith(b"version https://git-lfs"):
            return (
                "is a pointer of git-lfs and not the file: run `git lfs pull` in the folder it was cloned to."
            )
        if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
            return "is a web page and not the file: the download needs a login or another address."
        if path.suffix != ".safetensors":
            return None
        length = int.from_bytes(start[:8], "little")
        if length > _LARGEST_HEADER or not start[8:].lstrip().startswith(b"{"):
            return (
                "is no safetensors file; save the model by save_pretrained, or convert it by `pgseg convert`."
            )
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            expected = 8 + length
    if size < expected:
        return f"is cut off, {size:,} of {expected:,} bytes: copy or download it again."
    return None


def refuse_bad_weights(model: Any, name: str) -> None:
    """Refuses weights and statistics that are NaN or infinite, were never loaded or are random, as the checkpoint lacks
    them.

    Args:
        model: on any device.
        name: what the error calls it.

    Raises:
        ValueError: naming the first such tensors.
    """
    is_offloaded = getattr(model, "hf_device_map", None) is not None
    if missing := getattr(model, "random_weights", ()):
        raise ValueError(
            f"{name} is no whole PGSeg checkpoint, these tensors are missing: {', '.join(missing)}."
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
            "were too large for float16; take an earlier checkpoint, or save in bfloat16 or float32."
        )
    if empty:
        raise ValueError(f"{name} has no values in {_named(empty)}: load the model by from_pretrained.")


def refuse_other_tokenizer(config: Any, tokenizer: Any, name: str) -> None:
    """Refuses a tokenizer whose tokens are none of the model's.

    Args:
        config: of the whole model.
        tokenizer: of its processor.
        name: what the error calls the two.

    Raises:
        ValueError: another end token, or more tokens than the model has.
    """
    text = config.text_config
    # 2 stands for the largest token, as in CLIP's first configurations. A vocabulary may have more rows than tokens.
    if text.eos_token_id not in (2, tokenizer.eos_token_id) or len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"{name} has a tokenizer of {len(tokenizer)} tokens, the end token is {tokenizer.eos_token_id}, "
            f"for a model of {text.vocab_size} and {text.eos_token_id}; files of the processor are missing or "
            "another's, or model.resize_token_embeddings was not called for new tokens."
        )


def _named(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} further tensors"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[Any]:
    """In the block the model is in evaluation mode. After it, the mode of every module, what learns, the buffers (the
    released text prototypes move in evaluation too) and torch's random state are what they were."""
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
