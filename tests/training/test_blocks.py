"""Readers of a streaming source: each record once per epoch, shuffled, and resumable anywhere."""

import itertools

import pytest
from fake_sources import Shards
from hypothesis import given
from hypothesis import strategies as st

from pgseg_hf.data.records import Record, UnusableRecord
from pgseg_hf.training.batches.reading import read_in_blocks


def reader(source, part=0, parts=1, block=3, state=None, seed=1):
    return read_in_blocks(source, (seed, 0), part, parts, block, state)


def first_epochs(source, part, parts, block, count=3):
    """The items that a reader yields in its first epochs, one list per epoch."""
    epochs = [[] for _ in range(count)]
    for item, (epoch, *_) in reader(source, part, parts, block):
        if epoch == count:
            return epochs
        epochs[epoch].append(str(item) if isinstance(item, UnusableRecord) else int(item.captions[0]))


@given(st.lists(st.integers(5, 12), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 30))
def test_readers_share_an_epoch(sizes, parts, block):
    source = Shards(sizes)
    readers = [first_epochs(source, part, parts, block) for part in range(parts)]
    for epoch in zip(*readers):
        assert sorted(itertools.chain(*epoch)) == list(range(sum(sizes)))


def test_epochs_and_blocks_are_shuffled():
    first, second, _ = first_epochs(Shards([50] * 4), 0, 1, 10)
    assert first != second
    blocks = [first[start : start + 10] for start in range(0, 200, 10)]
    orders = [tuple(number - min(block) for number in block) for block in blocks]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len(set(orders)) > 15
    shards = [block[0] // 50 for block in blocks[::5]]
    assert sorted(shards) == [0, 1, 2, 3]
    assert shards != [number // 50 for number in second[::50]]


def test_readers_with_shards_of_their_own_open_no_others():
    source = Shards([4] * 6)
    first_epochs(source, 1, 3, 100, count=1)
    # Two shards in the first epoch; `first_epochs` reads on into the second epoch.
    assert sum(source.reads.values()) == 4


@given(
    st.lists(st.integers(3, 8), min_size=1, max_size=4),
    st.sampled_from([(0, 1), (1, 2), (0, 3), (2, 3)]),
    st.integers(1, 12),
    st.lists(st.integers(0, 25), min_size=1, max_size=4),
)
def test_readers_go_on_anywhere(sizes, part, block, stops):
    def text(item):
        return item.captions[0] if isinstance(item, Record) else str(item)

    source = Shards(sizes, broken=frozenset([1]))
    expected = [text(item) for item, _ in itertools.islice(reader(source, *part, block), sum(stops))]
    got, state = [], None
    for stop in stops:
        for item, after in itertools.islice(reader(source, *part, block, state), stop):
            got.append(text(item))
            state = after
    assert got == expected


def test_more_readers_than_records_is_an_error():
    with pytest.raises(ValueError, match=r"shards .*reader 4 of 4: .* Use fewer workers"):
        next(reader(Shards([3]), part=3, parts=4))
