"""The parts that PGSeg's image tower is made of.

Shapes: B batch, L image tokens of a stage's input, K groups of a stage, P prototypes, C width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_pgseg import PGSegVisionConfig
from .kernels import faster_attention, is_plain_linear, linear, project_mixtures, projects_first
from .losses import sum_over_processes
from .prototypes import PrototypeEstimate, estimate_prototypes, tokens_to_weights, updated_prototypes

# Added to a group's number of patches where its mean stands for it: small beside one patch, and a group without any
# gets a mean near 0 instead of noise.
EMPTY_GROUP_EPS = 1e-3


def estimation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of prototype estimation and losses: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device_type: str) -> torch.autocast:
    return torch.autocast(device_type, enabled=False)


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
    """Plain attention of [B, heads, length, width] tensors, output [B, length, heads, width]; softmax in float32 or
    better."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1).to(query.dtype)  # torch sums float16 and bfloat16 in float32
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _as_convolution(layer: Any, x: Tensor) -> Tensor:
    """A linear layer on [B, channels, L], as a convolution of width 1."""
    if is_plain_linear(layer):
        return nn.functional.conv1d(x, layer.weight[..., None], layer.bias)
    return layer(x.transpose(1, 2)).transpose(1, 2)


class PGSegAttention(nn.Module):
    """Multi-head attention of queries [B, Q, C] over keys and values from another sequence [B, L, C]."""

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
        query = self._heads(linear(self.q_proj, queries))
        key, value = (self._heads(linear(layer, context)) for layer in (self.k_proj, self.v_proj))
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
        hidden = linear(self.fc1, x)
        if self._forgets_activations():
            return checkpoint(
                self._activate_and_project, hidden, use_reentrant=False, preserve_rng_state=False
            )
        return self._activate_and_project(hidden)

    def _forgets_activations(self) -> bool:
        """Whether the activations, the largest tensors of a block, are made again for the gradient, which takes no
        product. Not with an adapter, which may have dropout, nor in a compiled graph, whose compiler decides."""
        learns = self.training and torch.is_grad_enabled()
        return learns and type(self.fc2) is nn.Linear and not torch.compiler.is_compiling()

    def _activate_and_project(self, hidden: Tensor) -> Tensor:
        return linear(self.fc2, self.activation_fn(hidden))


class PGSegMixerMLP(PGSegMLP):
    """Two linear layers over the tokens: [B, tokens in, C] to [B, tokens out, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class PGSegDropPath(nn.Module):
    """Stochastic depth: in training, leaves the branch out for whole samples and scales the others up."""

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
    """Lets projected group tokens read the image tokens; no norm before the attention, one at the end."""

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
    """Assigns each image token to one group and, where it pools, averages the tokens of each group."""

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
        """Standard Gumbel noise of the shape of the logits, in float32 or better: in 16 bits it would be cut off at 4.4
        and often equal, which favours the first groups."""
        dtype = estimation_dtype(logits.dtype)
        zero, one = (torch.full((), value, device=logits.device, dtype=dtype) for value in (0.0, 1.0))
        # Checking the arguments would have a GPU wait.
        return torch.distributions.Gumbel(zero, one, validate_args=False).sample(logits.shape)

    def forward(self, centers_BKC: Tensor, tokens_BLC: Tensor) -> tuple[Tensor | None, Tensor]:
        """Returns the groups' averaged tokens [B, K, C] and the logits of the soft assignment [B, K, L]."""
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
    """Groups L image tokens, led by the group tokens, and, where it pools, makes K segment tokens of them."""

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
        """Returns segment tokens [B, K, C], group centres [B, K, C] and assignment logits [B, K, L]."""
        centers_BKC = self.norm_post_tokens(self.mlp_inter(self.norm_tokens(group_tokens_BGC)))
        tokens_BLC = self.norm_x(tokens_BLC)
        centers_BKC = self.pre_assign_attn(centers_BKC, tokens_BLC)
        pooled_BKC, logits_BKL = self.assign(centers_BKC, tokens_BLC)
        if pooled_BKC is None:
            return None, centers_BKC, logits_BKL
        segments_BKC = pooled_BKC + centers_BKC
        segments_BKC = segments_BKC + self.mlp_channels(self.norm_new_x(segments_BKC))
        return segments_BKC, centers_BKC, logits_BKL


class PGSegProjection(nn.Sequential):
    """Linear, BatchNorm, ReLU, Linear over the last dimension of a tensor of any shape."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__(
            nn.Linear(in_features, hidden_features),
            nn.BatchNorm1d(hidden_features),
            nn.ReLU(),
            nn.Linear(hidden_features, out_features),
        )

    def forward(self, x: Tensor, use_running_stats: bool = False) -> Tensor:
        """With `use_running_stats`, or for a single row, which has no statistics of its own, training too normalises by
        the running statistics and leaves them as they are."""
        shape = x.shape[:-1]
        hidden = linear(self[0], x.reshape(-1, x.shape[-1]))
        if self.training and (use_running_stats or hidden.shape[0] == 1):
            norm: Any = self[1]
            # Copies, as the next forward changes the statistics in place before this one's backward.
            scale = norm.weight * torch.rsqrt(norm.running_var.clone() + norm.eps)
            hidden = (hidden - norm.running_mean.clone()) * scale + norm.bias
        else:
            hidden = self._normalized(hidden)
        hidden = linear(self[3], self[2](hidden))
        return hidden.reshape(*shape, hidden.shape[-1])

    def _normalized(self, hidden: Tensor) -> Tensor:
        """BatchNorm; frozen, in training too by its running statistics, which stay: below an adapter nothing is learned
        that the adapter does not hold."""
        norm: Any = self[1]
        if not self.training or norm.weight.requires_grad:
            return norm(hidden)
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return nn.functional.batch_norm(hidden, *statistics, training=False, eps=norm.eps)

    def convolve(self, tokens_BLC: Tensor) -> Tensor:
        """The same on tokens, as the convolutions of width 1 of the released code, whose rounding this reproduces."""
        hidden = self[2](self._normalized(_as_convolution(self[0], tokens_BLC.transpose(1, 2))))
        return _as_convolution(self[3], hidden).transpose(1, 2)


@torch.no_grad()
def init_prototypes(buffer: Tensor, dim: int = -1) -> None:
    """Fills a buffer of prototypes with random unit vectors along `dim`, the same at every call: transformers expects
    buffers not to depend on the seed or on the order of initialisation."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(buffer.shape, generator=generator, dtype=torch.float32, device="cpu")
    init.copy_(buffer, nn.functional.normalize(values, dim=dim))


class PGSegStagePrototypes(nn.Module):
    """A stage's prototypes: the moving seeds of the estimation and the projection of prototypes to tokens."""

    prototypes: Tensor

    def __init__(self, config: PGSegVisionConfig, num_prototypes: int):
        super().__init__()
        self.released = config.npr_variant == "released"
        self.mixing = config.prototype_mixing
        self.num_iterations = config.num_prototype_iterations
        self.momentum = config.prototype_momentum
        self.register_buffer(
            "prototypes", torch.empty(1, num_prototypes, config.hidden_size, dtype=torch.float32)
        )
        init_prototypes(self.prototypes)
        self.projection = PGSegProjection(
            config.hidden_size, config.prototype_projection_dim, config.hidden_size
        )

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        return apply_keeping_precision(self, "prototypes", super()._apply, fn, recurse)

    def seeds(self) -> Tensor:
        """Where a forward starts the estimation, [1, P, C]: a copy where `move` will change the prototypes, so that a
        recompute of the stage starts from the same."""
        return self.prototypes.clone() if self._moves() else self.prototypes

    def _moves(self) -> bool:
        # Frozen prototypes stay, as a frozen model's statistics do.
        is_frozen = not self.projection[1].weight.requires_grad
        return self.training and torch.is_grad_enabled() and not self.released and not is_frozen

    def move(self, estimates_BPC: Tensor) -> None:
        """In training with gradient, moves the seeds to the mean of the batch's prototypes."""
        if self._moves():
            move_prototypes(self.prototypes, estimates_BPC, self.momentum)

    def estimate(self, tokens_BLC: Tensor, seeds_1PC: Tensor) -> PrototypeEstimate:
        """Estimates prototypes from a stage's input."""
        with full_precision(tokens_BLC.device.type):
            tokens_BLC = tokens_BLC.detach().to(estimation_dtype(tokens_BLC.dtype))
            return estimate_prototypes(tokens_BLC, seeds_1PC, self.num_iterations)

    def reconstruct(self, estimate: PrototypeEstimate, dtype: torch.dtype) -> Tensor:
        """The prototypes' part of each token, R [B, L, C]."""
        if self.released or self.mixing == "tokens":
            weights_BLP = tokens_to_weights(estimate.responsibilities)
            if projects_first(self.projection):
                return project_mixtures(self.projection, estimate.prototypes.to(dtype), weights_BLP.to(dtype))
            with full_precision(weights_BLP.device.type):
                mixed_BLC = (weights_BLP @ estimate.prototypes).to(dtype)
            return self.projection.convolve(mixed_BLC) if self.released else self.projection(mixed_BLC)
        return estimate.responsibilities.to(dtype) @ self.projection(estimate.prototypes.to(dtype))


@torch.no_grad()
def move_prototypes(
    buffer_1PC: Tensor, estimates_BPC: Tensor, momentum: float, mask_BP: Tensor | None = None
) -> None:
    """Moves the seeds towards the mean of all processes' estimates; a prototype that no sample has stays."""
    if mask_BP is None:
        mask_BP = torch.ones(estimates_BPC.shape[:2], dtype=torch.bool, device=estimates_BPC.device)
    sums_PC = sum_over_processes((estimates_BPC * mask_BP[..., None]).sum(0))
    counts_P1 = sum_over_processes(mask_BP.sum(0).to(sums_PC.dtype))[:, None]
    moved_PC = updated_prototypes(buffer_1PC[0], sums_PC / counts_P1.clamp(min=1), momentum)
    buffer_1PC.copy_(torch.where(counts_P1 > 0, moved_PC, buffer_1PC[0])[None])


def apply_keeping_precision(
    module: nn.Module, name: str, apply: Callable, fn: Callable, recurse: bool
) -> nn.Module:
    """`nn.Module._apply` that keeps the buffer `name` in float32 or better."""
    before = module._buffers[name]
    result = apply(fn, recurse)
    after = module._buffers[name]
    if before is not None and after is not None and after.dtype in (torch.float16, torch.bfloat16):
        module._buffers[name] = before.to(device=after.device)
    return result


class PGSegStage(nn.Module):
    """Transformer blocks over image and group tokens, then a grouping block; the last stage only has blocks."""

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
        if config.npr_variant != "none":
            self.npr = PGSegStagePrototypes(config, config.num_output_groups[index])

    def forward(
        self, tokens_BLC: Tensor, previous_group_tokens: Tensor | None, seeds: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, tuple[Tensor, ...] | None, Tensor]:
        """`seeds` [1, P, C] start the prototype estimation; needed where the stage has prototypes.

        Returns the tokens of the next stage [B, K, C] (or [B, L, C]; None where the grouping does not pool), the group
        tokens after the blocks, the assignment logits [B, K, L], what the prototype losses need (centres, prototypes,
        responsibilities, logits), and the image tokens [B, L, C] that were grouped.
        """
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
            return tokens_BLC, None, None, None, tokens_BLC
        tokens_BLC, group_tokens = tokens_BLC[:, :length], tokens_BLC[:, length:]
        if self.npr is not None and estimate is not None:
            tokens_BLC = tokens_BLC + self.npr.reconstruct(estimate, tokens_BLC.dtype)
        segments, centers, logits = self.downsample(tokens_BLC, group_tokens)
        losses_need = (
            None if estimate is None else (centers, estimate.prototypes, estimate.responsibilities, logits)
        )
        return segments, group_tokens, logits, losses_need, tokens_BLC


def mean_of_groups(tokens_BLC: Tensor, assignment_BKL: Tensor) -> Tensor:
    """Mean [B, K, C] of the tokens over each group by the soft assignment; near 0 for a group without tokens."""
    weights_BKL = assignment_BKL.to(tokens_BLC.dtype)
    return weights_BKL @ tokens_BLC / (weights_BKL.sum(dim=-1, keepdim=True) + EMPTY_GROUP_EPS)


class PGSegPatchEmbeddings(nn.Module):
    """Pixels [B, 3, H, W] to patches [B, C, H // p, W // p]; a remainder that does not fill a patch is cut off."""

    def __init__(self, config: PGSegVisionConfig):
        super().__init__()
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values.to(self.projection.weight.dtype))


class PGSegVisionEmbeddings(nn.Module):
    """Patch tokens with position embeddings, interpolated where the grid is not the configured one."""

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
        """Position embeddings of a grid of `height` x `width` patches, [1, height * width, C]; bicubic."""
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
        """Patches [B, C, h, w] as tokens with their positions, and the grid."""
        height, width = patches.shape[-2:]
        tokens = self.layernorm(patches.flatten(2).transpose(1, 2))
        return self.dropout(tokens + self.interpolated_positions(height, width)), (height, width)


class PGSegVisionEncoder(nn.Module):
    """The stages."""

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
