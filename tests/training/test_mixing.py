"""Seeds, and shares of several sources."""

import numpy as np
import pytest
from fake_sources import WEIGHTS
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
    # Shares of less than one in 65,536 are rounded up to it.
    assert np.allclose(mixture.shares, np.array(weights) / sum(weights), atol=len(weights) / 65536)


def test_shares_by_hand():
    mixture = Mixture([2, 1])
    assert mixture.places(0, 6)[0].tolist() == Mixture([0.5, 0.25]).places(0, 6)[0].tolist()
    assert np.bincount(mixture.places(30, 6)[0]).tolist() == [4, 2]
    assert Mixture([0.3]).places(7, 3)[1].tolist() == [7, 8, 9]
    assert Mixture([1, 1e-9]).taken(10 * 65_537).tolist() == [10 * 65_536, 10]


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [float("inf")], [float("nan")]])
def test_weights_must_be_positive(weights):
    with pytest.raises(ValueError, match="expected positive numbers"):
        Mixture(weights)
