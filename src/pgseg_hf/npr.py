"""The variants of non-learnable prototypes (NPR): their modules and losses.

A variant is a subclass of [`NPR`], selected by `npr_variant` of the configuration. The arithmetic is in
`prototypes.py`. The released code's variant is in `npr_released.py`, which `modeling_base.py` imports.

Shapes: B batch, L image tokens of a stage's input, K groups, P prototypes, C width, D joint width.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_pgseg import PGSegVisionConfig
from .distributed import sum_over_processes
from .features import Batch, TextFeatures, TextOwners
from .kernels import project_mixtures, projects_first
from .precision import KeepsPrecision, estimation_dtype, full_precision
from .projection import PGSegProjection
from .prototypes import (
    Matching,
    PrototypeEstimate,
    assignment_loss,
    estimate_prototypes,
    ordered_matching,
    prototype_loss,
    tokens_to_weights,
    updated_prototypes,
)
from .variants import NPR_VARIANTS, VariantSettings


@torch.no_grad()
def init_prototypes(buffer: Tensor, dim: int = -1) -> None:
    """Fills a buffer of prototypes with random unit vectors along `dim`. They are the same in each call: transformers
    expects buffers not to depend on the seed or the order of initialisation."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(buffer.shape, generator=generator, dtype=torch.float32, device="cpu")
    init.copy_(buffer, nn.functional.normalize(values, dim=dim))


@torch.no_grad()
def move_prototypes(
    buffer_1PC: Tensor, estimates_BPC: Tensor, momentum: float, mask_BP: Tensor | None = None
) -> None:
    """Updates the moving average of prototypes with the mean of all processes' estimates. Prototypes without samples
    stay."""
    if mask_BP is None:
        mask_BP = torch.ones(estimates_BPC.shape[:2], dtype=torch.bool, device=estimates_BPC.device)
    sums_PC = sum_over_processes((estimates_BPC * mask_BP[..., None]).sum(0))
    counts_P1 = sum_over_processes(mask_BP.sum(0).to(sums_PC.dtype))[:, None]
    moved_PC = updated_prototypes(buffer_1PC[0], sums_PC / counts_P1.clamp(min=1), momentum)
    buffer_1PC.copy_(torch.where(counts_P1 > 0, moved_PC, buffer_1PC[0])[None])


class PGSegStagePrototypes(KeepsPrecision, nn.Module):
    """Prototypes of a stage: a moving average that seeds the estimation, and the projection of prototypes to tokens."""

    precise_buffer = "prototypes"
    prototypes: Tensor

    def __init__(self, config: PGSegVisionConfig, num_prototypes: int):
        super().__init__()
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

    def seeds(self) -> Tensor:
        """Initial prototypes of the estimation [1, P, C]; a copy if `move` will change them, so that a recompute of the
        stage gives the same result."""
        return self.prototypes.clone() if self.moves() else self.prototypes

    def moves(self) -> bool:
        """Whether this forward pass updates the prototypes: in training with gradient, unless they are frozen."""
        is_frozen = not self.projection[1].weight.requires_grad
        return self.training and torch.is_grad_enabled() and not is_frozen

    def move(self, estimates_BPC: Tensor) -> None:
        """Updates the prototypes with the mean of the batch's prototypes, in training with gradient."""
        if self.moves():
            move_prototypes(self.prototypes, estimates_BPC, self.momentum)

    def estimate(self, tokens_BLC: Tensor, seeds_1PC: Tensor) -> PrototypeEstimate:
        """Estimates prototypes from the input tokens of a stage."""
        with full_precision(tokens_BLC.device.type):
            tokens_BLC = tokens_BLC.detach().to(estimation_dtype(tokens_BLC.dtype))
            return estimate_prototypes(tokens_BLC, seeds_1PC, self.num_iterations)

    def reconstruct(self, estimate: PrototypeEstimate, dtype: torch.dtype) -> Tensor:
        """R [B, L, C], which is added to the tokens."""
        if self.mixing == "tokens":
            return self.project_mixed(estimate, dtype)
        return estimate.responsibilities.to(dtype) @ self.projection(estimate.prototypes.to(dtype))

    def project_mixed(self, estimate: PrototypeEstimate, dtype: torch.dtype) -> Tensor:
        """Projection [B, L, C] of each token's mixture of prototypes."""
        weights_BLP = tokens_to_weights(estimate.responsibilities)
        if projects_first(self.projection):
            return project_mixtures(self.projection, estimate.prototypes.to(dtype), weights_BLP.to(dtype))
        with full_precision(weights_BLP.device.type):
            mixed_BLC = (weights_BLP @ estimate.prototypes).to(dtype)
        return self.project_tokens(mixed_BLC)

    def project_tokens(self, tokens_BLC: Tensor) -> Tensor:
        return self.projection(tokens_BLC)


class NPRLosses(NamedTuple):
    """Losses of one batch, before their weights.

    image_by_stage: I-NPR of each grouping stage, scalars.
    text: T-NPR.
    assignment: sum over the stages; None if it has no weight.
    text_estimate: the texts' prototypes [B, P, D] and which of them exist, bool [B, P], for variants that update them.
    """

    image_by_stage: tuple[Tensor, ...]
    text: Tensor
    assignment: Tensor | None = None
    text_estimate: tuple[Tensor, Tensor] | None = None


class NPR:
    """A variant of NPR. It has no state: its tensors are in the modules and buffers of the model.

    A subclass with a `name` can be selected in configurations; `settings` is what it requires of them.
    """

    # Module of each grouping stage; variants without one have no losses.
    stage_prototypes: ClassVar[type[PGSegStagePrototypes] | None] = None
    # Name of the model's buffer of text prototypes, and the dimension along which they have unit length.
    text_buffer: ClassVar[str | None] = None
    text_dim: ClassVar[int] = -1
    # Buffers of the model that change when texts are encoded.
    moved_by_texts: ClassVar[tuple[str, ...]] = ()
    # Whether a loss, and so the total, may be NaN if no pair is kept.
    may_be_nan: ClassVar[bool] = False

    def __init_subclass__(cls, name: str | None = None, settings: VariantSettings | None = None) -> None:
        super().__init_subclass__()
        if name is not None:
            NPR_VARIANTS.setdefault(name, settings or VariantSettings())
            _VARIANTS[name] = cls()

    def text_buffer_shape(self, config: Any) -> tuple[int, int]:
        """[prototypes, width] of the text prototypes."""
        raise NotImplementedError

    def observe_texts(self, model: Any, pooled: Tensor) -> Tensor | None:
        """Called with the pooled outputs [N, C] of all texts, also in evaluation; returns `prototypes` of
        [`TextFeatures`]."""
        return None

    def add_text_features(
        self, model: Any, features: TextFeatures, pooled: Tensor, hidden: Tensor, word_mask: Tensor
    ) -> None:
        """Adds what the losses need from texts, given the pooled [N, C] and token outputs [N, T, C] of the tower."""

    def losses(self, batch: Batch) -> NPRLosses:
        """I-NPR of each grouping stage, the assignment term if it has a weight, and T-NPR."""
        by_stage, assignments = [], []
        for stage in batch.images.stages:
            loss, matching = self.stage_loss(
                batch, stage.centers.to(stage.prototypes.dtype), stage.prototypes
            )
            by_stage.append(loss)
            if stage.logits is not None and stage.responsibilities is not None:
                log_assignment = stage.logits.to(stage.prototypes.dtype).log_softmax(dim=1)
                assignments.append(assignment_loss(log_assignment, stage.responsibilities, matching))
        text, estimate = self.text_loss(batch)
        assignment = torch.stack(assignments).sum() if assignments else None
        return NPRLosses(tuple(by_stage), text, assignment, estimate)

    def stage_loss(
        self, batch: Batch, centers_BKC: Tensor, prototypes_BPC: Tensor
    ) -> tuple[Tensor, Matching]:
        """I-NPR of one stage, and the matching of its groups with prototypes."""
        raise NotImplementedError

    def text_loss(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """T-NPR between the last grouping stage and the texts' prototypes, and `text_estimate` of [`NPRLosses`]."""
        raise NotImplementedError

    def move_text_prototypes(self, model: Any, estimates: Tensor, mask: Tensor) -> None:
        """Called with `text_estimate` of the losses, in training with gradient."""


_VARIANTS: dict[str, NPR] = {}


def npr_of(config: Any) -> NPR:
    """The variant that a configuration selects."""
    return _VARIANTS[config.npr_variant]


class NoPrototypes(NPR, name="none"):
    """GroupViT, without prototypes."""


class CorrectedNPR(NPR, name="corrected"):
    """The method of the paper without the faults of the released code."""

    stage_prototypes = PGSegStagePrototypes
    text_buffer = "text_prototypes"

    def text_buffer_shape(self, config: Any) -> tuple[int, int]:
        vision = config.vision_config
        num_groups = vision.num_output_groups[sum(tokens > 0 for tokens in vision.num_group_tokens) - 1]
        return config.num_text_prototypes or num_groups, config.projection_dim

    @torch.no_grad()
    def add_text_features(
        self, model: Any, features: TextFeatures, pooled: Tensor, hidden: Tensor, word_mask: Tensor
    ) -> None:
        def joint_space(rows: Tensor) -> Tensor:
            embeds = model.text_projection(rows.detach(), use_running_stats=True)
            return embeds.to(estimation_dtype(embeds.dtype))

        features.joint, features.word_mask = joint_space(pooled), word_mask
        words = joint_space(hidden[word_mask])
        zeros = words.new_zeros(*word_mask.shape, words.shape[-1])
        features.words = zeros.masked_scatter(word_mask[..., None].expand_as(zeros), words)

    def stage_loss(
        self, batch: Batch, centers_BKC: Tensor, prototypes_BPC: Tensor
    ) -> tuple[Tensor, Matching]:
        return self._loss(
            batch, centers_BKC, prototypes_BPC, torch.ones_like(prototypes_BPC[..., 0], dtype=torch.bool)
        )

    def text_loss(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        tokens_BTD, mask_BT = own_texts(batch.texts, batch.owners)
        seeds = batch.scales.text_seeds
        mask_BP = torch.arange(seeds.shape[1], device=seeds.device) < mask_BT.sum(1, keepdim=True)
        prototypes = estimate_prototypes(
            tokens_BTD,
            seeds,
            batch.config.vision_config.num_prototype_iterations,
            token_mask_BL=mask_BT,
            prototype_mask_BP=mask_BP,
        ).prototypes
        return self._loss(batch, batch.joint.segments, prototypes, mask_BP)[0], (prototypes, mask_BP)

    def _loss(
        self, batch: Batch, centers_BKC: Tensor, prototypes_BPC: Tensor, mask_BP: Tensor
    ) -> tuple[Tensor, Matching]:
        matching = None
        if batch.config.prototype_matching == "order":
            matching = ordered_matching(centers_BKC.shape[1], mask_BP)
        scale, threshold = batch.scales.prototype, batch.config.rejection_threshold
        return prototype_loss(centers_BKC, prototypes_BPC, scale, threshold, mask_BP, matching)

    def move_text_prototypes(self, model: Any, estimates: Tensor, mask: Tensor) -> None:
        # With an adapter only the adapter's own state may change.
        if any(parameter.requires_grad for parameter in model.parameters(recurse=False)):
            momentum = model.config.vision_config.prototype_momentum
            move_prototypes(model.text_prototypes, estimates, momentum, mask)


def own_texts(texts: TextFeatures, owners: TextOwners) -> tuple[Tensor, Tensor]:
    """The texts that each image's prototypes are estimated from: its label texts if it has several, else the words of
    its caption. Returns constants [B, ., D] and which of them exist, bool [B, .]."""
    count = owners.num_captions
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
