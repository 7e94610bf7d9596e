"""Configuration of the PGSeg models."""

import math
from collections.abc import Iterable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, CLIPTextConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec

# This import registers the backbone for configurations that name it.
from .efficientnet_lite import EfficientNetLiteConfig
from .poolings import CONTRASTIVE_LOSSES, POOLINGS, PoolingSettings, refuse_other_losses
from .variants import NPR_VARIANTS, SEGMENT_SOURCES, VariantSettings

# The name of the task in `pipeline`, and its name on the Hub and in model cards.
PIPELINE_TASK = "open-vocabulary-segmentation"
HUB_TASK = "image-segmentation"

PROTOTYPE_MATCHINGS = ("hungarian", "order")
PROTOTYPE_MIXINGS = ("prototypes", "tokens")
# A file with more layers would keep the machine busy for hours before its weights are read.
_MOST_LAYERS = 10_000


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    _require(value in choices, f"{name} is {value!r}, expected one of {', '.join(choices)}.")


def _require_range(
    config: Any, names: Iterable[str], low: float = -math.inf, high: float = math.inf, prefix: str = ""
) -> None:
    """Checks that each field is None or a finite number in the range."""
    least = "a finite number" if math.isinf(low) else f"a finite number of at least {low}"
    expected = least if math.isinf(high) else f"{low} to {high:,}"
    for name in names:
        value = getattr(config, name)
        is_inside = value is None or (math.isfinite(value) and low <= value <= high)
        _require(is_inside, f"{prefix}{name} is {value}, expected {expected}.")


def _require_heads(config: Any, prefix: str) -> None:
    size, heads = config.hidden_size, config.num_attention_heads
    _require(
        size % heads == 0,
        f"{prefix}hidden_size is {size}, expected a multiple of num_attention_heads = {heads}.",
    )


class PipelineOfFolder(dict):
    """The `custom_pipelines` of a configuration. `pipeline(model=folder)` finds its task here and its class in the
    folder's code; the Hub's name of the task works too. The class of an imported package takes precedence over the
    folder's."""

    def __init__(self) -> None:
        impl = "pipeline.OpenVocabularySegmentationPipeline"
        super().__init__({PIPELINE_TASK: {"impl": impl, "pt": ["AutoModel"], "type": "multimodal"}})

    def __contains__(self, task: object) -> bool:
        from transformers.pipelines import PIPELINE_REGISTRY  # late: slow, and only for pipelines

        is_registered = PIPELINE_TASK in PIPELINE_REGISTRY.supported_tasks
        return task == HUB_TASK or (task == PIPELINE_TASK and not is_registered)

    def __getitem__(self, task: str) -> dict[str, Any]:
        # A copy, because transformers adds classes to it, which JSON cannot hold.
        return dict(super().__getitem__(PIPELINE_TASK))

    def __reduce__(self) -> tuple:
        return PipelineOfFolder, ()


@strict
class PGSegTextConfig(CLIPTextConfig):
    r"""
    Configuration of the text tower: a CLIP text transformer, pooled at the end-of-text token. The fields are those of
    [`~transformers.CLIPTextConfig`]; the defaults are those of PGSeg and GroupViT.

    Args:
        vocab_size (`int`, defaults to 49408): number of byte-pair tokens.
        hidden_size (`int`, defaults to 256): width of the transformer.
        intermediate_size (`int`, defaults to 1024): width of the hidden layer of the MLPs.
        projection_dim (`int`, *optional*): not used; see [`PGSegConfig`] for the joint space.
        num_hidden_layers (`int`, defaults to 12): number of transformer blocks.
        num_attention_heads (`int`, defaults to 4): number of attention heads; must divide `hidden_size`.
        max_position_embeddings (`int`, defaults to 77): context length in tokens.
        hidden_act (`str`, defaults to `"quick_gelu"`): activation of the MLPs.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the layer normalisations.
        attention_dropout (`float`, defaults to 0.0): dropout of the attention weights.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial embeddings.
        initializer_factor (`float`, defaults to 1.0): factor on all initial standard deviations.
        pad_token_id (`int`, *optional*, defaults to 49407): padding token; CLIP pads with the end-of-text token.
        bos_token_id (`int`, *optional*, defaults to 49406): start-of-text token.
        eos_token_id (`int`, defaults to 49407): end-of-text token; texts are pooled at its first occurrence.
    """

    # Saved with its code, for trust_remote_code=True where this package is not installed.
    _auto_class = "AutoConfig"
    model_type = "pgseg_text_model"
    base_config_key = "text_config"

    hidden_size: int = 256
    intermediate_size: int = 1024
    projection_dim: int | None = None
    num_attention_heads: int = 4
    pad_token_id: int | None = 49407
    bos_token_id: int | None = 49406
    eos_token_id: int | list[int] | None = 49407

    def validate_architecture(self) -> None:
        """Checks fields against each other (called by `@strict`)."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
        _require_range(self, sizes, 1, prefix="text_config.")
        _require_range(self, ["max_position_embeddings"], 2, prefix="text_config.")
        _require_range(self, ["num_hidden_layers"], 0, _MOST_LAYERS, prefix="text_config.")
        _require_range(self, ["layer_norm_eps", "initializer_range"], 0, prefix="text_config.")
        _require_range(self, ["attention_dropout"], 0, 1, prefix="text_config.")
        _require_heads(self, "text_config.")
        _require_choice("text_config.hidden_act", self.hidden_act, ACT2FN)
        _require(
            isinstance(self.eos_token_id, int),
            f"text_config.eos_token_id is {self.eos_token_id}, expected a single token id, at which texts are pooled.",
        )


def _backbone_config(fields: dict[str, Any]) -> PreTrainedConfig:
    model_type = fields.get("model_type")
    if model_type == EfficientNetLiteConfig.model_type:
        return EfficientNetLiteConfig.from_dict(fields)
    _require(
        model_type in CONFIG_MAPPING,
        f"vision_config.backbone_config has model_type {model_type!r}, expected a model type that transformers has.",
    )
    return CONFIG_MAPPING[model_type].from_dict(fields)


@strict
class PGSegVisionConfig(PreTrainedConfig):
    r"""
    Configuration of the image tower: a GroupViT with non-learnable prototypes (NPR). Lists have one entry per stage. A
    stage without group tokens, such as the last one, does not group.

    Args:
        hidden_size (`int`, defaults to 384): width C of all stages.
        intermediate_size (`int`, defaults to 1536): width of the hidden layer of the blocks' MLPs.
        depths (`list[int]`, defaults to `(6, 3, 3)`): number of transformer blocks per stage.
        num_group_tokens (`list[int]`, defaults to `(64, 8, 0)`): number of learned group tokens per stage.
        num_output_groups (`list[int]`, defaults to `(64, 8, 0)`): number K of groups that each stage's grouping block
            outputs. Entries for stages without group tokens are not used; the last one may be omitted.
        num_hidden_layers (`int`, *optional*, defaults to the sum of `depths`): must equal the sum of `depths` if given.
        num_attention_heads (`int`, defaults to 6): number of attention heads; must divide `hidden_size`.
        image_size (`int`, defaults to 224): side in pixels of the stored position embeddings; other sizes interpolate
            them.
        patch_size (`int`, defaults to 16): side of a patch in pixels; must divide `image_size`.
        num_channels (`int`, defaults to 3): number of colour channels.
        backbone_config (`dict` or [`~transformers.PreTrainedConfig`], *optional*): configuration of a pretrained
            [`~transformers.AutoBackbone`] whose features replace the patch convolution. `out_features` may name several
            stages, which are resized to the finest grid, normalised, concatenated and projected to `hidden_size`.
            `patch_size` must be the stride of the finest stage.
        freeze_backbone (`bool`, defaults to `True`): whether to keep the backbone's weights and statistics fixed.
        hidden_act (`str`, defaults to `"gelu"`): activation of the MLPs.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the layer normalisations.
        dropout (`float`, defaults to 0.0): dropout after the patch embedding.
        attention_dropout (`float`, defaults to 0.0): dropout of the attention weights.
        drop_path_rate (`float`, defaults to 0.1): stochastic depth of the last block; rises linearly from 0.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        initializer_factor (`float`, defaults to 1.0): factor on initial standard deviations.
        assign_eps (`float`, defaults to 1.0): added to the number of a group's tokens when they are averaged.
        assign_mlp_ratio (`list[float]`, defaults to `(0.5, 4)`): hidden widths of the grouping block's two MLPs
            (tokens, channels), as multiples of `hidden_size`.
        npr_variant (`str`, defaults to `"corrected"`): `"none"` (a GroupViT), `"released"` (reproduces the released
            PGSeg code, for its checkpoints) or `"corrected"` (the method as the paper describes it).
        num_prototype_iterations (`int`, defaults to 10): number of steps of the prototype estimation.
        prototype_momentum (`float`, defaults to 0.9): weight of the old prototypes in their moving average.
        prototype_projection_dim (`int`, *optional*, defaults to 8/3 of `intermediate_size`): hidden width of the
            projection of prototypes to tokens. The default gives the paper's 4096 for an `intermediate_size` of 1536.
        prototype_mixing (`str`, defaults to `"prototypes"`): how the corrected variant adds prototypes to the tokens.
            `"prototypes"` projects each prototype and then mixes them by their responsibilities, which keeps the
            magnitude independent of the number of tokens. `"tokens"` mixes by weights that sum to 1 over the tokens and
            then projects, as the released code does. Not used by other variants.
        segment_source (`str`, *optional*, defaults to `"patches"` for the corrected variant, else `"groups"`): what the
            last grouping stage computes segment tokens from. `"groups"` uses its input tokens and the group tokens
            (GroupViT and the paper). `"patches"` averages the first stage's patches over each group by the soft
            assignment (ours), so that a group's name depends only on the patches in it. `"inputs"` averages the patches
            as they enter the first stage, so that the name does not depend on attention to the rest of the image.
    """

    _auto_class = "AutoConfig"
    model_type = "pgseg_vision_model"
    base_config_key = "vision_config"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(AutoConfig, EfficientNetLiteConfig.model_type, optional=True)
    }

    hidden_size: int = 384
    intermediate_size: int = 1536
    depths: list[int] | tuple[int, ...] = (6, 3, 3)
    num_group_tokens: list[int] | tuple[int, ...] = (64, 8, 0)
    num_output_groups: list[int] | tuple[int, ...] = (64, 8, 0)
    num_hidden_layers: int | None = None
    num_attention_heads: int = 6
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    backbone_config: Any = None
    freeze_backbone: bool = True
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.1
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    assign_eps: float | int = 1.0
    assign_mlp_ratio: list[float | int] | tuple[float | int, ...] = (0.5, 4)
    npr_variant: str = "corrected"
    num_prototype_iterations: int = 10
    prototype_momentum: float = 0.9
    prototype_projection_dim: int | None = None
    prototype_mixing: str = "prototypes"
    segment_source: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone_config, dict):
            self.backbone_config = _backbone_config(self.backbone_config)
        _require(
            self.backbone_config is None or isinstance(self.backbone_config, PreTrainedConfig),
            f"vision_config.backbone_config is {self.backbone_config!r}, expected the configuration of a backbone, or "
            "a dict of its fields with model_type.",
        )
        if self.num_hidden_layers is None:
            self.num_hidden_layers = sum(self.depths)
        if self.prototype_projection_dim is None:
            self.prototype_projection_dim = max(self.intermediate_size * 8 // 3, 1)
        if self.segment_source is None:
            self.segment_source = NPR_VARIANTS.get(self.npr_variant, VariantSettings()).segment_source
        super().__post_init__(**kwargs)

    def _validate_backbone(self) -> None:
        channels = getattr(self.backbone_config, "num_channels", self.num_channels)
        _require(
            channels == self.num_channels,
            f"vision_config.num_channels is {self.num_channels}, but that of backbone_config is {channels}.",
        )
        # EfficientNet-Lite has strides by stage name. Other backbones use the field for the strides between stages.
        strides = getattr(self.backbone_config, "strides", None)
        if isinstance(strides, dict):
            finest = min(strides[name] for name in self.backbone_config.out_features)
            _require(
                self.patch_size == finest,
                f"vision_config.patch_size is {self.patch_size}, expected {finest}, the stride of the finest of the "
                f"backbone's stages {', '.join(self.backbone_config.out_features)}.",
            )

    def _validate_stages(self) -> None:
        stages = len(self.depths)
        for name, values in (("depths", self.depths), ("num_group_tokens", self.num_group_tokens)):
            _require(
                sum(values) <= _MOST_LAYERS,
                f"vision_config.{name} is {list(values)}, expected a sum of at most {_MOST_LAYERS:,}.",
            )
        _require(stages > 0, "vision_config.depths is empty, expected one depth per stage.")
        _require(
            len(self.num_group_tokens) == stages,
            f"vision_config.num_group_tokens has {len(self.num_group_tokens)} entries, but depths has {stages}.",
        )
        grouping_stages = sum(tokens > 0 for tokens in self.num_group_tokens)
        _require(
            all(tokens > 0 for tokens in self.num_group_tokens[:grouping_stages])
            and min(self.num_group_tokens) >= 0
            and grouping_stages > 0,
            f"vision_config.num_group_tokens is {list(self.num_group_tokens)}, expected at least one grouping stage, "
            "and no grouping stage after one without group tokens.",
        )
        _require(
            len(self.num_output_groups) in (stages, grouping_stages),
            f"vision_config.num_output_groups has {len(self.num_output_groups)} entries, but depths has {stages}.",
        )
        _require(
            all(groups > 0 for groups in self.num_output_groups[:grouping_stages]),
            f"vision_config.num_output_groups is {list(self.num_output_groups)}, expected at least 1 for every "
            "stage with group tokens.",
        )
        _require(
            min(self.depths) >= 0 and self.num_hidden_layers == sum(self.depths),
            f"vision_config.num_hidden_layers is {self.num_hidden_layers}, but depths = {list(self.depths)} sum to "
            f"{sum(self.depths)}.",
        )

    def validate_architecture(self) -> None:
        """Checks fields against each other (called by `@strict`)."""
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size", "num_channels")
        counts = ("num_prototype_iterations", "prototype_projection_dim")
        _require_range(self, (*sizes, *counts), 1, prefix="vision_config.")
        _require_heads(self, "vision_config.")
        _require(
            self.image_size > 0 and self.image_size % self.patch_size == 0,
            f"vision_config.image_size is {self.image_size}, expected a multiple of patch_size = {self.patch_size}.",
        )
        self._validate_backbone()
        self._validate_stages()
        _require(
            len(self.assign_mlp_ratio) == 2 and int(min(self.assign_mlp_ratio) * self.hidden_size) > 0,
            f"vision_config.assign_mlp_ratio is {list(self.assign_mlp_ratio)}, expected two numbers that give at "
            "least one channel when multiplied by hidden_size.",
        )
        _require_choice("vision_config.npr_variant", self.npr_variant, NPR_VARIANTS)
        _require_choice("vision_config.prototype_mixing", self.prototype_mixing, PROTOTYPE_MIXINGS)
        _require_choice("vision_config.segment_source", self.segment_source, SEGMENT_SOURCES)
        known = NPR_VARIANTS[self.npr_variant].segment_sources
        _require(
            self.segment_source in known,
            f"vision_config.segment_source is {self.segment_source!r}, which the {self.npr_variant} variant does not "
            f"support; expected one of {', '.join(known)}.",
        )
        shares = ("dropout", "attention_dropout", "drop_path_rate", "prototype_momentum")
        _require_range(self, shares, 0, 1, prefix="vision_config.")
        _require(self.drop_path_rate < 1, "vision_config.drop_path_rate is 1, which drops every branch.")
        small = ("layer_norm_eps", "initializer_range", "assign_eps")
        _require_range(self, small, 0, prefix="vision_config.")
        _require_choice("vision_config.hidden_act", self.hidden_act, ACT2FN)


@strict
class PGSegConfig(PreTrainedConfig):
    r"""
    Configuration of [`PGSegModel`]: both towers, the joint space and the losses. `npr_variant` may be given here too;
    it is stored in `vision_config`, and reading or setting it here reads or sets it there.

    Args:
        text_config (`dict` or [`PGSegTextConfig`], *optional*): configuration of the text tower.
        vision_config (`dict` or [`PGSegVisionConfig`], *optional*): configuration of the image tower.
        projection_dim (`int`, defaults to 256): dimension D of the joint space.
        projection_intermediate_dim (`int`, defaults to 4096): hidden width of both projection heads.
        logit_scale_init_value (`float`, defaults to ln(1/0.07)): initial logarithm of the contrastive logit scale.
        prototype_logit_scale_init_value (`float`, defaults to ln(1/0.1)): the same for the prototype losses.
        max_logit_scale (`float`, defaults to 100.0): upper bound of both scales.
        image_prototype_weight (`float`, defaults to 0.1): weight of the image prototype losses (I-NPR).
        text_prototype_weight (`float`, defaults to 0.01): weight of the text prototype loss (T-NPR).
        num_text_prototypes (`int`, *optional*): number of text prototypes. Defaults to 8 for the released variant, as
            fixed in its code, and to the number of output groups of the last grouping stage for others.
        multi_label_weight (`float`, defaults to 1.0): weight of the multi-label loss, used if label texts are given.
        rejection_threshold (`float`, defaults to 0.1): pairs whose min-max-normalised similarity is not above it are
            left out of the prototype losses.
        prototype_matching (`str`, defaults to `"hungarian"`): which prototype each group learns from in the corrected
            variant. `"hungarian"` maximises similarity; `"order"` pairs group i with prototype i.
        assignment_weight (`float`, *optional*, defaults to 0.2 for the corrected variant, else 0): weight of the
            assignment term (ours): the cross-entropy between the prototypes' responsibilities for each token and the
            soft assignment of tokens to the matched groups.
        contrastive_pooling (`str`, *optional*, defaults to `"groups"` for the corrected variant, else `"mean"`): how an
            image is compared with texts.
            - `"mean"` uses the projected mean of its segment tokens (the paper).
            - `"groups"` uses the log-mean-exp over its groups of their scaled cosines (ours, a multiple-instance loss).
            - `"mixture"` uses the log odds that a text is seen in `mixture_looks` looks at the segmented image. A
              text's share of the image is the sum over groups of their area times the softmax of their scaled cosines
              over all texts (ours). For the sigmoid loss with tags that name all classes and at least two texts per
              batch.
            - `"patches"` trains names on the patches and lets inference combine them with the groups (ours). With the
              sigmoid loss it uses the same log odds with each patch as a group; with the other losses, the mean of a
              text's scaled cosines over the patches, weighted by their softmax.
        mixture_looks (`float`, defaults to 1.0): n in $1-(1-s)^n$, the probability that at least one of n random points
            falls on a text with share s of the image. At 1 the tags of an image are driven to equal shares. With more
            looks a tag that already has some share is driven no further, while other texts are driven to 0.
        patch_text_weight (`float`, defaults to 1.0): weight of the cross-entropy between the patches' softmax over
            texts and `patch_targets`, used if these are given.
        contrastive_loss (`str`, defaults to `"info_nce"`): the contrastive loss; the multi-label loss is of the same
            kind.
            - `"info_nce"`: one positive text per image, all others are negatives (the paper); for distinct captions.
            - `"multi_positive"`: equal texts of the global batch count as one, and all texts equal to one of an image's
              own are its positives, with soft targets; for tags and repeated captions.
            - `"sigmoid"`: the same positives, with each image-text pair classified separately and one shared bias (no
              bias with `"mixture"` and `"patches"`, whose odds need none); for any number of tags per image.
        label_balance (`float`, defaults to 1.0): weighting of the sigmoid loss. At 1 all texts have the same weight,
            however frequent, and so do the images with and without a text. At 0 all image-text pairs have the same
            weight, so that frequent texts get larger shares. Values in between interpolate.
        logit_bias_init_value (`float`, defaults to 0.0): initial bias of the sigmoid loss.
        freeze_text (`bool`, defaults to `False`): whether to keep the text tower and its projection fixed in training.
        guard_prototype_losses (`bool`, defaults to `False`): for training the released variant, whose prototype losses
            are NaN if no pair is kept. Leaves NaN losses out of the total and stops the gradient of the text prototype
            loss to the group centres, which is 0 except for amplified rounding errors.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        initializer_factor (`float`, defaults to 1.0): factor on initial standard deviations.
    """

    _auto_class = "AutoConfig"
    model_type = "pgseg"
    sub_configs_defaults = {"text_config": PGSegTextConfig, "vision_config": PGSegVisionConfig}
    # Trainer concatenates the other fields of a `PGSegOutput` over batches and processes: logits_per_image,
    # image_embeds and segment_embeds. It cannot concatenate those below if numbers of texts or image sizes vary.
    keys_to_ignore_at_inference = [
        *("contrastive_loss", "multi_label_loss", "image_prototype_loss", "image_prototype_losses"),
        *("text_prototype_loss", "assignment_loss", "num_negatives", "logits_per_text", "segment_logits"),
        *("patch_logits", "text_embeds", "grouping", "image_sizes", "text_model_output"),
        "vision_model_output",
    ]

    text_config: Any = None
    vision_config: Any = None
    projection_dim: int = 256
    projection_intermediate_dim: int = 4096
    logit_scale_init_value: float = math.log(1 / 0.07)
    prototype_logit_scale_init_value: float = math.log(1 / 0.1)
    max_logit_scale: float | int = 100.0
    image_prototype_weight: float | int = 0.1
    text_prototype_weight: float | int = 0.01
    num_text_prototypes: int | None = None
    multi_label_weight: float | int = 1.0
    rejection_threshold: float | int = 0.1
    prototype_matching: str = "hungarian"
    assignment_weight: float | int | None = None
    contrastive_pooling: str | None = None
    mixture_looks: float | int = 1.0
    patch_text_weight: float | int = 1.0
    contrastive_loss: str = "info_nce"
    label_balance: float | int = 1.0
    logit_bias_init_value: float = 0.0
    freeze_text: bool = False
    guard_prototype_losses: bool = False
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        npr_variant = kwargs.pop("npr_variant", None)
        if npr_variant is not None and not isinstance(self.vision_config, PGSegVisionConfig):
            self.vision_config = {**(self.vision_config or {}), "npr_variant": npr_variant}
        super().__post_init__(**kwargs | {"custom_pipelines": PipelineOfFolder()})
        if npr_variant is not None:
            self.npr_variant = npr_variant
        if self.assignment_weight is None:
            self.assignment_weight = self.npr_settings.assignment_weight
        if self.contrastive_pooling is None:
            self.contrastive_pooling = self.npr_settings.contrastive_pooling

    @classmethod
    def paper(cls, **fields: Any) -> "PGSegConfig":
        """The corrected variant as in the paper, without the defaults that are ours: no assignment term, images
        compared with texts by their mean, and segments named by their tokens. `fields` set other fields."""
        vision = fields.pop("vision_config", None) or {}
        vision = vision.to_dict() if isinstance(vision, PGSegVisionConfig) else vision
        defaults = {"contrastive_pooling": "mean", "assignment_weight": 0.0}
        return cls(vision_config={"segment_source": "groups"} | vision, **(defaults | fields))

    @property
    def npr_variant(self) -> str:
        """`"none"`, `"released"` or `"corrected"`, as stored in `vision_config`."""
        return self.vision_config.npr_variant

    @npr_variant.setter
    def npr_variant(self, value: str) -> None:
        if value not in NPR_VARIANTS:
            raise ValueError(f"npr_variant is {value!r}, expected one of {', '.join(NPR_VARIANTS)}.")
        self.vision_config.npr_variant = value
        if self.vision_config.segment_source not in self.npr_settings.segment_sources:
            self.vision_config.segment_source = self.npr_settings.segment_source

    @property
    def pooling(self) -> PoolingSettings:
        """What `contrastive_pooling` requires of the model and its training."""
        return POOLINGS[str(self.contrastive_pooling)]

    @property
    def npr_settings(self) -> VariantSettings:
        """What the NPR variant requires for training and running the model."""
        return NPR_VARIANTS[self.npr_variant]

    def validate_architecture(self) -> None:
        """Checks fields against each other (called by `@strict`)."""
        weights = ("image_prototype_weight", "text_prototype_weight", "multi_label_weight")
        scales = ("logit_scale_init_value", "prototype_logit_scale_init_value", "logit_bias_init_value")
        _require_range(self, ("projection_dim", "projection_intermediate_dim"), 1)
        _require_range(self, (*weights, "assignment_weight", "patch_text_weight"), 0)
        _require_range(self, scales)
        _require_range(self, ("rejection_threshold", "label_balance"), 0, 1)
        _require_range(self, ("mixture_looks", "num_text_prototypes"), 1)
        bound = self.max_logit_scale
        _require(bound > 0, f"max_logit_scale is {bound}, expected a positive number.")
        _require_choice("prototype_matching", self.prototype_matching, PROTOTYPE_MATCHINGS)
        _require_choice("contrastive_pooling", self.contrastive_pooling, POOLINGS)
        _require_choice("contrastive_loss", self.contrastive_loss, CONTRASTIVE_LOSSES)
        refuse_other_losses(str(self.contrastive_pooling), self.contrastive_loss)


__all__ = ["PGSegConfig", "PGSegTextConfig", "PGSegVisionConfig"]
