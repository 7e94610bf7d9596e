"""A pretrained backbone in place of the patch convolution.

Shapes: B batch, h x w the grid of the backbone's finest chosen stage, C width of the image tower.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from .configuration_pgseg import PGSegVisionConfig
from .layers import PGSegVisionEmbeddings


def load_backbone(name_or_path: str, **fields: Any) -> Any:
    """Loads a pretrained backbone in float32. `fields` override its configuration, for example `out_features`."""
    config = AutoConfig.from_pretrained(name_or_path, **fields)
    # AutoBackbone looks every name up on the Hub and treats a folder as a timm model.
    backbone = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(
        name_or_path, config=config, dtype="float32"
    )
    backbone.config.name_or_path = ""  # keeps local paths out of saved checkpoints
    return backbone


def _new_backbone(config: PreTrainedConfig) -> Any:
    """Builds a backbone with the configured attention, or with its default where it does not support that one."""
    try:
        return AutoBackbone.from_config(config)
    except (ValueError, ImportError):
        if config._attn_implementation is None:
            raise
        config._attn_implementation = None
        return AutoBackbone.from_config(config)


class PGSegBackboneFeatures(nn.Module):
    """Turns the feature maps of a backbone's chosen stages into patches [B, C, h, w]: resizes them to the finest grid,
    normalises each stage's channels, concatenates and projects them."""

    def __init__(self, config: PGSegVisionConfig):
        super().__init__()
        self.is_frozen, self.patch_size = config.freeze_backbone, config.patch_size
        self.backbone: Any = _new_backbone(config.backbone_config)
        self.channels = [int(size) for size in self.backbone.channels]
        self.norms = nn.ModuleList(nn.LayerNorm(size, eps=config.layer_norm_eps) for size in self.channels)
        self.projection = nn.Linear(sum(self.channels), config.hidden_size)
        self.train(self.training)

    def train(self, mode: bool = True) -> "PGSegBackboneFeatures":
        """Sets the mode, but keeps a frozen backbone in evaluation mode and without gradient, also after loading. It is
        frozen if its configuration says so or if none of its parameters learn, as below an adapter."""
        super().train(mode)
        if self.is_frozen or not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval().requires_grad_(False)
        return self

    @property
    def _dtype(self) -> torch.dtype:
        # The projection's dtype does not count: it may be quantised.
        return next(self.norms.parameters()).dtype

    def features(self, pixel_values: Tensor) -> Tensor:
        """The chosen stages for images [B, 3, H, W], resized to the finest grid and concatenated, not normalised:
        [B, channels, h, w]. Without gradient if the backbone is frozen."""
        return self.on_one_grid(self.maps(pixel_values))

    def maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The chosen stages for images [B, 3, H, W], each on its own grid.

        Raises:
            ValueError: if the stride of the finest stage is not the configured `patch_size`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            maps = self.backbone(pixel_values.to(self._dtype)).feature_maps
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            self._refuse_another_stride(pixel_values.shape[-2:], maps[0].shape[-2:])
        return maps

    def _refuse_another_stride(self, image: torch.Size, grid: torch.Size) -> None:
        # A grid may include a partial patch at the border or leave it out.
        if any(abs(cells * self.patch_size - side) >= self.patch_size for side, cells in zip(image, grid)):
            raise ValueError(
                f"vision_config.patch_size is {self.patch_size}, but the backbone's finest stage has {grid[0]} x "
                f"{grid[1]} cells for an image of {image[0]} x {image[1]} pixels; expected its stride, about "
                f"{max(round(image[0] / grid[0]), 1)}."
            )

    def on_one_grid(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Resizes maps of the chosen stages to the finest grid and concatenates them."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            # Stages are ordered from fine to coarse. Their sizes are not compared, so that one graph works for all of
            # them; resizing a map to its own size does not change it.
            size = maps[0].shape[-2:]
            on_grid = [
                nn.functional.interpolate(features, size=size, mode="bilinear", align_corners=False)
                for features in maps[1:]
            ]
            return torch.cat([maps[0], *on_grid], dim=1)

    def project(self, features: Tensor) -> Tensor:
        """Projects features from [`~PGSegBackboneFeatures.features`], of any float dtype, to patches [B, C, h, w]."""
        parts = features.to(self._dtype).permute(0, 2, 3, 1).split(self.channels, dim=-1)
        normed = torch.cat([norm(part) for norm, part in zip(self.norms, parts)], dim=-1)
        return self.projection(normed).permute(0, 3, 1, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.project(self.features(pixel_values))


@contextmanager
def backbones_set_aside(model: nn.Module) -> Iterator[list[Any]]:
    """Removes the backbones from a model inside the block, for operations that not every backbone supports."""
    parts = [module for module in model.modules() if isinstance(module, PGSegBackboneFeatures)]
    backbones = [part.backbone for part in parts]
    for part in parts:
        part.backbone = nn.Identity()
    try:
        yield backbones
    finally:
        for part, backbone in zip(parts, backbones):
            part.backbone = backbone


class PGSegBackboneEmbeddings(PGSegVisionEmbeddings):
    """Patch tokens from a backbone, with position embeddings."""

    patch_embeddings: PGSegBackboneFeatures

    def _make_patch_embeddings(self, config: PGSegVisionConfig) -> nn.Module:
        return PGSegBackboneFeatures(config)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Features [B, channels, h, w] to pass as `backbone_features` to [`~PGSegBackboneEmbeddings.forward`]. For a
        frozen backbone they can be computed once and reused in every epoch."""
        return self.patch_embeddings.features(pixel_values)

    def forward(
        self, pixel_values: Tensor | None = None, backbone_features: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Returns tokens [B, h * w, C] and the grid (h, w)."""
        if backbone_features is None:
            return self.embed(self.patch_embeddings(pixel_values))
        return self.embed(self.patch_embeddings.project(backbone_features))
