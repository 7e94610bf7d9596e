"""The records that every source of training data yields."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..images import ImageSource


@dataclass
class Record:
    """An undecoded image with its texts.

    Args:
        image: path, URL, bytes or PIL image, as accepted by `load_image`.
        captions: sentences, used without changes; may be empty.
        tags: words or phrases without a template; may be empty.
        mask: label map of the same size as the image, or None. It is only used to find the tags of a crop.
        name: name of the record for messages.
        views: backbone features [C, h, w] of several views of the image. The image itself is then not read.
        view_tags: tags visible in each view, or None to use the record's tags.
        view_names: for each view, the share of each name in every cell of a grid, {name: [h, w]}.
    """

    image: ImageSource
    captions: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    mask: ImageSource | None = None
    name: str = ""
    views: list[np.ndarray] | None = None
    view_tags: list[list[str] | None] | None = None
    view_names: list[dict[str, np.ndarray]] | None = None


class UnusableRecord(ValueError):
    """Raised or returned for a record that cannot be used; `reason` is the short name it is counted under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def until_broken(
    items: Iterator[Record | UnusableRecord], place: str, start: int = 0
) -> Iterator[Record | UnusableRecord]:
    """Yields the items of a shard. An error while reading is yielded as the last item; an empty shard yields an error.

    Args:
        items: the items from number `start`.
        place: name of the shard for messages.
    """
    count = start
    while True:
        # Guard only the reading and not the yield, which raises GeneratorExit when the reader is discarded.
        try:
            item = next(items, None)
        except Exception as error:  # file systems, compressions and file formats raise all kinds of errors
            text = str(error) or type(error).__name__
            item = UnusableRecord("broken shard", f"{place} cannot be read after {count} records: {text}")
            items = iter(())
        if item is None:
            break
        yield item
        count += 1
    if not count:
        yield UnusableRecord("empty shard", f"{place} has no records.")
