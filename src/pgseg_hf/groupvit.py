"""Warm starts from Transformers' GroupViT: its architecture as a PGSeg configuration, and its checkpoints."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import AutoConfig, GroupViTConfig, GroupViTModel, PreTrainedConfig
from transformers.utils import logging

from .configuration_pgseg import PGSegConfig, PGSegTextConfig, PGSegVisionConfig

if TYPE_CHECKING:
    from .modeling_pgseg import PGSegModel

logger = logging.get_logger(__name__)


def config_from_groupvit(
    config: GroupViTConfig, npr_variant: str = "corrected", **kwargs: Any
) -> PGSegConfig:
    """The PGSeg configuration with the architecture of a Transformers GroupViT.

    Args:
        config: configuration of the GroupViT.
        npr_variant: NPR variant of the PGSeg model.
        kwargs: further fields of [`PGSegConfig`]; `text_config` and `vision_config` may be dicts of fields.

    Raises:
        ValueError: if a keyword is not a field of [`PGSegConfig`].
    """
    unknown = sorted(set(kwargs) - {field.name for field in fields(PGSegConfig)})
    if unknown:
        raise ValueError(f"not a field of PGSegConfig: {', '.join(unknown)}.")
    text_overrides, vision_overrides = kwargs.pop("text_config", {}), kwargs.pop("vision_config", {})
    text_fields = {field.name for field in fields(PGSegTextConfig)} & set(config.text_config.to_dict())
    vision_fields = {field.name for field in fields(PGSegVisionConfig)} & set(config.vision_config.to_dict())
    # In GroupViT the number of layers may disagree with the depths; only the depths are used.
    vision_fields -= {"num_hidden_layers"}
    not_architecture = {field.name for field in fields(PreTrainedConfig)}
    text, vision = (
        {name: getattr(part, name) for name in names - not_architecture}
        for part, names in ((config.text_config, text_fields), (config.vision_config, vision_fields))
    )
    shared = {
        name: getattr(config, name)
        for name in ("projection_dim", "projection_intermediate_dim", "logit_scale_init_value")
    }
    return PGSegConfig.paper(  # the heads were trained on segment tokens and their mean
        text_config={**text, **text_overrides},
        vision_config={**vision, "npr_variant": npr_variant, **vision_overrides},
        **{**shared, **kwargs},
    )


def load_groupvit(
    model_class: type["PGSegModel"], name_or_path: str, npr_variant: str, **kwargs: Any
) -> "PGSegModel":
    """Implements [`PGSegModel.from_groupvit`]."""
    source = _read_groupvit(name_or_path)
    model = model_class(config_from_groupvit(source.config, npr_variant, **kwargs))
    model.vision_model.set_attn_implementation("eager")
    tensors = source.state_dict()
    left_out = _tensors_left_out(model.config)
    unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unexpected := [name for name in unexpected if not name.startswith(left_out)]:
        raise ValueError(f"{name_or_path} has tensors that PGSeg does not have: {', '.join(unexpected)}.")
    new = [name for name in model.state_dict() if name not in tensors]
    logger.warning(f"Warm start from {name_or_path}; newly initialised: {', '.join(new) or 'nothing'}.")
    return model.eval()


def _tensors_left_out(config: PGSegConfig) -> tuple[str, ...]:
    """Prefixes of GroupViT tensors that a PGSeg model with this configuration does not use."""
    vision = config.vision_config
    if vision.segment_source == "groups":
        return ()
    last = sum(tokens > 0 for tokens in vision.num_group_tokens) - 1
    grouping = f"vision_model.encoder.stages.{last}.downsample."
    return tuple(
        grouping + part for part in ("assign.v_proj.", "assign.proj.", "norm_new_x.", "mlp_channels.")
    )


def _read_groupvit(name_or_path: str) -> GroupViTModel:
    """Loads a Transformers GroupViT checkpoint; raises a ValueError if it is unreadable, not a GroupViT, or
    incomplete."""
    try:
        model_type = AutoConfig.from_pretrained(name_or_path).model_type
        if model_type != "groupvit":
            raise ValueError(f"{name_or_path} is a {model_type!r} checkpoint, expected 'groupvit'.")
        model, loaded = GroupViTModel.from_pretrained(
            name_or_path, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{name_or_path} cannot be loaded: {error}") from error
    missing = sorted({*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])})
    if missing:
        raise ValueError(f"{name_or_path} lacks tensors of its architecture: {', '.join(missing)}.")
    return model
