"""The metadata file of a folder, with one row per image, as a table with random access.

Reading it needs pyarrow from `pgseg-hf[train]`. Finding it does not, because the core package imports this module.
"""

import json
import re
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from ..text_files import parse_json, read_text, split_lines

if TYPE_CHECKING:
    import pyarrow

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

# A record must fit into one block, and it may have many captions.
_BLOCK_BYTES = 1 << 26
_SEPARATORS = ",;\t"


class Rows(Protocol):
    """Rows of a table; `rows[i]` raises a `ValueError` if the row cannot be read."""

    column_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def place(self, index: int) -> str:
        """The name of a row for messages."""

    def select_columns(self, column_names: Sequence[str]) -> Self: ...


class JsonRows:
    """Rows of a JSON Lines file, or of a JSON list as written by `DataFrame.to_json(orient="records")`. Rows may have
    different columns and types, and a broken row does not affect the others.

    Args:
        path: path of the file.

    Raises:
        ValueError: if the file is not text, or none of its rows can be read.
    """

    def __init__(self, path: Path):
        import pyarrow

        text = read_text(path)
        lines = [(number, line) for number, line in enumerate(split_lines(text), 1) if line.strip()]
        if lines and lines[0][1].lstrip().startswith("["):
            lines = list(enumerate(_elements(text, path), 1))
        self._path = path
        self._numbers = pyarrow.array([number for number, _ in lines], pyarrow.int64())
        # A single block of memory, which DataLoader workers can share.
        self._lines = pyarrow.array([line for _, line in lines], pyarrow.large_string())
        names: dict[str, None] = {}
        for _, line in lines:
            try:
                names.update(dict.fromkeys(_row(line)))
            except ValueError:
                continue
        self.column_names = list(names)
        if lines and not names:
            self[0]  # raises an error with the reason

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return _row(self._lines[index].as_py())
        except ValueError as error:
            raise ValueError(f"{self.place(index)} cannot be read: {error}.") from error

    def place(self, index: int) -> str:
        return f"line {self._numbers[index]} of {self._path}"

    def select_columns(self, column_names: Sequence[str]) -> "JsonRows":
        return self  # a line is always parsed as a whole


def _elements(text: str, path: Path) -> list[str]:
    """The elements of a JSON list, each as one line of JSON."""
    try:
        return [json.dumps(element) for element in parse_json(text)]
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def _row(line: str) -> dict[str, Any]:
    row = parse_json(line)
    if not isinstance(row, dict):
        raise ValueError(f"it contains a {type(row).__name__}, expected an object with file_name and texts")
    return row


class ArrowRows:
    """Rows of an Arrow table in memory; `path` is its file, for messages."""

    def __init__(self, table: "pyarrow.Table", path: Path):
        self._table, self._path = table, path
        self.column_names = list(table.column_names)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        values = (column[index].as_py() for column in self._table.columns)
        return dict(zip(self.column_names, values))

    def place(self, index: int) -> str:
        return f"row {index + 1} of {self._path}"

    def select_columns(self, column_names: Sequence[str]) -> "ArrowRows":
        return ArrowRows(self._table.select(column_names), self._path)


def find_metadata(folder: Path) -> Path | None:
    """The metadata file of a folder, if it has one."""
    return next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)


def read_metadata(file: Path) -> Rows:
    """Reads a file in one of the formats of `METADATA_FILES`, or a JSON list.

    Raises:
        ValueError: if the file cannot be read, or has no rows.
    """
    import pyarrow.parquet

    rows: Rows
    try:
        if file.stat().st_size == 0:
            raise OSError("the file is empty")
        if file.suffix in (".jsonl", ".json"):
            rows = JsonRows(file)
        elif file.suffix == ".parquet":
            rows = ArrowRows(pyarrow.parquet.read_table(file), file)
        else:
            rows = ArrowRows(_read_csv(file), file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from error
    if not len(rows):
        raise ValueError(f"{file} has no records.")
    return rows


def _read_csv(file: Path) -> "pyarrow.Table":
    """Reads a CSV file; the separator is the most frequent of comma, semicolon and tab in the header."""
    import pyarrow.compute
    import pyarrow.csv

    text = read_text(file)
    header = re.sub(r'"[^"]*"', "", next(iter(split_lines(text)), ""))
    parsing = pyarrow.csv.ParseOptions(delimiter=max(_SEPARATORS, key=header.count), newlines_in_values=True)
    data = pyarrow.py_buffer(text.encode("utf-8"))
    reading = pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES)
    names = pyarrow.csv.open_csv(data, reading, parsing).schema.names
    # Read everything as text, because a file name such as 0001 is not a number.
    conversion = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
    table = pyarrow.csv.read_csv(data, reading, parsing, conversion)
    filled = [pyarrow.compute.not_equal(column, "") for column in table.columns]
    # Spreadsheets may end with rows that contain only separators.
    return table.filter(reduce(pyarrow.compute.or_, filled)).rename_columns([name.strip() for name in names])
