"""Contrastive losses between images and texts, local to a process or over all of them.

Shapes: B images of this process, N texts of this process, G processes.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A logit that takes no part in a softmax, finite so that gradients stay finite where a whole row is left out.
NEVER = -1e9


def world_size() -> int:
    """Number of processes that train together, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_features(features: Tensor) -> Tensor:
    """Features of all processes, [G * N, ...], in the order of ranks, with gradient to every process's part."""
    if world_size() == 1:
        return features
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(features.contiguous()), dim=0)


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum over all processes, without gradient; the same on each of them."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def pad_to_longest(values_BM: Tensor) -> Tensor:
    """Pads dimension 1 with zeros to the longest of all processes."""
    if world_size() == 1:
        return values_BM
    longest = torch.tensor(values_BM.shape[1], device=values_BM.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    missing = int(longest) - values_BM.shape[1]
    return torch.cat(
        [values_BM, values_BM.new_zeros(values_BM.shape[0], missing, *values_BM.shape[2:])], dim=1
    )


def rank_offset(batch: int) -> int:
    """Place of this process's first sample among the gathered ones."""
    return dist.get_rank() * batch if world_size() > 1 else 0


def info_nce(logits_per_image: Tensor, logits_per_text: Tensor) -> Tensor:
    """Mean of the two directions of InfoNCE.

    Args:
        logits_per_image: [B, G * B], this process's images against all texts.
        logits_per_text: [B, G * B], this process's texts against all images.
    """
    if logits_per_image.shape != logits_per_text.shape:
        raise ValueError(
            f"the contrastive loss needs one text for each image: got logits per image {list(logits_per_image.shape)} "
            f"and per text {list(logits_per_text.shape)}."
        )
    batch = logits_per_image.shape[0]
    labels = torch.arange(batch, device=logits_per_image.device) + rank_offset(batch)
    image_loss = nn.functional.cross_entropy(logits_per_image, labels)
    text_loss = nn.functional.cross_entropy(logits_per_text, labels)
    return (image_loss + text_loss) / 2


def multi_positive_loss(logits_per_image: Tensor, logits_per_text: Tensor, targets: Tensor) -> Tensor:
    """InfoNCE with several positives: soft targets spread evenly over the positives of a row.

    Args:
        logits_per_image: [B, N].
        logits_per_text: [N, B].
        targets: bool [B, N], which texts belong to which image. A row (or column) with no positive is left out of
            its direction.
    """
    if targets.shape != logits_per_image.shape:
        raise ValueError(
            f"text targets have shape {list(targets.shape)}, expected images x texts = {list(logits_per_image.shape)}."
        )
    return (
        _soft_cross_entropy(logits_per_image, targets) + _soft_cross_entropy(logits_per_text, targets.T)
    ) / 2


def multi_label_loss(logits_per_image: Tensor, logits_per_label: Tensor, mask_BM: Tensor) -> Tensor:
    """InfoNCE between images and their own label texts, of which each image has up to M.

    Args:
        logits_per_image: [B, G * B * M], this process's images against the labels of all.
        logits_per_label: [B * M, G * B], this process's labels against all images.
        mask_BM: bool, True for labels that exist.

    Source: GroupViT section 3.2, multi-label contrastive loss; targets are spread evenly over an image's labels.
    """
    batch, num_labels = mask_BM.shape
    mask_all = torch.cat(_gather_constant(mask_BM)).flatten()
    own = torch.arange(batch, device=mask_BM.device) + rank_offset(batch)
    label_owners = torch.arange(mask_all.numel(), device=mask_BM.device) // num_labels
    image_targets = (label_owners[None] == own[:, None]) & mask_all[None]
    image_loss = _soft_cross_entropy(logits_per_image.masked_fill(~mask_all[None], NEVER), image_targets)
    label_targets = own.repeat_interleave(num_labels)[:, None] == torch.arange(
        logits_per_label.shape[1], device=own.device
    )
    label_loss = _soft_cross_entropy(logits_per_label, label_targets & mask_BM.flatten()[:, None])
    return (image_loss + label_loss) / 2


def _gather_constant(values: Tensor) -> list[Tensor]:
    if world_size() == 1:
        return [values]
    gathered = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(gathered, values.contiguous())
    return gathered


def _soft_cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    """Mean over the rows (of all processes) that have a positive; scaled so that processes' mean is the global one."""
    counts = positives.sum(1)
    weights = positives.to(logits.dtype) / counts.clamp(min=1)[:, None]
    rows = -(weights * logits.log_softmax(1)).sum(1)
    rows_of_all = sum_over_processes((counts > 0).sum().to(logits.dtype))
    return rows.sum() * world_size() / rows_of_all.clamp(min=1)
