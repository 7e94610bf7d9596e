"""Writing results so that a file is either there as a whole or not at all; names that stay in their folder."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from safetensors import SafetensorError


def path_inside(folder: Path, name: str) -> Path:
    """The file that a list or table names, relative to its folder.

    Raises:
        ValueError: the name leads out of the folder.
    """
    path = Path(name.replace("\\", "/"))
    if path.is_absolute() or path.drive or ".." in path.parts:
        raise ValueError(f"{name!r} leads out of the folder {folder}.")
    return Path(str(folder), path)


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> Path:
    """Writes a file under a temporary name in its folder, then renames it.

    Raises:
        ValueError: the folder cannot be made or written to; nothing is left behind.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}; choose another output path.") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_image(image: Image.Image, path: str | os.PathLike) -> Path:
    """Writes a picture in the format of its ending, whole or not at all."""
    path = Path(path)
    Image.init()
    image_format = Image.EXTENSION.get(path.suffix.lower())
    if image_format is None or image_format not in Image.SAVE:
        raise ValueError(
            f"{path} has no ending of a picture format that can be written, for instance .png or .jpg."
        )
    return write_atomically(path, lambda file: image.save(file, format=image_format))


def write_json(content: Any, path: str | os.PathLike) -> Path:
    """Writes JSON, whole or not at all."""
    return write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: str | os.PathLike) -> Path:
    """Writes text in UTF-8, whole or not at all. What is no character, as in a file name of another encoding, is
    escaped as JSON does it."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode("utf-8", errors="backslashreplace"))

    return write_atomically(path, write)


@contextmanager
def folder_written_whole(path: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that takes the name `path` when the block ends without an error.

    Args:
        path: the folder to make.
        replace: an older folder of that name gives way at the end.

    Raises:
        ValueError: `path` is a file, or a folder that is not empty and not to be replaced, or its parent cannot be
            written to.
    """
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not replace)):
        raise ValueError(f"{path} exists already; choose a new or empty folder.")
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
        except (OSError, SafetensorError) as error:  # the latter for a full disk
            raise ValueError(f"{path} cannot be written: {error}; choose another output folder.") from error
