"""Configuration of the PGSeg models."""

import math
from collections.abc import Iterable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, CLIPTextConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec

# Registers the backbone, for configurations that name it.
from .efficientnet_lite import EfficientNetLiteConfig
from .poolings import CONTRASTIVE_LOSSES, POOLINGS, PoolingSettings, refuse_other_losses
from .variants import NPR_VARIANTS, SEGMENT_SOURCES, VariantSettings

# What `pipeline` knows the task by, and what the Hub's list of tasks, and so a card, calls it.
PIPELINE_TASK = "open-vocabulary-segmentation"
HUB_TASK = "image-segmentation"

PROTOTYPE_MATCHINGS = ("hungarian", "order")
PROTOTYPE_MIXINGS = ("prototypes", "tokens")
# A file that asks for more keeps the machine busy for hours before anything of it is read.
_MOST_LAYERS = 10_000


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    _require(value in choices, f"{name} is {value!r}, expected one of {', '.join(choices)}.")


def _require_range(
    config: Any, names: Iterable[str], low: float = -math.inf, high: float = math.inf, prefix: str = ""
) -> None:
    """For fields that are not None."""
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
        f"{prefix}hidden_size is {size}, which is no multiple of num_attention_heads = {heads}.",
    )


class PipelineOfFolder(dict):
    """`custom_pipelines` of a configuration: `pipeline(model=folder)` finds its task by it and, in the folder's code,
    its class; the Hub's name of the task leads to it too. Where the package is imported its own class is registered,
    and the folder's is not looked for."""

    def __init__(self) -> None:
        impl = "pipeline.OpenVocabularySegmentationPipeline"
        super().__init__({PIPELINE_TASK: {"impl": impl, "pt": ["AutoModel"], "type": "multimodal"}})

    def __contains__(self, task: object) -> bool:
        from transformers.pipelines import PIPELINE_REGISTRY  # late: only pipelines ask, and it takes long

        is_registered = PIPELINE_TASK in PIPELINE_REGISTRY.supported_tasks
        return task == HUB_TASK or (task == PIPELINE_TASK and not is_registered)

    def __getitem__(self, task: str) -> dict[str, Any]:
        # A copy, as transformers puts classes into it, which no JSON can hold.
        return dict(super().__getitem__(PIPELINE_TASK))

    def __reduce__(self) -> tuple:
        return PipelineOfFolder, ()


@strict
class PGSegTextConfig(CLIPTextConfig):
    r"""
    Configuration of the text tower: a CLIP text transformer, pooled at the end-of-text token. The fields are those
    of [`~transformers.CLIPTextConfig`]; the defaults are PGSeg's and GroupViT's.

    Args:
        vocab_size (`int`, defaults to 49408): number of byte-pair tokens.
        hidden_size (`int`, defaults to 256): width of the transformer.
        intermediate_size (`int`, defaults to 1024): width of the hidden layer of its MLPs.
        projection_dim (`int`, *optional*): not used, see [`PGSegConfig`]; a field of CLIP's configuration.
        num_hidden_layers (`int`, defaults to 12): number of transformer blocks.
        num_attention_heads (`int`, defaults to 4): number of heads; divides `hidden_size`.
        max_position_embeddings (`int`, defaults to 77): context length in tokens.
        hidden_act (`str`, defaults to `"quick_gelu"`): activation of the MLPs.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the layer normalisations.
        attention_dropout (`float`, defaults to 0.0): dropout of the attention weights.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial embeddings.
        initializer_factor (`float`, defaults to 1.0): factor on all initial standard deviations.
        pad_token_id (`int`, *optional*, defaults to 49407): CLIP pads with the end-of-text token.
        bos_token_id (`int`, *optional*, defaults to 49406): start-of-text token.
        eos_token_id (`int`, defaults to 49407): end-of-text token, at whose first place the text is pooled.
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
            f"text_config.eos_token_id is {self.eos_token_id}, expected the one token at which texts are pooled.",
        )


def _backbone_config(fields: dict[str, Any]) -> PreTrainedConfig:
    model_type = fields.get("model_type")
    if model_type == EfficientNetLiteConfig.model_type:
        return EfficientNetLiteConfig.from_dict(fields)
    _require(
        model_type in CONFIG_MAPPING,
        f"vision_config.backbone_config has the model_type {model_type!r}, which transformers does not know.",
    )
    return CONFIG_MAPPING[model_type].from_dict(fields)


@strict
class PGSegVisionConfig(PreTrainedConfig):
    r"""
    Configuration of the image tower: a GroupViT with non-learnable prototypes (NPR). All lists have one entry for
    each stage; a stage with no group tokens (the last one) does not group.

    Args:
        hidden_size (`int`, defaults to 384): width C of all stages.
        intermediate_size (`int`, defaults to 1536): width of the hidden layer of the blocks' MLPs.
        depths (`list[int]`, defaults to `(6, 3, 3)`): number of transformer blocks of each stage.
        num_group_tokens (`list[int]`, defaults to `(64, 8, 0)`): number of learned group tokens of each stage.
        num_output_groups (`list[int]`, defaults to `(64, 8, 0)`):
            number K of groups that each stage's grouping block makes; not read for a stage without group tokens. A
            last entry for a stage that does not group may be left out.
        num_hidden_layers (`int`, *optional*): the sum of `depths`; filled in, and checked where it is given.
        num_attention_heads (`int`, defaults to 6): number of heads; divides `hidden_size`.
        image_size (`int`, defaults to 224):
            side in pixels of the square for which position embeddings are stored; other sizes interpolate them.
        patch_size (`int`, defaults to 16): side of a patch in pixels; divides `image_size`.
        num_channels (`int`, defaults to 3): colour channels.
        backbone_config (`dict` or [`~transformers.PreTrainedConfig`], *optional*):
            configuration of a pretrained backbone of [`~transformers.AutoBackbone`] whose features take the place of
            the patch convolution. Its `out_features` may name several stages: they are brought to the finest one's
            grid, normalised, joined and projected to `hidden_size`. `patch_size` is then the stride of the finest one.
        freeze_backbone (`bool`, defaults to `True`): keep the backbone's weights and statistics as they are.
        hidden_act (`str`, defaults to `"gelu"`): activation of the MLPs.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the layer normalisations.
        dropout (`float`, defaults to 0.0): dropout after the patch embedding.
        attention_dropout (`float`, defaults to 0.0): dropout of the attention weights.
        drop_path_rate (`float`, defaults to 0.1): stochastic depth of the last block, rising linearly from 0.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        initializer_factor (`float`, defaults to 1.0): factor on initial standard deviations.
        assign_eps (`float`, defaults to 1.0): added to a group's number of tokens when its tokens are averaged.
        assign_mlp_ratio (`list[float]`, defaults to `(0.5, 4)`):
            hidden widths, as multiples of `hidden_size`, of the grouping block's token-mixing and channel MLPs.
        npr_variant (`str`, defaults to `"corrected"`):
            `"none"` (a GroupViT), `"released"` (the numbers of the released PGSeg code, for its checkpoints) or
            `"corrected"` (the method as the paper describes it).
        num_prototype_iterations (`int`, defaults to 10): steps of the prototype estimation.
        prototype_momentum (`float`, defaults to 0.9): share of the old prototypes in their moving average.
        prototype_projection_dim (`int`, *optional*):
            hidden width of the projection of prototypes to tokens; by default 8/3 of `intermediate_size`, which at the
            paper's 1536 is its 4096.
        prototype_mixing (`str`, defaults to `"prototypes"`):
            how the corrected variant makes the prototypes' part of the tokens: `"prototypes"`, each prototype is
            projected and then mixed by its responsibilities, whose size does not depend on the number of tokens;
            `"tokens"`, mixed by weights that sum to 1 over the tokens and then projected, as the released code does.
            Not read by the other variants.
        segment_source (`str`, *optional*, defaults to `"patches"` for the corrected variant, else `"groups"`):
            what the last grouping stage makes segment tokens of: `"groups"`, its input tokens and the group tokens
            (GroupViT's and the paper's), or `"patches"`, the mean of the first stage's patches over each group by the
            soft assignment (ours): what a group is called then depends on nothing but the patches in it; or `"inputs"`,
            the same mean of the patches as they enter the first stage, so that a name depends on what the patch
            embeddings, or the backbone, see there, and not on what attention brings from elsewhere in the image.
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
            "its fields with model_type.",
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
            f"vision_config.num_channels is {self.num_channels}, and backbone_config has {channels}.",
        )
        # Of stages by their names, as EfficientNet-Lite's; what others call strides are those between stages.
        strides = getattr(self.backbone_config, "strides", None)
        if isinstance(strides, dict):
            finest = min(strides[name] for name in self.backbone_config.out_features)
            _require(
                self.patch_size == finest,
                f"vision_config.patch_size is {self.patch_size}, expected {finest}, the stride of the finest of the "
                f"backbone's {', '.join(self.backbone_config.out_features)}.",
            )

    def _validate_stages(self) -> None:
        stages = len(self.depths)
        for name, values in (("depths", self.depths), ("num_group_tokens", self.num_group_tokens)):
            _require(
                sum(values) <= _MOST_LAYERS,
                f"vision_config.{name} is {list(values)}, expected at most {_MOST_LAYERS:,} in all.",
            )
        _require(stages > 0, "vision_config.depths is empty, expected one depth for each stage.")
        _require(
            len(self.num_group_tokens) == stages,
            f"vision_config.num_group_tokens has {len(self.num_group_tokens)} entries, depths has {stages}.",
        )
        grouping_stages = sum(tokens > 0 for tokens in self.num_group_tokens)
        _require(
            all(tokens > 0 for tokens in self.num_group_tokens[:grouping_stages])
            and min(self.num_group_tokens) >= 0
            and grouping_stages > 0,
            f"vision_config.num_group_tokens is {list(self.num_group_tokens)}, expected at least one grouping stage, "
            "and none after a stage without group tokens.",
        )
        _require(
            len(self.num_output_groups) in (stages, grouping_stages),
            f"vision_config.num_output_groups has {len(self.num_output_groups)} entries, depths has {stages}.",
        )
        _require(
            all(groups > 0 for groups in self.num_output_groups[:grouping_stages]),
            f"vision_config.num_output_groups is {list(self.num_output_groups)}, expected at least 1 for each stage "
            "with group tokens.",
        )
        _require(
            min(self.depths) >= 0 and self.num_hidden_layers == sum(self.depths),
            f"vision_config.num_hidden_layers is {self.num_hidden_layers}, but depths = {list(self.depths)} add up to "
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
            f"vision_config.assign_mlp_ratio is {list(self.assign_mlp_ratio)}, expected two numbers that make at least "
            "one channel of hidden_size.",
        )
        _require_choice("vision_config.npr_variant", self.npr_variant, NPR_VARIANTS)
        _require_choice("vision_config.prototype_mixing", self.prototype_mixing, PROTOTYPE_MIXINGS)
        _require_choice("vision_config.segment_source", self.segment_source, SEGMENT_SOURCES)
        known = NPR_VARIANTS[self.npr_variant].segment_sources
        _require(
            self.segment_source in known,
            f"vision_config.segment_source is {self.segment_source!r}, which the {self.npr_variant} variant does not "
            f"have; expected one of {', '.join(known)}.",
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
    Configuration of [`PGSegModel`]: both towers, the joint space and the weights of the losses. `npr_variant` may be
    given here too; it is stored in `vision_config`, and reading or setting it here reads or sets it there.

    Args:
        text_config (`dict` or [`PGSegTextConfig`], *optional*): the text tower.
        vision_config (`dict` or [`PGSegVisionConfig`], *optional*): the image tower.
        projection_dim (`int`, defaults to 256): dimension D of the joint space.
        projection_intermediate_dim (`int`, defaults to 4096): hidden width of both projection heads.
        logit_scale_init_value (`float`, defaults to ln(1/0.07)): initial logarithm of the contrastive logit scale.
        prototype_logit_scale_init_value (`float`, defaults to ln(1/0.1)): the same for the prototype losses.
        max_logit_scale (`float`, defaults to 100.0): upper bound of both scales.
        image_prototype_weight (`float`, defaults to 0.1): weight of the image prototype losses, I-NPR.
        text_prototype_weight (`float`, defaults to 0.01): weight of the text prototype loss, T-NPR.
        num_text_prototypes (`int`, *optional*):
            number of text prototypes; by default 8 for the released variant, where the code fixes it, else as many as
            the last grouping stage has output groups.
        multi_label_weight (`float`, defaults to 1.0): weight of the multi-label loss, where label texts are given.
        rejection_threshold (`float`, defaults to 0.1):
            pairs whose min-max-normalised similarity is not above it are left out of the prototype losses.
        prototype_matching (`str`, defaults to `"hungarian"`):
            which prototype each group learns from in the corrected variant: `"hungarian"`, the matching of largest
            similarity, or `"order"`, group i from prototype i. Not read by the other variants.
        assignment_weight (`float`, *optional*, defaults to 0.2 for the corrected variant, else 0):
            weight of a term of ours: the cross-entropy between the prototypes' responsibilities for each token and
            the soft assignment of tokens to the matched groups.
        contrastive_pooling (`str`, *optional*, defaults to `"groups"` for the corrected variant, else `"mean"`):
            what an image is compared with texts by: `"mean"`, the projected mean of its segment tokens (the paper's),
            `"groups"`, the log-mean-exp over its groups of their scaled cosines (ours, a multiple-instance loss), or
            `"mixture"`, the log odds that a text is seen in `mixture_looks` looks at the image as it would be
            segmented, where its share is the sum over groups of their area times the softmax of their scaled cosines
            over all texts (ours, for the sigmoid loss with tags that name everything that is to be told apart; a batch
            needs two different texts at least), or `"patches"`, which trains names on the patches themselves and lets
            inference join them with the groups (ours): with the sigmoid loss the same log odds with every patch a
            group of its own, with the other losses the mean of a text's scaled cosines over the patches, weighted by
            their softmax.
        mixture_looks (`float`, defaults to 1.0):
            n of $1-(1-s)^n$, the chance that at least one of n points drawn at random falls on what has the share s of
            an image. At 1 the tags of an image are driven to equal shares of it; with more looks a tag that has
            some share already is driven no further, while what is no tag gets none.
        patch_text_weight (`float`, defaults to 1.0):
            weight of the cross-entropy between the patches' softmax over texts and `patch_targets`, where there are
            any.
        contrastive_loss (`str`, defaults to `"info_nce"`):
            `"info_nce"`: one positive text an image (the paper's), all others are negatives; for captions that differ.
            `"multi_positive"`: equal texts of the global batch count as one, and all texts equal to one of an image's
            own are its positives, by a softmax with soft targets; for tags and repeated captions.
            `"sigmoid"`: the same positives, every pair of image and text judged on its own, with one bias for all (none
            with `"mixture"` and `"patches"`, whose odds need none); for tags, where an image has any number of them.
            The multi-label loss is of the same kind.
        label_balance (`float`, defaults to 1.0):
            weights of the sigmoid loss: at 1 every text counts the same however frequent it is, and its images as much
            as all other images; at 0 every pair of image and text counts the same, so that frequent texts are given
            larger shares; between them in between.
        logit_bias_init_value (`float`, defaults to 0.0): initial bias of the sigmoid loss.
        freeze_text (`bool`, defaults to `False`): keep the text tower and its projection as they are in training.
        guard_prototype_losses (`bool`, defaults to `False`):
            for training the released variant, whose prototype losses are NaN where no pair is kept: leave those out of
            the total, and cut the text prototypes' gradient to the group centres, which is 0 but for rounding that is
            amplified to any size.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        initializer_factor (`float`, defaults to 1.0): factor on initial standard deviations.
    """

    _auto_class = "AutoConfig"
    model_type = "pgseg"
    sub_configs_defaults = {"text_config": PGSegTextConfig, "vision_config": PGSegVisionConfig}
    # Trainer stacks the rest of a `PGSegOutput` over batches and processes: logits_per_image, image_embeds and
    # segment_embeds. These cannot be where batches differ in their number of texts or in their size.
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
        """The corrected variant as the paper has it, without the details of ours that are the default: no assignment
        term, images compared with texts by their mean, and segments named by their tokens. Other fields as given."""
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
        """What `contrastive_pooling` asks of the model and its training."""
        return POOLINGS[str(self.contrastive_pooling)]

    @property
    def npr_settings(self) -> VariantSettings:
        """What the variant asks of those who train and run the model."""
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
