"""Logging of a run: progress bar, `log.jsonl`, trackers, running means and throughput."""

import json
import math
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils import logging

from ..files import write_text
from ..text_files import read_text, split_lines

LOG_NAME = "log.jsonl"


class Meter:
    """Sums over steps, kept on the device so that it is only synchronized when a line is logged."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}
        self.bad: Counter[str] = Counter()
        """How often each term was NaN or infinite, over all processes."""

    def state_dict(self) -> dict[str, list[float]]:
        """This process's sums since the last line, as JSON values."""
        return {name: row.tolist() for name, row in self._sums.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        device = self._accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = {name: torch.tensor(row, dtype=dtype, device=device) for name, row in state.items()}

    def add(self, parts: dict[str, Tensor]) -> None:
        """Adds the scalars of a step. Values that are not finite are only counted."""
        for name, value in parts.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach().float()
            finite = value.isfinite()
            row = torch.stack(
                [torch.where(finite, value, 0.0), finite.to(value.dtype), (~finite).to(value.dtype)]
            )
            self._sums[name] = self._sums.get(name, 0) + row

    def means(self) -> dict[str, float]:
        """Means over all processes and the steps since the last call (NaN if never finite). All must call it."""
        if not self._sums:
            return {}
        names = list(self._sums)
        rows = self._accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum").tolist()
        self._sums = {}
        self.bad.update({name: int(bad) for name, (_, _, bad) in zip(names, rows) if bad})
        return {
            name: total / count if count else float("nan") for name, (total, count, _) in zip(names, rows)
        }


class RunLog:
    """Logs metrics to `log.jsonl`, trackers and a progress bar, on the main process.

    Args:
        accelerator: its trackers must not be started yet.
        output_dir: folder of `log.jsonl`. Lines after `start_step`, from an interrupted run, are removed.
        total_steps, start_step: last step and first step of the run.
        settings: settings that the trackers record.
        project_name: project name for the trackers.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | os.PathLike,
        total_steps: int,
        start_step: int,
        settings: dict[str, Any],
        project_name: str = "pgseg",
    ):
        self.accelerator = accelerator
        self.path = Path(output_dir) / LOG_NAME
        is_main = accelerator.is_main_process
        if is_main:
            kept = [line for line in read_log(self.path) if line["step"] <= start_step] if start_step else []
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_text(text, self.path)
        if accelerator.log_with:
            flat = {
                name: value for name, value in settings.items() if isinstance(value, int | float | str | bool)
            }
            accelerator.init_trackers(project_name, config=flat)
        self.bar = logging.tqdm(
            total=total_steps, initial=start_step, desc="Training", unit="step", disable=not is_main
        )

    def line(self, step: int, values: dict[str, float], shown: dict[str, float] | None = None) -> None:
        """Logs the metrics of a step; `shown` also appear in the progress bar."""
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                known = {name: value if math.isfinite(value) else None for name, value in values.items()}
                file.write(json.dumps({"step": step, **known}) + "\n")
        self.accelerator.log(values, step=step)
        if shown:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)

    def drawings(self, step: int, drawings: dict[str, Any]) -> None:
        """Passes images (arrays [H, W, 3]) to the trackers that support them."""
        for tracker in self.accelerator.trackers:
            if drawings and hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(
                    {name: drawing[None] for name, drawing in drawings.items()}, step=step, **layout
                )

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`, without a truncated last line of a killed run."""
    path = Path(path)
    if not path.exists():
        return []
    lines = []
    for text in split_lines(read_text(path)):
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class Clock:
    """Measures the time that a run spends waiting for data and computing."""

    def __init__(self) -> None:
        self.images = 0
        self.waiting = self.computing = 0.0
        self._mark = time.monotonic()

    def waited(self) -> None:
        self.waiting += self._lap()

    def computed(self, images: int) -> None:
        self.computing += self._lap()
        self.images += images

    def skip(self) -> None:
        """Ignores the time since the last mark, such as an evaluation or a checkpoint."""
        self._lap()

    def _lap(self) -> float:
        now = time.monotonic()
        lap, self._mark = now - self._mark, now
        return lap

    @property
    def images_per_second(self) -> float:
        """Throughput of the run, including waiting for data."""
        return self.images / max(self.waiting + self.computing, 1e-9)

    @property
    def model_images_per_second(self) -> float:
        """Throughput of the model alone, without waiting for data."""
        return self.images / max(self.computing, 1e-9)
