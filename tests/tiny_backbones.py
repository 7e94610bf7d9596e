"""Backbones with a few thousand weights for tiny models."""

from typing import Any

import pytest
from tiny_models import tiny_model

from pgseg_hf.modeling_pgseg import PGSegModel

_VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_VIT["mlp_ratio"] = 2
# Configurations, and the stride of the finest stage in use.
BACKBONES: dict[str, tuple[dict[str, Any], int]] = {
    "efficientnet_lite": (
        {
            "stem_size": 4,
            "hidden_sizes": [4, 6, 8, 10, 12, 14, 16],
            "depths": [1] * 7,
            "out_features": ["stage3", "stage5"],
        },
        8,
    ),
    "dinov2": (_VIT | {"out_features": ["stage1", "stage2"]}, 4),
    "vitdet": (_VIT | {"pretrain_image_size": 16, "out_features": ["stage2"]}, 4),
    "convnextv2": ({"hidden_sizes": [4, 6, 8, 10], "depths": [1] * 4, "out_indices": [1, 3]}, 4),
    "swin": (
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
            "out_features": ["stage1", "stage2"],
        },
        2,
    ),
    "pvt_v2": (
        {
            "hidden_sizes": [4, 8, 8, 8],
            "depths": [1] * 4,
            "num_attention_heads": [1, 2, 2, 2],
            "out_features": ["stage1", "stage2"],
        },
        4,
    ),
}
ANY_BACKBONE = pytest.mark.parametrize("name", BACKBONES)


def backbone_fields(name: str = "efficientnet_lite", **vision: Any) -> dict[str, Any]:
    """Fields of a `vision_config` with stored position embeddings for a grid of 4 x 4."""
    fields, stride = BACKBONES[name]
    config = {"model_type": name, **fields}
    return {"backbone_config": config, "patch_size": stride, "image_size": 4 * stride} | vision


def tiny_backbone_model(
    name: str = "efficientnet_lite", vision: dict | None = None, **kwargs: Any
) -> PGSegModel:
    return tiny_model(vision_config=backbone_fields(name, **(vision or {})), **kwargs)
