"""Faster ways to what `layers.py` computes in evaluation without gradient; numbers change by rounding only.

[`plain_kernels`] turns all of them off: the layers then are torch's own.

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

# Entries of attention scores that are worked on at a time where attention goes in parts: they stay in a core's cache.
_CACHED_SCORES = 2**21

_is_on = True


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Within it every layer computes as it is written down, to compare or to look for a fault; for all threads."""
    global _is_on
    before, _is_on = _is_on, False
    try:
        yield
    finally:
        _is_on = before


def is_plain_linear(layer: Any) -> bool:
    """Whether a layer is a linear one and no more: no adapter's, quantised or offloaded one, and none with hooks."""
    # Quantised and fake tensors are subclasses.
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
    )


def linear(layer: Any, x: Tensor, activation: nn.Module | None = None) -> Tensor:
    """A linear layer and what follows it; in evaluation on a CPU by oneDNN, which on some is faster than the library
    that torch multiplies float32 with, and applies GELU before a row leaves the cache. In training always by itself, so
    that a part that is computed again for the gradient comes out the same.

    No subclass, as tools that quantise take `nn.Linear` alone.
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
    """Linear layers of one input, which for those in int8 is rounded once."""
    if all(isinstance(layer, Int8Linear) for layer in layers):
        x = layers[0].quantized(x)
    return [linear(layer, x) for layer in layers]


@cache
def _onednn_dtypes() -> frozenset[torch.dtype]:
    """What oneDNN's linear layer takes here. torch keeps the operator for itself: where it is missing, or not what it
    was, nothing."""
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
    """An attention function that is faster than the configured one of a module, with the same arguments; or None."""
    if not _is_on or module.training or torch.is_grad_enabled():
        return None
    configured = module.config._attn_implementation
    # Some variants are eager for their gradients only, see `PGSegVisionModel`.
    eager_for_gradients = configured == "eager" and NPR_VARIANTS[module.config.npr_variant].eager_gradients
    if configured != "sdpa" and not eager_for_gradients:
        return None
    if query.dtype == torch.bfloat16 and _is_eager_cpu_inference(query):
        return attention_in_parts
    return ALL_ATTENTION_FUNCTIONS["sdpa"] if eager_for_gradients else None


def attention_in_parts(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """As `eager_attention_forward`, a few heads at a time, without a matrix of all weights. On CPUs whose bfloat16
    instructions are no matrix units faster than torch's fused kernel."""
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
    """Whether [`project_mixtures`] may stand for the projection of mixtures: only where BatchNorm is affine."""
    return _is_on and not projection.training and not torch.is_grad_enabled()


def project_mixtures(projection: Any, rows_BPC: Tensor, weights_BLP: Tensor) -> Tensor:
    """The projection (linear, BatchNorm, ReLU, linear) of `weights_BLP @ rows_BPC`: its first two layers, affine
    together, take the P rows, and the mix comes after them."""
    first, norm, _, last = projection

    def affine(rows: Tensor) -> Tensor:
        return norm(linear(first, rows.flatten(0, -2))).unflatten(0, rows.shape[:-1])

    shift_H = affine(rows_BPC.new_zeros(1, rows_BPC.shape[-1]))[0]
    hidden = torch.baddbmm(shift_H, weights_BLP, affine(rows_BPC) - shift_H).relu_()
    return linear(last, hidden)
