"""Label maps of a model's groups with perfect labels."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...scoring import WindowScores
from ...segmentation import ScoredImage
from .analysis import label_votes
from .confusion import IGNORE_INDEX


def oracle_map(
    image: ScoredImage, truth: np.ndarray, num_labels: int, ignore_index: int | None = IGNORE_INDEX
) -> np.ndarray:
    """The label map in which each group of each window has its majority label (the lowest one in case of a tie). The
    gap to the model's own result is due to wrong labels, the remaining errors are due to the groups.

    Args:
        image: groups and windows of the image.
        truth: ground truth at the size of the image, int [H, W].
        num_labels: N; labels are 0 to N - 1.
        ignore_index: value of the ground truth that is ignored.

    Returns:
        int64 [H, W].
    """
    small = resized_truth(truth, image.resized)
    named = [
        WindowScores(
            window.groups, _majority(window, small, num_labels, ignore_index), window.top, window.left
        )
        for window in image.windows
    ]
    return replace(image, windows=named).label_map()[0].cpu().numpy()


def resized_truth(truth: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resizes a mask to the model's input size (height, width) by nearest neighbour, int64."""
    resized = Image.fromarray(truth.astype(np.int32)).resize(size[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized)).long()


def _majority(window: WindowScores, truth_HW: Tensor, num_labels: int, ignore_index: int | None) -> Tensor:
    """Majority label of each group, one-hot [K, N]; label 0 if all pixels of the group are unknown."""
    height, width = window.groups.shape
    part = truth_HW[window.top : window.top + height, window.left : window.left + width]
    limits = len(window.scores), num_labels
    votes = label_votes(window.groups, part.to(window.groups.device), limits, ignore_index)
    return torch.nn.functional.one_hot(votes.argmax(1), num_labels).float()
