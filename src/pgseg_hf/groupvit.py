"""The architecture of transformers' GroupViT in PGSeg's configuration, for warm starts."""

from dataclasses import fields
from typing import Any

from transformers import GroupViTConfig, PreTrainedConfig

from .configuration_pgseg import PGSegConfig, PGSegTextConfig, PGSegVisionConfig


def config_from_groupvit(
    config: GroupViTConfig, npr_variant: str = "corrected", **kwargs: Any
) -> PGSegConfig:
    """The PGSeg configuration of a transformers GroupViT's architecture."""
    text_fields = {field.name for field in fields(PGSegTextConfig)} & set(config.text_config.to_dict())
    vision_fields = {field.name for field in fields(PGSegVisionConfig)} & set(config.vision_config.to_dict())
    # GroupViT lets the number of layers disagree with the depths, which alone decide.
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
    return PGSegConfig(
        text_config=text, vision_config={**vision, "npr_variant": npr_variant}, **{**shared, **kwargs}
    )
