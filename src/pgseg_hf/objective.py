"""The training objective: computes the losses from the features of a batch of images and texts.

Shapes: B images of this process, N texts of this process, U distinct texts of all processes, L patches.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .distributed import gather_features, gather_rows, pad_to_longest, sum_over_processes, world_size
from .features import (
    Batch,
    ImageFeatures,
    JointImages,
    Scales,
    TextFeatures,
    TextOwners,
    clamped_scale,
    normalized,
)
from .losses import SharedTexts, info_nce, multi_label_loss, multi_positive_loss, share_texts, sigmoid_loss
from .npr import NPRLosses, npr_of
from .poolings import refuse_other_losses
from .precision import full_precision

logger = logging.get_logger(__name__)


@dataclass
class Losses:
    """Parts of the objective before their weights, and `total`, their weighted sum."""

    total: Tensor
    contrastive: Tensor
    multi_label: Tensor | None = None
    image_prototype: Tensor | None = None
    image_prototype_by_stage: tuple[Tensor, ...] | None = None
    text_prototype: Tensor | None = None
    assignment: Tensor | None = None
    patch_text: Tensor | None = None
    negatives: Tensor | None = None
    """Mean number of texts that an image is contrasted with; not part of the total."""

    def parts(self) -> dict[str, Tensor]:
        """The parts that were computed, as scalars without gradient."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}


class Objective(Batch):
    """The losses of one global batch, with gradient to the features, the scales' factors and the bias."""

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.config
        self.npr = npr_of(config)
        refuse_other_losses(config.contrastive_pooling, config.contrastive_loss)
        self.negatives: Tensor | None = None
        self.prototype_losses: NPRLosses | None = None

    def __call__(self) -> Losses:
        config, count = self.config, self.owners.num_captions
        texts = normalized(self.texts.embeds)
        shared = self._shared_captions(texts[:count])
        contrastive = self._captions_loss(texts[:count], shared)
        losses = Losses(contrastive, contrastive, negatives=self.negatives)
        if self.owners.label_mask is not None:
            losses.multi_label = self._labels_loss(texts[count:])
            losses.total = losses.total + config.multi_label_weight * losses.multi_label
        if self.owners.patch_targets is not None:
            losses.patch_text = self._patch_texts_loss(shared, self.owners.patch_targets)
            losses.total = losses.total + config.patch_text_weight * losses.patch_text
        if self.images.stages:
            self._add_prototype_losses(losses)
        return losses

    def _logits(self, images: JointImages, text_ND: Tensor) -> Tensor:
        return images.logits(text_ND, self.scales.contrastive, self.config)

    def _shared_captions(self, texts_ND: Tensor) -> SharedTexts | None:
        """The captions with equal ones merged, if a loss needs that."""
        owners = self.owners
        one_each = self.config.contrastive_loss == "info_nce" and owners.text_targets is None
        if one_each and owners.patch_targets is None:
            return None
        keys_NT = self.texts.keys[: len(texts_ND)]
        return self._share(texts_ND, keys_NT, owners.caption_owners(texts_ND.device))

    def _captions_loss(self, texts_ND: Tensor, shared: SharedTexts | None) -> Tensor:
        if self.config.contrastive_loss != "info_nce" or self.owners.text_targets is not None:
            loss, targets_BU = self._shared_texts_loss(shared)
            self.negatives = (~targets_BU).sum(1).to(loss.dtype).mean()
            return loss
        self.negatives = self.scales.contrastive.new_full((), len(texts_ND) * world_size() - 1)
        if world_size() == 1:
            logits = self._logits(self.joint, texts_ND)
            return info_nce(logits, logits.T)
        images = self.joint.gathered()
        return info_nce(
            self._logits(self.joint, gather_features(texts_ND)),
            self._logits(images, texts_ND).T,
        )

    def _labels_loss(self, texts_ND: Tensor) -> Tensor:
        owners_BN = self.owners.label_owners(len(texts_ND))
        if self.config.contrastive_loss != "info_nce":
            keys_NT = self.texts.keys[self.owners.num_captions :]
            return self._shared_texts_loss(self._share(texts_ND, keys_NT, owners_BN))[0]
        labels_of_all, start = gather_rows(texts_ND)
        return multi_label_loss(
            self._logits(self.joint, labels_of_all),
            self._logits(self.joint.gathered(), texts_ND).T,
            owners_BN,
            start,
        )

    def _share(self, texts_ND: Tensor, keys_NT: Tensor, owners_BN: Tensor) -> SharedTexts:
        keys_NT = pad_to_longest(keys_NT + 1) - 1  # so that texts padded to different lengths stay equal
        return share_texts(texts_ND, keys_NT, owners_BN)

    def _shared_texts_loss(self, shared: SharedTexts) -> tuple[Tensor, Tensor]:
        """Contrastive loss with equal texts merged, and which of them belong to this process's images, bool [B, U]."""
        logits_BU = self._logits(self.joint, shared.embeds)
        if self.config.contrastive_loss == "sigmoid":
            targets_BU = shared.image_targets
            if self.scales.bias is not None:
                logits_BU = logits_BU + self.scales.bias
            if self.config.pooling.words_compete:
                shown_U = sum_over_processes(targets_BU.sum(0)) > 0
                logits_BU, targets_BU = logits_BU[:, shown_U], targets_BU[:, shown_U]
            loss = sigmoid_loss(logits_BU, targets_BU, self.config.label_balance)
            return loss, targets_BU
        images = self.joint.gathered()
        logits_per_text = self._logits(images, shared.embeds[shared.own]).T
        loss = multi_positive_loss(logits_BU, logits_per_text, shared.image_targets, shared.text_targets)
        return loss, shared.image_targets

    def _patch_texts_loss(self, shared: SharedTexts, targets_BhwN: Tensor) -> Tensor:
        """Cross-entropy of the patches' softmax over all texts with the texts' shares of the cells; mean over
        what the cells of all processes show."""
        patches_BLD = self.joint.patches
        if patches_BLD is None:
            raise ValueError(
                f"patch_targets require contrastive_pooling='patches', but it is {self.config.contrastive_pooling!r}."
            )
        if targets_BhwN.ndim != 4 or targets_BhwN.shape[::3] != (len(patches_BLD), len(shared.places)):
            raise ValueError(
                f"patch_targets has shape {list(targets_BhwN.shape)}, expected [{len(patches_BLD)}, height, width, "
                f"{len(shared.places)}]."
            )
        log_shares_BLU = self.joint.patch_log_shares(shared.embeds, self.scales.contrastive)
        log_shares_BUhw = log_shares_BLU.unflatten(1, self.images.patch_grid[0].tolist()).permute(0, 3, 1, 2)
        height, width = targets_BhwN.shape[1:3]
        of_cells_BUhw = nn.functional.adaptive_avg_pool2d(log_shares_BUhw, (height, width))
        of_cells_BhwN = of_cells_BUhw.permute(0, 2, 3, 1).index_select(3, shared.places)
        targets_BhwN = targets_BhwN.to(of_cells_BhwN.dtype)
        shown = sum_over_processes(targets_BhwN.sum())
        return -(targets_BhwN * of_cells_BhwN).sum() * world_size() / shown.clamp(min=1)

    def _add_prototype_losses(self, losses: Losses) -> None:
        config = self.config
        self.prototype_losses = parts = self.npr.losses(self)
        losses.image_prototype_by_stage = parts.image_by_stage
        losses.image_prototype = torch.stack(parts.image_by_stage).sum()
        losses.text_prototype, losses.assignment = parts.text, parts.assignment
        image_prototype = torch.stack([self._guarded(loss) for loss in parts.image_by_stage]).sum()
        losses.total = losses.total + config.image_prototype_weight * image_prototype
        losses.total = losses.total + config.text_prototype_weight * self._guarded(parts.text)
        if parts.assignment is not None:
            losses.total = losses.total + config.assignment_weight * parts.assignment

    def _guarded(self, loss: Tensor) -> Tensor:
        if self.config.guard_prototype_losses:
            return torch.where(loss.isfinite(), loss, 0.0)
        learns = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if learns and self.npr.may_be_nan and not loss.isfinite():
            logger.warning_once(
                f"A prototype loss of the {self.config.npr_variant} variant is NaN, as when no pair of a group and a "
                "prototype is kept, and so is the total. For training set guard_prototype_losses=True in the "
                "configuration."
            )
        return loss


def compute_losses(model: Any, images: ImageFeatures, texts: TextFeatures, owners: TextOwners) -> Losses:
    """The losses of one global batch in float32 or float64. In training with gradient, also updates the text prototypes
    of a `PGSegModel`."""
    config = model.config
    with full_precision(images.embeds.device.type):
        scales = Scales(clamped_scale(model.logit_scale, config), bias=model.logit_bias)
        if images.stages:
            scales.prototype = clamped_scale(model.prototype_logit_scale, config)
            scales.text_seeds = model.get_buffer(model.npr.text_buffer)
        objective = Objective(config, scales, images, texts, owners)
        losses = objective()
        parts = objective.prototype_losses
        if parts is not None and parts.text_estimate and model.training and torch.is_grad_enabled():
            model.npr.move_text_prototypes(model, *parts.text_estimate)
    return losses
