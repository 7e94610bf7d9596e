"""Counts that can be summed over images, over the files of a run and over processes."""

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
import torch.distributed as dist

from ... import distributed
from ...files import write_atomically


class Sums:
    """Base class of all counts."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The sums by name, not copied."""
        raise NotImplementedError

    def add_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Adds the result of [`~Sums.arrays`] for other images.

        Raises:
            KeyError, ValueError: an array is missing or has a different shape.
        """
        mine = self.arrays()
        for name, sums in mine.items():
            if np.shape(arrays[name]) != sums.shape:
                raise ValueError(
                    f"{name} has shape {np.shape(arrays[name])}, expected {sums.shape}: the labels must be the same."
                )
        for name, sums in mine.items():
            sums += arrays[name]

    def merge(self, other: Self) -> None:
        """Adds the counts of another object with the same labels and options."""
        self.add_arrays(other.arrays())

    def sum_over_processes(self, device: str | torch.device = "cpu") -> Self:
        """Sums the counts of all `torch.distributed` processes; every process must call it. `device` is the device on
        which the backend sums."""
        # A single process moves nothing to the device, since not all devices support float64.
        for sums in self.arrays().values() if distributed.world_size() > 1 else ():
            sums[...] = distributed.sum_over_processes(torch.from_numpy(sums).to(device)).cpu().numpy()
        return self


@dataclass(kw_only=True)
class ImageSums(Sums):
    """Base class of the counts of a run over a dataset.

    Args:
        images: number of evaluated images.
        broken: reason for each skipped image, by name.
        seconds: wall time of this process, summed over resumed runs.
        reused: number of images that were evaluated by an earlier run.
    """

    images: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    reused: int = 0

    def merge(self, other: Self) -> None:
        super().merge(other)
        self._add_told(other._told())

    def sum_over_processes(self, device: str | torch.device = "cpu") -> Self:
        """Like [`Sums.sum_over_processes`]; `seconds` is the maximum over the processes."""
        super().sum_over_processes(device)
        if distributed.world_size() > 1:
            told: list[Any] = [None] * distributed.world_size()
            dist.all_gather_object(told, self._told())
            self.images = self.reused = 0
            self.broken, self.seconds = {}, 0.0
            for each in told:
                self._add_told(each)
            self.seconds = max(each["seconds"] for each in told)
        return self

    def save(self, path: Path) -> None:
        """Writes the counts to a file."""

        def write(file: BinaryIO) -> None:
            np.savez_compressed(file, told=json.dumps(self._told()), **self.arrays())  # type: ignore[arg-type]

        write_atomically(path, write)

    def add_file(self, path: Path) -> None:
        """Adds the counts of a file written by [`~ImageSums.save`]; its images count as reused.

        Raises:
            ValueError: the file is damaged or has other counts; nothing is added.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                told = json.loads(str(arrays["told"]))
                self.add_arrays({name: arrays[name] for name in self.arrays()})
        except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        self._add_told({**told, "reused": told["images"]})

    def _told(self) -> dict[str, Any]:
        names = ("images", "broken", "seconds", "reused")
        return {name: getattr(self, name) for name in names}

    def _add_told(self, told: Mapping[str, Any]) -> None:
        self.images += told["images"]
        self.broken |= told["broken"]
        self.seconds += told["seconds"]
        self.reused += told["reused"]
