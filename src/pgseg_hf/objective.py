"""The training objective: from the features of a batch of images and texts to the method's losses.

Features are kept apart from the towers that make them, so that a batch may be encoded in parts (gradient caching).
Shapes: B images of this process, N texts of this process, G processes, K groups, P prototypes, T tokens, C width, D
joint width.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .layers import estimation_dtype, full_precision, move_prototypes
from .losses import (
    SharedTexts,
    gather_features,
    gather_rows,
    info_nce,
    multi_label_loss,
    multi_positive_loss,
    pad_to_longest,
    share_texts,
    sigmoid_loss,
    sum_over_processes,
    world_size,
)
from .prototypes import Matching, assignment_loss, estimate_prototypes, ordered_matching, prototype_loss

logger = logging.get_logger(__name__)

# Areas of groups are at least this, and shares of texts this far from 1, so that log odds stay finite.
SMALLEST_SHARE = 1e-4
# Below it the chance to be seen in one look is its odds, to float32's rounding.
NEGLIGIBLE_LOG_SHARE = -20.0


@dataclass
class StageFeatures:
    """What the prototype losses need of a grouping stage.

    centers: [B, K, C]; gradient flows into them.
    prototypes: [B, P, C], constants.
    responsibilities: [B, L, P], constants; None where the assignment term has no weight.
    logits: [B, K, L] of the soft assignment; None likewise.
    """

    centers: Tensor
    prototypes: Tensor
    responsibilities: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class ImageFeatures:
    """Images in the joint space, not normalised: `embeds` [B, D], `segment_embeds` [B, K, D], for mixture pooling each
    group's share of the image, `areas` [B, K], for patch pooling `patch_embeds` [B, L, D] with the height and width of
    their grid, `patch_grid` [B, 2], and the stages' parts."""

    embeds: Tensor
    segment_embeds: Tensor
    areas: Tensor | None = None
    patch_embeds: Tensor | None = None
    patch_grid: Tensor | None = None
    stages: tuple[StageFeatures, ...] = ()


@dataclass
class TextFeatures:
    """Texts in the joint space.

    embeds: [N, D], not normalised; gradient flows into them.
    keys: int64 [N, T], equal rows are equal texts.
    joint: [N, D], the same through the head's running statistics, constants; corrected variant.
    words: [N, T, D], the tokens of words likewise.
    word_mask: bool [N, T].
    released_prototypes: [N, P, 1]; released variant.
    """

    embeds: Tensor
    keys: Tensor
    joint: Tensor | None = None
    words: Tensor | None = None
    word_mask: Tensor | None = None
    released_prototypes: Tensor | None = None


@dataclass
class TextOwners:
    """Which texts belong to which image.

    num_captions: the first so many texts are captions, the rest the images' label texts, image by image.
    label_mask: bool [B, M], which labels each image has.
    text_targets: bool [B, num_captions], where captions are shared; None: caption i belongs to image i.
    patch_targets: [B, h, w, num_captions], how much of a cell of each image shows each caption, where that is known.
    """

    num_captions: int
    label_mask: Tensor | None = None
    text_targets: Tensor | None = None
    patch_targets: Tensor | None = None

    def caption_owners(self, device: torch.device) -> Tensor:
        """bool [B, num_captions]."""
        if self.text_targets is not None:
            return self.text_targets.bool()
        return torch.eye(self.num_captions, dtype=torch.bool, device=device)

    def label_owners(self, count: int) -> Tensor:
        """bool [B, count], `count` being the number of label texts, which a GPU would have to be asked for."""
        images = torch.arange(len(self.label_mask), device=self.label_mask.device)
        return images[:, None] == images.repeat_interleave(self.label_mask.sum(1), output_size=count)

    def at_labels(self, rows: Tensor) -> Tensor:
        """Rows of the label texts at their places, [B, M, ...], zeros elsewhere."""
        placed = rows.new_zeros(*self.label_mask.shape, *rows.shape[1:])
        mask = self.label_mask.view(*self.label_mask.shape, *[1] * (rows.ndim - 1))
        return placed.masked_scatter(mask.expand_as(placed), rows)


@dataclass
class Losses:
    """Parts of the objective before their weights, and `total`, the weighted sum that is minimised."""

    total: Tensor
    contrastive: Tensor
    multi_label: Tensor | None = None
    image_prototype: Tensor | None = None
    image_prototype_by_stage: tuple[Tensor, ...] | None = None
    text_prototype: Tensor | None = None
    assignment: Tensor | None = None
    patch_text: Tensor | None = None
    negatives: Tensor | None = None
    """How many texts an image is told apart from in the contrastive loss, on average; not part of the total."""

    def parts(self) -> dict[str, Tensor]:
        """The parts that there are, as scalars without gradient."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}


def normalized(embeds: Tensor) -> Tensor:
    """Unit vectors in float32 or better."""
    return nn.functional.normalize(embeds.to(estimation_dtype(embeds.dtype)), dim=-1)


def clamped_scale(log_scale: Tensor, config: Any) -> Tensor:
    """The factor on cosines, in float32 or better."""
    scale = log_scale.to(estimation_dtype(log_scale.dtype)).exp()
    return scale.clamp(max=float(config.max_logit_scale))


@dataclass
class JointImages:
    """Images [B, D] and their groups [B, K, D] as unit vectors of the joint space, for mixture pooling each group's
    share of its image [B, K], and for patch pooling the patches [B, L, D]."""

    embeds: Tensor
    segments: Tensor
    areas: Tensor | None = None
    patches: Tensor | None = None
    _log_shares: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def normalized(cls, features: ImageFeatures) -> "JointImages":
        patches = None if features.patch_embeds is None else normalized(features.patch_embeds)
        return cls(normalized(features.embeds), normalized(features.segment_embeds), features.areas, patches)

    def gathered(self) -> "JointImages":
        """Those of all processes, for the losses that need them; not for mixtures."""
        patches = None if self.patches is None else gather_features(self.patches)
        return JointImages(gather_features(self.embeds), gather_features(self.segments), patches=patches)

    def logits(self, text_ND: Tensor, scale: Tensor, config: Any) -> Tensor:
        """Scaled similarity [B, N] with normalised texts, by the configured pooling; by a mixture it depends on what
        other texts there are."""
        if config.contrastive_pooling == "mean":
            return scale * (self.embeds @ text_ND.T)
        if config.contrastive_pooling == "patches" and config.contrastive_loss == "sigmoid":
            log_shares_BLN = self.patch_log_shares(text_ND, scale)
            log_shares_BN = log_shares_BLN.logsumexp(dim=1) - math.log(log_shares_BLN.shape[1])
            return log_odds_of_being_seen(log_shares_BN, config.mixture_looks)
        parts_BPD = self.patches if config.contrastive_pooling == "patches" else self.segments
        logits_BPN = scale * (parts_BPD @ text_ND.T)
        if config.contrastive_pooling == "groups":
            return logits_BPN.logsumexp(dim=1) - math.log(logits_BPN.shape[1])
        if config.contrastive_pooling == "patches":
            return (logits_BPN.softmax(dim=1) * logits_BPN).sum(dim=1)
        log_areas_BP = self.areas.to(logits_BPN.dtype).clamp(min=SMALLEST_SHARE).log()
        log_shares_BPN = logits_BPN.log_softmax(dim=2) + log_areas_BP[..., None]
        return log_odds_of_being_seen(log_shares_BPN.logsumexp(dim=1), config.mixture_looks)

    def patch_log_shares(self, text_ND: Tensor, scale: Tensor) -> Tensor:
        """Log softmax over normalised texts at each patch, [B, L, N]; of the same tensor computed once, as two losses
        need it."""
        if self._log_shares is None or self._log_shares[0] is not text_ND:
            self._log_shares = text_ND, (scale * (self.patches @ text_ND.T)).log_softmax(dim=2)
        return self._log_shares[1]


def log_odds_of_being_seen(log_shares: Tensor, looks: float) -> Tensor:
    """Log odds that one at least of so many looks, each at a point drawn at random, falls on what has this share of a
    picture: of $1-(1-s)^n$."""
    negligible = NEGLIGIBLE_LOG_SHARE - math.log(looks)
    log_shares = log_shares.clamp(max=math.log1p(-SMALLEST_SHARE))
    log_unseen = looks * torch.log1p(-log_shares.clamp(min=negligible).exp())
    odds = torch.log(-torch.expm1(log_unseen)) - log_unseen
    return torch.where(log_shares < negligible, log_shares + math.log(looks), odds)


class Objective:
    """The losses of one global batch.

    Args:
        model: a `PGSegModel`; its configuration, scales and text prototypes are used, and in training with gradient
            the text prototypes are moved.
        images, texts, owners: the features of this process's batch and which texts belong to which image.
    """

    def __init__(self, model: Any, images: ImageFeatures, texts: TextFeatures, owners: TextOwners):
        self.model, self.config = model, model.config
        if self.config.contrastive_pooling == "mixture" and self.config.contrastive_loss != "sigmoid":
            raise ValueError(
                f"contrastive_pooling is 'mixture' and contrastive_loss {self.config.contrastive_loss!r}, expected "
                "'sigmoid'; or set the configuration's contrastive_pooling to 'groups' or 'mean'."
            )
        self.images, self.texts, self.owners = images, texts, owners
        self.joint = JointImages.normalized(images)
        self.scale = clamped_scale(model.logit_scale, self.config)
        self.negatives: Tensor | None = None

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
            losses.text_prototype = self._text_prototype_loss()
            image_prototype = torch.stack(
                [self._guarded(loss) for loss in losses.image_prototype_by_stage]
            ).sum()
            losses.total = losses.total + config.image_prototype_weight * image_prototype
            text_prototype = self._guarded(losses.text_prototype)
            losses.total = losses.total + config.text_prototype_weight * text_prototype
            if losses.assignment is not None:
                losses.total = losses.total + config.assignment_weight * losses.assignment
        return losses

    def _logits(self, images: JointImages, text_ND: Tensor) -> Tensor:
        return images.logits(text_ND, self.scale, self.config)

    def _shared_captions(self, texts_ND: Tensor) -> SharedTexts | None:
        """The captions, equal ones once, where a loss needs them so."""
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
        self.negatives = self.scale.new_full((), len(texts_ND) * world_size() - 1)
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
        keys_NT = pad_to_longest(keys_NT + 1) - 1  # texts of processes that pad to other lengths stay equal
        return share_texts(texts_ND, keys_NT, owners_BN)

    def _shared_texts_loss(self, shared: SharedTexts) -> tuple[Tensor, Tensor]:
        """Equal texts of the global batch count as one, which may belong to many images; also which belong to this
        process's images, bool [B, U]."""
        logits_BU = self._logits(self.joint, shared.embeds)
        if self.config.contrastive_loss == "sigmoid":
            targets_BU = shared.image_targets
            if self.model.logit_bias is not None:
                logits_BU = logits_BU + self.model.logit_bias
            if self.config.contrastive_pooling == "patches":
                # Words that no image of the batch has compete for the patches already.
                shown_U = sum_over_processes(targets_BU.sum(0)) > 0
                logits_BU, targets_BU = logits_BU[:, shown_U], targets_BU[:, shown_U]
            loss = sigmoid_loss(logits_BU, targets_BU, self.config.label_balance)
            return loss, targets_BU
        images = self.joint.gathered()
        logits_per_text = self._logits(images, shared.embeds[shared.own]).T
        loss = multi_positive_loss(logits_BU, logits_per_text, shared.image_targets, shared.text_targets)
        return loss, shared.image_targets

    def _patch_texts_loss(self, shared: SharedTexts, targets_BhwN: Tensor) -> Tensor:
        """Cross-entropy of the patches' softmax over the texts of the global batch, by how much of their cell a text
        has; a mean over what the cells of all processes show."""
        patches_BLD = self.joint.patches
        if patches_BLD is None:
            raise ValueError(
                f"patch_targets are given and contrastive_pooling is {self.config.contrastive_pooling!r}, expected "
                "'patches'."
            )
        if targets_BhwN.ndim != 4 or targets_BhwN.shape[::3] != (len(patches_BLD), len(shared.places)):
            raise ValueError(
                f"patch_targets has shape {list(targets_BhwN.shape)}, expected [{len(patches_BLD)}, height, width, "
                f"{len(shared.places)}]."
            )
        log_shares_BLU = self.joint.patch_log_shares(shared.embeds, self.scale)
        log_shares_BUhw = log_shares_BLU.unflatten(1, self.images.patch_grid[0].tolist()).permute(0, 3, 1, 2)
        height, width = targets_BhwN.shape[1:3]
        of_cells_BUhw = nn.functional.adaptive_avg_pool2d(log_shares_BUhw, (height, width))
        of_cells_BhwN = of_cells_BUhw.permute(0, 2, 3, 1).index_select(3, shared.places)
        targets_BhwN = targets_BhwN.to(of_cells_BhwN.dtype)
        shown = sum_over_processes(targets_BhwN.sum())
        return -(targets_BhwN * of_cells_BhwN).sum() * world_size() / shown.clamp(min=1)

    def _guarded(self, loss: Tensor) -> Tensor:
        if self.config.guard_prototype_losses:
            return torch.where(loss.isfinite(), loss, 0.0)
        learns = self.model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if learns and self.config.npr_variant == "released" and not loss.isfinite():
            logger.warning_once(
                "The released variant's prototype losses are NaN where no pair of a group and a prototype is kept, and "
                "with them the total. For training set the configuration's guard_prototype_losses to True."
            )
        return loss

    def _prototype_scale(self) -> Tensor:
        return clamped_scale(self.model.prototype_logit_scale, self.config)

    def _matching(self, centers_BKC: Tensor, prototype_mask_BP: Tensor) -> Matching | None:
        """The matching of groups and prototypes where it does not depend on their similarity."""
        if self.config.prototype_matching != "order" or self.config.npr_variant != "corrected":
            return None
        return ordered_matching(centers_BKC.shape[1], prototype_mask_BP)

    def _add_prototype_losses(self, losses: Losses) -> None:
        """I-NPR of each grouping stage and, where it has a weight, the assignment term."""
        by_stage, assignments = [], []
        for stage in self.images.stages:
            every_one = torch.ones_like(stage.prototypes[..., 0], dtype=torch.bool)
            loss, matching = prototype_loss(
                stage.centers.to(stage.prototypes.dtype),
                stage.prototypes,
                self._prototype_scale(),
                threshold=self.config.rejection_threshold,
                variant=self.config.npr_variant,
                matching=self._matching(stage.centers, every_one),
            )
            by_stage.append(loss)
            if stage.logits is not None and stage.responsibilities is not None:
                log_assignment = stage.logits.to(stage.prototypes.dtype).log_softmax(dim=1)
                assignments.append(assignment_loss(log_assignment, stage.responsibilities, matching))
        losses.image_prototype_by_stage = tuple(by_stage)
        losses.image_prototype = torch.stack(by_stage).sum()
        if assignments:
            losses.assignment = torch.stack(assignments).sum()

    def _text_prototype_loss(self) -> Tensor:
        """T-NPR between the last grouping stage and the prototypes of the texts."""
        if self.config.npr_variant == "released":
            return self._released_text_prototype_loss()
        tokens_BTD, mask_BT = self._own_texts()
        seeds, vision = self.model.text_prototypes, self.config.vision_config
        mask_BP = torch.arange(seeds.shape[1], device=seeds.device) < mask_BT.sum(1, keepdim=True)
        prototypes = estimate_prototypes(
            tokens_BTD,
            seeds,
            vision.num_prototype_iterations,
            token_mask_BL=mask_BT,
            prototype_mask_BP=mask_BP,
        ).prototypes
        # Below an adapter nothing moves that the adapter does not hold.
        is_frozen = not any(parameter.requires_grad for parameter in self.model.parameters(recurse=False))
        if self.model.training and torch.is_grad_enabled() and not is_frozen:
            move_prototypes(seeds, prototypes, vision.prototype_momentum, mask_BP)
        threshold = self.config.rejection_threshold
        return prototype_loss(
            self.joint.segments,
            prototypes,
            self._prototype_scale(),
            threshold,
            "corrected",
            prototype_mask_BP=mask_BP,
            matching=self._matching(self.joint.segments, mask_BP),
        )[0]

    def _released_text_prototype_loss(self) -> Tensor:
        centers = self.images.stages[-1].centers
        prototypes = self.texts.released_prototypes[: len(centers)]
        if centers.shape[:2] != prototypes.shape[:2]:
            raise ValueError(
                "the released text prototypes need one text an image and as many of them as the last grouping stage "
                f"has output groups; got {list(centers.shape[:2])} images x groups, {list(prototypes.shape[:2])} "
                "texts x prototypes."
            )
        scalars = centers.to(prototypes.dtype).mean(-1, keepdim=True)
        if self.config.guard_prototype_losses:
            scalars = scalars.detach()
        threshold = self.config.rejection_threshold
        return prototype_loss(scalars, prototypes, self._prototype_scale(), threshold, "released")[0]

    def _own_texts(self) -> tuple[Tensor, Tensor]:
        """What each image's text prototypes are estimated from: the texts of its labels where it has several, else the
        words of its caption. Constants [B, ., D] and which of them exist, bool [B, .]."""
        owners, texts, count = self.owners, self.texts, self.owners.num_captions
        words, words_mask = texts.words[:count], texts.word_mask[:count]
        if owners.text_targets is not None:
            targets = owners.text_targets.bool()
            most = max(int(targets.sum(1).max()), 1)
            own = targets.long().argsort(dim=1, descending=True, stable=True)[:, :most]
            label_mask, labels = targets.gather(1, own), texts.joint[own]
            words, words_mask = words[own[:, 0]], words_mask[own[:, 0]] & label_mask[:, :1]
        elif owners.label_mask is not None:
            label_mask, labels = owners.label_mask, owners.at_labels(texts.joint[count:])
        else:
            return words, words_mask
        by_labels = label_mask.sum(1, keepdim=True) > 1
        mask_BT = torch.cat([label_mask & by_labels, words_mask & ~by_labels], dim=1)
        return torch.cat([labels, words], dim=1) * mask_BT[..., None], mask_BT


def compute_losses(model: Any, images: ImageFeatures, texts: TextFeatures, owners: TextOwners) -> Losses:
    """The losses of one global batch in float32 or better; see [`Objective`]."""
    with full_precision(images.embeds.device.type):
        return Objective(model, images, texts, owners)()
