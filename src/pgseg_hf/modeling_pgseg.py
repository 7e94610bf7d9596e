"""PGSeg models: GroupViT's two towers with non-learnable prototypes (NPR).

Shapes: B batch, L image tokens of a stage's input, K groups of a stage, C width, N texts, T text tokens, D joint width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, ModelCard
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .backbone import (
    PGSegBackboneEmbeddings,
    PGSegBackboneFeatures,
    backbones_set_aside,
    load_backbone,
)
from .configuration_pgseg import PGSegConfig, PGSegTextConfig, PGSegVisionConfig
from .groupvit import config_from_groupvit, read_groupvit
from .layers import (
    PGSegAssignAttention,
    PGSegAttention,
    PGSegMLP,
    PGSegProjection,
    PGSegStage,
    PGSegStagePrototypes,
    PGSegVisionEmbeddings,
    PGSegVisionEncoder,
    apply_keeping_precision,
    estimation_dtype,
    full_precision,
    init_prototypes,
    mean_of_groups,
)
from .model_cards import generate_model_card, is_processor_card
from .objective import (
    ImageFeatures,
    JointImages,
    StageFeatures,
    TextFeatures,
    TextOwners,
    clamped_scale,
    compute_losses,
    normalized,
)
from .prototypes import PrototypeEstimate, estimate_prototypes, updated_prototypes
from .quantization import METHOD  # noqa: F401 (from here on transformers knows the method)
from .token_ids import (
    different_texts,
    find_words,
    padded_on_the_right,
    rotated,
    starts_of_texts,
    up_to_ends,
)
from .weights import what_is_wrong_with

if TYPE_CHECKING:
    # Never run: what a file imports is saved beside the weights, and there `custom_pipelines` names this class.
    from .pipeline import OpenVocabularySegmentationPipeline  # noqa: F401

logger = logging.get_logger(__name__)

# Released `TextTransformer.Atten`: both numbers are fixed in the code.
RELEASED_TEXT_PROTOTYPES = 8
RELEASED_TEXT_MOMENTUM = 0.9


@dataclass
class PGSegVisionOutput(ModelOutput):
    """Output of [`PGSegVisionModel`] and, with embeddings in the joint space, of [`PGSegModel.get_image_features`].

    Args:
        last_hidden_state: [B, K, C], the segment tokens after the last stage and LayerNorm.
        pooler_output: [B, C], their mean; from `get_image_features` its projection [B, D], not normalised.
        segment_embeds: [B, K, D], projected segment tokens, not normalised; only from `get_image_features`.
        patch_hidden_state: [B, L, C], the patches that groups are named by (as the first stage groups them, or as they
            enter it where `segment_source` says so), after the same LayerNorm.
        patch_embeds: [B, L, D], these projected, not normalised; only from `get_image_features` with patch pooling.
        grouping: [B, K, h, w], soft assignment of patches to the last stage's groups, on the true patch grid.
        image_sizes: int64 [B, 2], height and width of the input in pixels.
        hidden_states: the input of each stage and the output of the last, where asked for.
        attentions: soft assignment [B, K, L] of each grouping stage, where asked for.
        npr: for each grouping stage what the prototype losses need (see `PGSegStage.forward`), where asked for.
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
    npr: tuple[tuple[Tensor, ...], ...] | None = None


@dataclass
class PGSegOutput(ModelOutput):
    """Output of [`PGSegModel`].

    Args:
        loss: weighted sum of the parts, with `return_loss`.
        contrastive_loss: mean of the two directions of InfoNCE over the global batch.
        multi_label_loss: the same with soft targets over each image's label texts, where these are given.
        image_prototype_loss: I-NPR, the sum over grouping stages, before its weight.
        image_prototype_losses: the stages' parts of it, a scalar for each grouping stage.
        text_prototype_loss: T-NPR, before its weight.
        assignment_loss: sum over grouping stages, before its weight; where the weight is not 0.
        patch_text_loss: of `patch_targets`, before its weight.
        num_negatives: texts of all processes that an image is told apart from in the contrastive loss, on average.
        logits_per_image: [B, N], scaled similarity of images and texts.
        logits_per_text: [N, B].
        segment_logits: [B, K, N], scaled cosine of segment tokens and texts.
        patch_logits: [B, N, h, w], scaled cosine of patches and texts; with patch pooling.
        image_embeds: [B, D], normalised.
        text_embeds: [N, D], normalised.
        segment_embeds: [B, K, D], normalised.
        grouping: [B, K, h, w], soft assignment of patches to groups.
        image_sizes: int64 [B, 2], height and width of the input in pixels.
        text_model_output: output of the text tower, `pooler_output` projected.
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

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class PGSegPreTrainedModel(PreTrainedModel):
    """Weight initialisation, and what transformers needs to know of PGSeg models."""

    config: PGSegConfig
    base_model_prefix = "pgseg"
    input_modalities: tuple[str, ...] = ("image", "text")
    _no_split_modules = [
        "PGSegVisionEmbeddings",
        "PGSegBackboneEmbeddings",
        "PGSegLayer",
        "PGSegStage",
        "CLIPTextEmbeddings",
        "CLIPEncoderLayer",
    ]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Names of those that the checkpoint lacked and nothing has trained since.
    random_weights: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As ever; of a folder that cannot be read the likely reason is named. Weights that it lacks are random, as
        ever with a warning, and a pipeline refuses such a model until it is put in training mode.

        Raises:
            OSError: such a folder: with a pointer of git-lfs or a web page for a file, a download that was cut off.
        """
        try:
            model, report = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except Exception as error:
            reason = (
                what_is_wrong_with(pretrained_model_name_or_path) if pretrained_model_name_or_path else None
            )
            if reason is None:
                raise
            raise OSError(reason) from error
        model.random_weights = tuple(sorted(report["missing_keys"]))
        return (model, report) if output_loading_info else model

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.random_weights = ()
        return super().train(mode)

    def set_attn_implementation(self, attn_implementation: Any, allow_all_kernels: bool = False) -> None:
        """As ever, but a backbone that cannot attend like this goes on as it did."""
        with backbones_set_aside(self) as backbones:
            before = [backbone.config._attn_implementation for backbone in backbones]
            super().set_attn_implementation(attn_implementation, allow_all_kernels)
        for backbone, known in zip(backbones, before):
            # Written down for it without asking whether it can.
            asked = backbone.config._attn_implementation
            backbone.config._attn_implementation = known
            try:
                backbone.set_attn_implementation(asked, allow_all_kernels)
            except (ValueError, ImportError) as error:
                logger.warning(f"{type(backbone).__name__} goes on with {known}: {error}")

    def enable_input_require_grads(self) -> None:
        """As ever, but for backbones, whose embeddings may give more than a tensor."""
        with backbones_set_aside(self):
            super().enable_input_require_grads()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside its tree transformers leaves out modules without tensors of their own, such as an MLP, in
        # case `_init_weights` overwrites what was loaded; `transformers.initialization` does not.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range * self.config.initializer_factor
        if isinstance(module, PGSegVisionEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, PGSegStage) and module.group_token is not None:
            if module.group_projector is None:
                init.trunc_normal_(module.group_token, std=std)
            else:
                init.zeros_(module.group_token)
        elif isinstance(module, (PGSegMLP, PGSegAttention, PGSegAssignAttention)):
            for child in module.children():
                if isinstance(child, nn.Linear):
                    init.trunc_normal_(child.weight, std=std)
        elif isinstance(module, PGSegProjection):
            linears: list[Any] = [module[0], module[3]]
            for linear in linears:
                bound = linear.in_features**-0.5
                init.uniform_(linear.weight, -bound, bound)
                init.uniform_(linear.bias, -bound, bound)
        elif isinstance(module, PGSegBackboneFeatures):
            init.trunc_normal_(module.projection.weight, std=std)
        elif isinstance(module, PGSegStagePrototypes):
            init_prototypes(module.prototypes)


def all_finite(values: Tensor) -> Tensor:
    """Whether no value is NaN or infinite; the minimum and maximum of what holds a NaN are NaN."""
    low, high = values.aminmax()
    return low.isfinite() & high.isfinite()


def _cannot_be_asked(values: Tensor, training: bool) -> bool:
    """Whether nobody looks for NaN: in training a GPU would have to be waited for, and the loss is then NaN as well."""
    return values.device.type == "meta" or values.numel() == 0 or (training and values.is_cuda)


def _refuse_bad_pixels(
    pixel_values: Tensor | None, patch_size: int, channels: int, training: bool = False
) -> None:
    if pixel_values is None:
        raise ValueError("pixel_values is None, expected a tensor [batch, channels, height, width].")
    if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
        raise ValueError(
            f"pixel_values has shape {list(pixel_values.shape)}, expected [batch, {channels}, height, width]."
        )
    height, width = pixel_values.shape[-2:]
    if height < patch_size or width < patch_size:
        raise ValueError(
            f"pixel_values is {height} x {width} pixels, smaller than a patch of {patch_size} x {patch_size}; "
            "resize it."
        )
    if _cannot_be_asked(pixel_values, training):
        return
    if not all_finite(pixel_values):
        raise ValueError("pixel_values holds NaN or infinite values; expected normalised finite pixels.")


def _refuse_bad_features(features: Tensor, channels: int, training: bool = False) -> None:
    if features.ndim != 4 or features.shape[1] != channels or not features.is_floating_point():
        raise ValueError(
            f"backbone_features has shape {list(features.shape)} and type {features.dtype}, expected [batch, "
            f"{channels}, height, width] of floats, as this model's embeddings.features gives them."
        )
    if _cannot_be_asked(features, training):
        return
    if not all_finite(features):
        raise ValueError("backbone_features holds NaN or infinite values; expected finite features.")


def _name_unused(kwargs: dict[str, Any]) -> None:
    """Says which arguments nothing is done with, a misspelt one for instance.

    Raises:
        ValueError: GroupViT's `output_segmentation`, whose output would be missed.
    """
    if kwargs.get("output_segmentation"):
        raise ValueError(
            "output_segmentation is True, an argument of GroupViT; segment_logits and grouping are always returned "
            "here, and processor.post_process_semantic_segmentation(outputs, target_sizes) makes label maps of them."
        )
    unused = sorted(name for name, value in kwargs.items() if value is not None and value is not False)
    if unused and not torch.compiler.is_compiling():
        logger.warning_once(f"not used: {', '.join(unused)}; see the arguments of forward.")


class PGSegVisionModel(PGSegPreTrainedModel):
    """The image tower: a photo to segment tokens and the grouping of its patches."""

    # Saved with its code, for trust_remote_code=True where this package is not installed.
    _auto_class = "AutoModel"
    config: PGSegVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [
        r"^text_",
        r"^visual_projection",
        r"logit_scale$",
        r"text_prototypes$",
    ]

    def __init__(self, config: PGSegVisionConfig):
        super().__init__(config)
        if config.npr_variant != "none":
            self._keep_in_fp32_modules_strict = ["npr.prototypes"]
        embeddings = PGSegVisionEmbeddings if config.backbone_config is None else PGSegBackboneEmbeddings
        self.embeddings = embeddings(config)
        self.encoder = PGSegVisionEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """The released variant attends eagerly unless asked otherwise: its BatchNorm over nearly equal rows amplifies
        the rounding of other kernels to some 2e-5 of a gradient's largest entry. In evaluation without gradient, where
        that does not matter, it then attends by sdpa."""
        if requested_attention is None and self.config.npr_variant == "released":
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
            output_attentions: return each stage's soft assignment.
            output_hidden_states: return the stages' inputs and the last output.
            output_npr: return what the prototype losses need.
            output_patches: return the patches that were grouped.
            move_prototypes: in training with gradient, move the prototypes to the mean of this batch; False where the
                batch is a part of one, see [`~PGSegVisionModel.move_prototypes`].
            backbone_features: [B, channels, h, w] instead of `pixel_values`, from `embeddings.features` of a model with
                a backbone; `image_sizes` are then those of the grid times `patch_size`.

        Raises:
            ValueError: wrong shape, images smaller than a patch, both inputs; NaN or infinite pixels or features, which
                in training on CUDA nobody looks for.
        """
        _name_unused(kwargs)
        if backbone_features is None and not torch.compiler.is_compiling():
            _refuse_bad_pixels(pixel_values, self.config.patch_size, self.config.num_channels, self.training)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        tokens, (height, width) = self._embed(pixel_values, backbone_features)
        hidden_states, assignments, npr = [tokens], [], []
        group_tokens = patch_groups = None
        patches = tokens if self.config.segment_source == "inputs" else None
        for stage in self.encoder.stages:
            prototypes: Any = stage.npr
            seeds = prototypes.seeds() if prototypes is not None else None
            tokens, group_tokens, logits, losses_need, grouped = stage(tokens, group_tokens, seeds)
            patches = grouped if patches is None else patches
            if losses_need is not None:
                if move_prototypes:
                    prototypes.move(losses_need[1])
                npr.append(losses_need)
            if logits is not None:
                assignment_BKL = logits.softmax(dim=1)
                assignments.append(assignment_BKL)
                patch_groups = assignment_BKL if patch_groups is None else assignment_BKL @ patch_groups
            tokens = mean_of_groups(patches, patch_groups) if tokens is None else tokens
            hidden_states.append(tokens)
        tokens = self.layernorm(tokens)
        return PGSegVisionOutput(
            last_hidden_state=tokens,
            pooler_output=tokens.mean(dim=1),
            patch_hidden_state=self.layernorm(patches) if output_patches else None,
            grouping=patch_groups.unflatten(2, (height, width)),
            image_sizes=(
                _image_sizes(pixel_values)
                if backbone_features is None
                else _image_sizes(backbone_features) * self.config.patch_size
            ),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
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
        """Moves each grouping stage's prototypes to the mean of a batch's, [B, P, C]."""
        stages: Any = [stage.npr for stage in self.encoder.stages if stage.npr is not None]
        for stage, of_stage in zip(stages, prototypes):
            stage.move(of_stage)


def _image_sizes(pixel_values: Tensor) -> Tensor:
    batch, _, height, width = pixel_values.shape
    return torch.stack(
        [torch.full((batch,), side, device=pixel_values.device) for side in (height, width)], dim=1
    )


class PGSegTextModel(CLIPTextModel):
    """The text tower: transformers' CLIP text transformer with PGSeg's configuration."""

    _auto_class = "AutoModel"
    config: PGSegTextConfig
    base_model_prefix = "text_model"
    _keys_to_ignore_on_load_unexpected = [
        r"^vision_model",
        r"projection",
        r"logit_scale$",
        r"text_prototypes$",
    ]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # As in `PGSegPreTrainedModel`.
        super()._initialize_weights(module)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """As CLIP's, on whichever side texts [N, T] are padded: without `position_ids` each is encoded as if its
        padding were on the right, where attentions have it too."""
        kwargs["return_dict"] = True
        starts_N = None
        if input_ids is not None and position_ids is None:
            starts_N = starts_of_texts(input_ids, attention_mask, self.config)
        if starts_N is None:
            return super().forward(input_ids, attention_mask, position_ids, **kwargs)
        mask = None if attention_mask is None else rotated(attention_mask, starts_N)
        outputs = super().forward(rotated(input_ids, starts_N), mask, **kwargs)
        outputs.last_hidden_state = rotated(outputs.last_hidden_state, -starts_N)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(rotated(hidden, -starts_N) for hidden in outputs.hidden_states)
        return outputs


class PGSegTextModelWithProjection(PGSegPreTrainedModel):
    """The text tower with its projection: texts to the joint space, from a folder of its own or a whole model's."""

    _auto_class = "AutoModelForTextEncoding"
    input_modalities = ("text",)
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [
        r"^vision_model",
        r"^visual_projection",
        r"logit_(scale|bias)$",
        r"text_prototypes$",
    ]

    def __init__(self, config: PGSegConfig):
        super().__init__(config)
        text_config = config.text_config
        self.text_model = PGSegTextModel._from_config(text_config)
        self.text_projection = PGSegProjection(
            text_config.hidden_size, config.projection_intermediate_dim, config.projection_dim
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeddings [N, D] of texts, projected and not normalised, as `PGSegModel.get_text_features` gives them.

        Args:
            input_ids: [N, T], or [N, P, T] for P prompts of each of N labels, whose embeddings are averaged.
            attention_mask: of the same shape.
        """
        if input_ids.ndim not in (2, 3):
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)}, expected token ids [texts, length] or "
                "[labels, prompts, length]."
            )
        mask = None if attention_mask is None else attention_mask.flatten(0, -2)
        outputs = self.text_model(input_ids.flatten(0, -2), attention_mask=mask, return_dict=True)
        embeds = self.text_projection(outputs.pooler_output)
        return embeds.unflatten(0, input_ids.shape[:2]).mean(1) if input_ids.ndim == 3 else embeds


class PGSegModel(PGSegPreTrainedModel):
    """Both towers in one joint space, with the losses of the method."""

    _auto_class = "AutoModel"

    def __init__(self, config: PGSegConfig):
        super().__init__(config)
        text_config, vision_config = config.text_config, config.vision_config
        self.text_model = PGSegTextModel._from_config(text_config)
        self.vision_model = PGSegVisionModel._from_config(vision_config)
        hidden, joint = config.projection_intermediate_dim, config.projection_dim
        self.visual_projection = PGSegProjection(vision_config.hidden_size, hidden, joint)
        self.text_projection = PGSegProjection(text_config.hidden_size, hidden, joint)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.logit_bias: nn.Parameter | None = None
        if config.contrastive_loss == "sigmoid" and config.contrastive_pooling not in ("mixture", "patches"):
            self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias_init_value))
        self.prototype_logit_scale: nn.Parameter | None = None
        if config.npr_variant != "none":
            self.prototype_logit_scale = nn.Parameter(torch.tensor(config.prototype_logit_scale_init_value))
            count, width = self._text_prototypes_shape()
            self.register_buffer(self._text_prototype_name, torch.empty(1, count, width, dtype=torch.float32))
            self._init_text_prototypes()
            self._keep_in_fp32_modules_strict = [self._text_prototype_name]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Those of the text tower's tokens."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "PGSegModel":
        """As ever, but a frozen text tower stays in evaluation mode and without gradient, after loading too."""
        super().train(mode)
        if self.config.freeze_text:
            for module in (self.text_model, self.text_projection):
                module.eval().requires_grad_(False)
        return self

    def _text_prototypes_shape(self) -> tuple[int, int]:
        vision = self.config.vision_config
        num_groups = vision.num_output_groups[sum(tokens > 0 for tokens in vision.num_group_tokens) - 1]
        if self.config.npr_variant == "released":
            return self.config.num_text_prototypes or RELEASED_TEXT_PROTOTYPES, 1
        return self.config.num_text_prototypes or num_groups, self.config.projection_dim

    @property
    def _text_prototype_name(self) -> str | None:
        return {"released": "released_text_prototypes", "corrected": "text_prototypes"}.get(
            self.config.npr_variant
        )

    def _tensors_left_out(self) -> tuple[str, ...]:
        """Prefixes of GroupViT's tensors that this model has no use for."""
        vision = self.config.vision_config
        if vision.segment_source == "groups":
            return ()
        last = sum(tokens > 0 for tokens in vision.num_group_tokens) - 1
        grouping = f"vision_model.encoder.stages.{last}.downsample."
        return tuple(
            grouping + part for part in ("assign.v_proj.", "assign.proj.", "norm_new_x.", "mlp_channels.")
        )

    def _init_text_prototypes(self) -> None:
        # The released scalars are normalised over the prototypes.
        dim = 1 if self.config.npr_variant == "released" else -1
        init_prototypes(self.get_buffer(self._text_prototype_name), dim)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        if self._text_prototype_name not in self._buffers:
            return super()._apply(fn, recurse)
        return apply_keeping_precision(self, self._text_prototype_name, super()._apply, fn, recurse)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PGSegModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)
            if module.prototype_logit_scale is not None:
                init.constant_(module.prototype_logit_scale, self.config.prototype_logit_scale_init_value)
                module._init_text_prototypes()

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
            attention_mask: of the same shape.

        Returns:
            the text tower's output, `pooler_output` [N, D] projected and not normalised.
        """
        outputs, _ = self._encode_text(input_ids, attention_mask, position_ids, **kwargs)
        embeds = self.text_projection(outputs.pooler_output)
        outputs.pooler_output = (
            embeds.unflatten(0, input_ids.shape[:2]).mean(1) if input_ids.ndim == 3 else embeds
        )
        return outputs

    def _encode_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        sparing: bool = False,
        **kwargs: Any,
    ) -> tuple[BaseModelOutputWithPooling, PrototypeEstimate | None]:
        """The text tower on [..., T] tokens; if `sparing`, equal texts pass its transformer once and what follows the
        longest text's end not at all, its hidden states are 0. In the released variant every call, in evaluation too,
        estimates text prototypes [N, 8, 1] from the scalars of the pooled text, normalised over the prototypes, and
        moves their buffer."""
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
        if self.config.npr_variant != "released" or torch.compiler.is_exporting():
            return outputs, None
        buffer = self.released_text_prototypes
        with full_precision(buffer.device.type):
            scalars = outputs.pooler_output.detach().to(estimation_dtype(outputs.pooler_output.dtype))[
                ..., None
            ]
            iterations = self.config.vision_config.num_prototype_iterations
            estimate = estimate_prototypes(scalars, buffer, iterations, norm_dim=1)
            mean = estimate.prototypes.mean(0)
            buffer.copy_(updated_prototypes(buffer[0], mean, RELEASED_TEXT_MOMENTUM, renormalize=False)[None])
        return outputs, estimate

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor | None = None, **kwargs: Any) -> PGSegVisionOutput:
        """Encodes images [B, 3, H, W]; `pooler_output` [B, D] and `segment_embeds` [B, K, D] are in the joint space,
        not normalised. All that segmentation needs of an image."""
        pooling = self.config.contrastive_pooling
        by_patches, by_groups = pooling == "patches", pooling in ("groups", "mixture")
        outputs = self.vision_model(pixel_values, return_dict=True, output_patches=by_patches, **kwargs)
        if by_patches:
            outputs.patch_embeds = self.visual_projection(outputs.patch_hidden_state)
        # BatchNorm takes its statistics from what the contrastive loss compares with texts.
        outputs.pooler_output = self.visual_projection(
            outputs.pooler_output, use_running_stats=by_groups or by_patches
        )
        outputs.segment_embeds = self.visual_projection(
            outputs.last_hidden_state, use_running_stats=not by_groups
        )
        return outputs

    def get_logits(self, image_features: PGSegVisionOutput, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled similarities with texts: of images [B, N] and of segment tokens [B, K, N], in float32 or better.

        Args:
            image_features: from [`~PGSegModel.get_image_features`].
            text_embeds: [N, D], normalised or not.
        """
        with full_precision(text_embeds.device.type):
            text = normalized(text_embeds)
            images = JointImages.normalized(self._image_features(image_features))
            scale = clamped_scale(self.logit_scale, self.config)
            pooled = images.logits(text, scale, self.config)
            return pooled, scale * (images.segments @ text.T)

    def get_patch_logits(self, image_features: PGSegVisionOutput, text_embeds: Tensor) -> Tensor | None:
        """Scaled cosines of the patches and texts, [B, N, h, w], in float32 or better; None without patch pooling.
        Arguments as for [`~PGSegModel.get_logits`]."""
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
        """Compares images with texts and, with `return_loss`, computes the losses of the method.

        Args:
            input_ids: [N, T] texts, or [N, P, T] labels with P prompts each. For the losses text i belongs to image i.
            pixel_values: [B, 3, H, W], normalised.
            attention_mask: of the shape of `input_ids`.
            tag_input_ids: [B, M, T], prompts of each image's nouns or tags, for the multi-label loss.
            tag_attention_mask: [B, M, T]; a label whose mask is all 0 is absent.
            text_targets: [B, N], bool or 0 and 1, which texts belong to which image, where they are shared between
                images: the contrastive loss then has several positives.
            return_loss: compute the losses. Hidden states of texts are then 0 after the longest text's end.
            output_attentions: return each stage's soft assignment (in `vision_model_output`).
            output_hidden_states: return the towers' hidden states.
            backbone_features: instead of `pixel_values`, see [`PGSegVisionModel`].
            patch_targets: [B, h, w, N], what share of each cell of an image's grid shows each text, 0 where nothing is
                known: another loss on the patches, where `contrastive_pooling` is `"patches"`.

        Raises:
            ValueError: pixels or texts of wrong shape, NaN pixels, or losses asked for without one text an image.
        """
        # Their names before; transformers' Trainer takes arguments with "label" in their names for targets.
        tag_input_ids = kwargs.pop("label_input_ids", tag_input_ids)
        tag_attention_mask = kwargs.pop("label_attention_mask", tag_attention_mask)
        _name_unused(kwargs)
        if input_ids is None or input_ids.ndim not in (2, 3):
            shape = None if input_ids is None else list(input_ids.shape)
            raise ValueError(
                f"input_ids has shape {shape}, expected token ids [texts, length] or [labels, prompts, length]."
            )
        if return_loss and input_ids.ndim == 3:
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)}; the losses need one prompt a text, [texts, length]."
            )
        towers = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        all_ids, all_mask, owners = input_ids, attention_mask, None
        if return_loss:
            all_ids, all_mask, owners = self.gather_texts(
                input_ids,
                attention_mask,
                tag_input_ids,
                tag_attention_mask,
                text_targets,
                patch_targets,
            )
        # Captions and labels pass the text tower together, so that BatchNorm sees them together; before the images, as
        # what is asked about token ids has a GPU wait, which then has little to do.
        text, text_features = self._encode_texts(
            all_ids, all_mask, for_losses=bool(return_loss), position_ids=position_ids, **towers
        )
        vision = self.get_image_features(
            pixel_values=pixel_values,
            backbone_features=backbone_features,
            output_npr=bool(return_loss),
            return_dict=True,
            **towers,
        )
        text.pooler_output = text.pooler_output[: len(input_ids)]
        text.last_hidden_state = text.last_hidden_state[: input_ids.shape[:-1].numel()]
        logits_per_image, segment_logits = self.get_logits(vision, text.pooler_output)
        patch_logits = None if return_loss else self.get_patch_logits(vision, text.pooler_output)
        output = PGSegOutput(
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            segment_logits=segment_logits,
            patch_logits=patch_logits,
            image_embeds=normalized(vision.pooler_output),
            text_embeds=normalized(text.pooler_output),
            segment_embeds=normalized(vision.segment_embeds),
            grouping=vision.grouping,
            image_sizes=vision.image_sizes,
            text_model_output=text,
            vision_model_output=vision,
        )
        if return_loss:
            losses = compute_losses(self, self._image_features(vision), text_features, owners)
            vision.npr = None
            output.loss = losses.total
            output.contrastive_loss = losses.contrastive
            output.multi_label_loss = losses.multi_label
            output.image_prototype_loss = losses.image_prototype
            output.image_prototype_losses = losses.image_prototype_by_stage
            output.text_prototype_loss = losses.text_prototype
            output.assignment_loss = losses.assignment
            output.patch_text_loss = losses.patch_text
            output.num_negatives = losses.negatives
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
        """The captions and then the label texts of a batch, [N, T], their attention mask, and whom they belong to;
        arguments as in `forward`."""
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
        """The text tower's output, `pooler_output` [N, D] projected, and what the losses need of it."""
        if for_losses:
            input_ids, attention_mask = padded_on_the_right(
                input_ids, attention_mask, self.config.text_config
            )
        # A batch's tags are a few words, many times; with dropout no two of them are equal.
        config = self.config.text_config
        asked = {name: kwargs.get(name) for name in ("output_attentions", "output_hidden_states")}
        details = any(getattr(config, name) if value is None else value for name, value in asked.items())
        plain = not details and kwargs.get("position_ids") is None
        sparing = for_losses and plain and not config.attention_dropout
        output, estimate = self._encode_text(input_ids, attention_mask, sparing=sparing, **kwargs)
        pooled, output.pooler_output = output.pooler_output, self.text_projection(output.pooler_output)
        if input_ids.ndim == 3:
            output.pooler_output = output.pooler_output.unflatten(0, input_ids.shape[:2]).mean(1)
        if not for_losses:
            return output, None
        word_mask, has_ended = find_words(input_ids, self.config.text_config)
        features = TextFeatures(output.pooler_output, input_ids.masked_fill(has_ended, -1))
        if estimate is not None:
            features.released_prototypes = estimate.prototypes
        if self.config.npr_variant == "corrected":
            with torch.no_grad():
                features.joint = self._joint_space(pooled.detach())
                words = self._joint_space(output.last_hidden_state.detach()[word_mask])
                zeros = words.new_zeros(*word_mask.shape, words.shape[-1])
                features.words = zeros.masked_scatter(word_mask[..., None].expand_as(zeros), words)
            features.word_mask = word_mask
        return output, features

    def _joint_space(self, pooled: Tensor) -> Tensor:
        embeds = self.text_projection(pooled, use_running_stats=True)
        return embeds.to(estimation_dtype(embeds.dtype))

    def _image_features(self, vision: PGSegVisionOutput) -> ImageFeatures:
        tied = bool(self.config.assignment_weight)
        stages = tuple(StageFeatures(*(npr if tied else npr[:2])) for npr in vision.npr or ())
        mixes = self.config.contrastive_pooling == "mixture"
        areas = vision.grouping.flatten(2).mean(2) if mixes else None
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
        """Features for [`~pgseg_hf.objective.compute_losses`] of some of a batch's images [B, 3, H, W], or of some of
        its texts [N, T]; image prototypes stay where they are."""
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

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """As for every transformers model; a repository without a model card gets a generated one first, with what
        that of the checkpoint says which was loaded."""
        token, private = kwargs.get("token"), kwargs.get("private")
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        has_card = api.file_exists(repo_id, "README.md")
        if has_card and is_processor_card(ModelCard.load(repo_id, token=token)):
            has_card = False
        if not kwargs.get("create_pr") and not has_card:
            starts = [self.name_or_path] if self.name_or_path else []
            generate_model_card(self.config, repo_id, starts=starts).push_to_hub(repo_id, token=token)
        return super().push_to_hub(repo_id, **kwargs)

    @classmethod
    def from_parts(
        cls, backbone_name_or_path: str | None = None, text_name_or_path: str | None = None, **kwargs: Any
    ) -> "PGSegModel":
        """A new model on pretrained parts; the rest has random weights.

        Args:
            backbone_name_or_path: folder or Hub name of a backbone of [`~transformers.AutoBackbone`]; fields of its
                configuration may be changed by `vision_config={"backbone_config": {"out_features": ...}}`.
            text_name_or_path: of a [`PGSegTextModelWithProjection`] or [`PGSegModel`], whose text tower, projection and
                joint space are taken.
            kwargs: fields of [`PGSegConfig`].

        Raises:
            ValueError: the parts do not fit the fields.
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
                raise ValueError(f"{', '.join(given)} come from {text_name_or_path}; leave them out.")
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
        """Warm start from a transformers GroupViT checkpoint; only NPR's tensors are new, and named in the log.

        The image tower attends eagerly, as GroupViT's does (the released variant in training and with gradient, see
        `PGSegVisionModel`), so that without NPR its numbers are the same;
        `model.set_attn_implementation("sdpa")` changes to the faster kernels.

        Args:
            name_or_path: Hub name or folder of a `GroupViTModel`.
            npr_variant: of the new model.
            kwargs: further fields of [`PGSegConfig`], for instance `image_prototype_weight`.

        Raises:
            ValueError: there is no such checkpoint, it is no GroupViT, or not a whole one.
        """
        source = read_groupvit(name_or_path)
        model = cls(config_from_groupvit(source.config, npr_variant, **kwargs))
        model.vision_model.set_attn_implementation("eager")
        tensors = source.state_dict()
        report = model.load_state_dict(tensors, strict=False)
        unexpected = [
            name for name in report.unexpected_keys if not name.startswith(model._tensors_left_out())
        ]
        if unexpected:
            raise ValueError(f"tensors of {name_or_path} that PGSeg does not have: {', '.join(unexpected)}.")
        new = [name for name in model.state_dict() if name not in tensors]
        logger.warning(f"Warm start from {name_or_path}; newly initialised: {', '.join(new) or 'nothing'}.")
        return model.eval()


__all__ = [
    "PGSegModel",
    "PGSegOutput",
    "PGSegPreTrainedModel",
    "PGSegTextModel",
    "PGSegTextModelWithProjection",
    "PGSegVisionModel",
    "PGSegVisionOutput",
]
