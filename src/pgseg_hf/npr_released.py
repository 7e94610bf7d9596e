"""NPR exactly as in the released code, with its faults, to reproduce its checkpoints. Does not change.

It differs from the method: groups are matched with the *least* similar prototypes; pairs are kept by the first row and
column instead of the diagonal; text prototypes are scalars, updated in each call of the text tower; image prototypes
are constant; a loss without pairs is NaN.

Shapes: B batch, L tokens, K groups, P prototypes, M pairs, C width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .features import Batch
from .kernels import is_plain_linear
from .npr import NPR, PGSegStagePrototypes
from .precision import estimation_dtype, full_precision
from .prototypes import (
    Matching,
    PrototypeEstimate,
    cosines,
    estimate_prototypes,
    match_prototypes,
    matched_terms,
    min_max,
    updated_prototypes,
)

# Released `TextTransformer.Atten`: both values are hard-coded.
TEXT_PROTOTYPES = 8
TEXT_MOMENTUM = 0.9


class ReleasedStagePrototypes(PGSegStagePrototypes):
    """Prototypes that are never updated."""

    def moves(self) -> bool:
        return False

    def reconstruct(self, estimate: PrototypeEstimate, dtype: torch.dtype) -> Tensor:
        return self.project_mixed(estimate, dtype)

    def project_tokens(self, tokens_BLC: Tensor) -> Tensor:
        """Uses convolutions of width 1 like the released code, to reproduce its rounding."""
        first, _, activation, last = self.projection
        hidden = self.projection.normalized(_as_convolution(first, tokens_BLC.transpose(1, 2)))
        return _as_convolution(last, activation(hidden)).transpose(1, 2)


def _as_convolution(layer: Any, x: Tensor) -> Tensor:
    """Applies a linear layer to [B, channels, L] as a convolution of width 1."""
    if is_plain_linear(layer):
        return nn.functional.conv1d(x, layer.weight[..., None], layer.bias)
    return layer(x.transpose(1, 2)).transpose(1, 2)


class ReleasedNPR(NPR, name="released"):
    """The released code's variant."""

    stage_prototypes = ReleasedStagePrototypes
    text_buffer = "released_text_prototypes"
    text_dim = 1  # the scalars are normalised over the prototypes
    moved_by_texts = ("released_text_prototypes",)
    may_be_nan = True

    def text_buffer_shape(self, config: Any) -> tuple[int, int]:
        return config.num_text_prototypes or TEXT_PROTOTYPES, 1

    def observe_texts(self, model: Any, pooled: Tensor) -> Tensor | None:
        """Estimates prototypes [N, P, 1] from the scalars of each pooled text, and updates their buffer."""
        if torch.compiler.is_exporting():
            return None
        buffer = model.released_text_prototypes
        with full_precision(buffer.device.type):
            scalars = pooled.detach().to(estimation_dtype(pooled.dtype))[..., None]
            iterations = model.config.vision_config.num_prototype_iterations
            prototypes = estimate_prototypes(scalars, buffer, iterations, norm_dim=1).prototypes
            mean = prototypes.mean(0)
            buffer.copy_(updated_prototypes(buffer[0], mean, TEXT_MOMENTUM, renormalize=False)[None])
        return prototypes

    def stage_loss(
        self, batch: Batch, centers_BKC: Tensor, prototypes_BPC: Tensor
    ) -> tuple[Tensor, Matching]:
        scale, threshold = batch.scales.prototype, batch.config.rejection_threshold
        return released_prototype_loss(centers_BKC, prototypes_BPC, scale, threshold)

    def text_loss(self, batch: Batch) -> tuple[Tensor, None]:
        centers = batch.images.stages[-1].centers
        prototypes = batch.texts.prototypes[: len(centers)]
        if centers.shape[:2] != prototypes.shape[:2]:
            raise ValueError(
                "the released text prototypes need one text per image and one prototype per output group of the last "
                f"grouping stage; got {list(centers.shape[:2])} images x groups, {list(prototypes.shape[:2])} texts "
                "x prototypes."
            )
        scalars = centers.to(prototypes.dtype).mean(-1, keepdim=True)
        if batch.config.guard_prototype_losses:
            scalars = scalars.detach()
        return self.stage_loss(batch, scalars, prototypes)[0], None


def released_prototype_loss(
    centers_BKC: Tensor, prototypes_BKC: Tensor, logit_scale: Tensor, threshold: float = 0.1
) -> tuple[Tensor, Matching]:
    """[`~pgseg_hf.prototypes.prototype_loss`] for equal numbers of prototypes and groups, with the matching of smallest
    cosine, rejection by first row and column, and NaN without terms. Source: released `downsample_spatial`, `match`."""
    similarity_BKP = cosines(centers_BKC, prototypes_BKC)
    matching = match_prototypes(similarity_BKP.detach().nan_to_num(), maximize=False)
    row_terms, column_terms = matched_terms(similarity_BKP, matching, logit_scale)
    row_kept, column_kept = kept_pairs_released(similarity_BKP.detach(), matching, threshold)
    return _masked_mean(row_terms, row_kept) + _masked_mean(column_terms, column_kept), matching


def kept_pairs_released(
    similarity_BKK: Tensor, matching: Matching, threshold: float
) -> tuple[Tensor, Tensor]:
    """[`~pgseg_hf.prototypes.kept_pairs`] with the released code's rejection, which reads the first row and column of
    the matched similarities instead of their diagonal. For equal numbers of prototypes and groups."""
    first_row = min_max(similarity_BKK[:, 0, :].gather(1, matching.prototypes), 1)
    first_prototype = matching.prototypes[:, None, :1].expand(-1, similarity_BKK.shape[1], 1)
    first_column = min_max(similarity_BKK.gather(2, first_prototype)[..., 0], 1)
    return first_row > threshold, first_column > threshold


def _masked_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of the kept values; NaN if none is kept."""
    total = torch.where(keep, values, torch.zeros_like(values)).sum()
    count = keep.sum()
    return torch.where(count > 0, total / count.clamp(min=1), torch.full_like(total, float("nan")))
