"""Where training data come from: one description for folders, data sets of the Hub, tar shards and synthetic scenes."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from ..images import load_image
from .columns import Columns
from .metadata import METADATA_FILES, find_metadata
from .records import Record, UnusableRecord
from .scenes import SceneOptions, SceneSource
from .tables import open_folder, open_hub
from .tars import TarSource

KINDS = ("auto", "folder", "hub", "webdataset", "synthetic")


@runtime_checkable
class MapSource(Protocol):
    """Records with random access; `source[i]` raises `UnusableRecord` for one that is left out."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@runtime_checkable
class StreamSource(Protocol):
    """Records that are read in order, each shard by itself and the same way every time.

    `read_shard(index, start)` leaves out the first `start` records. It raises nothing for data that are broken, but
    gives an `UnusableRecord` in their place, and gives at least that for an empty shard.
    """

    name: str

    @property
    def num_shards(self) -> int: ...

    def read_shard(self, index: int, start: int = 0) -> Iterator[Record | UnusableRecord]: ...


Source = MapSource | StreamSource


@dataclass
class SourceSpec:
    """One source of training data, as an entry of a YAML list or out of command line arguments.

    Args:
        path: a folder with metadata, a data set of the Hub or a folder in its layout, patterns of tar shards, or
            "synthetic"; the last with options as in "synthetic:train,size=96,length=20000", see `SceneOptions`.
        kind: "folder", "hub", "webdataset" or "synthetic"; "auto" goes by what the path looks like.
        weight: the source's share of the records, against the other sources' weights.
        split, name, streaming: for data sets of the Hub, as `datasets.load_dataset` takes them.
        image_column: column of the image, in shards the ending of its file; by default the usual names.
        caption_column: a string or a list of strings; in shards an ending or a key of the `.json`.
        tags_column: a list of strings, a string split at commas, semicolons and `|`, or class labels.
        mask_column: label maps.
        metadata: of a folder, its metadata file where that is not in it.

    Raises:
        ValueError: an unknown kind, no path, or a weight that is not positive.
    """

    path: str
    kind: Literal["auto", "folder", "hub", "webdataset", "synthetic"] = "auto"
    weight: float = 1.0
    split: str = "train"
    name: str | None = None
    streaming: bool = False
    image_column: str | None = None
    caption_column: str | None = None
    tags_column: str | None = None
    mask_column: str | None = None
    metadata: str | None = None

    def __post_init__(self) -> None:
        self.path = os.fspath(self.path)
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, expected one of {', '.join(KINDS)}.")
        if not self.path:
            raise ValueError(
                "A source has no path; give a folder, a data set of the Hub or a pattern of tar files."
            )
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"The weight of {self.path} is {self.weight}, expected a positive number.")

    @property
    def columns(self) -> Columns:
        return Columns(self.image_column, self.caption_column, self.tags_column, self.mask_column)


def open_source(spec: SourceSpec) -> Source:
    """Opens a source and reads its first records.

    Raises:
        ValueError: naming the source, where it does not exist, has no such columns, or gives nothing to train on.
    """
    kind = ("folder" if spec.metadata else _kind_of(spec.path)) if spec.kind == "auto" else spec.kind
    if kind == "synthetic":
        return SceneSource(SceneOptions.parse(spec.path.partition(":")[2]))
    source: Source
    if kind == "folder":
        source = open_folder(spec.path, spec.columns, spec.metadata)
    elif kind == "webdataset":
        source = TarSource(spec.path, spec.columns)
    else:
        source = open_hub(spec.path, spec.columns, spec.name, spec.split, spec.streaming)
    check_source(source)
    return source


def _kind_of(path: str) -> str:
    if path.partition(":")[0] == "synthetic":
        return "synthetic"
    folder = Path(path).expanduser()
    if find_metadata(folder):
        return "folder"
    if ".tar" in path or ".tgz" in path:
        return "webdataset"
    if folder.is_file():
        raise ValueError(
            f"{path} is a file; expected a folder with {', '.join(METADATA_FILES)}, a data set of the Hub or a pattern "
            f"of tar files. For a table with images in it give its folder, {str(folder.parent)!r}."
        )
    if not folder.is_dir() and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise ValueError(
            f"{path} does not exist; expected a folder, a data set of the Hub or a pattern of tar files."
        )
    return "hub"


def check_source(source: Source, count: int = 32) -> None:
    """Reads records, at most `count`, until one can be trained on.

    Raises:
        ValueError: there is none; says what was seen.
    """
    reasons: Counter[str] = Counter()
    first = ""
    items: Iterator[Record | UnusableRecord]
    if isinstance(source, StreamSource):
        items = chain.from_iterable(map(source.read_shard, range(source.num_shards)))
    else:
        items = records_of(source, count)
    for item in islice(items, count):
        problem = item if isinstance(item, UnusableRecord) else _problem(item)
        if problem is None:
            return
        reasons[problem.reason] += 1
        first = first or str(problem)
    if not reasons:
        raise ValueError(f"{source.name} has no records.")
    seen = ", ".join(f"{number} x {reason}" for reason, number in reasons.items())
    raise ValueError(
        f"{source.name}: none of {reasons.total()} records can be used ({seen}). The first: {first}"
    )


def records_of(table: MapSource, count: int | None = None) -> Iterator[Record | UnusableRecord]:
    """The records of a table in order, or `count` of them from all over it; unreadable ones are given as errors."""
    places = np.arange(len(table))
    if count is not None and len(table):
        places = np.unique(np.linspace(0, len(table) - 1, count).astype(int))
    for index in places:
        try:
            yield table[int(index)]
        except UnusableRecord as error:
            yield error


def _problem(record: Record) -> UnusableRecord | None:
    if not (record.captions or record.tags or record.mask is not None):
        return UnusableRecord("no text", f"{record.name} has no caption and no tags.")
    try:
        load_image(record.image)
    except ValueError as error:
        return UnusableRecord("broken image", f"{record.name}: {error}")
    return None
