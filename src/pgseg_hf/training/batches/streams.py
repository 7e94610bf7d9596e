"""Endless batches for training: weighted sources, exact resumption with worker processes, broken records left out."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.utils import logging

from ...data.records import Record, UnusableRecord
from ...data.sources import MapSource, Source, StreamSource
from ...run_records import differences
from ..continuing import contents_of
from .mixing import Draw, Mixture, seeded
from .reading import State, read_in_blocks

logger = logging.get_logger(__name__)

Prepare = Callable[[Record, np.random.Generator], Any]
Collate = Callable[[list[Any]], dict[str, Any]]


@dataclass
class StreamOptions:
    """How batches are made.

    Args:
        batch_size: records of a batch of one process.
        seed: of the order of the records and of everything that `prepare` draws.
        num_workers: worker processes of each process; 0 to work in the process itself.
        shuffle_block: records of a streaming source that each worker holds, not decoded, to shuffle them.
        pin_memory: batches in pinned memory, for faster copies to a GPU.
        max_failures: so many unusable records in a row end the run.

    Raises:
        ValueError: naming the field that makes no sense.
    """

    batch_size: int
    seed: int = 0
    num_workers: int = 0
    shuffle_block: int = 1000
    pin_memory: bool = False
    max_failures: int = 1000

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "seed": 0, "num_workers": 0, "shuffle_block": 1, "max_failures": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {value}.")


@dataclass
class _Recipe:
    """All that decides what is in a batch."""

    sources: Sequence[Source]
    mixture: Mixture
    prepare: Prepare
    collate: Collate
    options: StreamOptions
    rank: int
    world_size: int

    @property
    def records(self) -> int:
        """Of a batch of all processes."""
        return self.options.batch_size * self.world_size


@dataclass
class _Progress:
    """What comes beside a batch.

    A class of its own, so that pinning memory leaves it alone.
    """

    worker: int
    readers: list[State | None] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None


class TrainingStream:
    """Batches without end from one or several sources, the same ones after a resumption.

    The places of all processes' batches are dealt to the sources by exact shares, mixed by a seed, and dealt to the
    processes. So with tables (sources with random access) neither the number of workers nor of processes changes what a
    batch of all processes holds, and every record comes once an epoch; no batch has one twice where a source has three
    times the records that a batch takes of it. Streaming sources are divided among processes
    and workers by shards. A record that cannot be used is replaced by another of its source, and counted.

    Iterating again goes on after the batch that was yielded last.

    Args:
        sources: where the records come from.
        weights: the sources' shares, positive numbers.
        prepare: makes an example of a record, with all chance from the generator; raises `UnusableRecord` for one to be
            left out. May be pickled, as `collate`.
        collate: makes a batch of a list of examples.
        options: batch size, seed, workers.
        rank, world_size: this process and how many there are.
        depends_on: what `prepare` and `collate` depend on, in plain values; a state of other ones is refused.

    Raises:
        ValueError: arguments that do not fit together; while iterating, where too many records in a row are unusable.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        prepare: Prepare,
        collate: Collate,
        options: StreamOptions,
        rank: int = 0,
        world_size: int = 1,
        depends_on: Mapping[str, Any] | None = None,
    ):
        if len(sources) != len(weights):
            raise ValueError(
                f"There are {len(sources)} sources and {len(weights)} weights; each source needs one."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1} for {world_size} processes.")
        self._recipe = _Recipe(sources, Mixture(weights), prepare, collate, options, rank, world_size)
        self._workers = max(1, options.num_workers)
        self._depends_on = dict(depends_on or {})
        self._batch = 0
        self._states: list[list[State | None] | None] = [None] * self._workers
        self.counts: Counter[str] = Counter()
        """Records of this process that were "read", how many of them were left out for which reason, and how many texts
        were longer than the text tower takes ("cut text")."""
        self._made, self._seconds = 0, 0.0
        self._streaming = [source for source in sources if isinstance(source, StreamSource)]
        readers = world_size * self._workers
        for source in self._streaming:
            if source.num_shards < readers:
                logger.warning(
                    f"{source.name} has {source.num_shards} shards for {readers} readers (processes x workers): "
                    "several read the same shard and keep a part of it. More shards or fewer workers read less."
                )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        options = self._recipe.options
        loader = DataLoader(
            _Batches(self._recipe, self._batch, list(self._states)),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=options.num_workers,
            pin_memory=options.pin_memory,
            # Without one of its own, the loader draws from torch's global generator.
            generator=torch.Generator(),
        )
        for batch, progress in loader:
            if progress.error is not None:
                raise ValueError(progress.error)
            self._batch += 1
            self._states[progress.worker] = progress.readers
            for reason, message in progress.messages.items():
                if reason not in self.counts:
                    logger.warning(f"left out: {message} ({reason}; further ones are only counted)")
            self.counts.update(progress.counts)
            self._made += 1
            self._seconds += progress.seconds
            yield batch

    @property
    def sources(self) -> Sequence[Source]:
        """Where the records come from."""
        return self._recipe.sources

    @property
    def epoch(self) -> float:
        """Passes over the sources, averaged by their shares; of a streaming source only whole passes are known."""
        recipe = self._recipe
        taken = recipe.mixture.taken(self._batch * recipe.records)
        passes = []
        for number, source in enumerate(recipe.sources):
            if isinstance(source, StreamSource):
                passes.append(min((state[number] or [0])[0] if state else 0 for state in self._states))
            else:
                passes.append(taken[number] / len(source))
        return float(recipe.mixture.shares @ np.array(passes))

    @property
    def batches_per_epoch(self) -> float:
        """Batches until the sources were seen once, averaged by their shares.

        Raises:
            ValueError: a streaming source, whose length is not known.
        """
        if self._streaming:
            raise ValueError(
                f"{self._streaming[0].name} is streamed and has no known length: give max_steps."
            )
        recipe = self._recipe
        lengths = np.array([len(cast(MapSource, source)) for source in recipe.sources])
        return float(1 / (recipe.mixture.shares @ (recipe.mixture.shares / lengths)) / recipe.records)

    @property
    def images_per_second(self) -> float:
        """What all workers of this process can make together, by the time that their batches took; 0 before any."""
        return self._workers * self._recipe.options.batch_size * self._made / max(self._seconds, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was yielded, of this process; plain numbers and strings for JSON."""
        return {
            "batch": self._batch,
            "readers": list(self._states) if self._streaming else None,
            "counts": dict(self.counts),
            "made_with": self._made_with,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a stream stopped, from the next `iter` on.

        Raises:
            ValueError: the state comes from a stream that would make other batches. With tables only, the number of
                workers may differ, and that of processes with the same number of records in all; with streaming
                sources neither.
        """
        try:
            batch, readers, counts, made_with = (
                state[key] for key in ("batch", "readers", "counts", "made_with")
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is no state of a training stream: {error} is missing.") from error
        if different := differences(made_with, self._made_with):
            why = (
                "streaming sources go on only as they were divided"
                if self._streaming
                else "it would make others"
            )
            raise ValueError(
                f"The data cannot go on with the same batches: {', '.join(different)}; {why}. Start anew or change "
                "back."
            )
        self._batch = batch
        self._states = list(readers) if self._streaming else [None] * self._workers
        self.counts = Counter(counts)

    @cached_property
    def _made_with(self) -> dict[str, Any]:
        recipe = self._recipe
        made_with = {
            "seed": recipe.options.seed,
            "records of all processes": recipe.records,
            "shares": recipe.mixture.shares.tolist(),
            "sizes": [
                source.num_shards if isinstance(source, StreamSource) else len(source)
                for source in recipe.sources
            ],
            "contents of the sources": [contents_of(source) for source in recipe.sources],
            **self._depends_on,
        }
        if self._streaming:
            made_with |= {
                "num_workers": self._workers,
                "world_size": recipe.world_size,
                "rank": recipe.rank,
                "shuffle_block": recipe.options.shuffle_block,
            }
        return made_with


class _Batches(IterableDataset):
    """The batches from number `first` on; each of n workers makes every n-th."""

    def __init__(self, recipe: _Recipe, first: int, states: list[list[State | None] | None]):
        self._recipe, self._first, self._states = recipe, first, states

    def __iter__(self) -> Iterator[tuple[dict[str, Any] | None, _Progress]]:
        info = get_worker_info()
        place, workers = (info.id, info.num_workers) if info else (0, 1)
        # The loader asks its workers in turn from 0 on. Which part of the shards a worker reads goes by its batches.
        first = self._first + place
        worker = first % workers
        maker = _BatchMaker(self._recipe, worker, workers, self._states[worker])
        for number in itertools.count(first, workers):
            start = time.monotonic()
            try:
                batch = maker.batch(number)
                yield batch, maker.progress(time.monotonic() - start)
            except ValueError as error:
                if info is None:
                    raise
                # The loader would put the text of a traceback around it.
                logger.info(f"worker {worker} stops", exc_info=True)
                yield None, _Progress(worker, error=str(error))
                return


class _BatchMaker:
    """Makes the batches of one worker."""

    def __init__(self, recipe: _Recipe, worker: int, workers: int, states: list[State | None] | None):
        self._recipe = recipe
        self._worker = worker
        self._counts: Counter[str] = Counter()
        self._messages: dict[str, str] = {}
        part, parts = recipe.rank * workers + worker, recipe.world_size * workers
        options = recipe.options
        self._states = list(states or [None] * len(recipe.sources))
        self._readers = [
            read_in_blocks(source, (options.seed, number), part, parts, options.shuffle_block, state)
            if isinstance(source, StreamSource)
            else None
            for number, (source, state) in enumerate(zip(recipe.sources, self._states))
        ]
        # A batch may begin in one epoch of a source and end in the next.
        self._order = lru_cache(maxsize=2 * len(recipe.sources))(_epoch_order)
        # As many as a batch may have of each source, see `Mixture`.
        shares = recipe.mixture.shares
        uneven = 1 + len(shares) * shares if len(shares) > 1 else 0
        self._apart = (shares * recipe.records + uneven).astype(int).tolist()

    def batch(self, number: int) -> dict[str, Any]:
        """Batch `number` of this process, collated."""
        recipe = self._recipe
        count, seed = recipe.records, recipe.options.seed
        sources, positions = recipe.mixture.places(number * count, count)
        places = seeded(Draw.DEAL, seed, number).permutation(count)
        examples = []
        for slot in range(recipe.rank, count, recipe.world_size):
            place = places[slot]
            rng = seeded(Draw.EXAMPLE, seed, number, slot)
            examples.append(self._example(int(sources[place]), int(positions[place]), rng))
        before = getattr(recipe.collate, "cut_texts", 0)
        batch = recipe.collate(examples)
        if cut := getattr(recipe.collate, "cut_texts", 0) - before:
            self._counts["cut text"] += cut
        return batch

    def progress(self, seconds: float) -> _Progress:
        """Where the readers stand, what happened since the last call and how long the batch took."""
        progress = _Progress(self._worker, list(self._states), self._counts, self._messages, seconds)
        self._counts, self._messages = Counter(), {}
        return progress

    def _example(self, number: int, position: int, rng: np.random.Generator) -> Any:
        """An example of a source, or of the first usable record instead of it."""
        limit = self._recipe.options.max_failures
        reasons: Counter[str] = Counter()
        first = ""
        while reasons.total() < limit:
            self._counts["read"] += 1
            try:
                record = self._record(number, None if reasons else position, rng)
                return self._recipe.prepare(record, rng)
            except UnusableRecord as error:
                reasons[error.reason] += 1
                self._counts[error.reason] += 1
                self._messages.setdefault(error.reason, str(error))
                first = first or str(error)
        seen = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
        name = self._recipe.sources[number].name
        raise ValueError(f"{name}: {limit} records in a row cannot be used ({seen}). The first: {first}")

    def _record(self, number: int, position: int | None, rng: np.random.Generator) -> Record:
        """The next record of a stream, or of a table the one at a position of the run; without one, any."""
        reader, source = self._readers[number], self._recipe.sources[number]
        if reader is not None:
            item, self._states[number] = next(reader)
            if isinstance(item, UnusableRecord):
                raise item
            return item
        table = cast(MapSource, source)
        if position is None:
            return table[int(rng.integers(len(table)))]
        epoch, place = divmod(position, len(table))
        order = self._order(self._recipe.options.seed, number, epoch, len(table), self._apart[number])
        return table[int(order[place])]


def _epoch_order(seed: int, number: int, epoch: int, length: int, apart: int) -> np.ndarray:
    """In which order an epoch takes the records of a table: none of the last `apart` of an epoch is among the first so
    many of the next, so that no batch has a record twice, if the table has three times as many."""
    order = _random_order(seed, number, epoch, length)
    if epoch and length >= 3 * apart:
        last = _random_order(seed, number, epoch - 1, length)[-apart:]
        was_last = np.isin(order, last)
        # Places in the middle only, so that the last ones are as drawn.
        places = np.flatnonzero(was_last[:apart])
        others = apart + np.flatnonzero(~was_last[apart : length - apart])[: len(places)]
        order[places], order[others] = order[others], order[places]
    return order


def _random_order(seed: int, number: int, epoch: int, length: int) -> np.ndarray:
    return seeded(Draw.RECORDS, seed, number, epoch).permutation(np.arange(length, dtype=np.uint32))


def _unchanged(item: Any) -> Any:
    return item
