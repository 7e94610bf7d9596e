"""Reads text files from editors, spreadsheets and pandas, with any Unicode encoding and line endings."""

import io
import json
import os
from pathlib import Path
from typing import Any


def decode_text(data: bytes, name: str) -> str:
    """Decodes UTF-8, UTF-16 or UTF-32 and removes a byte order mark.

    Raises:
        ValueError: the text has another encoding; the message gives the line.
    """
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name} is not {encoding.upper()} text: line {line} has {data[error.start : error.start + 8]!r}; save it "
            "as UTF-8 (in Excel as 'CSV UTF-8')."
        ) from error


def read_text(path: str | os.PathLike) -> str:
    """Reads a text file, see [`decode_text`].

    Raises:
        ValueError: the file cannot be read, or its encoding is not Unicode.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    return decode_text(data, str(path))


def split_lines(text: str) -> list[str]:
    """The lines of a text. `str.splitlines` would also split at U+2028, U+0085 and others inside a sentence."""
    return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]


def parse_json(text: str) -> Any:
    """Parses JSON.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{text[:20]!r}... is nested too deeply") from error


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: the file cannot be read or is not JSON.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


def read_yaml(path: str | os.PathLike) -> Any:
    """Reads a YAML or JSON file. Needs `pgseg-hf[train]`.

    Raises:
        ValueError: the file cannot be read or is not YAML.
    """
    import yaml

    text = read_text(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}.") from error


def check_characters(text: str) -> str:
    """Returns the text unchanged.

    Raises:
        ValueError: the text has half a surrogate pair, which comes from broken JSON or bytes that are not UTF-8 and can
            be neither tokenised nor written.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{text!r} has {text[error.start]!r}, which is not a character; expected Unicode text (UTF-8)"
        ) from error
    return text
