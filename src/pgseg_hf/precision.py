"""Where 16 bits are not enough: prototype estimation, losses and prototype buffers."""

from collections.abc import Callable
from typing import Any

import torch


def estimation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of prototype estimation and losses: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device_type: str) -> torch.autocast:
    return torch.autocast(device_type, enabled=False)


class KeepsPrecision:
    """Mixin for a `torch.nn.Module` that keeps one of its buffers as it is when the module is cast to 16 bits."""

    precise_buffer: str | None = None
    _buffers: dict[str, Any]

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        name = self.precise_buffer or ""
        before = self._buffers.get(name)
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        after = self._buffers.get(name)
        if before is not None and after is not None and after.dtype in (torch.float16, torch.bfloat16):
            self._buffers[name] = before.to(device=after.device)
        return result
