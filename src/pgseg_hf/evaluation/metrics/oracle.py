"""What a perfect namer would make of a model's groups."""

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
    """In each window each group takes its majority label (of equal ones the first); the windows are merged as ever.
    What a model loses below it are names, the rest are groups.

    Args:
        image: groups and windows.
        truth: int [H, W] of the image's size.
        num_labels: N; labels are 0 to N - 1.
        ignore_index: value of the truth that does not count.

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
    """A mask at the size (height, width) that the model saw, by nearest neighbours; int64."""
    resized = Image.fromarray(truth.astype(np.int32)).resize(size[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized)).long()


def _majority(window: WindowScores, truth_HW: Tensor, num_labels: int, ignore_index: int | None) -> Tensor:
    """One for each group's most frequent label, [K, num_labels]; the first one where all its pixels are unknown."""
    height, width = window.groups.shape
    part = truth_HW[window.top : window.top + height, window.left : window.left + width]
    limits = len(window.scores), num_labels
    votes = label_votes(window.groups, part.to(window.groups.device), limits, ignore_index)
    return torch.nn.functional.one_hot(votes.argmax(1), num_labels).float()
