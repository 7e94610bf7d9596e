"""PGSeg models: GroupViT's two towers with non-learnable prototypes (NPR).

Shapes: B batch, L image tokens of a stage's input, K groups of a stage, C width, N texts, T text tokens, D joint width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbone import load_backbone
from .configuration_pgseg import PGSegConfig
from .features import ImageFeatures, JointImages, TextFeatures, TextOwners, clamped_scale, normalized
from .groupvit import load_groupvit
from .model_cards import WithModelCard
from .modeling_base import PGSegPreTrainedModel, name_unused
from .modeling_text import (
    EmbedsTokens,
    PGSegTextModel,
    PGSegTextModelWithProjection,
    mean_over_prompts,
    refuse_bad_texts,
)
from .modeling_vision import PGSegVisionModel, PGSegVisionOutput
from .npr import init_prototypes, npr_of
from .objective import Losses, compute_losses
from .precision import KeepsPrecision, full_precision
from .projection import PGSegProjection
from .token_ids import different_texts, find_words, padded_on_the_right, up_to_ends


@dataclass
class PGSegOutput(ModelOutput):
    """Output of [`PGSegModel`]. Losses are set with `return_loss`; parts are before their weights.

    Args:
        loss: weighted sum of the parts.
        contrastive_loss: the contrastive loss over the global batch.
        multi_label_loss: contrastive loss with each image's label texts, if these are given.
        image_prototype_loss: I-NPR, the sum over grouping stages.
        image_prototype_losses: I-NPR of each grouping stage, scalars.
        text_prototype_loss: T-NPR.
        assignment_loss: sum over grouping stages; None if its weight is 0.
        patch_text_loss: loss of `patch_targets`, if these are given.
        num_negatives: mean number of texts of all processes that an image is contrasted with.
        logits_per_image: [B, N], scaled similarity of images and texts.
        logits_per_text: [N, B].
        segment_logits: [B, K, N], scaled cosine of segment tokens and texts.
        patch_logits: [B, N, h, w], scaled cosine of patches and texts, for patch pooling without `return_loss`.
        image_embeds: [B, D], normalised.
        text_embeds: [N, D], normalised.
        segment_embeds: [B, K, D], normalised.
        grouping: [B, K, h, w], soft assignment of patches to groups.
        image_sizes: int64 [B, 2], height and width of the input in pixels.
        text_model_output: output of the text tower, with projected `pooler_output`.
        vision_model_output: [`PGSegVisionOutput`].
    """

    loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    multi_label_loss: Tensor | None = None
    image_prototype_loss: Tensor | None = None
    image_prototype_losses: tuple[Tensor, ...] | None = None
    text_prototype_loss: Tensor | None = None
    assignment_loss: Tensor | None = None
    patch_text_loss: Tensor | None = None
    num_negatives: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    segment_logits: Tensor | None = None
    patch_logits: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    segment_embeds: Tensor | None = None
    grouping: Tensor | None = None
    image_sizes: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: PGSegVisionOutput | None = None

    def add_losses(self, losses: Losses) -> None:
        """Sets the losses and their parts."""
        self.loss, self.num_negatives = losses.total, losses.negatives
        self.contrastive_loss, self.multi_label_loss = losses.contrastive, losses.multi_label
        self.image_prototype_loss = losses.image_prototype
        self.image_prototype_losses = losses.image_prototype_by_stage
        self.text_prototype_loss, self.assignment_loss = losses.text_prototype, losses.assignment
        self.patch_text_loss = losses.patch_text

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class PGSegModel(KeepsPrecision, WithModelCard, EmbedsTokens, PGSegPreTrainedModel):
    """PGSeg: an image and a text tower with a joint space and the losses of the method."""

    _auto_class = "AutoModel"

    def __init__(self, config: PGSegConfig):
        super().__init__(config)
        self.npr = npr_of(config)
        text_config, vision_config = config.text_config, config.vision_config
        self.text_model = PGSegTextModel._from_config(text_config)
        self.vision_model = PGSegVisionModel._from_config(vision_config)
        hidden, joint = config.projection_intermediate_dim, config.projection_dim
        self.visual_projection = PGSegProjection(vision_config.hidden_size, hidden, joint)
        self.text_projection = PGSegProjection(text_config.hidden_size, hidden, joint)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.logit_bias: nn.Parameter | None = None
        if config.contrastive_loss == "sigmoid" and not config.pooling.by_share:
            self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias_init_value))
        self.prototype_logit_scale: nn.Parameter | None = None
        self.precise_buffer = self.npr.text_buffer
        if self.precise_buffer is not None:
            self.prototype_logit_scale = nn.Parameter(torch.tensor(config.prototype_logit_scale_init_value))
            shape = (1, *self.npr.text_buffer_shape(config))
            self.register_buffer(self.precise_buffer, torch.empty(shape, dtype=torch.float32))
            init_prototypes(self.get_buffer(self.precise_buffer), self.npr.text_dim)
            self._keep_in_fp32_modules_strict = [self.precise_buffer]
        self.post_init()

    def train(self, mode: bool = True) -> "PGSegModel":
        """Sets the mode, but keeps a frozen text tower in evaluation mode and without gradient, also after loading."""
        super().train(mode)
        if self.config.freeze_text:
            for module in (self.text_model, self.text_projection):
                module.eval().requires_grad_(False)
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PGSegModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)
            if module.prototype_logit_scale is not None:
                init.constant_(module.prototype_logit_scale, self.config.prototype_logit_scale_init_value)
                init_prototypes(module.get_buffer(module.precise_buffer), module.npr.text_dim)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes texts.

        Args:
            input_ids: [N, T], or [N, P, T] for P prompts of each of N labels, whose embeddings are averaged.
            attention_mask: same shape.

        Returns:
            The text tower's output with `pooler_output` [N, D] projected and not normalised.
        """
        return self._encode_texts(input_ids, attention_mask, False, position_ids=position_ids, **kwargs)[0]

    def _encode_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        sparing: bool = False,
        **kwargs: Any,
    ) -> tuple[BaseModelOutputWithPooling, Tensor | None]:
        """Applies the text tower to [..., T] tokens; also returns the prototypes from
        [`~pgseg_hf.npr.NPR.observe_texts`]. If `sparing`, equal texts are encoded once and tokens after the longest
        text's end are skipped (their hidden states are 0)."""
        input_ids = input_ids.flatten(0, -2)
        attention_mask = None if attention_mask is None else attention_mask.flatten(0, -2)
        rows, length = None, input_ids.shape[1]
        if sparing:
            input_ids, attention_mask, rows = different_texts(input_ids, attention_mask)
            input_ids, attention_mask = up_to_ends(input_ids, attention_mask, self.config.text_config)
        outputs = self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )
        if rows is not None:
            outputs.pooler_output = outputs.pooler_output[rows]
            outputs.last_hidden_state = outputs.last_hidden_state[rows]
        if sparing:
            left_out = length - outputs.last_hidden_state.shape[1]
            outputs.last_hidden_state = nn.functional.pad(outputs.last_hidden_state, (0, 0, 0, left_out))
        return outputs, self.npr.observe_texts(self, outputs.pooler_output)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor | None = None, **kwargs: Any) -> PGSegVisionOutput:
        """Encodes images [B, 3, H, W]. `pooler_output` [B, D] and `segment_embeds` [B, K, D] are in the joint space,
        not normalised."""
        parts = self.config.pooling.parts
        by_patches, by_groups = parts == "patches", parts == "groups"
        outputs = self.vision_model(pixel_values, return_dict=True, output_patches=by_patches, **kwargs)
        if by_patches:
            outputs.patch_embeds = self.visual_projection(outputs.patch_hidden_state)
        # BatchNorm computes its statistics from the parts that the contrastive loss compares with texts.
        outputs.pooler_output = self.visual_projection(
            outputs.pooler_output, use_running_stats=by_groups or by_patches
        )
        outputs.segment_embeds = self.visual_projection(
            outputs.last_hidden_state, use_running_stats=not by_groups
        )
        return outputs

    def get_logits(self, image_features: PGSegVisionOutput, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled similarities of images [B, N] and segment tokens [B, K, N] with texts, in float32 or float64.

        Args:
            image_features: output of [`~PGSegModel.get_image_features`].
            text_embeds: [N, D], normalised or not.
        """
        with full_precision(text_embeds.device.type):
            text = normalized(text_embeds)
            images = JointImages.normalized(self._image_features(image_features))
            scale = clamped_scale(self.logit_scale, self.config)
            pooled = images.logits(text, scale, self.config)
            return pooled, scale * (images.segments @ text.T)

    def get_patch_logits(self, image_features: PGSegVisionOutput, text_embeds: Tensor) -> Tensor | None:
        """Scaled cosines of patches and texts [B, N, h, w], in float32 or float64; None without patch pooling. The
        arguments are those of [`~PGSegModel.get_logits`]."""
        if image_features.patch_embeds is None:
            return None
        with full_precision(text_embeds.device.type):
            scale = clamped_scale(self.logit_scale, self.config)
            logits_BNL = scale * (normalized(text_embeds) @ normalized(image_features.patch_embeds).mT)
            return logits_BNL.unflatten(2, image_features.grouping.shape[-2:])

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        tag_input_ids: Tensor | None = None,
        tag_attention_mask: Tensor | None = None,
        text_targets: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        backbone_features: Tensor | None = None,
        patch_targets: Tensor | None = None,
        **kwargs: Any,
    ) -> PGSegOutput:
        """Compares images with texts and, with `return_loss`, computes the losses.

        Args:
            input_ids: [N, T] texts, or [N, P, T] labels with P prompts each. For the losses text i belongs to image i.
            pixel_values: [B, 3, H, W], normalised.
            attention_mask: shape of `input_ids`.
            tag_input_ids: [B, M, T], prompts of each image's nouns or tags, for the multi-label loss.
            tag_attention_mask: [B, M, T]; a mask of zeros marks an absent label.
            text_targets: [B, N], bool or 0 and 1: which texts belong to which image, for texts that images share. The
                contrastive loss then has several positives.
            return_loss: whether to compute the losses. Hidden states of texts are then 0 after the longest text's end.
            output_attentions: whether to return each stage's soft assignment (in `vision_model_output`).
            output_hidden_states: whether to return the hidden states of the towers.
            backbone_features: replaces `pixel_values`, see [`PGSegVisionModel`].
            patch_targets: [B, h, w, N], share of each grid cell that shows each text, 0 where unknown. Adds a loss on
                the patches; requires `contrastive_pooling="patches"`.

        Raises:
            ValueError: for pixels or texts of the wrong shape, NaN pixels, or losses without one text per image.
        """
        # The former names; Trainer treats arguments with "label" in their names as targets.
        tag_input_ids = kwargs.pop("label_input_ids", tag_input_ids)
        tag_attention_mask = kwargs.pop("label_attention_mask", tag_attention_mask)
        name_unused(kwargs)
        return_loss = bool(return_loss)
        refuse_bad_texts(input_ids, return_loss)
        towers = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        all_ids, all_mask, owners = input_ids, attention_mask, None
        if return_loss:
            all_ids, all_mask, owners = self.gather_texts(
                input_ids, attention_mask, tag_input_ids, tag_attention_mask, text_targets, patch_targets
            )
        # Captions and labels share a pass through the text tower, so that BatchNorm sees them together. Texts come
        # before images, because checking token ids synchronises with the GPU, which has little queued at this point.
        text, text_features = self._encode_texts(
            all_ids, all_mask, return_loss, position_ids=position_ids, **towers
        )
        vision = self.get_image_features(
            pixel_values=pixel_values,
            backbone_features=backbone_features,
            output_npr=return_loss,
            return_dict=True,
            **towers,
        )
        text.pooler_output = text.pooler_output[: len(input_ids)]
        text.last_hidden_state = text.last_hidden_state[: input_ids.shape[:-1].numel()]
        logits_per_image, segment_logits = self.get_logits(vision, text.pooler_output)
        output = PGSegOutput(
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            segment_logits=segment_logits,
            patch_logits=None if return_loss else self.get_patch_logits(vision, text.pooler_output),
            image_embeds=normalized(vision.pooler_output),
            text_embeds=normalized(text.pooler_output),
            segment_embeds=normalized(vision.segment_embeds),
            grouping=vision.grouping,
            image_sizes=vision.image_sizes,
            text_model_output=text,
            vision_model_output=vision,
        )
        if return_loss:
            output.add_losses(compute_losses(self, self._image_features(vision), text_features, owners))
            vision.npr = None
        return output

    @staticmethod
    def gather_texts(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        tag_input_ids: Tensor | None = None,
        tag_attention_mask: Tensor | None = None,
        text_targets: Tensor | None = None,
        patch_targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, TextOwners]:
        """The captions followed by the label texts of a batch [N, T], their attention mask, and which images they
        belong to. The arguments are those of `forward`."""
        owners = TextOwners(len(input_ids), text_targets=text_targets, patch_targets=patch_targets)
        if tag_input_ids is None:
            return input_ids, attention_mask, owners
        if tag_input_ids.ndim != 3 or tag_input_ids.shape[-1] != input_ids.shape[-1]:
            raise ValueError(
                f"tag_input_ids has shape {list(tag_input_ids.shape)}, expected [images, labels, "
                f"{input_ids.shape[-1]}], padded to the length of input_ids."
            )
        if tag_attention_mask is None:
            tag_attention_mask = torch.ones_like(tag_input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        owners.label_mask = present = tag_attention_mask.any(-1)
        places = present.nonzero(as_tuple=True)
        ids = torch.cat([input_ids, tag_input_ids[places]])
        mask = torch.cat([attention_mask, tag_attention_mask[places].to(attention_mask.dtype)])
        return ids, mask, owners

    def _encode_texts(
        self, input_ids: Tensor, attention_mask: Tensor | None, for_losses: bool, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPooling, TextFeatures | None]:
        """The text tower's output, with `pooler_output` [N, D] projected, and the features that the losses need."""
        if for_losses:
            input_ids, attention_mask = padded_on_the_right(
                input_ids, attention_mask, self.config.text_config
            )
        # The tags of a batch repeat a few words. With dropout, equal texts have different embeddings.
        config = self.config.text_config
        asked = {name: kwargs.get(name) for name in ("output_attentions", "output_hidden_states")}
        details = any(getattr(config, name) if value is None else value for name, value in asked.items())
        plain = not details and kwargs.get("position_ids") is None
        sparing = for_losses and plain and not config.attention_dropout
        output, prototypes = self._encode_text(input_ids, attention_mask, sparing=sparing, **kwargs)
        pooled = output.pooler_output
        output.pooler_output = mean_over_prompts(self.text_projection(pooled), input_ids)
        if not for_losses:
            return output, None
        word_mask, has_ended = find_words(input_ids, self.config.text_config)
        features = TextFeatures(
            output.pooler_output, input_ids.masked_fill(has_ended, -1), prototypes=prototypes
        )
        self.npr.add_text_features(self, features, pooled, output.last_hidden_state, word_mask)
        return output, features

    def _image_features(self, vision: PGSegVisionOutput) -> ImageFeatures:
        stages = vision.npr or ()
        if not self.config.assignment_weight:
            stages = tuple(stage._replace(responsibilities=None, logits=None) for stage in stages)
        pooling = self.config.pooling
        weighs_groups = pooling.by_share and pooling.parts == "groups"
        areas = vision.grouping.flatten(2).mean(2) if weighs_groups else None
        grid = None
        if vision.npr is not None and vision.patch_embeds is not None:
            grid = torch.tensor([vision.grouping.shape[-2:]] * len(vision.grouping))
        return ImageFeatures(
            vision.pooler_output, vision.segment_embeds, areas, vision.patch_embeds, grid, stages
        )

    def encode_part(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        backbone_features: Tensor | None = None,
    ) -> ImageFeatures | TextFeatures:
        """Features of part of a batch, images [B, 3, H, W] or texts [N, T], for `compute_losses`. Image prototypes are
        not updated."""
        if input_ids is None:
            vision = self.get_image_features(
                pixel_values=pixel_values,
                backbone_features=backbone_features,
                output_npr=True,
                move_prototypes=False,
                return_dict=True,
            )
            return self._image_features(vision)
        return self._encode_texts(input_ids, attention_mask, for_losses=True)[1]

    @classmethod
    def from_parts(
        cls, backbone_name_or_path: str | None = None, text_name_or_path: str | None = None, **kwargs: Any
    ) -> "PGSegModel":
        """Creates a model from pretrained parts; the rest has random weights.

        Args:
            backbone_name_or_path: folder or Hub name of an [`~transformers.AutoBackbone`]. Fields of its configuration
                can be set by `vision_config={"backbone_config": {"out_features": ...}}`.
            text_name_or_path: the same for a [`PGSegTextModelWithProjection`] or [`PGSegModel`], for its text tower and
                joint space.
            kwargs: fields of [`PGSegConfig`].

        Raises:
            ValueError: if the parts do not fit the fields.
        """
        backbone = text = None
        if backbone_name_or_path is not None:
            vision = dict(kwargs.pop("vision_config", None) or {})
            fields = vision.pop("backbone_config", None) or {}
            backbone = load_backbone(backbone_name_or_path, **fields)
            kwargs["vision_config"] = vision | {"backbone_config": backbone.config}
        if text_name_or_path is not None:
            text = PGSegTextModelWithProjection.from_pretrained(text_name_or_path, dtype="float32")
            names = ("text_config", "projection_dim", "projection_intermediate_dim")
            if given := [name for name in names if name in kwargs]:
                raise ValueError(f"{text_name_or_path} sets {', '.join(given)}; leave them out.")
            kwargs |= {name: getattr(text.config, name) for name in names}
        model = cls(PGSegConfig(**kwargs))
        if backbone is not None:
            target: Any = model.vision_model.embeddings.patch_embeddings
            target.backbone.load_state_dict(backbone.state_dict())
        if text is not None:
            model.text_model.load_state_dict(text.text_model.state_dict())
            model.text_projection.load_state_dict(text.text_projection.state_dict())
        return model.eval()

    @classmethod
    def from_groupvit(cls, name_or_path: str, npr_variant: str = "corrected", **kwargs: Any) -> "PGSegModel":
        """Warm start from a Transformers GroupViT checkpoint. Only NPR's tensors are new; they are named in the log.

        The image tower uses eager attention like GroupViT's, for the same outputs without NPR (the released variant
        only in training and with gradient, see `PGSegVisionModel`). `set_attn_implementation("sdpa")` is faster.

        Args:
            name_or_path: Hub name or folder of a `GroupViTModel`.
            npr_variant: NPR variant of the new model.
            kwargs: further fields of [`PGSegConfig`], for example `image_prototype_weight`.

        Raises:
            ValueError: if the checkpoint does not exist, is not a GroupViT, or is incomplete.
        """
        return load_groupvit(cls, name_or_path, npr_variant, **kwargs)


__all__ = ["PGSegModel", "PGSegOutput"]
