"""What the groups of a checkpoint are like, apart from their names: compactness and richness.

Compact groups mean one thing each, rich ones mean different things (PGSeg, NeurIPS 2023, arXiv 2310.19001, which names
the two properties; the figures here are ours). Maths only: it knows no model and no files.

Shapes: K groups, N labels, D width, H x W pixels of a window, h x w patches, U groups in use.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# How far a soft grouping may be from a sum of 1, for half precision.
_SUM_TOLERANCE = 0.02


@dataclass
class GroupStatistics:
    """Sums over windows, which can be added over pictures and processes; `to_dict` makes means of them.

    Every figure is a mean over all its units (windows, pixels, labels, pairs, patches) of all windows, NaN without
    any. A group is *in use* in a window where it has at least one pixel, known or not; its *majority label* is the
    most frequent one among its known pixels, of equal ones the first.

    Per window, n_k being the pixels of group k, n its sum, and v_kl the known pixels of group k with label l:

    - `groups_used`: groups with n_k >= 1. From 1 to K.
    - `groups_used_1_percent`: groups with n_k >= n / 100. From 0 to K.
    - `effective_groups`: exp(-sum_k p_k log p_k) with p_k = n_k / n: how many groups of equal area would be as
      diverse. From 1 to K.

    Compactness:

    - `purity`, per known pixel: sum_k max_l v_kl / sum_kl v_kl, what a perfect namer would get right. Above 0,
      to 1; grows with the number of groups.
    - `coverage`, per label present: max_k v_kl / sum_k v_kl, whether a thing is in one group. Above 0, to 1.
    - `best_group_iou`, per label present: max_k v_kl / (sum_l v_kl + sum_k v_kl - v_kl). Above 0, to 1, which is
      where one group is exactly the label.
    - `sharpness`, per patch: its largest soft assignment. From 1 / K to 1.

    Richness:

    - `redundancy`, per pair of groups in use: cosine similarity of their embeddings. From -1 to 1; 1 is all the same.
    - `same_label_share`, per pair of groups in use with known pixels: whether their majority labels are equal. From 0
      to 1; above 0 as soon as a thing is in several groups.
    - `overlap`, per pair of groups in use: sum min(a, b) / sum max(a, b) of their soft maps a and b. From 0, disjoint,
      to 1, equal.

    Args:
        windows: how many were added.
        groups_used, groups_used_1_percent, effective_groups: sums of the figures.
        known_pixels, majority_pixels: all, and those with their group's majority label.
        labels: labels present, summed over windows.
        coverage, best_group_iou: sums over these.
        pairs: of groups in use.
        cosine: sum over these.
        labelled_pairs: of groups in use with known pixels.
        same_label_pairs: those with equal majority labels.
        soft_pairs: of groups in use in windows with a soft grouping.
        overlap: sum over these.
        patches: of windows with a soft grouping.
        largest_assignment: sum over these.
    """

    windows: int = 0
    groups_used: int = 0
    groups_used_1_percent: int = 0
    effective_groups: float = 0.0
    known_pixels: int = 0
    majority_pixels: int = 0
    labels: int = 0
    coverage: float = 0.0
    best_group_iou: float = 0.0
    pairs: int = 0
    cosine: float = 0.0
    labelled_pairs: int = 0
    same_label_pairs: int = 0
    soft_pairs: int = 0
    overlap: float = 0.0
    patches: int = 0
    largest_assignment: float = 0.0

    @torch.no_grad()
    def add(
        self,
        groups: Tensor,
        segments: Tensor,
        truth: Tensor,
        num_labels: int,
        ignore_index: int | None,
        grouping: Tensor | None = None,
    ) -> None:
        """Counts one window.

        Args:
            groups: integers [H, W], the group of each pixel.
            segments: [K, D], the groups' embeddings at any scale.
            truth: int64 [H, W].
            num_labels: N; labels are 0 to N - 1.
            ignore_index: value of the truth that does not count; None for none.
            grouping: [K, h, w], the soft assignment of each patch, which sums to 1 over the groups.

        Raises:
            ValueError: shapes that do not belong together, values that are no groups or labels, embeddings that are
                not finite, a grouping that is no assignment. Nothing is counted then.
        """
        groups, truth = _whole_numbers("groups", groups), _whole_numbers("the truth", truth.to(groups.device))
        known = torch.ones_like(truth, dtype=torch.bool) if ignore_index is None else truth != ignore_index
        _check_pixels(groups, truth, known, (len(segments), num_labels))
        _check_embeddings(segments, grouping)
        num_groups = len(segments)
        area_K = groups.flatten().bincount(minlength=num_groups)
        cells = groups[known] * num_labels + truth[known]
        votes_KN = cells.bincount(minlength=num_groups * num_labels).view(num_groups, num_labels)
        used_K = area_K > 0
        self.windows += 1
        self._add_areas(area_K)
        self._add_labels(votes_KN)
        self._add_cosines(segments.to(groups.device)[used_K])
        if grouping is not None:
            self._add_grouping(grouping.to(groups.device).double(), used_K)

    def _add_areas(self, area_K: Tensor) -> None:
        pixels = area_K.sum()
        self.groups_used += int((area_K > 0).sum())
        self.groups_used_1_percent += int((100 * area_K >= pixels).sum())
        self.effective_groups += float(torch.special.entr(area_K.double() / pixels).sum().exp())

    def _add_labels(self, votes_KN: Tensor) -> None:
        best_K, majority_K = votes_KN.max(dim=1)
        self.known_pixels += int(votes_KN.sum())
        self.majority_pixels += int(best_K.sum())

        votes_KL = votes_KN[:, votes_KN.any(dim=0)].double()
        self.labels += votes_KL.shape[1]
        in_label_1L, in_group_K1 = votes_KL.sum(0, keepdim=True), votes_KL.sum(1, keepdim=True)
        self.coverage += float((votes_KL / in_label_1L).amax(0).sum())
        self.best_group_iou += float((votes_KL / (in_label_1L + in_group_K1 - votes_KL)).amax(0).sum())

        groups_of_label = majority_K[best_K > 0].bincount()
        self.labelled_pairs += _num_pairs(int(groups_of_label.sum()))
        self.same_label_pairs += sum(_num_pairs(count) for count in groups_of_label.tolist())

    def _add_cosines(self, segments_UD: Tensor) -> None:
        # Embeddings may be small, but an embedding of zeros has no direction: its cosines are 0.
        unit_UD = nn.functional.normalize(segments_UD.double(), dim=-1, eps=1e-300)
        self.pairs += _num_pairs(len(unit_UD))
        self.cosine += float((unit_UD @ unit_UD.T).triu(diagonal=1).sum())

    def _add_grouping(self, grouping_Khw: Tensor, used_K: Tensor) -> None:
        self.patches += grouping_Khw[0].numel()
        self.largest_assignment += float(grouping_Khw.amax(0).sum())

        maps_UL = grouping_Khw[used_K].flatten(1)
        # The sum of min and max is a + b, their difference |a - b|: no tensor of pairs x patches is needed.
        total_UU = maps_UL.sum(1, keepdim=True) + maps_UL.sum(1)
        distance_UU = torch.cdist(maps_UL, maps_UL, p=1)
        iou_UU = (total_UU - distance_UU).clamp(min=0) / (total_UU + distance_UU).clamp(min=1e-300)
        self.soft_pairs += _num_pairs(len(maps_UL))
        self.overlap += float(iou_UU.triu(diagonal=1).sum())

    def merge(self, other: "GroupStatistics") -> None:
        """Adds what another one has counted."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def as_array(self) -> np.ndarray:
        """The sums in the order of the fields, float64 [17]; adding two of them is `merge`."""
        return np.array([getattr(self, field.name) for field in fields(self)], dtype=np.float64)

    @classmethod
    def from_array(cls, array: np.ndarray) -> "GroupStatistics":
        """The inverse of `as_array`.

        Raises:
            ValueError: another shape.
        """
        names = fields(cls)
        if np.shape(array) != (len(names),):
            raise ValueError(
                f"the array has shape {np.shape(array)}, expected ({len(names)},) from GroupStatistics.as_array."
            )
        values: dict[str, Any] = {
            field.name: round(value) if field.type is int else value
            for field, value in zip(names, map(float, array))
        }
        return cls(**values)

    def to_dict(self) -> dict[str, float]:
        """The figures by name, and `windows`, how many there were."""
        return {
            "groups_used": _mean(self.groups_used, self.windows),
            "groups_used_1_percent": _mean(self.groups_used_1_percent, self.windows),
            "effective_groups": _mean(self.effective_groups, self.windows),
            "purity": _mean(self.majority_pixels, self.known_pixels),
            "coverage": _mean(self.coverage, self.labels),
            "best_group_iou": _mean(self.best_group_iou, self.labels),
            "redundancy": _mean(self.cosine, self.pairs),
            "same_label_share": _mean(self.same_label_pairs, self.labelled_pairs),
            "overlap": _mean(self.overlap, self.soft_pairs),
            "sharpness": _mean(self.largest_assignment, self.patches),
            "windows": self.windows,
        }


def _mean(total: float, count: int) -> float:
    return total / count if count else float("nan")


def _num_pairs(count: int) -> int:
    return count * (count - 1) // 2


def _whole_numbers(name: str, values: Tensor) -> Tensor:
    if values.is_floating_point():
        raise ValueError(f"{name} has the type {values.dtype}, expected whole numbers [H, W].")
    return values.long()


def _check_pixels(groups: Tensor, truth: Tensor, known: Tensor, limits: tuple[int, int]) -> None:
    """`limits`: numbers of groups and labels."""
    if groups.ndim != 2 or groups.shape != truth.shape or not groups.numel():
        raise ValueError(
            f"groups have shape {tuple(groups.shape)} and the truth {tuple(truth.shape)}, expected the same [H, W]."
        )
    for name, values, limit in (("groups", groups, limits[0]), ("the truth", truth[known], limits[1])):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
            raise ValueError(
                f"{name} has values from {int(values.min())} to {int(values.max())}, expected 0 to {limit - 1}; "
                "give embeddings of all groups, num_labels of all labels and the ignore_index of the masks."
            )


def _check_embeddings(segments: Tensor, grouping: Tensor | None) -> None:
    if segments.ndim != 2 or not segments.isfinite().all():
        raise ValueError(
            f"segments have shape {tuple(segments.shape)}, expected finite embeddings [K, D] of the groups."
        )
    if grouping is None:
        return
    if grouping.ndim != 3 or len(grouping) != len(segments) or not grouping.numel():
        raise ValueError(f"grouping has shape {tuple(grouping.shape)}, expected [{len(segments)}, h, w].")
    error = float((grouping.double().sum(0) - 1).abs().max())
    if not (float(grouping.min()) >= 0 and error <= _SUM_TOLERANCE):
        raise ValueError(
            f"grouping has values from {float(grouping.min()):g} and sums that differ from 1 by up to {error:g}, "
            "expected a soft assignment: the softmax over the groups, not its logits."
        )
