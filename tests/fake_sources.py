"""Sources of numbered records without images, and streams of them."""

import itertools
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from pgseg_hf.data.records import Record, UnusableRecord
from pgseg_hf.images import load_image
from pgseg_hf.training.batches.streams import StreamOptions, TrainingStream

WEIGHTS = st.one_of(
    st.lists(values, min_size=1, max_size=5) for values in (st.integers(1, 5), st.floats(0.01, 100))
)


@dataclass
class Table:
    """Numbered records; those in `broken` cannot be used."""

    length: int
    first: int = 0
    broken: frozenset = frozenset()
    name: str = "table"

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return Record(b"", [str(self.first + index)], name="broken" if index in self.broken else "")


@dataclass
class Shards:
    """A streaming source of shards of the given sizes, with consecutively numbered records."""

    sizes: list
    first: int = 0
    broken: frozenset = frozenset()
    name: str = "shards"
    reads: Counter = field(default_factory=Counter)
    open: int = 0

    @property
    def num_shards(self):
        return len(self.sizes)

    def read_shard(self, index, start=0):
        self.reads[index] += 1
        self.open += 1
        first = self.first + sum(self.sizes[:index])
        try:
            for number in range(first + start, first + self.sizes[index]):
                if number in self.broken:
                    yield UnusableRecord("broken shard", f"number {number}")
                else:
                    yield Record(b"", [str(number)])
        finally:
            self.open -= 1
        if not self.sizes[index]:
            yield UnusableRecord("empty shard", "nothing")


def prepare(record, rng):
    """The number in a record's caption and a random draw."""
    if record.name == "broken":
        rng.random()
        raise UnusableRecord("broken image", f"{record.captions[0]} is broken")
    return int(record.captions[0].split()[-1]), rng.random()


def prepare_image(record, rng):
    try:
        pixel = load_image(record.image).getpixel((0, 0))[0]
    except ValueError as error:
        raise UnusableRecord("broken image", str(error)) from error
    assert record.captions == [f"text {pixel}"]
    return pixel, rng.random()


def slowly(record, rng):
    time.sleep(0.02)
    return prepare(record, rng)


def collate(examples):
    numbers, draws = zip(*examples, strict=True)
    return {"numbers": torch.tensor(numbers), "draws": torch.tensor(draws, dtype=torch.float64)}


def stream_of(sources, weights=None, rank=0, world_size=1, prepare=prepare, collate=collate, **options):
    options = StreamOptions(**{"batch_size": 4, "seed": 5, "shuffle_block": 3, **options})
    return TrainingStream(sources, weights or [1] * len(sources), prepare, collate, options, rank, world_size)


def take(stream, count):
    """Numbers and random draws of the next batches."""
    batches = itertools.islice(stream, count)
    return [(batch["numbers"].tolist(), batch["draws"].tolist()) for batch in batches]


def numbers(batches):
    return [number for batch, _ in batches for number in batch]
