"""Building blocks of PGSeg's image tower.

Shapes: B batch, L image tokens of a stage's input, K groups of a stage, P prototypes, C width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_pgseg import PGSegVisionConfig
from .features import StageFeatures
from .kernels import faster_attention, linear, linears
from .npr import PGSegStagePrototypes, npr_of
from .precision import estimation_dtype, full_precision

# Added to a group's number of patches when they are averaged: small beside one patch, and gives an empty group a mean
# near 0 instead of noise.
EMPTY_GROUP_EPS = 1e-3


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention of [B, heads, length, width] tensors; returns [B, length, heads, width] and the weights."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1).to(query.dtype)  # torch accumulates float16 and bfloat16 in float32
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class PGSegAttention(nn.Module):
    """Multi-head attention of queries [B, Q, C] over a context [B, L, C]."""

    def __init__(self, config: PGSegVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if queries is context:
            parts = linears(layers, context)
        else:
            parts = [linear(self.q_proj, queries), *linears(layers[1:], context)]
        query, key, value = (self._heads(part) for part in parts)
        attend: Callable = faster_attention(self, query) or ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        out, _ = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout)
        return linear(self.out_proj, out.reshape(queries.shape))


class PGSegMLP(nn.Module):
    """Two linear layers over the last dimension."""

    def __init__(self, config: PGSegVisionConfig, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        # The activations, the largest tensors of a block, are recomputed for the gradient, which costs no matrix
        # product. Not with an adapter, which may have dropout, nor in a compiled graph, where the compiler decides.
        learns = self.training and torch.is_grad_enabled()
        if not learns or type(self.fc2) is not nn.Linear or torch.compiler.is_compiling():
            return linear(self.fc2, linear(self.fc1, x, self.activation_fn))

        def activate_and_project(hidden: Tensor) -> Tensor:
            return linear(self.fc2, self.activation_fn(hidden))

        hidden = linear(self.fc1, x)
        return checkpoint(activate_and_project, hidden, use_reentrant=False, preserve_rng_state=False)


class PGSegMixerMLP(PGSegMLP):
    """Two linear layers over the tokens: maps [B, tokens in, C] to [B, tokens out, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class PGSegDropPath(nn.Module):
    """Stochastic depth: in training, drops the branch for random samples and scales the others up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device, dtype=torch.float32) >= self.rate
        return x * (keep.to(x.dtype) / (1 - self.rate))


class PGSegLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: PGSegVisionConfig, drop_path_rate: float):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = PGSegAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PGSegMLP(config, config.hidden_size, config.intermediate_size, config.hidden_size)
        self.drop_path = PGSegDropPath(drop_path_rate)

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.layer_norm1(hidden_states)
        hidden_states = hidden_states + self.drop_path(self.self_attn(normed, normed))
        return hidden_states + self.drop_path(self.mlp(self.layer_norm2(hidden_states)))


class PGSegCrossAttentionLayer(nn.Module):
    """Cross-attention from projected group tokens to image tokens, with a norm at the end only."""

    def __init__(self, config: PGSegVisionConfig):
        super().__init__()
        self.attn = PGSegAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PGSegMLP(config, config.hidden_size, config.intermediate_size, config.hidden_size)
        self.norm_post = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        queries = queries + self.attn(queries, context)
        queries = queries + self.mlp(self.norm2(queries))
        return self.norm_post(queries)


class PGSegAssignAttention(nn.Module):
    """Assigns each image token to one group and, if `pools`, averages the tokens of each group."""

    def __init__(self, config: PGSegVisionConfig, pools: bool = True):
        super().__init__()
        self.pools = pools
        self.scaling = config.hidden_size**-0.5
        self.assign_eps = config.assign_eps
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        if pools:
            self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
            self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def sample_noise(self, logits: Tensor) -> Tensor:
        """Standard Gumbel noise in the shape of the logits, in float32 or float64. In 16 bits it would be cut off at
        4.4 and often have ties, which favour the first groups."""
        dtype = estimation_dtype(logits.dtype)
        zero, one = (torch.full((), value, device=logits.device, dtype=dtype) for value in (0.0, 1.0))
        # Validating the arguments would synchronise with a GPU.
        return torch.distributions.Gumbel(zero, one, validate_args=False).sample(logits.shape)

    def forward(self, centers_BKC: Tensor, tokens_BLC: Tensor) -> tuple[Tensor | None, Tensor]:
        """Returns the groups' averaged tokens [B, K, C] or None, and the logits of the soft assignment [B, K, L]."""
        queries_BKC = linear(self.q_proj, centers_BKC)
        keys_BLC = linear(self.k_proj, tokens_BLC)
        logits_BKL = queries_BKC @ keys_BLC.transpose(1, 2) * self.scaling
        if not self.pools:
            return None, logits_BKL
        noisy_BKL = logits_BKL + self.sample_noise(logits_BKL) if self.training else logits_BKL
        soft_BKL = noisy_BKL.softmax(dim=1)
        hard_BKL = torch.zeros_like(soft_BKL).scatter_(1, soft_BKL.argmax(dim=1, keepdim=True), 1.0)
        assignment_BKL = hard_BKL + (soft_BKL - soft_BKL.detach())
        weights_BKL = assignment_BKL / (assignment_BKL.sum(dim=-1, keepdim=True) + self.assign_eps)
        values_BLC = linear(self.v_proj, tokens_BLC)
        return linear(self.proj, weights_BKL.to(values_BLC.dtype) @ values_BLC), logits_BKL


class PGSegGroupingBlock(nn.Module):
    """Groups L image tokens by means of the group tokens and, if `pools`, computes K segment tokens."""

    def __init__(
        self, config: PGSegVisionConfig, num_group_tokens: int, num_output_groups: int, pools: bool = True
    ):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        tokens_width, channels_width = (int(ratio * width) for ratio in config.assign_mlp_ratio)
        self.norm_tokens = nn.LayerNorm(width, eps=eps)
        self.mlp_inter = PGSegMixerMLP(config, num_group_tokens, tokens_width, num_output_groups)
        self.norm_post_tokens = nn.LayerNorm(width, eps=eps)
        self.norm_x = nn.LayerNorm(width, eps=eps)
        self.pre_assign_attn = PGSegCrossAttentionLayer(config)
        self.assign = PGSegAssignAttention(config, pools)
        if pools:
            self.norm_new_x = nn.LayerNorm(width, eps=eps)
            self.mlp_channels = PGSegMLP(config, width, channels_width, width)

    def forward(self, tokens_BLC: Tensor, group_tokens_BGC: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Returns segment tokens [B, K, C] or None, group centres [B, K, C] and assignment logits [B, K, L]."""
        centers_BKC = self.norm_post_tokens(self.mlp_inter(self.norm_tokens(group_tokens_BGC)))
        tokens_BLC = self.norm_x(tokens_BLC)
        centers_BKC = self.pre_assign_attn(centers_BKC, tokens_BLC)
        pooled_BKC, logits_BKL = self.assign(centers_BKC, tokens_BLC)
        if pooled_BKC is None:
            return None, centers_BKC, logits_BKL
        segments_BKC = pooled_BKC + centers_BKC
        segments_BKC = segments_BKC + self.mlp_channels(self.norm_new_x(segments_BKC))
        return segments_BKC, centers_BKC, logits_BKL


class StageOutput(NamedTuple):
    """Output of a stage. Stages that do not group return only `tokens` and `grouped`.

    tokens: input of the next stage, [B, K, C] or [B, L, C]; None if the grouping does not pool.
    group_tokens: [B, G, C], after the blocks.
    logits: [B, K, L], logits of the soft assignment.
    features: what the prototype losses need, if the stage has prototypes.
    grouped: [B, L, C], the image tokens that were grouped.
    """

    tokens: Tensor | None
    group_tokens: Tensor | None
    logits: Tensor | None
    features: StageFeatures | None
    grouped: Tensor


class PGSegStage(nn.Module):
    """Transformer blocks over image and group tokens, followed by a grouping block; the last stage has only blocks."""

    def __init__(self, config: PGSegVisionConfig, index: int, drop_path_rates: list[float]):
        super().__init__()
        self.num_group_tokens = config.num_group_tokens[index]
        self.layers = nn.ModuleList([PGSegLayer(config, rate) for rate in drop_path_rates])
        self.group_token: nn.Parameter | None = None
        self.group_projector: nn.Sequential | None = None
        self.downsample: PGSegGroupingBlock | None = None
        self.npr: PGSegStagePrototypes | None = None
        if self.num_group_tokens == 0:
            return
        self.group_token = nn.Parameter(torch.zeros(1, self.num_group_tokens, config.hidden_size))
        last = sum(tokens > 0 for tokens in config.num_group_tokens) - 1
        self.downsample = PGSegGroupingBlock(
            config,
            self.num_group_tokens,
            config.num_output_groups[index],
            pools=index < last or config.segment_source == "groups",
        )
        if index > 0:
            self.group_projector = nn.Sequential(
                nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
                PGSegMixerMLP(
                    config, config.num_group_tokens[index - 1], config.hidden_size // 2, self.num_group_tokens
                ),
            )
        if make_prototypes := npr_of(config).stage_prototypes:
            self.npr = make_prototypes(config, config.num_output_groups[index])

    def forward(
        self, tokens_BLC: Tensor, previous_group_tokens: Tensor | None, seeds: Tensor | None = None
    ) -> StageOutput:
        """`seeds` [1, P, C], required if the stage has prototypes, are the start of the prototype estimation."""
        estimate = self.npr.estimate(tokens_BLC, seeds) if self.npr is not None else None
        length = tokens_BLC.shape[1]
        if self.group_token is not None:
            group_tokens = self.group_token.expand(tokens_BLC.shape[0], -1, -1)
            if self.group_projector is not None:
                group_tokens = group_tokens + self.group_projector(previous_group_tokens)
            tokens_BLC = torch.cat([tokens_BLC, group_tokens.to(tokens_BLC.dtype)], dim=1)
        for layer in self.layers:
            tokens_BLC = layer(tokens_BLC)
        if self.downsample is None:
            return StageOutput(tokens_BLC, None, None, None, tokens_BLC)
        tokens_BLC, group_tokens = tokens_BLC[:, :length], tokens_BLC[:, length:]
        if self.npr is not None and estimate is not None:
            tokens_BLC = tokens_BLC + self.npr.reconstruct(estimate, tokens_BLC.dtype)
        segments, centers, logits = self.downsample(tokens_BLC, group_tokens)
        features = None
        if estimate is not None:
            features = StageFeatures(centers, estimate.prototypes, estimate.responsibilities, logits)
        return StageOutput(segments, group_tokens, logits, features, tokens_BLC)


def mean_of_groups(tokens_BLC: Tensor, assignment_BKL: Tensor) -> Tensor:
    """Mean [B, K, C] of each group's tokens by the soft assignment; near 0 for a group without tokens."""
    weights_BKL = assignment_BKL.to(tokens_BLC.dtype)
    return weights_BKL @ tokens_BLC / (weights_BKL.sum(dim=-1, keepdim=True) + EMPTY_GROUP_EPS)


class PGSegPatchEmbeddings(nn.Module):
    """Maps pixels [B, 3, H, W] to patches [B, C, H // p, W // p]; pixels beyond the last whole patch are dropped."""

    def __init__(self, config: PGSegVisionConfig):
        super().__init__()
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values.to(self.projection.weight.dtype))


class PGSegVisionEmbeddings(nn.Module):
    """Patch tokens with position embeddings, which are interpolated for other grids than the configured one."""

    def __init__(self, config: PGSegVisionConfig):
        super().__init__()
        self.grid = config.image_size // config.patch_size
        self.patch_embeddings = self._make_patch_embeddings(config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.grid**2, config.hidden_size))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def _make_patch_embeddings(self, config: PGSegVisionConfig) -> nn.Module:
        return PGSegPatchEmbeddings(config)

    def interpolated_positions(self, height: int, width: int) -> Tensor:
        """Position embeddings [1, height * width, C] for a grid of `height` x `width` patches; bicubic."""
        if not torch.compiler.is_exporting() and height == self.grid and width == self.grid:
            return self.position_embeddings
        weight = self.position_embeddings
        with full_precision(weight.device.type):
            square = (
                weight.to(estimation_dtype(weight.dtype))
                .unflatten(1, (self.grid, self.grid))
                .permute(0, 3, 1, 2)
            )
            resized = nn.functional.interpolate(
                square, size=(height, width), mode="bicubic", align_corners=False
            )
        return resized.flatten(2).transpose(1, 2).to(weight.dtype)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Returns tokens [B, h * w, C] and the patch grid (h, w)."""
        return self.embed(self.patch_embeddings(pixel_values))

    def embed(self, patches: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Converts patches [B, C, h, w] to tokens with positions; also returns the grid (h, w)."""
        height, width = patches.shape[-2:]
        tokens = self.layernorm(patches.flatten(2).transpose(1, 2))
        return self.dropout(tokens + self.interpolated_positions(height, width)), (height, width)


class PGSegVisionEncoder(nn.Module):
    """The stages, which compute in `compute_dtype`, or in the dtype of their input if it is None."""

    compute_dtype: torch.dtype | None = None

    def __init__(self, config: PGSegVisionConfig):
        super().__init__()
        depth = sum(config.depths)
        rates = [config.drop_path_rate * block / max(depth - 1, 1) for block in range(depth)]
        starts = [sum(config.depths[:stage]) for stage in range(len(config.depths))]
        self.stages = nn.ModuleList(
            PGSegStage(config, stage, rates[start : start + config.depths[stage]])
            for stage, start in enumerate(starts)
        )
        self.gradient_checkpointing = False
