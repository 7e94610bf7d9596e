"""Sources of numbered records without pictures."""

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import strategies as st

from pgseg_hf.data.records import Record, UnusableRecord

WEIGHTS = st.one_of(
    st.lists(values, min_size=1, max_size=5) for values in (st.integers(1, 5), st.floats(0.01, 100))
)


@dataclass
class Table:
    """Records named by their numbers; those in `broken` cannot be used."""

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
    """A streaming source of shards of the given sizes; records numbered through."""

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
