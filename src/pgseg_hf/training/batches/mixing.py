"""Assigns records to batches: exact shares of several sources, and seeds for everything that is random."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

_LONGEST_CYCLE = 1 << 16


class Draw(IntEnum):
    """What a random generator is used for; each use has its own stream of numbers."""

    RECORDS = 1
    SHARDS = 2
    BLOCK = 3
    DEAL = 4
    EXAMPLE = 5
    VIEW = 6


def seeded(draw: Draw, *numbers: int) -> np.random.Generator:
    """A generator for one use, seeded with `numbers`.

    Each use must always pass the same count of numbers, because NumPy treats (1, 2) and (1, 2, 0) as the same seed.
    """
    return np.random.default_rng((int(draw), *numbers))


class Mixture:
    """Distributes the slots of a run, numbered 0, 1, 2, ..., among sources according to their weights.

    The assignment is a pure function of the slot number. It repeats after a cycle in which the slots of each source are
    spread evenly, so a source's share is right over any span (to within 1 + share * sources records).

    Args:
        weights: one positive number per source. Shares are exact to about 1/65,536.

    Raises:
        ValueError: if there are no weights, or one is not positive and finite.
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
        """The share of each source; they sum to 1."""
        return self._counts / self._counts.sum()

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """For `count` slots from `first`: their sources and their positions among the records taken from the source."""
        cycles, inside = np.divmod(np.arange(first, first + count), len(self._sources))
        sources = self._sources[inside]
        return sources, cycles * self._counts[sources] + self._turns[inside]

    def taken(self, count: int) -> np.ndarray:
        """How many of the first `count` slots belong to each source."""
        cycles, rest = divmod(count, len(self._sources))
        return cycles * self._counts + np.bincount(self._sources[:rest], minlength=len(self._counts))
