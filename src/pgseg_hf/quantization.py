"""Int8 models for the CPU: a Transformers quantization method, `quantization_config=PGSegInt8Config()`.

| layers | weights | computed in |
|---|---|---|
| linear layers of the image tower's stages, and of a backbone | int8, a scale for each row | int8 |
| those that decide a patch's group; other linear layers, token embeddings | int8, a scale for each row | floats |
| projections of prototypes | bfloat16 | bfloat16 if the CPU supports it |
| convolutions | float16 | float32 |
| norms, position embeddings, prototypes, biases | float32 | dtype of their input |

Int8 computation rounds inputs in each call (dynamic quantisation). It is used in the stages, which take almost all of
the time. Elsewhere it would cost accuracy for little gain, and rounding the weights of a backbone's fifty consecutive
convolutions would too. Between products the stages compute in bfloat16 if the CPU supports it.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .int8 import Int8Linear, has_bfloat16, refuse_other_dtype, rounded
from .layers import PGSegVisionEncoder

METHOD = "pgseg_int8"

# Attributes that a layer's forward needs in addition to its `__constants__`.
_EXTRA_FIELDS = ("_reversed_padding_repeated_twice",)

_COMPUTED_IN_INT8 = re.compile(r"(^|\.)(stages\.\d+\.(?!downsample\.assign\.[qk]_proj)|backbone\.)")
_OF_PROTOTYPES = re.compile(r"(^|\.)npr\.")


class PGSegInt8Config(QuantizationConfigMixin):
    """Quantisation to int8: `from_pretrained(..., quantization_config=PGSegInt8Config())`.

    Args:
        modules_to_not_convert: names of modules to keep in float32 with all their submodules, such as
            `["vision_model.embeddings"]`. Names that the model does not have raise a `ValueError` on loading.
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None, **kwargs: Any):
        self.quant_method: Any = METHOD
        self.modules_to_not_convert = modules_to_not_convert


class _Stored(nn.Module):
    """A layer that stores the weight of a float layer in fewer bits and returns it in float32."""

    def __init__(self, layer: Any):
        nn.Module.__init__(self)
        for name in (*layer.__constants__, *_EXTRA_FIELDS):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self._store(layer.weight)
        if hasattr(layer, "bias"):
            self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    def _store(self, weight: Tensor) -> None:
        values, scale = rounded(weight)
        self.register_buffer("weight_int8", values)
        self.register_buffer("weight_scale", scale)

    def _rows(self, index: Any) -> Tensor:
        values: Any = self.weight_int8
        scale: Any = self.weight_scale
        return values[index] * scale[index][..., None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        refuse_other_dtype(fn)
        return super()._apply(fn, recurse)

    @property
    def weight(self) -> Tensor:
        return self._rows(slice(None))


class _StoredInFloat16(_Stored):
    def _store(self, weight: Tensor) -> None:
        self.register_buffer("weight_float16", weight.detach().half())

    @property
    def weight(self) -> Tensor:
        values: Any = self.weight_float16
        return values.float()


class StoredLinear(_Stored, nn.Linear):  # type: ignore[override]
    """A linear layer with 8-bit weights that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


class BFloat16Linear(nn.Linear):
    """A linear layer with bfloat16 weights that computes in bfloat16 if the CPU supports it, else in float32."""

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("weight", layer.weight.detach().bfloat16())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.bfloat16 if has_bfloat16() else torch.float32
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)


class Float16Conv2d(_StoredInFloat16, nn.Conv2d):  # type: ignore[override]
    """A convolution with float16 weights that computes in float32."""


class StoredEmbedding(_Stored, nn.Embedding):  # type: ignore[override]
    """An embedding with 8-bit weights; embeddings are returned in float32."""

    def forward(self, ids: Tensor) -> Tensor:
        return self._rows(ids)


def _replacement(name: str, module: nn.Module) -> Any:
    """The class that replaces a layer, or None. Subclasses are kept: they may do more than their weights tell."""
    if type(module) is nn.Conv2d:
        return Float16Conv2d
    if type(module) is nn.Embedding and not name.endswith("position_embedding"):
        return StoredEmbedding
    if type(module) is not nn.Linear:
        return None
    if _OF_PROTOTYPES.search(name):
        return BFloat16Linear
    return Int8Linear if _COMPUTED_IN_INT8.search(name) else StoredLinear


def _replace_layers(model: nn.Module, kept: list[str]) -> None:
    for name, module in list(model.named_modules()):
        is_kept = any(name == part or name.startswith(f"{part}.") for part in kept)
        if not is_kept and (replacement := _replacement(name, module)) is not None:
            model.set_submodule(name, replacement(module).train(module.training))


class PGSegInt8Quantizer(HfQuantizer):
    """Converts the layers of a model to int8: after loading float weights, or before loading int8 weights."""

    quantization_config: PGSegInt8Config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if not devices <= {None, "cpu", torch.device("cpu")}:
            raise ValueError(f"device_map is {device_map}, expected the CPU: int8 models run only there.")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        kept = self.quantization_config.modules_to_not_convert or []
        if self.pre_quantized:
            _replace_layers(model, kept)
        elif unknown := sorted(set(kept) - {name for name, _ in model.named_modules()}):
            parts = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"modules_to_not_convert has {unknown[0]!r}, which {type(model).__name__} does not have, expected "
                f"{parts} or modules in them."
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            _replace_layers(model, self.quantization_config.modules_to_not_convert or [])
        self._tell_parts(model)
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.pack()
            elif isinstance(module, PGSegVisionEncoder) and has_bfloat16():
                is_whole = not any(type(part) is nn.Linear for part in module.modules())
                module.compute_dtype = torch.bfloat16 if is_whole else None
        model.requires_grad_(False)

    def _tell_parts(self, model: PreTrainedModel) -> None:
        """Stores the quantisation in each tower's configuration, because a tower can be saved and loaded alone."""
        kept = self.quantization_config.modules_to_not_convert or []
        for name, part in model.named_children():
            if isinstance(part, PreTrainedModel) and name not in kept:
                config: Any = part.config
                config.quantization_config = PGSegInt8Config([each.removeprefix(f"{name}.") for each in kept])

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


# Not with transformers' decorators: they reject a second copy of this file, as `trust_remote_code` may load one.
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, PGSegInt8Config)
AUTO_QUANTIZER_MAPPING.setdefault(METHOD, PGSegInt8Quantizer)
