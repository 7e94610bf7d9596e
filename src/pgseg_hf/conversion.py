"""Converts released PGSeg checkpoints to Transformers folders without executing any code in them."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.utils import logging

from .configuration_pgseg import PGSegConfig, PGSegTextConfig, PGSegVisionConfig
from .efficientnet_lite import IMAGE_MEAN, IMAGE_STD, EfficientNetLiteBackbone
from .files import folder_written_whole
from .image_processing_pil_pgseg import PGSegImageProcessorPil
from .model_cards import RELEASED_LICENSE, generate_model_card
from .modeling_pgseg import PGSegModel
from .processing_pgseg import PGSegProcessor
from .text_files import read_json
from .tokenization import default_tokenizer
from .torch_files import read_state_dict, tensors_of

logger = logging.get_logger(__name__)

HEAD_WIDTH = 64

# Patterns of released names and their replacements, applied in this order.
_RENAMES = (
    (r"^img_encoder\.logit_scale$", "prototype_logit_scale"),
    (r"^img_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embeddings.projection."),
    (r"^img_encoder\.patch_embed\.norm\.", "vision_model.embeddings.layernorm."),
    (r"^img_encoder\.pos_embed$", "vision_model.embeddings.position_embeddings"),
    (r"^img_encoder\.norm\.", "vision_model.layernorm."),
    (r"^img_encoder\.layers\.", "vision_model.encoder.stages."),
    (r"\.downsample_spatial\.mu$", ".npr.prototypes"),
    (r"\.downsample_spatial\.mapping_x\.", ".npr.projection."),
    (r"\.pre_assign_attn\.attn\.proj\.", ".pre_assign_attn.attn.out_proj."),
    (r"\.blocks\.(\d+)\.", r".layers.\1."),
    (r"^text_encoder\.Atten\.mu$", "released_text_prototypes"),
    (r"^text_encoder\.token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^text_encoder\.positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^text_encoder\.ln_final\.", "text_model.final_layer_norm."),
    (r"^text_encoder\.transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"(\.layers\.\d+)\.attn\.(out_)?proj\.", r"\1.self_attn.out_proj."),
    (r"(\.layers\.\d+)\.attn\.(in_proj_|qkv\.)", r"\1.self_attn.qkv."),
    (r"(\.layers\.\d+)\.(norm|ln_)(\d)\.", r"\1.layer_norm\3."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^img_projector\.", "visual_projection."),
    (r"^text_projector\.", "text_projection."),
    (r"\.linear_hidden\.([01])\.", r".\1."),
    (r"\.linear_out\.", ".3."),
)
# The released code trains and saves these tensors but never reads them.
_DROPPED = "img_encoder.mapping_text."


def rename(released_name: str) -> list[str]:
    """The [`PGSegModel`] names for a released tensor: none if it is dropped, three if it fuses queries, keys and
    values."""
    if released_name.startswith(_DROPPED):
        return []
    name = released_name
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return [name.replace(".qkv.", f".{part}_proj.") for part in "qkv"] if ".qkv." in name else [name]


def convert_state_dict(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and reshapes released tensors; unknown parts of names stay as they are."""
    converted: dict[str, Tensor] = {}
    for released_name, tensor in released.items():
        names = rename(released_name)
        if len(names) == 3:
            if tensor.ndim == 0 or tensor.shape[0] % 3:
                raise ValueError(
                    f"{released_name} has shape {list(tensor.shape)}, expected a number of rows divisible by 3 "
                    "(queries, keys, values)."
                )
            converted |= {name: part.clone() for name, part in zip(names, tensor.chunk(3), strict=True)}
        elif names:
            is_convolution = tensor.ndim == 3 and "projection" in names[0] and names[0].endswith(".weight")
            converted[names[0]] = tensor.squeeze(-1) if is_convolution else tensor
    return converted


class _Shapes:
    """Reads the architecture from the shapes of converted tensors."""

    def __init__(self, converted: Mapping[str, Tensor]):
        self.converted = converted

    def shape(self, name: str, ndim: int) -> torch.Size:
        if name not in self.converted:
            raise ValueError(f"the checkpoint has no tensor for {name}; is it a released PGSeg checkpoint?")
        found = self.converted[name].shape
        if len(found) != ndim or 0 in found:
            raise ValueError(f"{name} has shape {list(found)}, expected {ndim} dimensions, none of them 0.")
        return found

    def count(self, pattern: str) -> int:
        names = {int(found[1]): found[0] for name in self.converted if (found := re.match(pattern, name))}
        if names and max(names) >= len(names):
            first = min(set(range(len(names))) - set(names))
            raise ValueError(
                f"the checkpoint has tensors {names[max(names)]}... but none with number {first}."
            )
        return len(names)

    def vision(self) -> dict[str, Any]:
        stage = "vision_model.encoder.stages."
        width, channels, patch, _ = self.shape(
            "vision_model.embeddings.patch_embeddings.projection.weight", 4
        )
        grid = round(self.shape("vision_model.embeddings.position_embeddings", 3)[1] ** 0.5)
        num_stages = self.count(r"vision_model\.encoder\.stages\.(\d+)\.")
        parts = ("group_token", "npr.prototypes", "downsample.mlp_inter.fc2.weight")
        grouping = [
            index
            for index in range(num_stages)
            if any(f"{stage}{index}.{part}" in self.converted for part in parts)
        ]
        ungrouped = [0] * (num_stages - len(grouping))
        return {
            "hidden_size": width,
            "intermediate_size": self.shape(f"{stage}0.layers.0.mlp.fc1.weight", 2)[0],
            "depths": [
                self.count(rf"vision_model\.encoder\.stages\.{index}\.layers\.(\d+)\.")
                for index in range(num_stages)
            ],
            "num_group_tokens": [self.shape(f"{stage}{index}.group_token", 3)[1] for index in grouping]
            + ungrouped,
            "num_output_groups": [
                self.shape(f"{stage}{index}.downsample.mlp_inter.fc2.weight", 2)[0] for index in grouping
            ]
            + ungrouped,
            "num_attention_heads": max(width // HEAD_WIDTH, 1),
            "image_size": grid * patch,
            "patch_size": patch,
            "num_channels": channels,
            "assign_mlp_ratio": [
                _ratio(self.shape(f"{stage}0.downsample.mlp_inter.fc1.weight", 2)[0], width),
                _ratio(self.shape(f"{stage}0.downsample.mlp_channels.fc1.weight", 2)[0], width),
            ],
            "prototype_projection_dim": self.shape(f"{stage}0.npr.projection.0.weight", 2)[0],
            "drop_path_rate": 0.0,
            "npr_variant": "released",
        }

    def text(self) -> dict[str, Any]:
        vocab_size, text_width = self.shape("text_model.embeddings.token_embedding.weight", 2)
        return {
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "intermediate_size": self.shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
            "num_hidden_layers": self.count(r"text_model\.encoder\.layers\.(\d+)\."),
            "num_attention_heads": max(text_width // HEAD_WIDTH, 1),
            "max_position_embeddings": self.shape("text_model.embeddings.position_embedding.weight", 2)[0],
            "eos_token_id": vocab_size - 1,
            "bos_token_id": vocab_size - 2,
            "pad_token_id": vocab_size - 1,
        }

    def top(self) -> dict[str, Any]:
        hidden, _ = self.shape("visual_projection.0.weight", 2)
        return {
            "projection_dim": self.shape("visual_projection.3.weight", 2)[0],
            "projection_intermediate_dim": hidden,
            "num_text_prototypes": self.shape("released_text_prototypes", 3)[1],
        }


def infer_config(converted: Mapping[str, Tensor], overrides: Mapping[str, Any] | None = None) -> PGSegConfig:
    """Infers the configuration from the shapes of converted tensors; by default with 64 channels per attention head.

    Args:
        converted: tensors from [`convert_state_dict`].
        overrides: fields of [`PGSegConfig`]; those of the towers are nested in `text_config` and `vision_config`.

    Raises:
        ValueError: a tensor that determines the architecture is missing or has the wrong number of dimensions, or an
            override is not a field or is invalid.
    """
    shapes = _Shapes(converted)
    vision, text, top = shapes.vision(), shapes.text(), shapes.top()
    overrides = dict(overrides or {})
    text.update(_checked_fields(overrides.pop("text_config", {}), text, "text_config"))
    vision.update(_checked_fields(overrides.pop("vision_config", {}), vision, "vision_config"))
    top.update(_checked_fields(overrides, top, ""))
    try:
        return PGSegConfig(text_config=text, vision_config=vision, **top)
    except StrictDataclassError as error:
        raise ValueError(
            f"the checkpoint's shapes and the overrides do not form a valid configuration: {error}"
        ) from error


def _ratio(hidden: int, width: int) -> float:
    """The ratio for which the model's `int(ratio * width)` gives exactly `hidden`."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)


def _checked_fields(overrides: Any, known: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(overrides, Mapping):
        raise ValueError(f"override {name} is {overrides!r}, expected an object of configuration fields.")
    config_class: Any = {"text_config": PGSegTextConfig, "vision_config": PGSegVisionConfig}.get(
        name, PGSegConfig
    )
    allowed = {known_field.name for known_field in fields(config_class)} | set(known) | {"npr_variant"}
    for key in overrides:
        if key not in allowed:
            raise ValueError(
                f"override {name + '.' if name else ''}{key} is not a field of {config_class.__name__}."
            )
    return overrides


def read_released_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads the tensors of a released PGSeg `.pth` file, see [`read_state_dict`].

    Raises:
        ValueError: the file does not exist, is not a torch checkpoint, or has no PGSeg state dict.
    """
    return _of_pgseg(read_state_dict(path), str(path))


def _of_pgseg(tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    if not any("downsample_spatial.mu" in name for name in tensors):
        first = ", ".join(list(tensors)[:3]) or "no tensors"
        raise ValueError(
            f"{origin} is not a PGSeg checkpoint: it has no prototypes (downsample_spatial.mu); it has {first}."
        )
    return tensors


@dataclass
class ConversionReport:
    """The names of tensors that a conversion found unknown or missing, or dropped on purpose."""

    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def convert_released(
    checkpoint: str | os.PathLike | Mapping[str, Tensor], overrides: Mapping[str, Any] | None = None
) -> tuple[PGSegModel, ConversionReport]:
    """Converts a released checkpoint to a [`PGSegModel`] of the released variant, in evaluation mode.

    Args:
        checkpoint: a `.pth` file or its content, a state dict with released names, bare or under `model`.
        overrides: fields of [`PGSegConfig`] that the shapes do not determine, for example
            `{"vision_config": {"num_attention_heads": 6}}`. Stochastic depth is 0 unless given.

    Raises:
        ValueError: the file does not exist or is not a PGSeg checkpoint, tensors are missing or have the wrong shape,
            or an override is not a field or is invalid.
    """
    if isinstance(checkpoint, Mapping):
        released = _of_pgseg(tensors_of(checkpoint), "the state dict")
    else:
        released = read_released_checkpoint(checkpoint)
    converted = convert_state_dict(released)
    config = infer_config(converted, overrides)
    if config.npr_variant != "released":
        raise ValueError(
            f"override npr_variant is {config.npr_variant!r}, expected 'released' for converted checkpoints; choose "
            "another variant when loading the result: PGSegModel.from_pretrained(folder, npr_variant=...)."
        )
    with torch.device("meta"):  # nothing is allocated before the shapes are known to match
        expected = PGSegModel(config).state_dict()
    report = ConversionReport(
        unknown=[name for name in released if not expected.keys() >= set(rename(name))],
        missing=sorted(set(expected) - set(converted)),
        dropped=[name for name in released if not rename(name)],
    )
    if report.missing:
        raise ValueError(f"tensors missing from the checkpoint: {', '.join(report.missing)}.")
    for name, tensor in converted.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(expected[name].shape)}.")
    model = PGSegModel(config)
    if any(tensor.dtype == torch.float64 for tensor in converted.values()):
        model = model.double()
    model.load_state_dict({name: tensor for name, tensor in converted.items() if name in expected})
    return model.eval(), report


def read_overrides(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON file of configuration overrides."""
    overrides = read_json(path)
    if not isinstance(overrides, dict):
        raise ValueError(
            f"{path} contains a {type(overrides).__name__}, expected an object of configuration fields."
        )
    return overrides


def write_converted(model: PGSegModel, output: str | os.PathLike) -> None:
    """Writes model, processor and tokenizer to a new folder, completely or not at all.

    Raises:
        ValueError: the folder exists and is not empty, or cannot be written to.
    """
    context = model.config.text_config.max_position_embeddings
    tokenizer = default_tokenizer(context_length=context)
    if len(tokenizer) != model.config.text_config.vocab_size:
        logger.warning(
            f"the model has {model.config.text_config.vocab_size} tokens, but CLIP's tokenizer has {len(tokenizer)}; "
            "the tokenizer in the folder does not match the model."
        )
    processor = PGSegProcessor(PGSegImageProcessorPil(), tokenizer)
    with folder_written_whole(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        card = generate_model_card(
            model.config,
            training="Converted from a released PGSeg checkpoint; see the paper and its repository for data and "
            "results.",
            license_text=f"{RELEASED_LICENSE}.",
        )
        card.save(folder / "README.md")


def write_backbone(backbone: EfficientNetLiteBackbone, output: str | os.PathLike) -> None:
    """Writes a backbone for [`~PGSegModel.from_parts`] and its image processor to a new folder, completely or not at
    all.

    Raises:
        ValueError: the folder exists and is not empty, or cannot be written to.
    """
    processor = PGSegImageProcessorPil(image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD))
    with folder_written_whole(output) as folder:
        backbone.save_pretrained(folder)
        processor.save_pretrained(folder)
