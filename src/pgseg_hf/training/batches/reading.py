"""Reads a streaming source indefinitely: shuffled, with shards divided among readers, and exactly resumable."""

from collections.abc import Iterator
from itertools import islice

from ...data.records import Record, UnusableRecord
from ...data.sources import StreamSource
from .mixing import Draw, seeded

State = list[int]
"""Epoch, position in its order of shards, first record of the current block in that shard, records already yielded."""


def read_in_blocks(
    source: StreamSource, seed: tuple[int, int], part: int, parts: int, block: int, state: State | None = None
) -> Iterator[tuple[Record | UnusableRecord, State]]:
    """Yields the records of one of several readers indefinitely. Together the readers read each record once per epoch.

    Each epoch distributes the shards again. With fewer shards than readers, n readers share a shard and each keeps
    every n-th record. Records are shuffled in blocks: `block` undecoded records are read and yielded in random order.
    A state is therefore only four numbers, and resuming reads a single block again.

    Args:
        source: the source to read.
        seed: seed of the run and number of the source.
        part, parts: index of this reader and number of readers over all processes.
        block: number of records held in memory.
        state: state at which a reader of the same part stopped.

    Returns:
        An iterator over records, each with the state after it.

    Raises:
        ValueError: during iteration, if an epoch has no record for this reader.
    """
    epoch, place, start, done = state or (0, 0, 0, 0)
    while True:
        items = _epoch(source, (*seed, epoch), (part, parts), place, start)
        is_empty = place == start == 0
        while records := list(islice(items, block)):
            is_empty = False
            order = seeded(Draw.BLOCK, *seed, part, epoch, place, start).permutation(len(records))
            for index in order[done:]:
                done += 1
                yield records[index][2], [epoch, place, start, done]
            place, start, done = records[-1][0], records[-1][1] + 1, 0
        if is_empty:
            raise ValueError(
                f"{source.name} has no record for reader {part + 1} of {parts}: it has fewer records than readers. "
                "Use fewer workers."
            )
        epoch, place, start = epoch + 1, 0, 0


def _epoch(
    source: StreamSource, seed: tuple[int, int, int], part_of: tuple[int, int], place: int, start: int
) -> Iterator[tuple[int, int, Record | UnusableRecord]]:
    """The rest of a reader's epoch: position in its order of shards, index in the shard, and the record."""
    part, parts = part_of
    count = source.num_shards
    order = seeded(Draw.SHARDS, *seed).permutation(count)
    shards = [int(shard) for shard in order[part % count :: parts]]
    step = len(range(part % count, parts, count))
    for later, shard in enumerate(shards[place:], place):
        first = start if later == place else 0
        for number, item in enumerate(source.read_shard(shard, first), first):
            if number % step == part // count:
                yield later, number, item
