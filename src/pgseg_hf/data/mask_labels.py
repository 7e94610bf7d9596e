"""`labels.json`: the meaning of mask values."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..prompts import validate_labels
from ..text_files import read_json
from ..values import is_whole

IGNORE_INDEX = 255
"""The default mask value for pixels without a label."""

_NAME = "labels.json"


def find_mask_labels(folders: Iterable[Path]) -> Path | None:
    """The first `labels.json` in one of the folders or their parent folders."""
    places = [place / _NAME for folder in folders for place in (folder, folder.resolve().parent)]
    return next(filter(Path.is_file, places), None)


def read_mask_labels(path: Path, may_repeat: bool = False) -> dict[str, Any]:
    """Reads a `labels.json`, see [`check_mask_labels`].

    Raises:
        ValueError: if the file cannot be read or is invalid.
    """
    try:
        return check_mask_labels(read_json(path), may_repeat)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f'{path} is invalid, expected {{"labels": [...], ...}}: {error}') from error


def check_mask_labels(content: dict[str, Any], may_repeat: bool = False) -> dict[str, Any]:
    """Checks the content of a `labels.json` and adds defaults: `labels` in the order of the mask values, `ignore_index`
    (255, or None), `background` (None), `synonyms` as lists by label ({}) and `mask_values` (None).

    Args:
        may_repeat: whether a label may be "", for values without a name, or occur for several values.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: if a field is missing or invalid.
    """
    labels = [str(label) for label in content["labels"]]
    if not may_repeat:
        labels = validate_labels(content["labels"])
    defaults: dict[str, Any] = {
        "ignore_index": IGNORE_INDEX,
        "background": None,
        "synonyms": {},
        "mask_values": None,
    }
    found: dict[str, Any] = {
        "labels": labels,
        **{name: content.get(name, value) for name, value in defaults.items()},
    }
    for name in ("ignore_index", "background"):
        value, is_label = found[name], name == "background"
        if value is not None and (not is_whole(value) or (value in range(len(labels))) != is_label):
            expected = f"a label's index, 0 to {len(labels) - 1}" if is_label else "a value without a label"
            raise ValueError(f"{name} is {value!r}, expected {expected}, or null")
    for name in ("synonyms", "mask_values"):
        if not isinstance(found[name] or {}, dict):
            raise ValueError(f"{name} is {found[name]!r}, expected an object such as {{}}")
    for label, words in found["synonyms"].items():
        if label not in labels:
            raise ValueError(f"synonyms has {label!r}, which is not one of the labels")
        if not isinstance(words, list):
            raise ValueError(f"synonyms of {label!r} are {words!r}, expected a list of words")
    if not may_repeat:
        validate_labels([*labels, *(word for words in found["synonyms"].values() for word in words)])
    return found
