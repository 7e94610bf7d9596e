"""Seeds, shares of several sources, and epochs."""

import itertools

import numpy as np
import pytest
from fake_sources import WEIGHTS, Shards, Table, stream_of, take
from hypothesis import given
from hypothesis import strategies as st

from pgseg_hf.training.batches.mixing import Draw, Mixture, seeded

# Seeds


def test_seeds_of_different_uses_and_numbers_differ():
    draws = [seeded(draw, 1, number).integers(2**62) for draw in Draw for number in range(3)]
    assert len(set(draws)) == len(draws)
    assert seeded(Draw.DEAL, 1, 2).integers(2**62) == seeded(Draw.DEAL, 1, 2).integers(2**62)


# Shares


@given(WEIGHTS, st.integers(1, 64), st.integers(0, 3000))
def test_every_source_gives_its_records_in_order(weights, batch, start):
    mixture = Mixture(weights)
    sources, positions = map(
        np.concatenate,
        zip(*(mixture.places(first, batch) for first in range(start, start + 5 * batch, batch))),
    )
    before = mixture.taken(start)
    for source in range(len(weights)):
        own = positions[sources == source]
        assert own.tolist() == list(range(before[source], before[source] + len(own)))
    assert (
        mixture.taken(start + 5 * batch).tolist()
        == (before + np.bincount(sources, minlength=len(weights))).tolist()
    )


@given(WEIGHTS, st.integers(0, 200_000), st.integers(1, 5000))
def test_shares_are_right_over_any_stretch(weights, start, length):
    mixture = Mixture(weights)
    expected = length * mixture.shares
    got = mixture.taken(start + length) - mixture.taken(start)
    assert got.sum() == length
    assert (np.abs(got - expected) <= 2 * (0.5 + mixture.shares * len(weights) / 2) + 1e-6).all()
    # Shares below 1/65,536 are rounded up to it.
    assert np.allclose(mixture.shares, np.array(weights) / sum(weights), atol=len(weights) / 65536)


def test_shares_by_hand():
    mixture = Mixture([2, 1])
    assert mixture.places(0, 6)[0].tolist() == Mixture([0.5, 0.25]).places(0, 6)[0].tolist()
    assert np.bincount(mixture.places(30, 6)[0]).tolist() == [4, 2]
    assert Mixture([4, 1]).places(0, 5)[0].tolist() == [0, 0, 1, 0, 0]
    assert Mixture([0.3]).places(7, 3)[1].tolist() == [7, 8, 9]
    assert Mixture([1, 1e-9]).taken(10 * 65_537).tolist() == [10 * 65_536, 10]


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [float("inf")], [float("nan")]])
def test_weights_must_be_positive(weights):
    with pytest.raises(ValueError, match="expected positive numbers"):
        Mixture(weights)


# Epochs


def test_epochs_of_tables():
    stream = stream_of([Table(8), Table(40)], [1, 3], world_size=2)
    assert stream.epoch == 0
    take(stream, 8)  # 64 records: 2 passes over the first source and 1.2 over the second
    assert stream.epoch == pytest.approx(0.25 * 2 + 0.75 * 1.2)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_streams_are_whole_passes_of_the_slowest_reader(workers):
    stream = stream_of([Shards([8] * 2)], num_workers=workers, batch_size=2)
    epochs = [stream.epoch for _ in itertools.islice(stream, 24)]
    assert epochs == [0] * (8 + (workers == 2)) + [1] * 8 + [2] * (8 - (workers == 2))


@given(WEIGHTS, st.integers(1, 4))
def test_an_epoch_ends_after_as_many_batches_as_it_has(weights, batch_size):
    stream = stream_of([Table(7 + 5 * n) for n in range(len(weights))], weights, batch_size=batch_size)
    many = round(1000 * stream.batches_per_epoch)
    stream.load_state_dict({**stream.state_dict(), "batch": many})
    assert stream.epoch == pytest.approx(1000, abs=1)


def test_a_stream_has_no_known_length():
    stream = stream_of([Table(3), Shards([3])])
    with pytest.raises(ValueError, match=r"shards is streamed .* max_steps"):
        _ = stream.batches_per_epoch
