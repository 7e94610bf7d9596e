"""Faster versions of what `layers.py` computes, for evaluation without gradient; results differ only by rounding.

[`plain_kernels`] turns them off, so that all layers use torch's own operators.

Shapes: B batch, L image tokens, P prototypes, C width, H hidden width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .int8 import Int8Linear
from .variants import NPR_VARIANTS

# Number of attention scores computed at a time by attention in parts, so that they fit a core's cache.
_CACHED_SCORES = 2**21

_is_on = True


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Turns the faster kernels off inside the block, in all threads, for comparisons and debugging."""
    global _is_on
    before, _is_on = _is_on, False
    try:
        yield
    finally:
        _is_on = before


def is_plain_linear(layer: Any) -> bool:
    """Whether a layer is exactly `nn.Linear`: no adapter, not quantised or offloaded, and without hooks."""
    # Quantised and fake tensors are subclasses.
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
    )


def linear(layer: Any, x: Tensor, activation: nn.Module | None = None) -> Tensor:
    """Applies a linear layer and an optional activation.

    In evaluation on a CPU it uses oneDNN, which on some CPUs is faster than torch's float32 library and fuses GELU. In
    training it always uses torch, so that a recompute for the gradient gives the same result. It is a function and not
    a subclass, because quantisation tools only accept `nn.Linear`.
    """
    if isinstance(layer, Int8Linear):
        return layer(x, activation)
    if (
        not layer.training
        and _is_eager_cpu_inference(x)
        and is_plain_linear(layer)
        and x.dtype == layer.weight.dtype
        and x.numel() > 0
        and torch.backends.mkldnn.enabled
        and x.dtype in _onednn_dtypes()
    ):
        fused = "gelu" if isinstance(activation, GELUActivation) else "none"
        out = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, fused, [], "none")
        return out if activation is None or fused == "gelu" else activation(out)
    return layer(x) if activation is None else activation(layer(x))


def linears(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """Applies several linear layers to one input; for int8 layers the input is rounded once."""
    if all(isinstance(layer, Int8Linear) for layer in layers):
        x = layers[0].quantized(x)
    return [linear(layer, x) for layer in layers]


@cache
def _onednn_dtypes() -> frozenset[torch.dtype]:
    """Dtypes that oneDNN's linear layer supports here; empty if torch's private operator is missing or has changed."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    try:
        one = torch.ones(1, 1, device="cpu", dtype=torch.float32)
        torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "none")
        has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError, TypeError):
        return frozenset()
    return frozenset({torch.float32, torch.bfloat16} if has_bfloat16 else {torch.float32})


def _is_eager_cpu_inference(x: Tensor) -> bool:
    return (
        _is_on
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


def faster_attention(module: Any, query: Tensor) -> Callable | None:
    """An attention function that is faster than the module's configured one and takes the same arguments, or None."""
    if not _is_on or module.training or torch.is_grad_enabled():
        return None
    configured = module.config._attn_implementation
    # Some variants use eager attention only for their gradients, see `PGSegVisionModel`.
    eager_for_gradients = configured == "eager" and NPR_VARIANTS[module.config.npr_variant].eager_gradients
    if configured != "sdpa" and not eager_for_gradients:
        return None
    if query.dtype == torch.bfloat16 and _is_eager_cpu_inference(query):
        return attention_in_parts
    return ALL_ATTENTION_FUNCTIONS["sdpa"] if eager_for_gradients else None


def attention_in_parts(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """`eager_attention_forward` for a few heads at a time, so that the full matrix of weights is never stored. Faster
    than torch's fused kernel on CPUs that have bfloat16 instructions but no matrix units."""
    batch, heads, length, width = query.shape
    query, key, value = (
        part.reshape(batch * heads, part.shape[2], width) for part in (query * scaling, key, value)
    )
    out = torch.empty_like(query)
    step = max(1, _CACHED_SCORES // (length * key.shape[1]))
    for start in range(0, batch * heads, step):
        part = slice(start, start + step)
        out[part] = (query[part] @ key[part].transpose(1, 2)).softmax(dim=-1) @ value[part]
    return out.view(batch, heads, length, width).transpose(1, 2), None


def projects_first(projection: Any) -> bool:
    """Whether [`project_mixtures`] can replace the projection of mixtures: only where BatchNorm is affine."""
    return _is_on and not projection.training and not torch.is_grad_enabled()


def project_mixtures(projection: Any, rows_BPC: Tensor, weights_BLP: Tensor) -> Tensor:
    """The projection (linear, BatchNorm, ReLU, linear) of `weights_BLP @ rows_BPC`. The first two layers are affine
    together, so they are applied to the P rows before mixing."""
    first, norm, _, last = projection

    def affine(rows: Tensor) -> Tensor:
        return norm(linear(first, rows.flatten(0, -2))).unflatten(0, rows.shape[:-1])

    shift_H = affine(rows_BPC.new_zeros(1, rows_BPC.shape[-1]))[0]
    hidden = torch.baddbmm(shift_H, weights_BLP, affine(rows_BPC) - shift_H).relu_()
    return linear(last, hidden)
