"""Which columns of a dataset hold the picture and its texts, and what their values mean."""

import ast
import contextlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a picture, its captions, tags and label map.

    A name that is None stands for the usual ones, `IMAGE_NAMES` and so on.
    """

    image: str | None = None
    caption: str | None = None
    tags: str | None = None
    mask: str | None = None

    def among(self, names: Collection[str], source: str) -> "Columns":
        """The columns that a table has; None for captions, tags or masks that it has not.

        Raises:
            ValueError: a column that was named is missing, there is no picture, or neither captions nor tags (and no
                mask that was asked for by name).
        """

        def find(given: str | None, usual: Iterable[str]) -> str | None:
            if given is not None and given not in names:
                raise ValueError(f"{source} has no column {given!r}; its columns are {', '.join(names)}.")
            return given or next((name for name in usual if name in names), None)

        found = Columns(
            find(self.image, IMAGE_NAMES),
            find(self.caption, CAPTION_NAMES),
            find(self.tags, TAG_NAMES),
            find(self.mask, MASK_NAMES),
        )
        if found.image is None:
            raise ValueError(
                f"{source} has no column of pictures by a usual name ({', '.join(IMAGE_NAMES)}); its columns are "
                f"{', '.join(names)}: say which one with image_column."
            )
        if not (found.caption or found.tags or self.mask):
            raise ValueError(
                f"{source} has no captions and no tags by a usual name ({', '.join(CAPTION_NAMES + TAG_NAMES)}); its "
                f"columns are {', '.join(names)}: say which one with caption_column or tags_column."
            )
        return found


def captions_of(value: Any) -> list[str]:
    """Captions out of a string or a list of strings; anything else and empty strings are left out."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [text for item in values if isinstance(item, str) and (text := " ".join(item.split()))]


def tags_of(value: Any) -> list[str]:
    """Tags out of a list of strings, of a string split at commas, semicolons and `|`, or of one that writes a Python or
    JSON list, as tables of pandas do; each one once."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if isinstance(value, str):
        value = re.split(r"[,;|]", value)
    return list(dict.fromkeys(captions_of(value)))
