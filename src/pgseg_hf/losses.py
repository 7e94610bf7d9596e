"""Contrastive losses between images and texts, for one or several processes.

Shapes: B images of this process, N texts of this process, G processes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .distributed import gather_constant, gather_rows, rank_offset, sum_over_processes, world_size

# Masks a logit in a softmax; finite, so that gradients stay finite if a whole row is masked.
NEVER = -1e9


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


def multi_positive_loss(
    logits_per_image: Tensor,
    logits_per_text: Tensor,
    image_targets: Tensor,
    text_targets: Tensor | None = None,
) -> Tensor:
    """InfoNCE with several positives: the targets are spread evenly over the positives of a row.

    Args:
        logits_per_image: [B, N], this process's images against all texts.
        logits_per_text: [M, G * B], this process's texts against all images.
        image_targets: bool [B, N], which texts belong to which image. Rows without a positive are ignored.
        text_targets: bool [M, G * B]; defaults to the transpose of `image_targets`.
    """
    text_targets = image_targets.T if text_targets is None else text_targets
    _refuse_other_shape(image_targets, logits_per_image, "images x texts")
    _refuse_other_shape(text_targets, logits_per_text, "texts x images")
    image_loss = _soft_cross_entropy(logits_per_image, image_targets)
    return (image_loss + _soft_cross_entropy(logits_per_text, text_targets)) / 2


def _refuse_other_shape(targets: Tensor, logits: Tensor, sides: str) -> None:
    if targets.shape != logits.shape:
        shape, expected = list(targets.shape), list(logits.shape)
        raise ValueError(f"text targets have shape {shape}, expected {sides} = {expected}.")


def sigmoid_loss(logits: Tensor, targets: Tensor, balance: float = 1.0) -> Tensor:
    """Binary classification of each image-text pair: does the text belong to the image?

    With a balance of 1 all texts have the same weight, however frequent, and so do the images with and without a text.
    With 0 all pairs have the same weight. SigLIP sums over all pairs, with one positive per text.

    Args:
        logits: [B, N], this process's images against all texts.
        targets: bool [B, N], which texts belong to which image.
        balance: 0 to 1; interpolates the weights.
    """
    _refuse_other_shape(targets, logits, "images x texts")
    positives = sum_over_processes(targets.sum(0).to(logits.dtype))
    negatives = sum_over_processes((~targets).sum(0).to(logits.dtype))
    weights = torch.where(targets, 1 / positives.clamp(min=1), 1 / negatives.clamp(min=1))
    weights = balance * weights + (1 - balance) * 2 / (positives + negatives)
    terms = nn.functional.softplus(torch.where(targets, -logits, logits))
    return (weights * terms).sum() * world_size() / max(logits.shape[1], 1)


class SharedTexts(NamedTuple):
    """The distinct texts of all processes, and which images they belong to.

    embeds: [U, D].
    image_targets: bool [B, U], which of them belong to this process's images.
    places: int64 [N], index of each of this process's texts among them.
    own: int64 [M], those that this process is responsible for; each text has exactly one such process.
    text_targets: bool [M, G * B], which images of all processes they belong to.
    """

    embeds: Tensor
    image_targets: Tensor
    places: Tensor
    own: Tensor
    text_targets: Tensor


def share_texts(embeds_ND: Tensor, keys_NT: Tensor, owners_BN: Tensor) -> SharedTexts:
    """Merges equal texts, so that an image's positives are all texts equal to one of its own.

    Args:
        embeds_ND: texts of this process, with gradient.
        keys_NT: int64; equal rows are equal texts. T must be the same on all processes.
        owners_BN: bool, which texts belong to which of this process's images.
    """
    keys, start = gather_rows(keys_NT)
    embeds, _ = gather_rows(embeds_ND)
    unique, index = torch.unique(keys, dim=0, return_inverse=True)
    places = torch.arange(len(keys), device=keys.device)
    first = torch.full((len(unique),), len(keys), device=keys.device).scatter_reduce(
        0, index, places, reduce="amin"
    )
    image_targets = torch.zeros(len(owners_BN), len(unique), device=keys.device)
    own_places = index[start : start + len(keys_NT)]
    image_targets.index_add_(1, own_places, owners_BN.to(image_targets.dtype))
    image_targets = image_targets > 0
    own = ((first >= start) & (first < start + len(keys_NT))).nonzero()[:, 0]
    text_targets = torch.cat(gather_constant(image_targets.contiguous()))[:, own].T
    return SharedTexts(embeds[first], image_targets, own_places, own, text_targets)


def multi_label_loss(
    logits_per_image: Tensor, logits_per_label: Tensor, owners_BN: Tensor, start: int = 0
) -> Tensor:
    """InfoNCE between images and their own label texts, any number per image.

    Args:
        logits_per_image: [B, labels of all processes], this process's images against all labels.
        logits_per_label: [N, G * B], this process's labels against all images.
        owners_BN: bool, which image each of this process's labels belongs to.
        start: index of this process's first label among all labels.

    Source: GroupViT section 3.2, multi-label contrastive loss; targets are spread evenly over an image's labels.
    """
    batch, count = owners_BN.shape
    labels_after = logits_per_image.shape[1] - start - count
    offset = rank_offset(batch)
    images_after = logits_per_label.shape[1] - offset - batch
    return multi_positive_loss(
        logits_per_image,
        logits_per_label,
        nn.functional.pad(owners_BN, (start, labels_after)),
        nn.functional.pad(owners_BN.T, (offset, images_after)),
    )


def _soft_cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    """Mean over all processes' rows with a positive, scaled so that the processes' mean is the global mean."""
    counts = positives.sum(1)
    weights = positives.to(logits.dtype) / counts.clamp(min=1)[:, None]
    rows = -(weights * logits.log_softmax(1)).sum(1)
    rows_of_all = sum_over_processes((counts > 0).sum().to(logits.dtype))
    return rows.sum() * world_size() / rows_of_all.clamp(min=1)
