"""WebDataset shards: local or remote tar files, read sequentially without unpacking them."""

import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from typing import Any

import fsspec

from ..images import IMAGE_EXTENSIONS
from ..text_files import decode_text, parse_json
from .columns import CAPTION_NAMES, TAG_NAMES, Columns, captions_of, tags_of
from .records import Record, UnusableRecord, until_broken

MAX_FILE_BYTES = 1 << 28
"""Maximum size of a file in a shard, because a small compressed shard can contain a huge file."""

MAX_SHARDS = 1_000_000

_IMAGE_ENDINGS = frozenset(extension[1:] for extension in IMAGE_EXTENSIONS)
_CAPTION_ENDINGS = ("txt", "caption")
_BRACES = re.compile(r"\{([^{}]*)\}")
# The path up to the first dot of the name is the key, the rest is the ending. Hidden files have no key.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


def expand_braces(pattern: str) -> list[str]:
    """Expands braces in a pattern: `a{08..11}` gives a08, a09, a10 and a11, and `{cat,dog}.tar` gives two files. A
    pattern can have several braces, also nested ones.

    Raises:
        ValueError: if braces contain neither a range nor a list, or there are too many names.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        if not 0 <= last - first < MAX_SHARDS:
            raise ValueError(f"{pattern} counts from {first} to {last}, expected 1 to {MAX_SHARDS:,} shards.")
        parts = [str(number).zfill(len(bounds[1])) for number in range(first, last + 1)]
    elif "," in match[1]:
        parts = match[1].split(",")
    else:
        raise ValueError(
            f"{pattern} has {match[0]}, expected a range {{000..012}} or a list {{a,b}} in braces."
        )
    before, after = pattern[: match.start()], pattern[match.end() :]
    return list(dict.fromkeys(name for part in parts for name in expand_braces(f"{before}{part}{after}")))


def find_shards(patterns: str) -> list[fsspec.core.OpenFile]:
    """Finds the files that match patterns with braces and wildcards, on any file system of fsspec. Several patterns are
    separated by whitespace or `::`; write `?` for a space in a name.

    Raises:
        ValueError: if a pattern matches no file, or a local file is missing.
    """
    shards: dict[str, fsspec.core.OpenFile] = {}
    for pattern in re.split(r"\s+|::", patterns.strip()):
        for name in expand_braces(pattern):
            # A question mark is a wildcard, except in a web URL.
            is_web = name.startswith(("http://", "https://"))
            try:
                files = fsspec.open_files(name if is_web else [name], "rb")
                missing = not files or any(_is_missing(file) for file in files)
            except (OSError, ValueError, ImportError) as error:
                raise ValueError(f"{name} cannot be opened: {error}") from error
            if missing:
                raise ValueError(f"{name}: tar file not found.")
            shards.update((file.full_name, file) for file in files)
    return list(shards.values())


def _is_missing(file: fsspec.core.OpenFile) -> bool:
    """Whether a local file is missing. Remote shards are only checked when they are read, because a lookup is slow."""
    return "file" in file.fs.protocol and not file.fs.isfile(file.path)


class TarSource:
    """Records of WebDataset shards. Consecutive files with the same name up to the first dot form a record.

    The image is found by its file extension and the mask by a double extension (`0001.mask.png`). Captions are in
    `.txt`, `.caption` or `.json` files, tags in `.json`. Other files are not read, and nothing is unpacked to disk.

    Args:
        patterns: patterns of the shards, see [`find_shards`].
        columns: file extensions (`jpg`, `mask.png`, `txt`) or, for texts, keys of the `.json`.

    Raises:
        ValueError: if no shard matches.
    """

    def __init__(self, patterns: str, columns: Columns | None = None):
        self.name = patterns
        self._columns = columns or Columns()
        self._shards = find_shards(patterns)

    @property
    def fingerprint(self) -> str:
        """A string that changes with the names of the shards and with their size and time, if available."""
        return repr([(each.full_name, each.fs.info(each.path)) for each in self._shards])

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def read_shard(self, index: int, start: int = 0) -> Iterator[Record | UnusableRecord]:
        """Yields the records of a shard from number `start`; records that cannot be read are yielded as errors."""
        shard = self._shards[index]
        return islice(until_broken(self._items(shard), shard.full_name), start, None)

    def _items(self, shard: fsspec.core.OpenFile) -> Iterator[Record | UnusableRecord]:
        # Do not use `with shard`, because an OpenFile closes the files of all its readers.
        with (
            shard.fs.open(shard.path, "rb") as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictMember) as archive,
        ):
            for key, files in self._groups(archive):
                yield self._item(files, f"{shard.path}/{key}")

    def _groups(self, archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes | None]]]:
        """Yields keys with the contents of their files by ending; the content of unneeded files is None."""
        key = ""
        files: dict[str, bytes | None] = {}
        for member in archive:
            match = _MEMBER.fullmatch(member.name)
            if match is None or not member.isreg():
                continue
            ending = match[2].lower()
            if files and (match[1] != key or ending in files):
                yield key, files
                files = {}
            key = match[1]
            is_read = self._is_needed(ending) and member.size <= MAX_FILE_BYTES
            file = archive.extractfile(member) if is_read else None
            files[ending] = file.read() if file else None
        if files:
            yield key, files

    def _is_needed(self, ending: str) -> bool:
        columns = self._columns
        return (
            ending in (columns.image, columns.caption, columns.tags, columns.mask, "json")
            or ending in _CAPTION_ENDINGS
            or ending.removeprefix("mask.") in _IMAGE_ENDINGS
        )

    def _item(self, files: dict[str, bytes | None], name: str) -> Record | UnusableRecord:
        columns = self._columns
        image = files.get(columns.image or next((end for end in files if end in _IMAGE_ENDINGS), ""))
        if image is None:
            return UnusableRecord("no image", f"{name} has no readable image, only {', '.join(files)}.")
        try:
            fields = _json_fields(files.get("json"))
            captions = self._texts(files, fields, columns.caption, (*_CAPTION_ENDINGS, *CAPTION_NAMES))
            tags = self._texts(files, fields, columns.tags, TAG_NAMES)
            record = Record(image, captions_of(captions), tags_of(tags), name=name)
        except ValueError as error:
            return UnusableRecord("broken text", f"{name}: {error}")
        mask_ending = columns.mask or next((end for end in files if end.startswith("mask.")), "")
        record.mask = files.get(mask_ending)
        if not (record.captions or record.tags or record.mask):
            keys = f" with the keys {', '.join(fields)}" if fields else ""
            return UnusableRecord("no text", f"{name} has no caption or tags, only {', '.join(files)}{keys}.")
        return record

    @staticmethod
    def _texts(
        files: dict[str, bytes | None], fields: dict, column: str | None, usual: tuple[str, ...]
    ) -> Any:
        """The first available text, from a file or a field of the JSON."""
        for name in (column,) if column else usual:
            content = files.get(name)
            value = decode_text(content, f"its .{name}") if content is not None else fields.get(name)
            if value:
                return value
        return None


class _StrictMember(tarfile.TarInfo):
    """Raises an error for a broken header, which `tarfile` treats as the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictMember":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset:,}") from error


def _json_fields(content: bytes | None) -> dict[str, Any]:
    if content is None:
        return {}
    fields = parse_json(decode_text(content, "its .json"))
    if not isinstance(fields, dict):
        raise ValueError(
            f"its .json contains a {type(fields).__name__}, expected an object with captions or tags"
        )
    return fields
