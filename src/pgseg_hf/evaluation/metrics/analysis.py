"""Compactness and richness of a model's groups, independent of their predicted labels.

Groups are compact if each one covers one object, and rich if they cover different ones. The two properties are named in
PGSeg (NeurIPS 2023, arXiv 2310.19001); the statistics here are our own.

Shapes: K groups, N labels, D hidden size, H x W pixels of a window, h x w patches, U groups in use.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .sums import Sums

_FIGURES = (
    *("groups_used", "groups_used_1_percent", "effective_groups", "purity", "coverage", "best_group_iou"),
    *("redundancy", "same_label_share", "overlap", "sharpness"),
)


class GroupStatistics(Sums):
    """Accumulates statistics over windows; `to_dict` returns their means.

    Each statistic is a mean over its units (windows, pixels, labels, pairs, patches) in all windows, or NaN if there
    are none. A group is *in use* in a window if it has at least one pixel, known or unknown. Its *majority label* is
    the most frequent one among its known pixels, and the lowest one in case of a tie.

    For each window, with n_k pixels in group k, n pixels in all, and v_kl known pixels of label l in group k:

    - `groups_used`: groups with n_k >= 1. From 1 to K.
    - `groups_used_1_percent`: groups with n_k >= n / 100. From 0 to K.
    - `effective_groups`: exp(-sum_k p_k log p_k) with p_k = n_k / n, the number of equally large groups with the same
      entropy. From 1 to K.

    Compactness:

    - `purity`, per known pixel: sum_k max_l v_kl / sum_kl v_kl, the pixel accuracy with perfectly labelled groups. In
      (0, 1]; grows with the number of groups.
    - `coverage`, per label present: max_k v_kl / sum_k v_kl, the share of the label in its largest group. In (0, 1].
    - `best_group_iou`, per label present: max_k v_kl / (sum_l v_kl + sum_k v_kl - v_kl). In (0, 1]; 1 if a group
      matches the label exactly.
    - `sharpness`, per patch: its largest soft assignment. From 1 / K to 1.

    Richness:

    - `redundancy`, per pair of groups in use: cosine similarity of their embeddings. From -1 to 1 (identical).
    - `same_label_share`, per pair of groups in use with known pixels: whether their majority labels are equal. From 0
      to 1; above 0 as soon as a label is split over several groups.
    - `overlap`, per pair of groups in use: sum min(a, b) / sum max(a, b) of their soft maps a and b. From 0 (disjoint)
      to 1 (equal).
    """

    def __init__(self) -> None:
        # Total and number of units for each statistic.
        self.sums = np.zeros((len(_FIGURES), 2))

    def arrays(self) -> dict[str, np.ndarray]:
        return {"sums": self.sums}

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
        """Adds one window.

        Args:
            groups: group of each pixel, integers [H, W].
            segments: embeddings of the groups, finite, at any scale, [K, D].
            truth: ground truth, int64 [H, W].
            num_labels: N; labels are 0 to N - 1.
            ignore_index: value of the ground truth that is ignored; None if there is none.
            grouping: soft assignment of each patch, which sums to 1 over the groups, [K, h, w].

        Raises:
            ValueError: groups and ground truth differ in size, or have values out of range.
        """
        groups, truth = groups.long(), truth.to(groups.device).long()
        votes_KN = label_votes(groups, truth, (len(segments), num_labels), ignore_index)
        area_K = groups.flatten().bincount(minlength=len(segments))
        used_K = area_K > 0
        self._add_areas(area_K)
        self._add_labels(votes_KN)
        self._add_cosines(segments.to(groups.device)[used_K])
        if grouping is not None:
            self._add_grouping(grouping.to(groups.device).double(), used_K)

    def _add(self, figure: str, total: Tensor | int, count: Tensor | int) -> None:
        self.sums[_FIGURES.index(figure)] += float(total), int(count)

    def _add_areas(self, area_K: Tensor) -> None:
        pixels = area_K.sum()
        self._add("groups_used", (area_K > 0).sum(), 1)
        self._add("groups_used_1_percent", (100 * area_K >= pixels).sum(), 1)
        self._add("effective_groups", torch.special.entr(area_K.double() / pixels).sum().exp(), 1)

    def _add_labels(self, votes_KN: Tensor) -> None:
        best_K, majority_K = votes_KN.max(dim=1)
        self._add("purity", best_K.sum(), votes_KN.sum())

        votes_KL = votes_KN[:, votes_KN.any(dim=0)].double()
        in_label_1L, in_group_K1 = votes_KL.sum(0, keepdim=True), votes_KL.sum(1, keepdim=True)
        iou_KL = votes_KL / (in_label_1L + in_group_K1 - votes_KL)
        self._add("coverage", (votes_KL / in_label_1L).amax(0).sum(), votes_KL.shape[1])
        self._add("best_group_iou", iou_KL.amax(0).sum(), votes_KL.shape[1])

        groups_of_label = majority_K[best_K > 0].bincount()
        self._add("same_label_share", _num_pairs(groups_of_label).sum(), _num_pairs(groups_of_label.sum()))

    def _add_cosines(self, segments_UD: Tensor) -> None:
        # Small embeddings are normalized too; an embedding of zeros has no direction, so its cosines are 0.
        unit_UD = nn.functional.normalize(segments_UD.double(), dim=-1, eps=1e-300)
        self._add("redundancy", (unit_UD @ unit_UD.T).triu(diagonal=1).sum(), _num_pairs(len(unit_UD)))

    def _add_grouping(self, grouping_Khw: Tensor, used_K: Tensor) -> None:
        self._add("sharpness", grouping_Khw.amax(0).sum(), grouping_Khw[0].numel())
        maps_UL = grouping_Khw[used_K].flatten(1)
        # min + max = a + b and max - min = |a - b|, so no tensor of pairs x patches is needed.
        total_UU = maps_UL.sum(1, keepdim=True) + maps_UL.sum(1)
        distance_UU = torch.cdist(maps_UL, maps_UL, p=1)
        iou_UU = (total_UU - distance_UU).clamp(min=0) / (total_UU + distance_UU).clamp(min=1e-300)
        self._add("overlap", iou_UU.triu(diagonal=1).sum(), _num_pairs(len(maps_UL)))

    def to_dict(self) -> dict[str, float]:
        """The statistics by name, and the number of `windows`."""
        found = {
            name: float(total / count) if count else float("nan")
            for name, (total, count) in zip(_FIGURES, self.sums)
        }
        return {**found, "windows": int(self.sums[0, 1])}


def _num_pairs(count: Any) -> Any:
    return count * (count - 1) // 2


def label_votes(groups: Tensor, truth: Tensor, limits: tuple[int, int], ignore_index: int | None) -> Tensor:
    """Number of pixels by group and label, int64 [K, N].

    Args:
        groups, truth: integers [H, W].
        limits: numbers of groups and labels, K and N.
        ignore_index: value of the ground truth that is ignored; None if there is none.

    Raises:
        ValueError: groups and ground truth differ in size, or have values out of range.
    """
    if groups.ndim != 2 or groups.shape != truth.shape or not groups.numel():
        raise ValueError(
            f"groups have shape {tuple(groups.shape)} and the ground truth {tuple(truth.shape)}, expected the same "
            "[H, W]."
        )
    known = torch.ones_like(truth, dtype=torch.bool) if ignore_index is None else truth != ignore_index
    pairs = groups[known].long(), truth[known]
    for name, values, limit in zip(("groups", "truth"), (groups, pairs[1]), limits, strict=True):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
            raise ValueError(
                f"{name} has values from {int(values.min())} to {int(values.max())}, expected 0 to {limit - 1}; "
                "pass the embeddings of all groups, the number of all labels and the ignore_index of the masks."
            )
    cells = pairs[0] * limits[1] + pairs[1]
    return cells.bincount(minlength=limits[0] * limits[1]).view(limits)
