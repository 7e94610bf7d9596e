"""Hashes of what a run depends on, from contents and not from paths, so that only the same run can be resumed."""

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.records import Record, UnusableRecord
from ..data.sources import Source, StreamSource, records_of
from ..run_records import hash_of, sha256

SAMPLED_RECORDS = 256
SAMPLED_SHARDS = 8


def hash_of_files(path: Path) -> str | None:
    """A hash of a file, or of a folder's files with their names; None if the path does not exist."""
    hashes = file_hashes(path)
    return hash_of(list(hashes.items())) if hashes else None


def file_hashes(path: Path) -> dict[str, str]:
    """The SHA-256 of a file, or of each file in a folder by its relative path."""
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return {each.relative_to(path).as_posix(): sha256(each) for each in files}


def contents_of(source: Source) -> str:
    """A hash of a source's images, texts and masks, independent of their location. It covers up to 256 evenly spaced
    records; for a stream, up to 256 records from the beginnings of up to eight shards."""
    digest = hashlib.sha256()
    if not isinstance(source, StreamSource):
        digest.update(str(len(source)).encode())
    for item in _sample(source):
        if isinstance(item, UnusableRecord):
            digest.update(item.reason.encode())
            continue
        digest.update(json.dumps([item.captions, item.tags, item.view_tags]).encode())
        for part in (item.image, item.mask, *(item.views or ())):
            digest.update(hashlib.sha256(bytes_of(part)).digest())
    return digest.hexdigest()[:16]


def _sample(source: Source) -> Iterator[Record | UnusableRecord]:
    if isinstance(source, StreamSource):
        shards = np.unique(np.linspace(0, source.num_shards - 1, SAMPLED_SHARDS).astype(int))
        for shard in shards:
            yield from islice(source.read_shard(int(shard)), SAMPLED_RECORDS // len(shards))
    else:
        yield from records_of(source, SAMPLED_RECORDS)


def bytes_of(part: Any) -> bytes:
    """The bytes of an image, a mask or features, in memory or in a file."""
    if isinstance(part, (str, os.PathLike)) and Path(part).is_file():
        return Path(part).read_bytes()
    if isinstance(part, (Image.Image, np.ndarray)):
        return part.tobytes()
    return part if isinstance(part, bytes) else str(part).encode()
