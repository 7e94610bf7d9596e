"""Gradient caching: gradients of a large contrastive batch in the memory of a small one.

The images and texts of a batch are first encoded in chunks without a graph. The losses of the whole batch then give the
gradient of each feature, and each chunk is encoded again with the same randomness to backpropagate that gradient to the
weights. The result is the gradient of the full batch, except for BatchNorm in the heads: it normalises each chunk with
the chunk's own statistics, as each process of a distributed run does. Its running statistics are updated once per batch
by the mean over the chunks of all processes, and image prototypes once per batch by the mean over the batch.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_map, tree_map_with_path

from ..distributed import sum_over_processes, world_size
from ..modeling_pgseg import PGSegModel
from ..objective import compute_losses

# Buffers that a forward pass in training mode updates; NPR variants add their own.
MOVING_BUFFERS = ("running_mean", "running_var")
# Features that receive a gradient from the losses; the others are constants.
DIFFERENTIABLE = frozenset({"embeds", "segment_embeds", "patch_embeds", "areas", "centers", "logits"})


def split_evenly(count: int, chunk_size: int) -> list[slice]:
    """Chunks of about `chunk_size` rows, avoiding single rows if possible, which BatchNorm cannot normalise."""
    parts = -(-count // chunk_size)
    if count // max(parts, 1) < 2:
        parts = max(count // 2, 1)
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(start, end) for start, end in pairwise(bounds)]


@dataclass
class _Chunk:
    inputs: dict[str, Any]
    share: float
    random_states: list[Tensor]


class GradientCache:
    """Computes losses and gradients of batches of any size in the memory of `chunk_size` images or texts.

    Args:
        model: the model in training mode, not wrapped for distributed training. With several processes, call
            [`average_gradients`] after `backward`.
        chunk_size: number of images, and of texts, encoded at a time.
        autocast: returns the context manager for mixed precision.
    """

    def __init__(
        self, model: PGSegModel, chunk_size: int, autocast: Callable[[], AbstractContextManager] = nullcontext
    ):
        if chunk_size < 2:
            raise ValueError(f"chunk_size is {chunk_size}, expected at least 2 for BatchNorm.")
        self.model, self.chunk_size, self.autocast = model, chunk_size, autocast

    def backward(
        self, inputs: dict[str, Tensor], backward: Callable[[Tensor], None] = torch.Tensor.backward
    ) -> dict[str, Tensor]:
        """Accumulates the gradient of the batch's total loss in the weights.

        Args:
            inputs: this process's arguments of `PGSegModel.forward`.
            backward: runs the backward pass of a scalar; `accelerator.backward` scales it for float16.

        Returns:
            The terms of the loss of the whole batch (see `Losses`). If the total is not finite, the second pass is
            skipped and only the scales get a gradient.
        """
        name = "pixel_values" if "pixel_values" in inputs else "backbone_features"
        model, device = self.model, inputs[name].device
        texts = {key: value for key, value in inputs.items() if key not in (name, "return_loss")}
        ids, mask, owners = model.gather_texts(**texts)
        image_chunks = self._chunks({name: inputs[name]})
        text_chunks = self._chunks({"input_ids": ids, "attention_mask": mask})
        moving = MOVING_BUFFERS + model.npr.moved_by_texts
        buffers = {name: value for name, value in model.named_buffers() if name.endswith(moving)}
        start = {name: value.clone() for name, value in buffers.items()}

        def encode(chunk: _Chunk) -> Any:
            for name, value in buffers.items():
                value.copy_(start[name])
            with self.autocast():
                return model.encode_part(**chunk.inputs)

        features = []
        for chunk in image_chunks + text_chunks:
            chunk.random_states = _random_states(device)
            with torch.no_grad():
                features.append(_as_leaves(encode(chunk)))
        count = len(image_chunks)
        all_images, all_texts = _concatenated(features[:count]), _concatenated(features[count:])
        losses = compute_losses(model, all_images, all_texts, owners)
        backward(losses.total)
        if sum_over_processes((~losses.total.isfinite()).double()) == 0:  # the same on every process
            moved = {name: torch.zeros_like(value) for name, value in start.items()}
            for chunk, leaves in zip(image_chunks + text_chunks, features):
                _set_random_states(chunk.random_states, device)
                outputs = _differentiable(encode(chunk))
                gradients = [leaf.grad for leaf in _differentiable(leaves)]
                # The outputs of a frozen tower have no graph.
                used = [
                    pair for pair in zip(outputs, gradients) if pair[0].requires_grad and pair[1] is not None
                ]
                torch.autograd.backward([out for out, _ in used], [grad for _, grad in used])
                for name, value in buffers.items():
                    moved[name] += chunk.share * (value - start[name])
            for name, value in buffers.items():
                value.copy_(start[name] + sum_over_processes(moved[name]) / world_size())
            model.vision_model.move_prototypes([stage.prototypes for stage in all_images.stages])
        return losses.parts()

    def _chunks(self, tensors: dict[str, Tensor | None]) -> list[_Chunk]:
        count = max(len(value) for value in tensors.values() if value is not None)
        chunks = []
        for rows in split_evenly(count, self.chunk_size):
            inputs = {name: None if value is None else value[rows] for name, value in tensors.items()}
            chunks.append(_Chunk(inputs, (rows.stop - rows.start) / count, []))
        return chunks


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages the gradients over all processes; a missing gradient counts as 0."""
    if world_size() == 1:
        return
    pending = []
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad /= world_size()
            pending.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in pending:
        work.wait()


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _is_differentiable(path: tuple[Any, ...]) -> bool:
    """Whether the last field of a path, of a dataclass or a named tuple, has a gradient."""
    return getattr(path[-1], "key", getattr(path[-1], "name", None)) in DIFFERENTIABLE


def _as_leaves(features: Any) -> Any:
    """The same features as leaves of a new graph; None stays None."""

    def leaf(path: tuple[Any, ...], value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().requires_grad_(_is_differentiable(path))

    return type(features)(**tree_map_with_path(leaf, vars(features)))


def _differentiable(features: Any) -> list[Tensor]:
    found, _ = tree_flatten_with_path(vars(features))
    return [value for path, value in found if value is not None and _is_differentiable(path)]


def _concatenated(chunks: list[Any]) -> Any:
    """The features of all chunks, concatenated into a single dataclass of the same type."""

    def joined(*parts: Any) -> Tensor | None:
        return None if parts[0] is None else torch.cat(parts)

    return type(chunks[0])(**tree_map(joined, *map(vars, chunks)))
