"""A map-style source as a PyTorch dataset, for Transformers' `Trainer` and custom training loops."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from ...data.records import Record, UnusableRecord
from ...data.sources import MapSource

logger = logging.get_logger(__name__)

MAX_FAILURES = 100


class RecordDataset(Dataset):
    """A dataset whose item i is a random view of record i. Randomness comes from torch's global generator, which
    `DataLoader` reseeds in each worker at every epoch.

    Args:
        source: a map-style source, such as `open_source(SourceSpec(path="photos"))`.
        prepare: turns a record into an example, such as a `Preparation`.
    """

    def __init__(self, source: MapSource, prepare: Callable[[Record, np.random.Generator], Any]):
        self.source, self.prepare = source, prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        """The example of record `index`, or of a random other record if that one cannot be used.

        Raises:
            IndexError: if the index is out of range.
            ValueError: if 100 records in a row cannot be used.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        rng = np.random.default_rng(torch.randint(2**62, (2,)).tolist())
        for _ in range(MAX_FAILURES):
            try:
                return self.prepare(self.source[index], rng)
            except UnusableRecord as error:
                logger.warning_once(f"skipped: {error}")
                first_error, index = error, int(rng.integers(len(self)))
        raise ValueError(
            f"{MAX_FAILURES} records of {self.source.name} in a row cannot be used: {first_error}"
        )
