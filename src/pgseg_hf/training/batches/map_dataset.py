"""A source with random access as a plain torch dataset, for transformers' `Trainer` and loops of one's own."""

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
    """Item i is a random view of record i. Chance comes from torch's generator, which `DataLoader` seeds in each worker
    anew for every epoch.

    Args:
        source: of records, for instance `open_source(SourceSpec(path="photos"))`.
        prepare: makes an example of a record, for instance a `Preparation`.
    """

    def __init__(self, source: MapSource, prepare: Callable[[Record, np.random.Generator], Any]):
        self.source, self.prepare = source, prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        """The example; of another record where this one cannot be used.

        Raises:
            IndexError: no such record.
            ValueError: 100 records in a row cannot be used.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        rng = np.random.default_rng(torch.randint(2**62, (2,)).tolist())
        for _ in range(MAX_FAILURES):
            try:
                return self.prepare(self.source[index], rng)
            except UnusableRecord as error:
                logger.warning_once(f"left out: {error}")
                first_error, index = error, int(rng.integers(len(self)))
        raise ValueError(
            f"{MAX_FAILURES} records of {self.source.name} in a row cannot be used: {first_error}"
        )
