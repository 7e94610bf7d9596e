"""What is common to all that is read shard by shard."""

from collections.abc import Iterator

from .records import Record, UnusableRecord


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
