"""Reading a streaming source for ever, shuffled, its shards divided among readers, and going on exactly."""

from collections.abc import Iterator
from itertools import islice

from ...data.records import Record, UnusableRecord
from ...data.sources import StreamSource
from .mixing import Draw, seeded

State = list[int]
"""Epoch; place in its order of shards and record in this shard where a block begins; records of it handed out."""


def read_in_blocks(
    source: StreamSource, seed: tuple[int, int], part: int, parts: int, block: int, state: State | None = None
) -> Iterator[tuple[Record | UnusableRecord, State]]:
    """The records of one of several readers, which together read every record of a source once an epoch; never ends.

    Each epoch deals the shards anew. With fewer shards than readers, n of them read the same shard and keep every n-th
    record. Records are shuffled in blocks: so many are read, not decoded, and handed out in random order. So a state is
    four numbers, and going on means reading one block again.

    Args:
        source: what is read.
        seed: of the run and of the source.
        part, parts: this reader and how many there are, over all processes.
        block: records in memory.
        state: where another reader of the same part stopped.

    Returns:
        Each record with the state after it.

    Raises:
        ValueError: while reading, where an epoch has nothing for this reader.
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
                f"{source.name} has nothing for reader {part + 1} of {parts}: it has fewer records than there are "
                "readers. Use fewer workers."
            )
        epoch, place, start = epoch + 1, 0, 0


def _epoch(
    source: StreamSource, seed: tuple[int, int, int], part_of: tuple[int, int], place: int, start: int
) -> Iterator[tuple[int, int, Record | UnusableRecord]]:
    """The rest of a reader's epoch: place in its order of shards, number in the shard, and the record."""
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
