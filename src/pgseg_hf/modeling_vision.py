"""PGSeg's image tower: computes segment tokens and a grouping of the patches for images of any size.

Shapes: B batch, L image tokens of a stage's input, K groups of a stage, C width, D joint width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbone import PGSegBackboneEmbeddings
from .configuration_pgseg import PGSegVisionConfig
from .features import StageFeatures
from .layers import PGSegVisionEmbeddings, PGSegVisionEncoder, StageOutput, mean_of_groups
from .modeling_base import PGSegPreTrainedModel, name_unused
from .npr import npr_of
from .variants import NPR_VARIANTS


@dataclass
class PGSegVisionOutput(ModelOutput):
    """Output of [`PGSegVisionModel`] and, with embeddings in the joint space, of [`PGSegModel.get_image_features`].

    Args:
        last_hidden_state: [B, K, C], the segment tokens after the last stage and LayerNorm.
        pooler_output: [B, C], their mean; from `get_image_features` its projection [B, D], not normalised.
        segment_embeds: [B, K, D], projected segment tokens, not normalised; only from `get_image_features`.
        patch_hidden_state: [B, L, C], the patches that groups are named by, after the same LayerNorm: as the first
            stage groups them, or as they enter it for `segment_source="inputs"`.
        patch_embeds: [B, L, D], their projection, not normalised; only from `get_image_features` with patch pooling.
        grouping: [B, K, h, w], soft assignment of patches to the last stage's groups, on the true patch grid.
        image_sizes: int64 [B, 2], height and width of the input in pixels.
        hidden_states: input of each stage and output of the last, with `output_hidden_states`.
        attentions: soft assignment [B, K, L] of each grouping stage, with `output_attentions`.
        npr: [`~pgseg_hf.features.StageFeatures`] of each grouping stage for the prototype losses, with `output_npr`.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    segment_embeds: Tensor | None = None
    patch_hidden_state: Tensor | None = None
    patch_embeds: Tensor | None = None
    grouping: Tensor | None = None
    image_sizes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    npr: tuple[StageFeatures, ...] | None = None


def _refuse_unfinite(name: str, values: Tensor, training: bool) -> None:
    """Raises a ValueError, except in training on a GPU, where checking would synchronise; the loss is NaN as well."""
    if values.device.type == "meta" or values.numel() == 0 or (training and values.is_cuda):
        return
    low, high = values.aminmax()  # NaN if any value is NaN
    if not (low.isfinite() & high.isfinite()):
        raise ValueError(f"{name} has NaN or infinite values, expected finite ones.")


def _refuse_bad_pixels(pixel_values: Tensor | None, patch_size: int, channels: int, training: bool) -> None:
    if pixel_values is None:
        raise ValueError("pixel_values is None, expected a tensor [batch, channels, height, width].")
    if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
        raise ValueError(
            f"pixel_values has shape {list(pixel_values.shape)}, expected [batch, {channels}, height, width]."
        )
    height, width = pixel_values.shape[-2:]
    if height < patch_size or width < patch_size:
        raise ValueError(
            f"pixel_values has images of {height} x {width} pixels, smaller than a patch of {patch_size} x "
            f"{patch_size}; resize them."
        )
    _refuse_unfinite("pixel_values", pixel_values, training)


def _refuse_bad_features(features: Tensor, channels: int, training: bool) -> None:
    if features.ndim != 4 or features.shape[1] != channels or not features.is_floating_point():
        raise ValueError(
            f"backbone_features has shape {list(features.shape)} and type {features.dtype}, expected [batch, "
            f"{channels}, height, width] of floats, as returned by this model's embeddings.features."
        )
    _refuse_unfinite("backbone_features", features, training)


class PGSegVisionModel(PGSegPreTrainedModel):
    """The image tower: computes segment tokens of images and the grouping of their patches."""

    # Saved with its code, for trust_remote_code=True where this package is not installed.
    _auto_class = "AutoModel"
    config: PGSegVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_", r"^visual_", r"logit_scale$", r"text_prototypes$"]
    _input_embed_layer = "patch_embeddings"

    def __init__(self, config: PGSegVisionConfig):
        super().__init__(config)
        if npr_of(config).stage_prototypes:
            self._keep_in_fp32_modules_strict = ["npr.prototypes"]
        embeddings = PGSegVisionEmbeddings if config.backbone_config is None else PGSegBackboneEmbeddings
        self.embeddings = embeddings(config)
        self.encoder = PGSegVisionEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Variants with `eager_gradients` default to eager attention: the released variant's BatchNorm over nearly
        equal rows amplifies the rounding of other kernels to about 2e-5 of a gradient's largest entry. Evaluation
        without gradient uses sdpa."""
        if requested_attention is None and NPR_VARIANTS[self.config.npr_variant].eager_gradients:
            requested_attention = "eager"
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_npr: bool = False,
        output_patches: bool = False,
        move_prototypes: bool = True,
        backbone_features: Tensor | None = None,
        **kwargs: Any,
    ) -> PGSegVisionOutput:
        """Encodes images of any size of at least one patch.

        Args:
            pixel_values: [B, 3, H, W], normalised.
            output_attentions: whether to return each stage's soft assignment.
            output_hidden_states: whether to return the stages' inputs and the last output.
            output_npr: whether to return what the prototype losses need.
            output_patches: whether to return the patches that were grouped.
            move_prototypes: whether to update the prototypes with the mean of this batch, in training with gradient.
                Pass False for a part of a batch, see [`~PGSegVisionModel.move_prototypes`].
            backbone_features: [B, channels, h, w] from `embeddings.features` of a model with a backbone, instead of
                `pixel_values`. `image_sizes` are then the size of the grid times `patch_size`.

        Raises:
            ValueError: for a wrong shape, images smaller than a patch, both inputs, or values that are not finite (not
                checked in CUDA training).
        """
        name_unused(kwargs)
        if backbone_features is None and not torch.compiler.is_compiling():
            _refuse_bad_pixels(pixel_values, self.config.patch_size, self.config.num_channels, self.training)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        tokens, (height, width) = self._embed(pixel_values, backbone_features)
        if backbone_features is None:
            image_sizes = _image_sizes(pixel_values)
        else:
            image_sizes = _image_sizes(backbone_features) * self.config.patch_size
        dtype, tokens = tokens.dtype, tokens.to(self.encoder.compute_dtype or tokens.dtype)
        hidden_states, assignments, npr = [tokens], [], []
        group_tokens = patch_groups = None
        patches = tokens if self.config.segment_source == "inputs" else None
        for stage in self.encoder.stages:
            prototypes: Any = stage.npr
            seeds = prototypes.seeds() if prototypes is not None else None
            output: StageOutput = stage(tokens, group_tokens, seeds)
            tokens, group_tokens = output.tokens, output.group_tokens
            patches = output.grouped if patches is None else patches
            if output.features is not None:
                if move_prototypes:
                    prototypes.move(output.features.prototypes)
                npr.append(output.features)
            if output.logits is not None:
                assignment_BKL = output.logits.to(dtype).softmax(dim=1)
                assignments.append(assignment_BKL)
                patch_groups = assignment_BKL if patch_groups is None else assignment_BKL @ patch_groups
            tokens = mean_of_groups(patches, patch_groups) if tokens is None else tokens
            hidden_states.append(tokens)
        tokens, patches = self.layernorm(tokens.to(dtype)), patches.to(dtype)
        return PGSegVisionOutput(
            last_hidden_state=tokens,
            pooler_output=tokens.mean(dim=1),
            patch_hidden_state=self.layernorm(patches) if output_patches else None,
            grouping=patch_groups.unflatten(2, (height, width)),
            image_sizes=image_sizes,
            hidden_states=tuple(each.to(dtype) for each in hidden_states) if output_hidden_states else None,
            attentions=tuple(assignments) if output_attentions else None,
            npr=tuple(npr) if output_npr else None,
        )

    def _embed(
        self, pixel_values: Tensor | None, backbone_features: Tensor | None
    ) -> tuple[Tensor, tuple[int, int]]:
        if backbone_features is None:
            return self.embeddings(pixel_values)
        if pixel_values is not None or self.config.backbone_config is None:
            reason = "this model has no backbone" if pixel_values is None else "pixel_values are given too"
            raise ValueError(f"backbone_features are given, but {reason}; expected one of the two inputs.")
        if not torch.compiler.is_compiling():
            part: Any = self.embeddings.patch_embeddings
            _refuse_bad_features(backbone_features, sum(part.channels), self.training)
        return self.embeddings(backbone_features=backbone_features)

    def move_prototypes(self, prototypes: Sequence[Tensor]) -> None:
        """Updates each grouping stage's prototypes with the mean of a batch's prototypes [B, P, C]."""
        stages: Any = [stage.npr for stage in self.encoder.stages if stage.npr is not None]
        for stage, of_stage in zip(stages, prototypes):
            stage.move(of_stage)


def _image_sizes(pixel_values: Tensor) -> Tensor:
    batch, device = pixel_values.shape[0], pixel_values.device
    return torch.stack([torch.full((batch,), side, device=device) for side in pixel_values.shape[2:]], dim=1)


__all__ = ["PGSegVisionModel", "PGSegVisionOutput"]
