"""What every source of training data yields, one by one or shard by shard."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..images import ImageSource


@dataclass
class Record:
    """One image with its texts, not decoded yet.

    Args:
        image: path, address, bytes or PIL image, whatever `load_image` takes.
        captions: sentences, used as they are; may be empty.
        tags: words or phrases without a template; may be empty.
        mask: label map of the image's size, or None; only ever used to tell which tags a crop has.
        name: what messages call the record.
        views: features of a backbone [C, h, w] for several views of the image, which then is not read.
        view_tags: the tags that each view shows, or None for the record's.
        view_names: for each view how much of each cell of a grid has a name, {name: [h, w]}, where something knows.
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
    """A record that cannot be trained on; `reason` is the short name that it is counted under."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def until_broken(
    items: Iterator[Record | UnusableRecord], place: str, start: int = 0
) -> Iterator[Record | UnusableRecord]:
    """The items of a shard; an error while reading them becomes the last one, and a shard without any gives one that
    says so.

    Args:
        items: from number `start` on.
        place: what messages call the shard.
    """
    count = start
    while True:
        # Only the reading is guarded, not the yield, which raises where the reader is thrown away.
        try:
            item = next(items, None)
        except Exception as error:  # every file system, compression and file format has errors of its own
            text = str(error) or type(error).__name__
            item = UnusableRecord("broken shard", f"{place} breaks off after {count} records: {text}")
            items = iter(())
        if item is None:
            break
        yield item
        count += 1
    if not count:
        yield UnusableRecord("empty shard", f"{place} has no records.")
