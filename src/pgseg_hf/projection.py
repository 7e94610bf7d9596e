"""The projection with BatchNorm for tokens, texts and prototypes."""

from typing import Any

import torch
from torch import Tensor, nn

from .kernels import linear


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
        """With `use_running_stats`, or for a single row, training uses the running statistics without updating them."""
        shape = x.shape[:-1]
        hidden = linear(self[0], x.reshape(-1, x.shape[-1]))
        if self.training and (use_running_stats or hidden.shape[0] == 1):
            norm: Any = self[1]
            # Copies, because the next forward changes the statistics in place before this one's backward.
            scale = norm.weight * torch.rsqrt(norm.running_var.clone() + norm.eps)
            hidden = (hidden - norm.running_mean.clone()) * scale + norm.bias
        else:
            hidden = self.normalized(hidden)
        hidden = linear(self[3], self[2](hidden))
        return hidden.reshape(*shape, hidden.shape[-1])

    def normalized(self, hidden: Tensor) -> Tensor:
        """BatchNorm. If frozen, as below an adapter, training also uses the running statistics as they are."""
        norm: Any = self[1]
        if not self.training or norm.weight.requires_grad:
            return norm(hidden)
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return nn.functional.batch_norm(hidden, *statistics, training=False, eps=norm.eps)
