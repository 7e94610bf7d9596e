"""Records of what results depend on, by content and not by path, so that a run resumes only with the same inputs."""

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
_SHOWN = 300  # characters of a value in a message
# Configuration fields that do not affect results.
_NO_FIELDS = {"_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"}


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: str | os.PathLike) -> str:
    """The first 16 digits of a file's SHA-256."""
    return sha256(path)[:_DIGITS]


def weights_digest(model: PreTrainedModel) -> str:
    """A 16-digit hash of a model's current weights, independent of their file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("text_prototypes"):
            continue  # Encoding texts updates those of the released variant, but no mask depends on them.
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:_DIGITS]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to names such as `vision_config.depths`; tuples become lists, as in JSON."""
    found: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(values)).items():
        inner = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that affect results, see [`flat`]."""
    fields = flat(json.loads(config.to_json_string(use_diff=False)))
    return {name: value for name, value in fields.items() if _NO_FIELDS.isdisjoint(name.split("."))}


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a tokenizer's vocabulary."""
    return hash_of(sorted(tokenizer.get_vocab().items()))


def hash_of(value: Any) -> str:
    """A hash of a value that can be written as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:_DIGITS]


def model_record(segmenter: Segmenter) -> dict[str, Any]:
    """Everything that masks depend on apart from images, labels and options."""
    return {
        "version": __version__,
        "dtype": str(segmenter.model.dtype).removeprefix("torch."),
        "weights": weights_digest(segmenter.model),
        "config": config_fields(segmenter.model.config),
        "processor": segmenter.processor.to_dict(),
        "tokenizer": vocabulary_of(segmenter.processor.tokenizer),
    }


def read_record(path: Path) -> dict[str, Any] | None:
    """Reads the record of an earlier run; None if there is none.

    Raises:
        ValueError: the file is not a record.
    """
    if not path.is_file():
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError("it is not the record of a run")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; choose another output folder.") from error
    return known


def is_same_run(path: Path, record: Mapping[str, Any], way_out: str, overwrite: bool = False) -> bool | None:
    """Whether the record in a file equals that of a new run; None if there is no file.

    Args:
        path: the record file in the results folder.
        record: record of the new run.
        way_out: advice at the end of the error message.
        overwrite: whether another run is allowed.

    Raises:
        ValueError: the file is not a record, or is of another run without `overwrite`.
    """
    known = read_record(path)
    if known is None:
        return None
    changes = differences(known, record)
    if changes and not overwrite:
        raise ValueError(f"{path.parent} contains results of another run: {'; '.join(changes)}. {way_out}")
    return not changes


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The differences between an old and a new record, each as "name was VALUE and is VALUE"."""
    old, new = (
        {name: value for name, value in flat(each).items() if value != {}} for each in (known, wanted)
    )
    return [
        f"{name} was {_short(old.get(name))} and is {_short(new.get(name))}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
