"""The variants of non-learnable prototypes (NPR): what each of them makes of a model, and its losses.

A variant is a subclass of [`NPR`]; `npr_variant` of a configuration names it. Its arithmetic is in `prototypes.py`. The
released code's variant has a file of its own, `npr_released.py`, which [`npr_of`] imports when it is asked for.

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
    """Fills a buffer of prototypes with random unit vectors along `dim`, the same at every call: transformers expects
    buffers not to depend on the seed or on the order of initialisation."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(buffer.shape, generator=generator, dtype=torch.float32, device="cpu")
    init.copy_(buffer, nn.functional.normalize(values, dim=dim))


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


class PGSegStagePrototypes(KeepsPrecision, nn.Module):
    """A stage's prototypes: the moving seeds of the estimation and the projection of prototypes to tokens."""

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
        """Where a forward starts the estimation, [1, P, C]: a copy where `move` will change the prototypes, so that a
        recompute of the stage starts from the same."""
        return self.prototypes.clone() if self.moves() else self.prototypes

    def moves(self) -> bool:
        """Whether this forward changes the seeds: in training with gradient. Frozen ones stay, as a frozen model's
        statistics do."""
        is_frozen = not self.projection[1].weight.requires_grad
        return self.training and torch.is_grad_enabled() and not is_frozen

    def move(self, estimates_BPC: Tensor) -> None:
        """In training with gradient, moves the seeds to the mean of the batch's prototypes."""
        if self.moves():
            move_prototypes(self.prototypes, estimates_BPC, self.momentum)

    def estimate(self, tokens_BLC: Tensor, seeds_1PC: Tensor) -> PrototypeEstimate:
        """Estimates prototypes from a stage's input."""
        with full_precision(tokens_BLC.device.type):
            tokens_BLC = tokens_BLC.detach().to(estimation_dtype(tokens_BLC.dtype))
            return estimate_prototypes(tokens_BLC, seeds_1PC, self.num_iterations)

    def reconstruct(self, estimate: PrototypeEstimate, dtype: torch.dtype) -> Tensor:
        """The prototypes' part of each token, R [B, L, C]."""
        if self.mixing == "tokens":
            return self.project_mixed(estimate, dtype)
        return estimate.responsibilities.to(dtype) @ self.projection(estimate.prototypes.to(dtype))

    def project_mixed(self, estimate: PrototypeEstimate, dtype: torch.dtype) -> Tensor:
        """The projection of each token's mixture of prototypes, [B, L, C]."""
        weights_BLP = tokens_to_weights(estimate.responsibilities)
        if projects_first(self.projection):
            return project_mixtures(self.projection, estimate.prototypes.to(dtype), weights_BLP.to(dtype))
        with full_precision(weights_BLP.device.type):
            mixed_BLC = (weights_BLP @ estimate.prototypes).to(dtype)
        return self.project_tokens(mixed_BLC)

    def project_tokens(self, tokens_BLC: Tensor) -> Tensor:
        return self.projection(tokens_BLC)


class NPRLosses(NamedTuple):
    """Losses of one batch before their weights.

    image_by_stage: I-NPR, a scalar for each grouping stage.
    text: T-NPR.
    assignment: the sum over the stages; None where it has no weight.
    text_estimate: the texts' prototypes [B, P, D] and which of them exist, bool [B, P], for those who move their seeds.
    """

    image_by_stage: tuple[Tensor, ...]
    text: Tensor
    assignment: Tensor | None = None
    text_estimate: tuple[Tensor, Tensor] | None = None


class NPR:
    """A variant, without state: its tensors lie in the modules and buffers of the model.

    A subclass with a `name` is one that configurations may ask for; `settings` are what it asks of a configuration.
    """

    # The modules of grouping stages; a variant without any has no losses.
    stage_prototypes: ClassVar[type[PGSegStagePrototypes] | None] = None
    # The model's buffer of text prototypes, and along which dimension they have unit length.
    text_buffer: ClassVar[str | None] = None
    text_dim: ClassVar[int] = -1
    # Buffers of the model that an encoding of texts changes.
    moved_by_texts: ClassVar[tuple[str, ...]] = ()
    # Whether a loss may be NaN for want of pairs, and so the total.
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
        """Called with the text tower's pooled output [N, C] of every text that is encoded, in evaluation too; what it
        returns is the `prototypes` of the [`TextFeatures`]."""
        return None

    def add_text_features(
        self, model: Any, features: TextFeatures, pooled: Tensor, hidden: Tensor, word_mask: Tensor
    ) -> None:
        """Adds what the losses need of texts, from the tower's output [N, C] and [N, T, C]."""

    def losses(self, batch: Batch) -> NPRLosses:
        """I-NPR of each grouping stage, the assignment term where it has a weight, and T-NPR."""
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
        """I-NPR of one stage and the matching of its groups with prototypes."""
        raise NotImplementedError

    def text_loss(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """T-NPR between the last grouping stage and the texts' prototypes, and the `text_estimate` of the losses."""
        raise NotImplementedError

    def move_text_prototypes(self, model: Any, estimates: Tensor, mask: Tensor) -> None:
        """Called with the `text_estimate` of the losses in training with gradient."""


_VARIANTS: dict[str, NPR] = {}


def npr_of(config: Any) -> NPR:
    """The variant that a configuration names."""
    if config.npr_variant == "released":
        from .npr_released import ReleasedNPR  # noqa: F401 (makes itself known)
    return _VARIANTS[config.npr_variant]


class NoPrototypes(NPR, name="none"):
    """GroupViT."""


class CorrectedNPR(NPR, name="corrected"):
    """The paper's method without the released code's faults."""

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
        # Below an adapter nothing moves that the adapter does not hold.
        if any(parameter.requires_grad for parameter in model.parameters(recurse=False)):
            momentum = model.config.vision_config.prototype_momentum
            move_prototypes(model.text_prototypes, estimates, momentum, mask)


def own_texts(texts: TextFeatures, owners: TextOwners) -> tuple[Tensor, Tensor]:
    """What each image's text prototypes are estimated from: the texts of its labels where it has several, else the
    words of its caption. Constants [B, ., D] and which of them exist, bool [B, .]."""
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
