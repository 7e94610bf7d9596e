"""Small folders, tables and tar shards for tests."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
from PIL import Image

from pgseg_hf.data.records import UnusableRecord
from pgseg_hf.data.sources import SourceSpec, open_source
from pgseg_hf.images import load_image

SIDE = 8


def image_bytes(number: int) -> bytes:
    """A PNG whose red value is the number, so that a test can identify the image."""
    pixels = np.full((SIDE, SIDE, 3), number % 256, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write_folder(folder: Path, rows: list[dict], kind: str = "jsonl") -> str:
    """Writes the rows as metadata, and an image 0, 1, 2, ... for each row with a `file_name`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        path = folder / str(row.get("file_name", "")).lstrip("/")
        if row.get("file_name") and path.resolve().is_relative_to(folder.resolve()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(number))
    file = folder / f"metadata.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        pyarrow.csv.write_csv(pyarrow.Table.from_pylist(rows), file)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return str(folder)


def numbered_folder(folder: Path, count: int, first: int = 0) -> str:
    rows = [{"file_name": f"{first + n}.png", "caption": f"text {first + n}"} for n in range(count)]
    return write_folder(folder, rows)


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def numbered_files(first: int, count: int) -> dict[str, bytes]:
    files = {}
    for number in range(first, first + count):
        files[f"{number:06d}.png"] = image_bytes(number)
        files[f"{number:06d}.txt"] = f"text {number}".encode()
    return files


def numbered_shards(folder: Path, sizes: list[int], first: int = 0) -> str:
    """Writes shards of the given sizes with consecutively numbered records and returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(sizes):
        (folder / f"{shard:03d}.tar").write_bytes(tar_bytes(numbered_files(first, size)))
        first += size
    return f"{folder}/{{000..{len(sizes) - 1:03d}}}.tar"


def numbered_tables(folder: Path, sizes: list[int], first: int = 0) -> str:
    """Writes a folder in the Hub's layout with parquet files of the given numbers of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(sizes):
        rows = [
            {"image": {"bytes": image_bytes(number), "path": None}, "caption": f"text {number}"}
            for number in range(first, first + size)
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"train-{shard:03d}.parquet")
        first += size
    return str(folder)


def open_path(path, **fields):
    return open_source(SourceSpec(str(path), **fields))


def number_of(record):
    """The number of an image made by [`image_bytes`]."""
    return load_image(record.image).getpixel((0, 0))[0]


def records_of(source):
    """Number and captions of each record of a source, or the reason why a record is unusable."""
    if hasattr(source, "read_shard"):
        items = itertools.chain.from_iterable(map(source.read_shard, range(source.num_shards)))
    else:
        items = (_item(source, index) for index in range(len(source)))
    return [
        item.reason if isinstance(item, UnusableRecord) else (number_of(item), *item.captions)
        for item in items
    ]


def _item(source, index):
    try:
        return source[index]
    except UnusableRecord as error:
        return error


def numbered(first, count):
    return [(number, f"text {number}") for number in range(first, first + count)]
