"""Non-learnable prototypes (NPR): estimation, matching, rejection and loss as pure functions without a model.

Shapes: B batch, L tokens, K groups, P prototypes, C width.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .distributed import sum_over_processes, world_size
from .losses import NEVER
from .precision import estimation_dtype

EPS = 1e-6
# Maximum number of groups for matching on a GPU. With more, its many small steps should be slower than scipy.
_FEW_GROUPS = 16
# Minimum number of similarities in a batch for using threads; about 20 ms of matching.
_WORTH_THREADS = 2**20


class PrototypeEstimate(NamedTuple):
    """Result of [`estimate_prototypes`].

    prototypes: [B, P, C], after the last update.
    responsibilities: [B, L, P], the last step's soft assignment of tokens to prototypes; rows sum to 1.
    """

    prototypes: Tensor
    responsibilities: Tensor


class Matching(NamedTuple):
    """One-to-one pairs of groups and prototypes.

    groups: int64 [B, M], rows of the similarity; M = min(K, P).
    prototypes: int64 [B, M], the columns they are matched to.
    valid: bool [B, M], False where an image has fewer than M pairs (the indices there are 0).
    """

    groups: Tensor
    prototypes: Tensor
    valid: Tensor


def tokens_to_weights(responsibilities_BLP: Tensor) -> Tensor:
    """Normalises responsibilities over the tokens, so that each prototype's weights sum to (almost) 1: [B, L, P]."""
    return responsibilities_BLP / (EPS + responsibilities_BLP.sum(dim=1, keepdim=True))


@torch.no_grad()
def estimate_prototypes(
    tokens_BLC: Tensor,
    seeds_PC: Tensor,
    num_iterations: int = 10,
    norm_dim: int = -1,
    token_mask_BL: Tensor | None = None,
    prototype_mask_BP: Tensor | None = None,
) -> PrototypeEstimate:
    """Estimates each sample's prototypes from its tokens by EM-like steps, without gradient.

    Args:
        tokens_BLC: tokens, float32 or float64.
        seeds_PC: [P, C] or [1, P, C], initial prototypes.
        num_iterations: number of steps, at least 1.
        norm_dim: dimension along which prototypes have unit length; the released text prototypes use 1.
        token_mask_BL: bool, True for tokens to use; all by default.
        prototype_mask_BP: bool, True for prototypes to use; the others are 0 in the result.

    Raises:
        ValueError: if `num_iterations` is below 1 or tokens and seeds have different widths.

    Source: PGSeg section 3.2; method of the released `downsample_spatial`.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations is {num_iterations}, expected at least 1.")
    if not torch.compiler.is_compiling() and tokens_BLC.shape[-1] != seeds_PC.shape[-1]:
        raise ValueError(
            f"tokens have {tokens_BLC.shape[-1]} channels, but the seeds have {seeds_PC.shape[-1]}."
        )
    prototypes_BPC = seeds_PC.to(tokens_BLC.dtype).expand(tokens_BLC.shape[0], -1, -1)
    for _ in range(num_iterations):
        logits_BLP = tokens_BLC @ prototypes_BPC.transpose(1, 2)
        if prototype_mask_BP is not None:
            logits_BLP = logits_BLP.masked_fill(~prototype_mask_BP[:, None, :], NEVER)
        responsibilities_BLP = logits_BLP.softmax(dim=-1)
        counted_BLP = responsibilities_BLP
        if prototype_mask_BP is not None:
            counted_BLP = counted_BLP * prototype_mask_BP[:, None, :]
        if token_mask_BL is not None:
            counted_BLP = counted_BLP * token_mask_BL[:, :, None]
        weights_BLP = tokens_to_weights(counted_BLP)
        prototypes_BPC = weights_BLP.transpose(1, 2) @ tokens_BLC
        prototypes_BPC = prototypes_BPC / (EPS + prototypes_BPC.norm(dim=norm_dim, keepdim=True))
    return PrototypeEstimate(prototypes_BPC, responsibilities_BLP)


@torch.compiler.disable
@torch.no_grad()
def match_prototypes(
    similarity_BKP: Tensor, maximize: bool = True, prototype_mask_BP: Tensor | None = None
) -> Matching:
    """Hungarian matching of groups (rows) with prototypes (columns), separately for each sample.

    Args:
        similarity_BKP: finite similarities.
        maximize: False gives the *worst* matching, with which the released code trains.
        prototype_mask_BP: bool, True for prototypes that exist; the others stay unmatched.

    Raises:
        ValueError: if a similarity is NaN or infinite (not checked if the matching is done on a GPU).
    """
    device = similarity_BKP.device
    if device.type == "cuda" and min(similarity_BKP.shape[1:]) <= _FEW_GROUPS:
        return match_on_device(similarity_BKP, maximize, prototype_mask_BP)
    similarity = similarity_BKP.detach().to("cpu", estimation_dtype(similarity_BKP.dtype))
    if not torch.isfinite(similarity).all():
        raise ValueError(
            "similarities of groups and prototypes are NaN or infinite; the features have diverged."
        )
    batch, num_groups, num_prototypes = similarity.shape
    num_pairs = min(num_groups, num_prototypes)
    groups, prototypes = np.zeros((2, batch, num_pairs), dtype=np.int64)
    valid = np.zeros((batch, num_pairs), dtype=bool)
    matrices = similarity.numpy()
    mask = None if prototype_mask_BP is None else prototype_mask_BP.cpu().numpy()

    def match(index: int) -> None:
        if mask is None or mask[index].all():
            rows, chosen = linear_sum_assignment(matrices[index], maximize=maximize)
        else:
            columns = mask[index].nonzero()[0]
            rows, chosen = linear_sum_assignment(matrices[index][:, columns], maximize=maximize)
            chosen = columns[chosen]
        groups[index, : len(rows)] = rows
        prototypes[index, : len(rows)] = chosen
        valid[index, : len(rows)] = True

    if matrices.size < _WORTH_THREADS:
        for index in range(batch):
            match(index)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # scipy releases the GIL
            list(pool.map(match, range(batch)))
    arrays = (torch.from_numpy(array) for array in (groups, prototypes, valid))
    return Matching(*(array.to(device, non_blocking=True) for array in arrays))


@torch.no_grad()
def match_on_device(
    similarity_BKP: Tensor, maximize: bool = True, prototype_mask_BP: Tensor | None = None
) -> Matching:
    """[`match_prototypes`] without synchronising with the GPU."""
    cost_BKP = -similarity_BKP.double() if maximize else similarity_BKP.double()
    batch, num_groups, num_prototypes = cost_BKP.shape
    more_groups = num_groups > num_prototypes
    if prototype_mask_BP is not None:
        # With more groups than prototypes, absent ones cost 0 and take spare groups. Else they cost more than any
        # alternative.
        largest_B11 = cost_BKP.abs().amax(dim=(1, 2), keepdim=True)
        filler_B11 = 0 * largest_B11 if more_groups else 2 * num_groups * largest_B11 + 1
        cost_BKP = torch.where(prototype_mask_BP[:, None, :], cost_BKP, filler_B11)
    chosen = cheapest_assignment(cost_BKP.mT if more_groups else cost_BKP)
    rows = torch.arange(chosen.shape[1], device=chosen.device).expand(batch, -1)
    groups, prototypes = (chosen, rows) if more_groups else (rows, chosen)
    valid = torch.ones_like(groups, dtype=torch.bool)
    if prototype_mask_BP is not None:
        valid = prototype_mask_BP.gather(1, prototypes)
    order = groups.masked_fill(~valid, num_groups).argsort(dim=1)
    valid = valid.gather(1, order)
    return Matching(groups.gather(1, order) * valid, prototypes.gather(1, order) * valid, valid)


def cheapest_assignment(cost_BNM: Tensor) -> Tensor:
    """The column of each row, int64 [B, N], such that columns are distinct and the sum of costs is minimal; N <= M.

    Shortest augmenting paths (Jonker and Volgenant, 1987), row by row like scipy, but for all samples at once. Each row
    takes as many steps as its longest possible path, so that their number, N (N + 1) / 2, does not depend on the costs.
    """
    batch, num_rows, num_columns = cost_BNM.shape
    # The extra row and column stand for none; no path continues from them.
    cost = nn.functional.pad(cost_BNM, (0, 0, 0, 1), value=float("inf"))
    row_prices, column_prices = cost.new_zeros(batch, num_rows + 1), cost.new_zeros(batch, num_columns)
    columns = torch.full((batch, num_rows + 1), num_columns, device=cost.device)
    rows = torch.full((batch, num_columns + 1), num_rows, device=cost.device)
    for row in range(num_rows):
        distances = torch.full_like(column_prices, float("inf"))
        seen = torch.zeros_like(distances, dtype=torch.bool)
        previous = torch.full_like(rows, num_rows)
        here, column = torch.full_like(rows[:, :1], row), torch.full_like(rows[:, :1], num_columns)
        reached = cost.new_zeros(batch, 1)
        for _ in range(row + 1):
            prices = row_prices.gather(1, here) + column_prices
            through = reached + cost.gather(1, here[..., None].expand(-1, -1, num_columns))[:, 0] - prices
            is_shorter = (through < distances) & ~seen
            distances = torch.where(is_shorter, through, distances)
            previous[:, :-1] = torch.where(is_shorter, here, previous[:, :-1])
            nearest, its_column = distances.masked_fill(seen, float("inf")).min(dim=1, keepdim=True)
            has_ended = here == num_rows
            reached = torch.where(has_ended, reached, nearest)
            column = torch.where(has_ended, column, its_column)
            seen.scatter_(1, column, True)
            here = rows.gather(1, column)
        gained = torch.where(seen, reached - distances, 0.0)
        column_prices = column_prices - gained
        row_prices.scatter_add_(1, rows[:, :-1], gained)
        row_prices[:, row] += reached[:, 0]
        for _ in range(row + 1):
            its_row = previous.gather(1, column)
            before = columns.gather(1, its_row)
            rows.scatter_(1, column, its_row)
            columns.scatter_(1, its_row, column)
            column = before
    return columns[:, :-1]


def ordered_matching(num_groups: int, prototype_mask_BP: Tensor) -> Matching:
    """Matches group i of `num_groups` with prototype i, regardless of similarity, if `prototype_mask_BP` has it."""
    valid = prototype_mask_BP[:, :num_groups]
    indices = torch.arange(valid.shape[1], device=valid.device).expand(len(valid), -1) * valid
    return Matching(indices, indices, valid)


def min_max(values: Tensor, dim: int, mask: Tensor | None = None) -> Tensor:
    """Scales values to 0 to 1 along a dimension, by the minimum and maximum of those in the mask."""
    low_source = values if mask is None else values.masked_fill(~mask, float("inf"))
    high_source = values if mask is None else values.masked_fill(~mask, float("-inf"))
    low, high = low_source.amin(dim, keepdim=True), high_source.amax(dim, keepdim=True)
    return (values - low) / (high - low + EPS)


def kept_pairs(
    similarity_BKP: Tensor,
    matching: Matching,
    threshold: float,
    prototype_mask_BP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hard rejection: which terms of the prototype loss are kept, bool [B, M] for the row and the column direction.

    A term is kept if its matched similarity is above `threshold` after min-max normalisation over the prototypes of its
    group (row direction) or the groups of its prototype (column direction).
    """
    mask = None if prototype_mask_BP is None else prototype_mask_BP[:, None, :]
    in_rows = _pair_values(min_max(similarity_BKP, 2, mask), matching)
    in_columns = _pair_values(min_max(similarity_BKP, 1), matching)
    return (in_rows > threshold) & matching.valid, (in_columns > threshold) & matching.valid


def _pair_values(matrix_BKP: Tensor, matching: Matching) -> Tensor:
    """Entries of the matched pairs, [B, M]."""
    flat = matching.groups * matrix_BKP.shape[2] + matching.prototypes
    return matrix_BKP.flatten(1).gather(1, flat)


def global_masked_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of kept values, scaled so that the mean over processes is the global one; 0 if no process keeps any."""
    total = torch.where(keep, values, torch.zeros_like(values)).sum()
    count = sum_over_processes(keep.sum().to(values.dtype))
    return total * world_size() / count.clamp(min=1)


def cosines(centers_BKC: Tensor, prototypes_BPC: Tensor) -> Tensor:
    """Cosines of group centres and prototypes [B, K, P], with gradient to the centres only."""
    centers_BKC = nn.functional.normalize(centers_BKC, dim=-1)
    prototypes_BPC = nn.functional.normalize(prototypes_BPC.detach(), dim=-1)
    return centers_BKC @ prototypes_BPC.transpose(1, 2)


def matched_terms(
    similarity_BKP: Tensor, matching: Matching, logit_scale: Tensor, prototype_mask_BP: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """InfoNCE of each matched pair [B, M]: its group against all prototypes, and its prototype against all groups."""
    logits_BKP = row_logits_BKP = logit_scale * similarity_BKP
    if prototype_mask_BP is not None:
        row_logits_BKP = logits_BKP.masked_fill(~prototype_mask_BP[:, None, :], NEVER)
    matched = _pair_values(logits_BKP, matching)
    row_terms = row_logits_BKP.logsumexp(2).gather(1, matching.groups) - matched
    column_terms = logits_BKP.logsumexp(1).gather(1, matching.prototypes) - matched
    return row_terms, column_terms


def prototype_loss(
    centers_BKC: Tensor,
    prototypes_BPC: Tensor,
    logit_scale: Tensor,
    threshold: float = 0.1,
    prototype_mask_BP: Tensor | None = None,
    matching: Matching | None = None,
) -> tuple[Tensor, Matching]:
    """Contrastive loss between group centres and their matched prototypes.

    Args:
        centers_BKC: group centres, with gradient.
        prototypes_BPC: prototypes, constants.
        logit_scale: scalar factor on the cosines, with gradient.
        threshold: threshold of the hard rejection.
        prototype_mask_BP: bool, True for prototypes that exist.
        matching: a matching to use instead of that of largest cosine.

    Returns:
        The loss, a scalar, and the matching. The loss is the mean of the kept row terms plus the mean of the kept
        column terms, over all processes; 0 if no term is kept.

    Source: PGSeg section 3.3.
    """
    similarity_BKP = cosines(centers_BKC, prototypes_BPC)
    if matching is None:
        # Any matching will do for NaN features: the loss is NaN as well, which the training loop handles.
        comparable_BKP = similarity_BKP.detach().nan_to_num()
        matching = match_prototypes(comparable_BKP, prototype_mask_BP=prototype_mask_BP)
    row_terms, column_terms = matched_terms(similarity_BKP, matching, logit_scale, prototype_mask_BP)
    row_kept, column_kept = kept_pairs(similarity_BKP.detach(), matching, threshold, prototype_mask_BP)
    return global_masked_mean(row_terms, row_kept) + global_masked_mean(column_terms, column_kept), matching


def assignment_loss(log_assignment_BKL: Tensor, responsibilities_BLP: Tensor, matching: Matching) -> Tensor:
    """Cross-entropy between the prototypes' responsibilities for each token and the token's soft assignment to groups,
    with prototypes in the order of their matched groups. Ours; for equal numbers of prototypes and groups.

    Args:
        log_assignment_BKL: logarithm of the soft assignment, which sums to 1 over the groups.
        responsibilities_BLP: constants, rows sum to 1.
        matching: from [`match_prototypes`].
    """
    targets_BPL = responsibilities_BLP.detach().transpose(1, 2)
    length = targets_BPL.shape[2]
    matched_targets = targets_BPL.gather(1, matching.prototypes[..., None].expand(-1, -1, length))
    matched_logs = log_assignment_BKL.gather(1, matching.groups[..., None].expand(-1, -1, length))
    return -(matched_targets * matched_logs).sum(1).mean()


@torch.no_grad()
def updated_prototypes(
    prototypes_PC: Tensor, batch_mean_PC: Tensor, momentum: float = 0.9, renormalize: bool = True
) -> Tensor:
    """Moving average of the prototypes [P, C]; with `renormalize`, rows are scaled to unit length."""
    updated = momentum * prototypes_PC + (1 - momentum) * batch_mean_PC.to(prototypes_PC.dtype)
    return nn.functional.normalize(updated, dim=-1) if renormalize else updated
