"""A pretrained backbone in the place of the patch convolution.

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
    """A pretrained backbone in float32; `fields` of its configuration, such as `out_features`, may be changed."""
    config = AutoConfig.from_pretrained(name_or_path, **fields)
    # AutoBackbone itself asks the Hub for the name, and takes a folder for a model of timm.
    backbone = MODEL_FOR_BACKBONE_MAPPING[type(config)].from_pretrained(
        name_or_path, config=config, dtype="float32"
    )
    backbone.config.name_or_path = ""  # a checkpoint should not tell where its backbone once lay
    return backbone


def _new_backbone(config: PreTrainedConfig) -> Any:
    """A backbone that attends as its configuration says or, where it cannot, as it does by itself."""
    try:
        return AutoBackbone.from_config(config)
    except (ValueError, ImportError):
        if config._attn_implementation is None:
            raise
        config._attn_implementation = None
        return AutoBackbone.from_config(config)


class PGSegBackboneFeatures(nn.Module):
    """Feature maps of a backbone's chosen stages to patches [B, C, h, w]: on the finest one's grid, each stage's
    channels normalised by themselves, joined, projected."""

    def __init__(self, config: PGSegVisionConfig):
        super().__init__()
        self.is_frozen, self.patch_size = config.freeze_backbone, config.patch_size
        self.backbone: Any = _new_backbone(config.backbone_config)
        self.channels = [int(size) for size in self.backbone.channels]
        self.norms = nn.ModuleList(nn.LayerNorm(size, eps=config.layer_norm_eps) for size in self.channels)
        self.projection = nn.Linear(sum(self.channels), config.hidden_size)
        self.train(self.training)

    def train(self, mode: bool = True) -> "PGSegBackboneFeatures":
        """As ever, but a frozen backbone, by its configuration or as below an adapter, stays in evaluation mode and
        without gradient, after loading too."""
        super().train(mode)
        if self.is_frozen or not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval().requires_grad_(False)
        return self

    @property
    def _dtype(self) -> torch.dtype:
        # Not the projection's, which may be quantised.
        return next(self.norms.parameters()).dtype

    def features(self, pixel_values: Tensor) -> Tensor:
        """The chosen stages of images [B, 3, H, W] on the finest one's grid, joined and not normalised: [B, channels,
        h, w]. Without gradient where the backbone is frozen."""
        return self.on_one_grid(self.maps(pixel_values))

    def maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The chosen stages of images [B, 3, H, W], each on its own grid.

        Raises:
            ValueError: the finest one's stride is not the configuration's `patch_size`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            maps = self.backbone(pixel_values.to(self._dtype)).feature_maps
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            self._refuse_another_stride(pixel_values.shape[-2:], maps[0].shape[-2:])
        return maps

    def _refuse_another_stride(self, image: torch.Size, grid: torch.Size) -> None:
        # A grid may count the part of a patch at the border or leave it out.
        if any(abs(cells * self.patch_size - side) >= self.patch_size for side, cells in zip(image, grid)):
            raise ValueError(
                f"vision_config.patch_size is {self.patch_size}, and the backbone's finest stage makes {grid[0]} x "
                f"{grid[1]} cells of {image[0]} x {image[1]} pixels; expected its stride, about "
                f"{max(round(image[0] / grid[0]), 1)}."
            )

    def on_one_grid(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Maps of the chosen stages on the finest one's grid, joined."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            # Stages go from fine to coarse. Their sizes are not compared, so that a graph holds for all of them; to its
            # own size a map is stretched as it is.
            size = maps[0].shape[-2:]
            on_grid = [
                nn.functional.interpolate(features, size=size, mode="bilinear", align_corners=False)
                for features in maps[1:]
            ]
            return torch.cat([maps[0], *on_grid], dim=1)

    def project(self, features: Tensor) -> Tensor:
        """Features of [`~PGSegBackboneFeatures.features`], of any float type, to patches [B, C, h, w]."""
        parts = features.to(self._dtype).permute(0, 2, 3, 1).split(self.channels, dim=-1)
        normed = torch.cat([norm(part) for norm, part in zip(self.norms, parts)], dim=-1)
        return self.projection(normed).permute(0, 3, 1, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.project(self.features(pixel_values))


@contextmanager
def backbones_set_aside(model: nn.Module) -> Iterator[list[Any]]:
    """Takes the backbones out of a model, for what not every backbone can do and the model around it can."""
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
    """Patch tokens of a backbone, with position embeddings as ever."""

    patch_embeddings: PGSegBackboneFeatures

    def _make_patch_embeddings(self, config: PGSegVisionConfig) -> nn.Module:
        return PGSegBackboneFeatures(config)

    def features(self, pixel_values: Tensor) -> Tensor:
        """What [`~PGSegBackboneEmbeddings.forward`] takes as `backbone_features`, [B, channels, h, w]: computed once,
        features of a frozen backbone can be used in every epoch."""
        return self.patch_embeddings.features(pixel_values)

    def forward(
        self, pixel_values: Tensor | None = None, backbone_features: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Returns tokens [B, h * w, C] and the grid (h, w)."""
        if backbone_features is None:
            return self.embed(self.patch_embeddings(pixel_values))
        return self.embed(self.patch_embeddings.project(backbone_features))
