"""Infinite training batches from weighted sources: exactly resumable with worker processes, skipping broken records."""

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
    """Options of a `TrainingStream`.

    Args:
        batch_size: number of records per batch and process.
        seed: seed of the order of records and of everything that `prepare` draws.
        num_workers: number of DataLoader workers per process; 0 loads data in the process itself.
        shuffle_block: number of undecoded records of a streaming source that each worker holds for shuffling.
        pin_memory: whether to put batches in pinned memory, for faster copies to a GPU.
        max_failures: number of unusable records in a row that ends the run.

    Raises:
        ValueError: if a field is invalid; the message names it.
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
    """Everything that determines the content of a batch."""

    sources: Sequence[Source]
    mixture: Mixture
    prepare: Prepare
    collate: Collate
    options: StreamOptions
    rank: int
    world_size: int

    @property
    def records(self) -> int:
        """Records in a batch across all processes."""
        return self.options.batch_size * self.world_size


@dataclass
class _Progress:
    """What a worker reports with each batch. It is a custom class so that pinning memory does not touch it."""

    worker: int
    readers: list[State | None] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None


class TrainingStream:
    """Infinite batches from one or several sources, exactly resumable.

    The slots of a batch across all processes are assigned to the sources in exact shares, shuffled, and distributed
    among the processes. With map-style sources, the content of such a batch therefore depends neither on the number of
    workers nor on the number of processes, and each record comes once per epoch. No batch contains a record twice if
    its source has at least three times as many records as the batch takes from it. Streaming sources are split among
    processes and workers by shards. Unusable records are counted and replaced by other records of the same source.

    Iterating again continues after the last batch yielded.

    Args:
        sources: sources of the records.
        weights: share of each source, as positive numbers.
        prepare: turns a record into an example, using only the generator for randomness. It raises `UnusableRecord`
            to skip a record. Workers may receive it pickled, like `collate`.
        collate: turns a list of examples into a batch.
        options: batch size, seed, number of workers.
        rank, world_size: rank of this process and number of processes.
        depends_on: what `prepare` and `collate` depend on, as plain values. A state with other values is rejected.

    Raises:
        ValueError: if arguments do not match, or, during iteration, if too many records in a row are unusable.
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
                f"There are {len(sources)} sources and {len(weights)} weights, expected one weight per source."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1} for {world_size} processes.")
        self._recipe = _Recipe(sources, Mixture(weights), prepare, collate, options, rank, world_size)
        self._workers = max(1, options.num_workers)
        self._depends_on = dict(depends_on or {})
        self._batch = 0
        self._states: list[list[State | None] | None] = [None] * self._workers
        self.counts: Counter[str] = Counter()
        """Records "read" by this process, records skipped for each reason, and truncated texts ("cut text")."""
        self._made, self._seconds = 0, 0.0
        self._streaming = [source for source in sources if isinstance(source, StreamSource)]
        readers = world_size * self._workers
        for source in self._streaming:
            if source.num_shards < readers:
                logger.warning(
                    f"{source.name} has {source.num_shards} shards for {readers} readers (processes x workers), so "
                    "several readers read the same shard. Use more shards or fewer workers to avoid reading data twice."
                )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        options = self._recipe.options
        loader = DataLoader(
            _Batches(self._recipe, self._batch, list(self._states)),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=options.num_workers,
            pin_memory=options.pin_memory,
            # Without a generator, the loader would draw from torch's global one.
            generator=torch.Generator(),
        )
        for batch, progress in loader:
            if progress.error is not None:
                raise ValueError(progress.error)
            self._batch += 1
            self._states[progress.worker] = progress.readers
            for reason, message in progress.messages.items():
                if reason not in self.counts:
                    logger.warning(f"skipped: {message} ({reason}; further ones are only counted)")
            self.counts.update(progress.counts)
            self._made += 1
            self._seconds += progress.seconds
            yield batch

    @property
    def sources(self) -> Sequence[Source]:
        """Sources of the records."""
        return self._recipe.sources

    @property
    def epoch(self) -> float:
        """Passes over the sources, weighted by their shares. Streaming sources count only complete passes."""
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
        """Number of batches in one pass over the sources, weighted by their shares.

        Raises:
            ValueError: if a source is streamed, because its length is unknown.
        """
        if self._streaming:
            raise ValueError(
                f"{self._streaming[0].name} is streamed and has no known length; set max_steps instead of num_epochs."
            )
        recipe = self._recipe
        lengths = np.array([len(cast(MapSource, source)) for source in recipe.sources])
        return float(1 / (recipe.mixture.shares @ (recipe.mixture.shares / lengths)) / recipe.records)

    @property
    def images_per_second(self) -> float:
        """Throughput of all workers of this process together, from the time per batch; 0 before the first batch."""
        return self._workers * self._recipe.options.batch_size * self._made / max(self._seconds, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """This process's position after the last batch yielded, as values that JSON can represent."""
        return {
            "batch": self._batch,
            "readers": list(self._states) if self._streaming else None,
            "counts": dict(self.counts),
            "made_with": self._made_with,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration resume where the saved stream stopped.

        Raises:
            ValueError: if the state belongs to a stream with other batches. With map-style sources only, the number of
                workers may change, and the number of processes as long as the total batch size stays the same. With
                streaming sources, neither may change.
        """
        try:
            batch, readers, counts, made_with = (
                state[key] for key in ("batch", "readers", "counts", "made_with")
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"Not a training stream state: {error} is missing.") from error
        if different := differences(made_with, self._made_with):
            why = (
                "streaming sources must be split as before" if self._streaming else "the batches would differ"
            )
            raise ValueError(
                f"The data cannot resume with the same batches: {', '.join(different)}; {why}. Change this back or "
                "start from scratch."
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
    """The batches starting at number `first`; each of n workers makes every n-th batch."""

    def __init__(self, recipe: _Recipe, first: int, states: list[list[State | None] | None]):
        self._recipe, self._first, self._states = recipe, first, states

    def __iter__(self) -> Iterator[tuple[dict[str, Any] | None, _Progress]]:
        info = get_worker_info()
        place, workers = (info.id, info.num_workers) if info else (0, 1)
        # The loader asks its workers in turn, starting at 0. The shards of a worker follow from its batch numbers.
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
                # Raised here, the loader would wrap the message in a traceback.
                logger.info(f"worker {worker} stopped", exc_info=True)
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
        # A batch may start in one epoch of a source and end in the next.
        self._order = lru_cache(maxsize=2 * len(recipe.sources))(_epoch_order)
        # Maximum number of records that a batch takes from each source, see `Mixture`.
        shares = recipe.mixture.shares
        uneven = 1 + len(shares) * shares if len(shares) > 1 else 0
        self._apart = (shares * recipe.records + uneven).astype(int).tolist()

    def batch(self, number: int) -> dict[str, Any]:
        """The collated batch `number` of this process."""
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
        """The readers' states, the counts and messages since the last call, and the time that the batch took."""
        progress = _Progress(self._worker, list(self._states), self._counts, self._messages, seconds)
        self._counts, self._messages = Counter(), {}
        return progress

    def _example(self, number: int, position: int, rng: np.random.Generator) -> Any:
        """An example of a source; if the record at the position is unusable, other records replace it."""
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
        raise ValueError(f"{name}: {limit} records in a row cannot be used ({seen}). First error: {first}")

    def _record(self, number: int, position: int | None, rng: np.random.Generator) -> Record:
        """The next record of a stream, or a map-style source's record at a position (a random one if None)."""
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
    """The order of a map-style source's records in an epoch. With at least `3 * apart` records, the last `apart` of an
    epoch never occur among the first `apart` of the next, so that no batch contains a record twice."""
    order = _random_order(seed, number, epoch, length)
    if epoch and length >= 3 * apart:
        last = _random_order(seed, number, epoch - 1, length)[-apart:]
        was_last = np.isin(order, last)
        # Swap with positions in the middle only: the next epoch assumes that the last `apart` are as drawn.
        places = np.flatnonzero(was_last[:apart])
        others = apart + np.flatnonzero(~was_last[apart : length - apart])[: len(places)]
        order[places], order[others] = order[others], order[places]
    return order


def _random_order(seed: int, number: int, epoch: int, length: int) -> np.ndarray:
    return seeded(Draw.RECORDS, seed, number, epoch).permutation(np.arange(length, dtype=np.uint32))


def _unchanged(item: Any) -> Any:
    return item
