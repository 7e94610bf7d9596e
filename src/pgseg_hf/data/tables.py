"""Tables of records: local folders with a metadata file, and datasets loaded or streamed with `datasets`."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import fsspec

from ..files import path_inside
from ..images import ImageSource
from ..values import is_list, is_whole
from .columns import Columns, captions_of, tags_of
from .metadata import METADATA_FILES, Rows, find_metadata, read_metadata
from .records import Record, UnusableRecord, until_broken

SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")

# Only these URLs are fetched, which `datasets` creates for files of a streamed repository. A dataset must not be able
# to select another protocol of fsspec.
_HUB_ADDRESS = re.compile(r"(?:zip://[^:]*::)?hf://")
_ROWS_AT_A_TIME = 16


@dataclass(frozen=True)
class RowReader:
    """Turns rows of a table into records.

    Args:
        columns: column names of the table.
        folder: folder that file names are relative to; None if the values are passed to `load_image`.
        tag_names: class names, if the tags are class labels.
    """

    columns: Columns
    folder: Path | None = None
    tag_names: Sequence[str] = ()

    def record(self, row: dict[str, Any], name: str) -> Record:
        """The record of a row.

        Raises:
            UnusableRecord: with the reason "no image", "broken text", or "bad path" (a file name outside the folder).
        """
        columns = self.columns
        image = self._image(row.get(cast(str, columns.image)), name)
        if image is None:
            raise UnusableRecord("no image", f"{name}: its {columns.image} is empty.")
        try:
            captions = captions_of(row.get(columns.caption)) if columns.caption else []
            tags = self._tags(row.get(columns.tags)) if columns.tags else []
        except ValueError as error:
            raise UnusableRecord("broken text", f"{name}: {error}") from error
        mask = self._image(row.get(columns.mask), name) if columns.mask else None
        return Record(image, captions, tags, mask, name)

    def _tags(self, value: Any) -> list[str]:
        if self.tag_names:
            values = value if is_list(value) else [value]
            value = [self._class_name(item) for item in values if item is not None and item >= 0]
        if is_whole(value):
            value = str(value)  # a class index without a name
        return tags_of(value)

    def _class_name(self, number: int) -> str:
        if number >= len(self.tag_names):
            raise ValueError(
                f"class {number} has no name, because there are only {len(self.tag_names)} names"
            )
        return self.tag_names[number]

    def _image(self, value: Any, name: str) -> ImageSource | None:
        """The input for `load_image`; None for an empty cell."""
        if isinstance(value, float) and math.isnan(value):  # an empty cell in pandas
            return None
        if isinstance(value, dict):  # an undecoded image in `datasets`
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and self.folder is not None:
            return self._inside_folder(value, name) if value else None
        if self.folder is not None and not isinstance(value, (bytes, type(None))):
            raise UnusableRecord("bad path", f"{name}: {value!r:.80} is not a file name.")
        if isinstance(value, str) and _HUB_ADDRESS.match(value):
            return _fetched(value, name)
        return None if value in ("", b"") else value

    def _inside_folder(self, value: str, name: str) -> Path:
        try:
            return path_inside(cast(Path, self.folder), value)
        except ValueError as error:
            raise UnusableRecord("bad path", f"{name}: {error}") from error


def _fetched(address: str, name: str) -> bytes:
    try:
        with fsspec.open(address, "rb") as file:
            return file.read()
    except Exception as error:  # file systems raise all kinds of errors
        raise UnusableRecord("broken image", f"{name}: {address} cannot be read: {error}") from error


class TableSource:
    """A table with random access.

    Args:
        rows: a map-style `datasets.Dataset`, or the result of `read_metadata`.
        columns: column names given by the user.
        name: name of the source for messages.
        folder: folder that file names are relative to; None if the values are passed to `load_image`.

    Raises:
        ValueError: if columns are missing.
    """

    def __init__(
        self, rows: datasets.Dataset | Rows, columns: Columns, name: str, folder: Path | None = None
    ):
        self.name = name
        found = columns.among(rows.column_names, name)
        class_names: Sequence[str] = ()
        if isinstance(rows, datasets.Dataset):
            for column in (found.image, found.mask):
                if column and isinstance(rows.features[column], datasets.Image):
                    rows = rows.cast_column(column, datasets.Image(decode=False))
            class_names = _class_names(rows.features, found.tags)
            rows = rows.with_format(None)
        self._reader = RowReader(found, folder, class_names)
        self._rows: Any = rows.select_columns(_names(found))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of a `datasets.Dataset`, which changes with its content."""
        return str(self._rows._fingerprint)

    @property
    def tag_names(self) -> Sequence[str]:
        """Class names if the tags are class labels, otherwise empty."""
        return self._reader.tag_names

    def __getitem__(self, index: int) -> Record:
        """The record of a row.

        Raises:
            UnusableRecord: as in [`RowReader.record`], or with the reason "broken row".
        """
        try:
            row = self._rows[int(index)]
        except ValueError as error:
            raise UnusableRecord("broken row", str(error)) from error
        return self._reader.record(row, f"{self.name}[{index}]")


class StreamedTable:
    """A streamed dataset that is read in order, shard by shard.

    Args:
        dataset: a streaming `datasets.IterableDataset`.
        columns: column names given by the user.
        name: name of the source for messages.

    Raises:
        ValueError: if there are no rows, or columns are missing.
    """

    def __init__(self, dataset: datasets.IterableDataset, columns: Columns, name: str):
        self.name = name
        features = dataset.features
        names = dataset.column_names or next(iter(dataset.take(1)), None)
        if names is None:
            raise ValueError(f"{name} has no rows.")
        found = columns.among(list(names), name)
        if features is not None:
            dataset = dataset.decode(False)
        self._reader = RowReader(found, tag_names=_class_names(features, found.tags))
        self._dataset = dataset.with_format(None).select_columns(_names(found))

    @property
    def num_shards(self) -> int:
        return self._dataset.num_shards

    def read_shard(self, index: int, start: int = 0) -> Iterator[Record | UnusableRecord]:
        """Yields the records of a shard from number `start`; rows that cannot be read are yielded as errors."""
        place = f"{self.name}, shard {index}"
        return until_broken(self._items(index, start, place), place, start)

    def _items(self, index: int, start: int, place: str) -> Iterator[Record | UnusableRecord]:
        shard = self._dataset.shard(num_shards=self.num_shards, index=index)
        number = start
        # In a DataLoader worker, `for row in shard` would skip the shards of other workers; `iter` does not.
        for batch in (shard.skip(start) if start else shard).iter(_ROWS_AT_A_TIME):
            for values in zip(*batch.values(), strict=True):
                yield self._item(dict(zip(batch, values)), f"{place}[{number}]")
                number += 1

    def _item(self, row: dict[str, Any], name: str) -> Record | UnusableRecord:
        try:
            return self._reader.record(row, name)
        except UnusableRecord as error:
            return error


def open_folder(path: str, columns: Columns, metadata: str | None = None) -> TableSource:
    """Opens a folder with `metadata.jsonl`, `metadata.csv` or `metadata.parquet`, or with another file `metadata`. File
    names are relative to the folder. The metadata is held in memory, and nothing is written to disk.

    Raises:
        ValueError: if the folder or metadata file is missing, cannot be read, or lacks columns.
    """
    folder = Path(path).expanduser()
    file = find_metadata(folder) if metadata is None else Path(metadata)
    if file is None:
        state = "has no metadata file" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{path} {state}, expected a folder with {', '.join(METADATA_FILES)}.")
    return TableSource(read_metadata(file), columns, path, folder)


def open_hub(
    path: str, columns: Columns, name: str | None = None, split: str = "train", streaming: bool = False
) -> TableSource | StreamedTable:
    """Opens a Hub dataset, a local folder with the same layout, or a folder written by `save_to_disk`.

    Without streaming, `datasets` keeps a copy in its cache (`HF_DATASETS_CACHE`), except for a saved dataset.

    Args:
        path, name, split, streaming: arguments of `datasets.load_dataset`.
        columns: column names given by the user.

    Raises:
        ValueError: if the dataset cannot be loaded, or the split or columns are missing.
    """
    folder = Path(path).expanduser()
    is_saved = any((folder / file).is_file() for file in SAVED_DATASET_FILES)
    try:
        if is_saved:
            dataset = datasets.load_from_disk(str(folder))
        else:
            known = str(folder) if folder.exists() else path
            dataset = datasets.load_dataset(known, name, split=split, streaming=streaming)
    except Exception as error:  # the Hub, the network and file formats raise all kinds of errors
        raise ValueError(f"{path} cannot be loaded as a dataset: {error}") from error
    if isinstance(dataset, (dict, datasets.DatasetDict)):
        if split not in dataset:
            raise ValueError(f"{path} has no split {split!r}; its splits are {', '.join(dataset)}.")
        dataset = dataset[split]
    if isinstance(dataset, datasets.IterableDataset):
        return StreamedTable(dataset, columns, path)
    return TableSource(dataset, columns, path)


def _names(columns: Columns) -> list[str]:
    names = (columns.image, columns.caption, columns.tags, columns.mask)
    return list(dict.fromkeys(name for name in names if name is not None))


def _class_names(features: Any, column: str | None) -> Sequence[str]:
    """The class names of a column of class labels or lists of class labels; empty for other columns."""
    if features is None or column is None:
        return ()
    feature = features[column]
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    return names or ()
