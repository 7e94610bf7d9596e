"""Finds the columns of a dataset with the image and its texts, and parses their values."""

import ast
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..text_files import check_characters
from ..values import is_list

IMAGE_NAMES = (
    "image",
    "file_name",
    "image_path",
    "image_file",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "image_url",
    "url",
)
CAPTION_NAMES = ("captions", "caption", "text", "texts", "txt", "sentences", "sentence")
TAG_NAMES = ("tags", "keywords")
MASK_NAMES = ("mask_file_name", "mask")

# A list of strings as printed by Python or NumPy (without commas).
_TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_PRINTED_LIST = re.compile(rf"\[\s*(?:(?:{_TEXT}|None|nan)[\s,]*)*\]", re.DOTALL)


@dataclass(frozen=True)
class Columns:
    """Names of the image, caption, tag and mask columns. None stands for the usual names (`IMAGE_NAMES` and so on)."""

    image: str | None = None
    caption: str | None = None
    tags: str | None = None
    mask: str | None = None

    def among(self, names: Sequence[str], source: str) -> "Columns":
        """Resolves the names among the columns of a table; captions, tags and mask are None if the table lacks them.

        Raises:
            ValueError: if a given column is missing or occurs twice, or the table has no image column, or neither
                captions nor tags (nor a mask column given by name).
        """

        def find(given: str | None, usual: Iterable[str]) -> str | None:
            if given is not None and given not in names:
                raise ValueError(f"{source} has no column {given!r}; its columns are {', '.join(names)}.")
            name = given or next((name for name in usual if name in names), None)
            if name is not None and names.count(name) > 1:
                raise ValueError(f"{source} has {names.count(name)} columns {name!r}, expected one.")
            return name

        found = Columns(
            find(self.image, IMAGE_NAMES),
            find(self.caption, CAPTION_NAMES),
            find(self.tags, TAG_NAMES),
            find(self.mask, MASK_NAMES),
        )
        if found.image is None:
            raise ValueError(
                f"{source} has no image column with a usual name ({', '.join(IMAGE_NAMES)}); its columns are "
                f"{', '.join(names)}. Set image_column to one of them."
            )
        if not (found.caption or found.tags or self.mask):
            raise ValueError(
                f"{source} has no captions or tags column with a usual name ({', '.join(CAPTION_NAMES + TAG_NAMES)}); "
                f"its columns are {', '.join(names)}. Set caption_column or tags_column to one of them."
            )
        return found


def captions_of(value: Any) -> list[str]:
    """The captions in a string or a list of strings. Other values and empty strings are ignored.

    Raises:
        ValueError: if a string is not valid Unicode.
    """
    values = value if is_list(value) else [value]
    texts = (" ".join(item.split()) for item in values if isinstance(item, str))
    return [check_characters(text) for text in texts if text]


def tags_of(value: Any) -> list[str]:
    """The distinct tags in a list of strings, in a string separated by commas, semicolons or `|`, or in a string with a
    JSON, Python or NumPy list, as pandas writes it.

    Raises:
        ValueError: if a string is not valid Unicode, or brackets are nested too deeply.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _listed(" ".join(value.split()))
    if isinstance(value, str):
        value = re.split(r"[,;|]", value)
    return list(dict.fromkeys(captions_of(value)))


def _listed(text: str) -> Any:
    """The list that a text represents, or the text itself."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{text[:20]!r}... is nested too deeply") from error
    except ValueError:
        if not _PRINTED_LIST.fullmatch(text):
            return text
    try:
        return [ast.literal_eval(part) for part in re.findall(_TEXT, text, re.DOTALL)]
    except SyntaxError as error:  # an invalid escape sequence
        raise ValueError(f"{text[:80]!r} cannot be parsed as a list: {error}") from error
