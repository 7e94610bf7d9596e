"""Text files as editors, spreadsheets and pandas write them: any Unicode encoding, any line ends."""

import io
import json
import os
from pathlib import Path
from typing import Any


def decode_text(data: bytes, name: str) -> str:
    """Text in UTF-8, UTF-16 or UTF-32, with or without a byte order mark, which is taken off.

    Raises:
        ValueError: it is in another encoding; says in which line.
    """
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name} is no {encoding.upper()} text: line {line} has {data[error.start : error.start + 8]!r}; save it "
            "as UTF-8 (in Excel as 'CSV UTF-8')."
        ) from error


def read_text(path: str | os.PathLike) -> str:
    """A text file, see [`decode_text`].

    Raises:
        ValueError: it cannot be read, or is in an encoding that is not Unicode.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    return decode_text(data, str(path))


def split_lines(text: str) -> list[str]:
    """The lines of a text. `str.splitlines` would also split at U+2028, U+0085 and other characters of a sentence."""
    return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]


def parse_json(text: str) -> Any:
    """JSON.

    Raises:
        ValueError: it is none, or nested deeper than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{text[:20]!r}... is nested too deep") from error


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it cannot be read, or is no JSON.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error


def read_yaml(path: str | os.PathLike) -> Any:
    """The content of a YAML file, which JSON is too. Needs `pgseg-hf[train]`.

    Raises:
        ValueError: it cannot be read, or is no YAML.
    """
    import yaml

    text = read_text(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {error}.") from error


def check_characters(text: str) -> str:
    """The text itself.

    Raises:
        ValueError: it has half a surrogate pair, as broken JSON and bytes that are not UTF-8 leave it, which is no
            character and can be neither tokenised nor written.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{text!r} has {text[error.start]!r}, which is no character; expected Unicode text (UTF-8)"
        ) from error
    return text
