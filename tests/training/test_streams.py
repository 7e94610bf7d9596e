"""`TrainingStream`: exact shares, each record once per epoch, exact resumption, and counts of skipped records."""

import gc
import itertools
import json
import pickle
import random
import time
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from data_files import numbered_files, numbered_folder, numbered_shards, numbered_tables, tar_bytes
from fake_sources import (
    WEIGHTS,
    Shards,
    Table,
    collate,
    numbers,
    prepare,
    prepare_image,
    slowly,
    stream_of,
    take,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pgseg_hf.data.sources import SourceSpec, open_source
from pgseg_hf.training.batches import streams
from pgseg_hf.training.batches.streams import StreamOptions, TrainingStream

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

SEEDS = st.integers(0, 2**31 - 1)


# Records


@pytest.mark.parametrize("workers", [0, 2])
def test_every_record_of_a_table_comes_once_an_epoch(workers):
    stream = stream_of([Table(10)], batch_size=3, num_workers=workers)
    got = numbers(take(stream, 10))
    # Batches that span two epochs are shuffled, so only the counts after three whole epochs are certain.
    assert Counter(got) == dict.fromkeys(range(10), 3)
    batches = [frozenset(batch) for batch, _ in take(stream_of([Table(12)], num_workers=workers), 9)]
    epochs = [batches[start : start + 3] for start in (0, 3, 6)]
    assert all(frozenset().union(*epoch) == set(range(12)) for epoch in epochs)
    assert len(set(batches)) > 6


def test_every_seed_and_every_place_has_an_order_and_draws_of_its_own():
    batches = [take(stream_of([Table(50)], seed=seed), 10) for seed in (1, 2)]
    assert numbers(batches[0]) != numbers(batches[1])
    assert len({draw for of_seed in batches for _, draws in of_seed for draw in draws}) == 80


def test_tables_do_not_depend_on_the_number_of_workers():
    sources = [Table(7), Table(20, first=100, broken=frozenset([3, 4]))]
    streams_ = [stream_of(sources, [1, 2], num_workers=workers) for workers in (0, 1, 3)]
    first, *others = (take(stream, 11) for stream in streams_)
    assert all(other == first for other in others)
    assert streams_[0].counts == streams_[1].counts == streams_[2].counts


@given(WEIGHTS, st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=20)
def test_processes_share_the_batches_of_one(weights, world_size, batch_size):
    sources = [Table(5 + n, first=100 * n, broken=frozenset([n])) for n in range(len(weights))]
    parts = [
        take(stream_of(sources, weights, rank, world_size, batch_size=batch_size), 6)
        for rank in range(world_size)
    ]
    whole = take(stream_of(sources, weights, batch_size=world_size * batch_size), 6)
    for index, batch in enumerate(whole):
        for kind in (0, 1):
            columns = zip(*(part[index][kind] for part in parts), strict=True)
            assert list(itertools.chain(*columns)) == batch[kind]


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_read_a_stream_together(workers):
    got = []
    for rank in range(2):
        stream = stream_of([Shards([4] * 8)], rank=rank, world_size=2, batch_size=2, num_workers=workers)
        got += numbers(take(stream, 8))
    assert sorted(got) == list(range(32))


def test_shares_of_tables_and_streams_in_every_process():
    sources = [Table(5), Shards([6] * 4, first=100), Shards([9] * 3, first=200)]
    got = numbers(take(stream_of(sources, [5, 3, 2], num_workers=3, batch_size=10), 6))
    assert Counter(number // 100 for number in got) == {0: 30, 1: 18, 2: 12}
    # Sources and processes alternate, so without shuffling each process would get a single source.
    for rank in (0, 1):
        tables = [Table(1000), Table(1000, first=1000)]
        got = numbers(take(stream_of(tables, rank=rank, world_size=2), 10))
        assert 8 < sum(number < 1000 for number in got) < 32


# Resuming


def check_resumption(make, count=20, seed=0):
    """A stream stopped at random and resumed from its state as JSON gives the same batches, draws and counts."""
    whole = make()
    expected = take(whole, count)
    stops = sorted(random.Random(seed).sample(range(1, count), 2))
    for first, second in (stops, (1, 2)):  # (1, 2) stops before every worker has made a batch
        stream, got = make(), []
        for stop in (first, second, count):
            got += take(stream, stop - len(got))
            state = json.loads(json.dumps(stream.state_dict()))
            stream = make()
            stream.load_state_dict(state)
        assert got == expected
        assert stream.counts == whole.counts
        assert stream.state_dict() == whole.state_dict()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_exact_resumption(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    paths = [
        numbered_folder(tmp_path / "folder", 23),
        numbered_shards(tmp_path / "tars", [7, 5, 9, 6], first=100),
        numbered_tables(tmp_path / "tables", [6, 8], first=200),
    ]
    (tmp_path / "folder" / "7.png").write_bytes(b"broken")
    shard = tmp_path / "tars" / "002.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    sources = [open_source(SourceSpec(path, streaming=True)) for path in paths]
    check_resumption(
        lambda: stream_of(sources, [3, 2, 1], num_workers=workers, prepare=prepare_image), seed=workers
    )


@given(st.data())
@settings(max_examples=30)
def test_exact_resumption_of_any_mix(data):
    tables = st.builds(Table, st.integers(2, 20), broken=st.just(frozenset([1])))
    sizes = st.lists(st.integers(4, 9), min_size=1, max_size=4)
    shards = st.builds(Shards, sizes, broken=st.just(frozenset([1, 2])))
    sources = data.draw(st.lists(st.one_of(tables, shards), min_size=1, max_size=3))
    block, batch = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    rank = data.draw(st.integers(0, 1))

    def make():
        return stream_of(sources, None, rank, 2, shuffle_block=block, batch_size=batch)

    check_resumption(make, seed=data.draw(SEEDS))


def test_an_iteration_that_is_given_up_lets_go_of_its_shards():
    source = Shards([10])
    stream = stream_of([source, Table(5)])
    gc.disable()
    try:
        for _ in stream:
            assert source.open == 1
            break
        assert source.open == 0
    finally:
        gc.enable()


def test_tables_go_on_with_other_workers_and_processes():
    def make(rank=0, world_size=1, workers=0):
        return stream_of([Table(11)], None, rank, world_size, batch_size=4 // world_size, num_workers=workers)

    expected = take(make(), 8)
    stream = make(workers=2)
    assert take(stream, 2) + take(stream, 1) == expected[:3], "iterating again should continue"
    state = stream.state_dict()
    for rank in range(2):
        other = make(rank, 2, workers=3)
        other.load_state_dict(state)
        assert [batch for batch, _ in take(other, 5)] == [batch[rank::2] for batch, _ in expected[3:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 3}, "num_workers was 2 and is 3; streaming sources"),
        ({"world_size": 2, "rank": 1, "batch_size": 2}, "world_size was 1 and is 2, rank was 0 and is 1"),
        ({"shuffle_block": 7}, "shuffle_block was 3 and is 7"),
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"batch_size": 5}, "records of all processes was 4 and is 5"),
        ({"weights": [1, 2]}, r"shares was \[0.5, 0.5\] and is \[0.333"),
        ({"sources": [Shards([5] * 5), Table(4)]}, r"sizes was \[5, 3\] and is \[5, 4\]"),
    ],
)
def test_other_streams_do_not_go_on(changes, message):
    arguments = {"sources": [Shards([5] * 5), Table(3)], "num_workers": 2}
    state = stream_of(**arguments).state_dict()
    other = stream_of(**{**arguments, **changes})
    with pytest.raises(ValueError, match=f"the same batches: .*{message}"):
        other.load_state_dict(state)


@pytest.mark.parametrize("kind", [numbered_folder, numbered_tables, numbered_shards])
def test_other_records_under_the_same_numbers_do_not_go_on_and_moved_ones_do(tmp_path, kind):
    def stream(folder, first):
        path = folder / "records"
        made = str(path) if path.exists() else kind(path, 6 if kind is numbered_folder else [3, 3], first)
        return stream_of([open_source(SourceSpec(made))])

    state = json.loads(json.dumps(stream(tmp_path / "here", 0).state_dict()))
    if kind is not numbered_shards:
        (tmp_path / "there").mkdir()
        (tmp_path / "here" / "records").rename(tmp_path / "there" / "records")
        stream(tmp_path / "there", 0).load_state_dict(state)
    with pytest.raises(ValueError, match="contents of the sources was"):
        stream(tmp_path / "other", 100).load_state_dict(state)


@pytest.mark.parametrize(
    ("lengths", "weights"),
    # With many small sources, all of a batch may be the large one's.
    [([13], [1]), ([19, 40], [1, 2]), ([19, 7, 7, 7, 7, 7], [5, 1, 1, 1, 1, 1])],
)
def test_no_record_is_twice_in_a_batch_and_each_once_an_epoch(lengths, weights):
    tables = [Table(length, first=100 * number) for number, length in enumerate(lengths)]
    batches = [batch for batch, _ in take(stream_of(tables, weights), 200)]
    assert all(len(set(batch)) == len(batch) for batch in batches)
    seen = Counter(each for table in tables for each in range(table.first, table.first + len(table)))
    for batch in batches:
        seen.update(batch)
        counts = [[seen[table.first + index] for index in range(len(table))] for table in tables]
        assert all(max(of_table) - min(of_table) <= 1 for of_table in counts)


def test_one_other_image_or_another_preparation_does_not_go_on(tmp_path):
    folder = numbered_folder(tmp_path, 5)
    source, options = open_source(SourceSpec(folder)), StreamOptions(2)

    def stream(**depends_on):
        return TrainingStream([source], [1], prepare, list, options, depends_on=depends_on)

    state = json.loads(json.dumps(stream(min_scale=0.08).state_dict()))
    stream(min_scale=0.08).load_state_dict(state)
    with pytest.raises(ValueError, match=r"min_scale was 0\.08 and is 0\.5"):
        stream(min_scale=0.5).load_state_dict(state)
    (tmp_path / "3.png").write_bytes((tmp_path / "4.png").read_bytes())
    with pytest.raises(ValueError, match="contents of the sources was"):
        stream(min_scale=0.08).load_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"batch": 1}, None, []])
def test_what_is_no_state(state):
    with pytest.raises(ValueError, match="training stream state"):
        stream_of([Table(3)]).load_state_dict(state)


def test_streams_can_be_sent_to_workers_that_are_spawned(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    paths = [
        numbered_folder(tmp_path / "a", 5),
        numbered_shards(tmp_path / "b", [5]),
        numbered_tables(tmp_path / "c", [5]),
    ]
    sources = [open_source(SourceSpec(path, streaming=True)) for path in paths]
    stream = stream_of(sources, prepare=prepare_image)
    assert take(pickle.loads(pickle.dumps(stream)), 4) == take(stream, 4)


def test_iterating_leaves_the_generators_of_torch_and_numpy_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in (0, 1):
        take(stream_of([Table(9), Shards([9] * 2)], num_workers=workers), 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


@pytest.mark.gpu
def test_batches_in_pinned_memory():
    for workers in (0, 1):
        stream = stream_of([Shards([9])], num_workers=workers, pin_memory=True)
        assert next(iter(stream))["numbers"].is_pinned()
        assert stream.counts == {"read": 4}


# Counts and unusable records


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_records_are_replaced_and_counted(workers):
    stream = stream_of([Table(10, broken=frozenset(range(4)))], num_workers=workers, max_failures=30)
    got = numbers(take(stream, 25))
    assert len(got) == 100
    assert set(got) == set(range(4, 10))
    assert stream.counts["read"] - stream.counts["broken image"] == 100
    assert stream.counts["broken image"] >= 40  # but never 30 in a row
    assert set(stream.counts) == {"read", "broken image"}


@pytest.mark.parametrize("workers", [0, 2])
def test_cut_texts_are_counted(workers):
    class Collator:
        cut_texts = 0

        def __call__(self, examples):
            self.cut_texts += 3
            return collate(examples)

    stream = stream_of([Table(10)], collate=Collator(), num_workers=workers)
    take(stream, 4)
    assert stream.counts == {"read": 16, "cut text": 12}


def test_broken_shards_are_counted_and_the_stream_goes_on(tmp_path):
    path = numbered_shards(tmp_path, [5, 5, 5])
    (tmp_path / "001.tar").write_bytes(b"no tar")
    (tmp_path / "002.tar").write_bytes(tar_bytes({**numbered_files(10, 4), "x.json": b"{", "x.png": b""}))
    stream = stream_of([open_source(SourceSpec(path))], prepare=prepare_image, batch_size=9)
    for _ in range(3):
        assert sorted(numbers(take(stream, 1))) == [0, 1, 2, 3, 4, 10, 11, 12, 13]
    take(stream, 1)
    broken = stream.counts["broken shard"] + stream.counts["broken text"]
    assert min(stream.counts["broken shard"], stream.counts["broken text"]) >= 3
    assert stream.counts["read"] == 36 + broken


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Table(5, broken=frozenset(range(5))), r"table: 30 .*\(30 x broken image\).* \d is broken"),
        (Shards([5] * 3, broken=frozenset(range(15))), r"\(30 x broken shard\).* number \d+"),
        (Shards([0] * 3), r"shards: 30 .*\(30 x empty shard\).* nothing"),
    ],
)
def test_nothing_usable_ends_the_run_with_a_readable_message(source, message, workers):
    stream = stream_of([source], max_failures=30, num_workers=workers)
    with pytest.raises(ValueError, match=message) as caught:
        take(stream, 5)
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 200


def test_too_many_workers_end_the_run():
    with pytest.raises(ValueError, match=r"^shards .*reader 2 of 2"):
        take(stream_of([Shards([1])], num_workers=2), 2)


def test_the_first_record_of_each_reason_and_too_few_shards_are_told(monkeypatch):
    lines = []
    monkeypatch.setattr(streams.logger, "warning", lines.append)
    stream_of([Shards([9] * 4), Table(1)], world_size=2, num_workers=2)
    take(stream_of([Table(10, broken=frozenset(range(5)))]), 20)
    assert len(lines) == 1 and "is broken (broken image;" in lines[0]
    stream_of([Shards([9] * 3), Table(1)], world_size=2, num_workers=2)
    assert "shards has 3 shards for 4 readers" in lines[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_speed_is_that_of_making_batches(workers):
    stream = stream_of([Table(9)], num_workers=workers, prepare=slowly)
    assert stream.images_per_second == 0
    for _ in itertools.islice(stream, 3):
        time.sleep(0.1)  # training takes its time too
    # Each worker makes at most 50 per second, and fewer on a busy machine.
    assert 5 < stream.images_per_second <= 50 * max(1, workers)


# Options


@pytest.mark.parametrize("name", ["batch_size", "seed", "num_workers", "shuffle_block", "max_failures"])
def test_options_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} is -1"):
        StreamOptions(**{"batch_size": 1, name: -1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"weights": [1, 2]}, "1 sources and 2 weights"), ({"rank": 2, "world_size": 2}, "rank is 2")],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        stream_of([Table(1)], **arguments)
