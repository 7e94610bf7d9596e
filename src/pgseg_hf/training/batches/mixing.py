"""Which record every place of every batch holds: exact shares of several sources, and seeds of all that is random."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

_LONGEST_CYCLE = 1 << 16


class Draw(IntEnum):
    """What a generator is for; each use has its own stream of numbers."""

    RECORDS = 1
    SHARDS = 2
    BLOCK = 3
    DEAL = 4
    EXAMPLE = 5
    VIEW = 6


def seeded(draw: Draw, *numbers: int) -> np.random.Generator:
    """A generator for one use and the numbers that tell its calls apart.

    For one use there are always as many numbers: numpy takes (1, 2) and (1, 2, 0) for the same seed.
    """
    return np.random.default_rng((int(draw), *numbers))


class Mixture:
    """Deals the places of a run, numbered 0, 1, 2, ..., to sources by their weights.

    The dealing repeats after a cycle in which every source has its places spread evenly, so a source's share is right
    over any stretch (to within 1 + share * sources records), and is a pure function of the places' numbers.

    Args:
        weights: positive numbers, one a source; shares are kept to one in 65,536.

    Raises:
        ValueError: no weights, or one that is not positive and finite.
    """

    def __init__(self, weights: Sequence[float]):
        values = np.asarray(weights, dtype=np.float64)
        if not values.size or not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"The sources' weights are {list(weights)}, expected positive numbers.")
        counts = np.maximum(np.round(values / values.sum() * _LONGEST_CYCLE), 1).astype(np.int64)
        self._counts = counts // np.gcd.reduce(counts)
        sources = np.repeat(np.arange(len(counts)), self._counts)
        turns = np.concatenate([np.arange(count) for count in self._counts])
        order = np.argsort((turns + 0.5) / self._counts[sources], kind="stable")
        self._sources, self._turns = sources[order], turns[order]

    @property
    def shares(self) -> np.ndarray:
        """The sources' shares, which sum up to 1."""
        return self._counts / self._counts.sum()

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of `count` places from number `first` on, and for each which record of its source it is, counted
        from the beginning of the run."""
        cycles, inside = np.divmod(np.arange(first, first + count), len(self._sources))
        sources = self._sources[inside]
        return sources, cycles * self._counts[sources] + self._turns[inside]

    def taken(self, count: int) -> np.ndarray:
        """How many of the first `count` places each source has."""
        cycles, rest = divmod(count, len(self._sources))
        return cycles * self._counts + np.bincount(self._sources[:rest], minlength=len(self._counts))
