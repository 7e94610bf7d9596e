"""Writes files completely or not at all, and keeps names inside their folder."""

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from safetensors import SafetensorError

# Prefix and suffix of files that are being written, and the age from which one counts as left behind.
_UNFINISHED = (".pgseg-", ".part")
_LEFT_SECONDS = 60

# PNG text keys: the digest of what a mask was made from, and the mean score of each value.
_SOURCE = "pgseg_source"
_SCORES = "pgseg_scores"

# Mask formats that keep every value; others are lossy or sort the palette.
MASK_FORMATS = ("PNG", "TIFF")


def path_inside(folder: Path, name: str) -> Path:
    """The path of a file that a list or table names relative to its folder.

    Raises:
        ValueError: the name leads out of the folder.
    """
    path = Path(name.replace("\\", "/"))
    if path.is_absolute() or path.drive or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of the folder {folder}.")
    return Path(str(folder), path)


def is_web_address(text: str) -> bool:
    """Whether a text is an `http(s)://` URL.

    Raises:
        ValueError: the URL has another scheme, such as `s3://`.
    """
    kind = re.match("([A-Za-z][A-Za-z0-9+.-]+)://", text)
    if kind is not None and kind[1].lower() not in ("http", "https"):
        raise ValueError(
            f"{text!r} has the scheme {kind[1]}, expected http or https: download the file first"
        )
    return kind is not None


def refuse_missing_folder(name_or_path: str | os.PathLike) -> None:
    """Raises a ValueError for an absolute path, which cannot be a name on the Hub, that is not a folder."""
    if Path(name_or_path).is_absolute() and not Path(name_or_path).is_dir():
        raise ValueError(
            f"{name_or_path} is not a folder; expected one made by save_pretrained or `pgseg convert`."
        )


def write_atomically(
    path: str | os.PathLike, write: Callable[[BinaryIO], None], replace: bool = True
) -> Path:
    """Writes a file under a temporary name in its folder, then renames it.

    Args:
        path: the file to write.
        write: writes the content to the open file.
        replace: whether to replace an existing file.

    Raises:
        ValueError: the folder cannot be created or written to; nothing is left behind.
        FileExistsError: the file exists, perhaps only since a moment ago, and `replace` is false.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        prefix, suffix = _UNFINISHED
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=suffix)
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(temporary, 0o666 & ~_umask())
        (os.replace if replace else _link)(temporary, path)
    except OSError as error:
        if isinstance(error, FileExistsError) and not replace:
            raise
        raise ValueError(f"{path} cannot be written: {error}; choose another output path.") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def _link(temporary: str, path: Path) -> None:
    """Renames a file unless the name is taken; of several processes only one succeeds."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, such as exFAT
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(temporary, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_unfinished(folder: Path) -> None:
    """Removes unfinished files of stopped runs from a folder and its subfolders, but not those still being written."""
    prefix, suffix = _UNFINISHED
    for path in folder.rglob(f"{prefix}*{suffix}"):
        with suppress(FileNotFoundError):  # finished meanwhile
            if time.time() - path.stat().st_mtime > _LEFT_SECONDS:
                path.unlink()


def image_format(path: str | os.PathLike, is_mask: bool = False) -> str:
    """The image format of a file name's ending.

    Raises:
        ValueError: the format cannot be written or, for a mask, does not keep its values.
    """
    Image.init()
    found = Image.EXTENSION.get(Path(path).suffix.lower())
    if is_mask and found not in MASK_FORMATS:
        raise ValueError(
            f"{path} has a format that does not keep a mask's values; expected the ending .png or .tif."
        )
    if found is None or found not in Image.SAVE:
        raise ValueError(
            f"{path} does not have the ending of an image format that can be written, such as .png or .jpg."
        )
    return found


def write_image(image: Image.Image, path: str | os.PathLike, **options: Any) -> Path:
    """Writes an image in the format of its ending, completely or not at all; `options` are those of `Image.save`."""
    found = image_format(path)
    return write_atomically(path, lambda file: image.save(file, format=found, **options))


def write_mask(
    mask: Image.Image, path: str | os.PathLike, source: str, scores: Sequence[float | None] | None = None
) -> Path:
    """Writes a PNG mask that stores its source, see [`mask_source`], and the mean score of each value."""
    info = PngInfo()
    info.add_text(_SOURCE, source)
    if scores is not None:
        info.add_text(_SCORES, json.dumps(list(scores)))
    return write_image(mask, path, pnginfo=info)


def mask_source(path: Path) -> str | None:
    """The source that [`write_mask`] stored in a mask; None if there is none or the file cannot be read."""
    return _text_of(path, _SOURCE)


def mask_scores(path: Path) -> list[float | None] | None:
    """The mean score of each value (None for absent ones) that [`write_mask`] stored; None if there are none."""
    text = _text_of(path, _SCORES)
    return None if text is None else json.loads(text)


def _text_of(path: Path, key: str) -> str | None:
    try:
        with PngImageFile(path) as mask:  # Image.open would refuse large masks
            return mask.info.get(key)
    except (OSError, SyntaxError):
        return None


def write_json(content: Any, path: str | os.PathLike, replace: bool = True) -> Path:
    """Writes JSON, see [`write_atomically`]."""
    return write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", path, replace)


def write_text(text: str, path: str | os.PathLike, replace: bool = True) -> Path:
    """Writes UTF-8 text, see [`write_atomically`]. Invalid characters, as in a file name of another encoding, are
    escaped as in JSON."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode("utf-8", errors="backslashreplace"))

    return write_atomically(path, write, replace)


@contextmanager
def folder_written_whole(path: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `path` when the block ends without an error.

    Args:
        path: the folder to create.
        replace: whether to replace an existing folder at the end.

    Raises:
        ValueError: `path` is a file, or a non-empty folder without `replace`, or its parent cannot be written to.
    """
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not replace)):
        raise ValueError(f"{path} already exists; choose a new or empty folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}; choose another output folder.") from error
    with temporary as name:
        inner = Path(name) / path.name
        inner.mkdir()
        try:
            yield inner
            if replace and path.exists():
                os.replace(path, Path(name) / "replaced")
            os.replace(inner, path)
        except (OSError, SafetensorError) as error:  # safetensors raises its own error when the disk is full
            raise ValueError(f"{path} cannot be written: {error}; choose another output folder.") from error
