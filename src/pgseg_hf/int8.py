"""An 8-bit linear layer for the CPU."""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

# Without these instructions sums of 8-bit products may overflow, so inputs are rounded to 7 bits. The check is private
# in torch; if it is missing, the CPU counts as one without them.
_ROUNDS_TO_7_BITS = not getattr(torch.cpu, "_is_vnni_supported", bool)()


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight [out, in] to int8; also returns the scale of each row, float32 [out]."""
    rows = weight.detach().float()
    scale = (rows.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows / scale[:, None]).round().to(torch.int8), scale


def refuse_other_dtype(apply: Callable[[Tensor], Tensor]) -> None:
    """Raises a ValueError if `apply`, the function that `model.to(dtype)` applies to tensors, changes float32."""
    dtype = apply(torch.empty(0)).dtype
    if dtype != torch.float32:
        raise ValueError(
            f"dtype is {dtype}, but an int8 model cannot be cast: its scales and biases are float32, and it already "
            "computes in bfloat16 where the CPU supports it. Leave the dtype as it is, or load the original "
            "checkpoint in float32."
        )


class QuantizedInput(NamedTuple):
    """A tensor in 8 bits, equal to `(values - zero) * scale`, and the dtype of results computed from it."""

    values: Tensor
    scale: float
    zero: int
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> "QuantizedInput":
        steps = 127 if _ROUNDS_TO_7_BITS else 254
        low, high = (float(value) for value in x.aminmax())
        if not math.isfinite(high - low):
            raise ValueError(
                f"the input of an int8 layer ranges from {low} to {high}, expected finite numbers; training of the "
                "checkpoint may have diverged."
            )
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / steps, torch.finfo(torch.float32).tiny)
        zero = round(-low / scale)
        return cls(_bytes_of(x.float().contiguous(), scale, zero), scale, zero, x.dtype)


def _bytes_of(x: Tensor, scale: float, zero: int) -> Tensor:
    """`x / scale + zero` rounded; the caller ensures values from 0 to 255."""
    if _rounds_at_once():
        quantized = torch.quantize_per_tensor(x, scale, zero, torch.quint8)
        values: Any = torch.empty(0, dtype=torch.uint8)
        return values.set_(quantized.untyped_storage(), 0, x.shape)
    # The sum is never negative, so truncation rounds it. Going through 16 bits is five times as fast in torch.
    positive = torch.add(torch.tensor(zero + 0.5), x, alpha=1 / scale)
    return positive.to(torch.int16).to(torch.uint8)


@cache
def _rounds_at_once() -> bool:
    """Whether torch still has quantised tensors (deprecated, with a warning): one pass instead of three."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            torch.quantize_per_tensor(torch.ones(1), 1.0, 0, torch.quint8)
        except (AttributeError, RuntimeError):
            return False
    return True


@cache
def has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


@cache
def _has_onednn() -> bool:
    """Whether torch has oneDNN's 8-bit product, a private operator."""
    try:
        weight = torch.ops.onednn.qlinear_prepack(torch.ones(1, 1, dtype=torch.int8), None)
        one, zero = torch.ones(1), torch.zeros(1, dtype=torch.long)
        values = torch.ones(1, 1, dtype=torch.uint8)
        torch.ops.onednn.qlinear_pointwise(
            values, 1.0, 0, weight, one, zero, None, 1.0, 0, torch.bfloat16, "gelu", [], "none"
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, inputs rounded to 8 bits in each call, and 32-bit accumulation. If the float
    layer `linear` is on the `"meta"` device, only its shape is used."""

    weight: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = rounded(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())
        self.packed: Any = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        refuse_other_dtype(fn)
        return super()._apply(fn, recurse)

    def pack(self) -> None:
        """Moves the weight to the layout of this machine's kernel and drops the unpacked copy."""
        values: Any = self.weight
        scale: Any = self.weight_scale
        # Not a buffer: transformers would leave it uninitialised, because no checkpoint has it.
        self.zeros = torch.zeros(self.out_features, dtype=torch.long)
        if _has_onednn():
            self.packed, self.weight = torch.ops.onednn.qlinear_prepack(values, None), None
            return
        with warnings.catch_warnings():
            # Hides the deprecation warning of quantised tensors, which this operator needs.
            warnings.simplefilter("ignore", UserWarning)
            weight = torch._make_per_channel_quantized_tensor(values, scale.double(), self.zeros, 0)
        engine = torch.backends.quantized.engine
        if "fbgemm" in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = "fbgemm"  # oneDNN's engine keeps two copies and is not faster
        try:
            self.packed = torch.ops.quantized.linear_prepack(weight, self.bias)
        finally:
            torch.backends.quantized.engine = engine
        self.weight = None

    def _unpacked(self) -> Tensor | None:
        if self.packed is None:
            return self.weight
        if _has_onednn():
            return self.packed.to_dense().T.contiguous()
        return torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self._unpacked()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        was_packed = self.packed is not None
        self.weight, self.packed = self._unpacked(), None
        super()._load_from_state_dict(*args, **kwargs)
        if was_packed:
            self.pack()

    def __getstate__(self) -> dict[str, Any]:
        """Unpacks the weight, because packed weights can be neither copied nor pickled, nor used by another kernel."""
        buffers = self._buffers | {"weight": self._unpacked()}
        return self.__dict__ | {"_buffers": buffers, "packed": self.packed is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"packed": None})
        if state["packed"]:
            self.pack()

    def quantized(self, x: Tensor) -> "QuantizedInput | Tensor":
        """Rounds an input to 8 bits, for several layers to share. Returns it unchanged if the kernel rounds."""
        self._refuse(x)
        return QuantizedInput.of(x) if _has_onednn() else x

    def forward(self, x: "Tensor | QuantizedInput", activation: nn.Module | None = None) -> Tensor:
        """Applies the layer and then the activation, if given."""
        if not isinstance(x, QuantizedInput):
            x = self.quantized(x)
        if isinstance(x, QuantizedInput):
            fused = "gelu" if isinstance(activation, GELUActivation) else "none"
            weight = (self.packed, self.weight_scale, self.zeros)
            output: Any = (1.0, 0, x.dtype, fused, [], "none")  # not rounded to 8 bits again
            out = torch.ops.onednn.qlinear_pointwise(x.values, x.scale, x.zero, *weight, self.bias, *output)
            return out if activation is None or fused == "gelu" else activation(out)
        out = torch.ops.quantized.linear_dynamic(x.float(), self.packed, _ROUNDS_TO_7_BITS).to(x.dtype)
        return out if activation is None else activation(out)

    def _refuse(self, x: Tensor) -> None:
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                "this model is in int8, which has no gradients and cannot be trained; call model.eval(), or for "
                "training load the original checkpoint in float32."
            )
        if x.device.type != "cpu":
            raise ValueError(f"the input is on {x.device}, expected the CPU: int8 layers run only there.")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
