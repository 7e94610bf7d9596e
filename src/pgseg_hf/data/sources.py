"""A common interface for training data from folders, Hub datasets, tar shards and synthetic scenes."""

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
    """Records with random access; `source[i]` raises `UnusableRecord` if the record cannot be used."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


@runtime_checkable
class StreamSource(Protocol):
    """Records that are read in order, shard by shard and always in the same order.

    `read_shard(index, start)` skips the first `start` records. For broken data or an empty shard it yields an
    `UnusableRecord` instead of raising an error.
    """

    name: str

    @property
    def num_shards(self) -> int: ...

    def read_shard(self, index: int, start: int = 0) -> Iterator[Record | UnusableRecord]: ...


Source = MapSource | StreamSource


@dataclass
class SourceSpec:
    """One source of training data, from an entry of a YAML list or from command line arguments.

    Args:
        path: a folder with metadata, a Hub dataset or a folder with the same layout, patterns of tar shards, or
            "synthetic", optionally with options such as "synthetic:train,size=96,length=20000", see `SceneOptions`.
        kind: "folder", "hub", "webdataset" or "synthetic"; "auto" infers the kind from the path.
        weight: share of the records, relative to the weights of the other sources.
        split, name, streaming: arguments of `datasets.load_dataset` for Hub datasets.
        image_column: column of the image, or file extension in shards; by default one of the usual names.
        caption_column: column with a string or a list of strings; in shards, a file extension or a key of the `.json`.
        tags_column: column with a list of strings, a string separated by commas, semicolons or `|`, or class labels.
        mask_column: column of the label maps.
        metadata: metadata file of a folder, if it is not in the folder.

    Raises:
        ValueError: if the kind is unknown, there is no path, or the weight is not positive.
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
                "A source has no path, expected a folder, a Hub dataset or a pattern of tar files."
            )
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"The weight of {self.path} is {self.weight}, expected a positive number.")

    @property
    def columns(self) -> Columns:
        return Columns(self.image_column, self.caption_column, self.tags_column, self.mask_column)


def open_source(spec: SourceSpec) -> Source:
    """Opens a source and checks its first records.

    Raises:
        ValueError: if the source does not exist, lacks the columns, or has no usable records; the message names it.
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
            f"{path} is a file, expected a folder with {', '.join(METADATA_FILES)}, a Hub dataset or a pattern of tar "
            f"files. For a table that contains images, pass its folder, {str(folder.parent)!r}."
        )
    if not folder.is_dir() and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise ValueError(
            f"{path} does not exist, expected a folder, a Hub dataset or a pattern of tar files."
        )
    return "hub"


def check_source(source: Source, count: int = 32) -> None:
    """Reads at most `count` records until it finds a usable one.

    Raises:
        ValueError: if there is none; the message lists the reasons.
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
        f"{source.name}: none of {reasons.total()} records can be used ({seen}). First error: {first}"
    )


def records_of(table: MapSource, count: int | None = None) -> Iterator[Record | UnusableRecord]:
    """Yields the records of a map-style source in order, or `count` evenly spaced ones; unusable ones are errors."""
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
        return UnusableRecord("no text", f"{record.name} has neither captions nor tags.")
    try:
        load_image(record.image)
    except ValueError as error:
        return UnusableRecord("broken image", f"{record.name}: {error}")
    return None
