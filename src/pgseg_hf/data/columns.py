"""Which columns of a dataset hold the image and its texts, and what their values mean."""

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

# A list of texts as Python or NumPy (without commas) prints it.
_TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_PRINTED_LIST = re.compile(rf"\[\s*(?:(?:{_TEXT}|None|nan)[\s,]*)*\]", re.DOTALL)


@dataclass(frozen=True)
class Columns:
    """Names of the columns of an image, its captions, tags and label map.

    A name that is None stands for the usual ones, `IMAGE_NAMES` and so on.
    """

    image: str | None = None
    caption: str | None = None
    tags: str | None = None
    mask: str | None = None

    def among(self, names: Sequence[str], source: str) -> "Columns":
        """The columns that a table has; None for captions, tags or masks that it has not.

        Raises:
            ValueError: a column that was named is missing or there twice, there is no image, or neither captions nor
                tags (and no mask that was asked for by name).
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
                f"{source} has no column of images by a usual name ({', '.join(IMAGE_NAMES)}); its columns are "
                f"{', '.join(names)}: say which one with image_column."
            )
        if not (found.caption or found.tags or self.mask):
            raise ValueError(
                f"{source} has no captions and no tags by a usual name ({', '.join(CAPTION_NAMES + TAG_NAMES)}); its "
                f"columns are {', '.join(names)}: say which one with caption_column or tags_column."
            )
        return found


def captions_of(value: Any) -> list[str]:
    """Captions out of a string or a list of strings; anything else and empty strings are left out.

    Raises:
        ValueError: a string that is no Unicode text.
    """
    values = value if is_list(value) else [value]
    texts = (" ".join(item.split()) for item in values if isinstance(item, str))
    return [check_characters(text) for text in texts if text]


def tags_of(value: Any) -> list[str]:
    """Tags out of a list of strings, of a string split at commas, semicolons and `|`, or of one that writes a JSON,
    Python or NumPy list, as tables of pandas do; each one once.

    Raises:
        ValueError: a string that is no Unicode text, or brackets nested too deep.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _listed(" ".join(value.split()))
    if isinstance(value, str):
        value = re.split(r"[,;|]", value)
    return list(dict.fromkeys(captions_of(value)))


def _listed(text: str) -> Any:
    """The list that a text writes, or the text itself."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{text[:20]!r}... is nested too deep") from error
    except ValueError:
        if not _PRINTED_LIST.fullmatch(text):
            return text
    try:
        return [ast.literal_eval(part) for part in re.findall(_TEXT, text, re.DOTALL)]
    except SyntaxError as error:  # an escape that is none
        raise ValueError(f"{text[:80]!r} is no list that can be read: {error}") from error
