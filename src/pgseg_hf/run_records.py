"""What results depend on, by contents and not by places, so that a run is only continued with the same."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from . import __version__
from .segmentation import Segmenter

_DIGITS = 16
_SHOWN = 300  # letters of a value in a message
# Fields of configurations that change no number.
_NO_FIELDS = {"_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"}


def file_digest(path: str | os.PathLike) -> str:
    """The first 16 digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]


def weights_digest(model: PreTrainedModel) -> str:
    """16 digits that stand for a model's weights as they are now, wherever and in whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("text_prototypes"):
            continue  # Texts move the released variant's, and no mask depends on them.
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:_DIGITS]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Mappings within mappings as one, with names such as `vision_config.depths`; tuples are lists, as in JSON."""
    found: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(values)).items():
        inner = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration on which numbers depend, see [`flat`]."""
    fields = flat(json.loads(config.to_json_string(use_diff=False)))
    return {name: value for name, value in fields.items() if _NO_FIELDS.isdisjoint(name.split("."))}


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer's vocabulary."""
    return hash_of(sorted(tokenizer.get_vocab().items()))


def hash_of(value: Any) -> str:
    """A hash of what can be written as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:_DIGITS]


def model_record(segmenter: Segmenter) -> dict[str, Any]:
    """What masks depend on beside images, labels and options."""
    return {
        "version": __version__,
        "dtype": str(segmenter.model.dtype).removeprefix("torch."),
        "weights": weights_digest(segmenter.model),
        "config": config_fields(segmenter.model.config),
        "processor": segmenter.processor.to_dict(),
        "tokenizer": vocabulary_of(segmenter.processor.tokenizer),
    }


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of an earlier run; None where there is none.

    Raises:
        ValueError: a file that is no record.
    """
    if not path.is_file():
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError("it is no record of a run")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; choose another output folder.") from error
    return known


def differences(known: Any, wanted: Any, name: str = "") -> list[str]:
    """What differs between a record that was read and a new one, each with both values."""
    wanted = json.loads(json.dumps(wanted))
    if isinstance(known, dict) and isinstance(wanted, dict):
        return [
            each
            for key in {**known, **wanted}
            for each in differences(known.get(key), wanted.get(key), f"{name} {key}".strip())
        ]
    return [] if known == wanted else [f"{name} = {_short(known)} there and {_short(wanted)} now"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
