"""Limits for a request: the time of a model's forward passes, and the size of the maps computed from them."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from torch import nn

# Largest number of pixels x labels in use for masks in full resolution: 12 megapixels with 22 labels.
MAX_MAP_ENTRIES = 2**28

_until: ContextVar[float] = ContextVar("until", default=math.inf)
_seconds: ContextVar[float] = ContextVar("seconds", default=math.inf)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Limits the total time of watched models' forward passes; a nested limit replaces the outer one."""
    tokens = _until.set(time.monotonic() + seconds), _seconds.set(seconds)
    try:
        yield
    finally:
        _until.reset(tokens[0])
        _seconds.reset(tokens[1])


def watch(model: nn.Module) -> None:
    """Makes a model's forward passes raise a ValueError once the [`time_limit`] is exceeded."""
    for module in model.modules():
        module.register_forward_pre_hook(_look_at_the_clock)


def _look_at_the_clock(module: nn.Module, inputs: Any) -> None:
    if time.monotonic() > _until.get():
        raise ValueError(
            f"This takes longer than the {_seconds.get():g} seconds allowed for a request; choose the whole image "
            "instead of the sliding window, a smaller short side, fewer labels or a smaller model."
        )


def map_size(size: tuple[int, int], num_labels: int) -> tuple[int, int]:
    """Height and width at which masks of `num_labels` labels are computed: `size`, or smaller with the same shape."""
    factor = math.sqrt(MAX_MAP_ENTRIES / (size[0] * size[1] * max(1, num_labels)))
    return size if factor >= 1 else (max(1, int(size[0] * factor)), max(1, int(size[1] * factor)))


def resampled(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a map [H, W, ...] to a height and width by nearest neighbour."""
    if values.shape[:2] == size:
        return values
    rows, columns = (np.arange(n) * full // n for n, full in zip(size, values.shape))
    return values[rows][:, columns]
