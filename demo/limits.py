"""What keeps a request from taking forever: time for a model's passes, and a size for the maps that follow them."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from torch import nn

# Pixels x labels that some window shows, of a map in full detail: 12 megapixels with 22 labels.
MAX_MAP_ENTRIES = 2**28

_until: ContextVar[float] = ContextVar("until", default=math.inf)
_seconds: ContextVar[float] = ContextVar("seconds", default=math.inf)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Inside, the passes of watched models have as much time in all; limits within limits start anew."""
    tokens = _until.set(time.monotonic() + seconds), _seconds.set(seconds)
    try:
        yield
    finally:
        _until.reset(tokens[0])
        _seconds.reset(tokens[1])


def watch(model: nn.Module) -> None:
    """Makes a model's modules look at the clock of [`time_limit`] before they begin.

    A pass raises ValueError once the time is over.
    """
    for module in model.modules():
        module.register_forward_pre_hook(_look_at_the_clock)


def _look_at_the_clock(module: nn.Module, inputs: Any) -> None:
    if time.monotonic() > _until.get():
        raise ValueError(
            f"This takes longer than the {_seconds.get():g} seconds that the model has for a request here; choose the "
            "whole image instead of the sliding window, a smaller short side, fewer words, or a smaller model."
        )


def map_size(size: tuple[int, int], num_labels: int) -> tuple[int, int]:
    """Height and width that a map of as many labels is made at: `size`, or less of the same shape."""
    factor = math.sqrt(MAX_MAP_ENTRIES / (size[0] * size[1] * max(1, num_labels)))
    return size if factor >= 1 else (max(1, int(size[0] * factor)), max(1, int(size[1] * factor)))


def resampled(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map [H, W, ...] at another height and width, each place from one of its values."""
    if values.shape[:2] == size:
        return values
    rows, columns = (np.arange(n) * full // n for n, full in zip(size, values.shape))
    return values[rows][:, columns]
