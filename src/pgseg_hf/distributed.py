"""Communication between the processes of a training run; every function also works in a single process.

Shapes: N rows of this process, G processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of training processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_constant(values: Tensor) -> list[Tensor]:
    """Tensors of the same shape from all processes, in rank order, without gradient."""
    if world_size() == 1:
        return [values]
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(gathered, values.contiguous())
    return gathered


def gather_features(features: Tensor) -> Tensor:
    """Features of all processes [G * N, ...], in rank order, with gradient to every process's part."""
    return features if world_size() == 1 else _GatherWithGradient.apply(features)


class _GatherWithGradient(torch.autograd.Function):
    """Concatenates over processes; in backward each part gets the sum of its gradients from all processes."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return torch.cat(gather_constant(features))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = sum_over_processes(gradients[0])
        return summed.chunk(world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """[`gather_features`] for any number of rows per process; also returns the index of this process's first row."""
    if world_size() == 1:
        return rows, 0
    counts = torch.cat(gather_constant(torch.tensor([len(rows)], device=rows.device))).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    if rows.is_floating_point():
        gathered = gather_features(padded).chunk(len(counts))
    else:
        gathered = tuple(gather_constant(padded))
    parts = [part[:count] for part, count in zip(gathered, counts)]
    return torch.cat(parts), sum(counts[: dist.get_rank()])


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum over all processes, identical on each of them, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def pad_to_longest(values_BM: Tensor) -> Tensor:
    """Pads dimension 1 with zeros to the largest size on any process."""
    if world_size() == 1:
        return values_BM
    longest = torch.tensor(values_BM.shape[1], device=values_BM.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    missing = int(longest) - values_BM.shape[1]
    return torch.cat(
        [values_BM, values_BM.new_zeros(values_BM.shape[0], missing, *values_BM.shape[2:])], dim=1
    )


def rank_offset(batch: int) -> int:
    """Index of this process's first sample in the gathered batch."""
    return dist.get_rank() * batch if world_size() > 1 else 0
