"""Counts that can be added: over images, over the files of a run, over processes."""

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
    """Base class of all that is counted on images."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The sums by name; the arrays themselves, not copies."""
        raise NotImplementedError

    def add_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Adds what [`~Sums.arrays`] gave for other images.

        Raises:
            KeyError, ValueError: arrays that are missing or have another shape.
        """
        mine = self.arrays()
        for name, sums in mine.items():
            if np.shape(arrays[name]) != sums.shape:
                raise ValueError(
                    f"{name} has the shape {np.shape(arrays[name])}, expected {sums.shape}: counts of other labels."
                )
        for name, sums in mine.items():
            sums += arrays[name]

    def merge(self, other: Self) -> None:
        """Adds what another one has counted of the same labels with the same options."""
        self.add_arrays(other.arrays())

    def sum_over_processes(self, device: str | torch.device = "cpu") -> Self:
        """Adds what all processes of `torch.distributed` counted, each on its part of the images; every process has to
        call it. `device` is where its backend needs the counts."""
        # Where there is one process nothing is moved: not every device knows float64.
        for sums in self.arrays().values() if distributed.world_size() > 1 else ():
            sums[...] = distributed.sum_over_processes(torch.from_numpy(sums).to(device)).cpu().numpy()
        return self


@dataclass(kw_only=True)
class ImageSums(Sums):
    """Base class of what a run over a data set counts.

    Args:
        images: how many images were counted.
        broken: names of images that were left out, with the reason.
        seconds: wall time of this process, summed over calls that were continued.
        reused: how many of the images an earlier run had counted.
    """

    images: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    reused: int = 0

    def merge(self, other: Self) -> None:
        super().merge(other)
        self._add_told(other._told())

    def sum_over_processes(self, device: str | torch.device = "cpu") -> Self:
        """As [`Sums.sum_over_processes`]; `seconds` is the longest."""
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
        """Writes all that was counted."""

        def write(file: BinaryIO) -> None:
            np.savez_compressed(file, told=json.dumps(self._told()), **self.arrays())  # type: ignore[arg-type]

        write_atomically(path, write)

    def add_file(self, path: Path) -> None:
        """Adds what [`~ImageSums.save`] wrote, all of it as reused.

        Raises:
            ValueError: a damaged file, or counts of something else; nothing is added.
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
