"""What a perfect namer makes of groups."""

import numpy as np
import torch

from pgseg_hf.evaluation import oracle_map
from pgseg_hf.scoring import WindowScores
from pgseg_hf.segmentation import ScoredImage


def test_the_oracle_names_each_windows_groups_by_majority():
    # Two windows of 2 x 3 over 2 x 4 pixels; they share columns 1 and 2.
    truth = np.array([[0, 0, 1, 2], [0, 1, 1, 255]])
    left = WindowScores(torch.tensor([[0, 0, 1], [0, 0, 1]]), torch.rand(3, 5), 0, 0)
    right = WindowScores(torch.tensor([[0, 1, 1], [1, 1, 2]]), torch.rand(3, 5), 0, 1)
    image = ScoredImage((2, 4), (2, 4), [left, right])
    # left: group 0 is 0 (three to one), group 1 is 1. right: group 0 is 0, group 1 is 1 (three to one), group 2 has
    # unknown pixels only. At the pixel where the windows disagree the first label wins.
    expected = [[0, 0, 1, 1], [0, 0, 1, 0]]
    assert oracle_map(image, truth, 3).tolist() == expected


def test_the_oracle_counts_what_is_unknown_only_where_told():
    image = ScoredImage(
        (1, 4), (1, 4), [WindowScores(torch.zeros(1, 4, dtype=torch.uint8), torch.rand(1, 2))]
    )
    truth = np.array([[2, 2, 2, 1]])
    assert oracle_map(image, truth, 3, ignore_index=None).tolist() == [[2] * 4]
    assert oracle_map(image, truth, 2, ignore_index=2).tolist() == [[1] * 4]


def test_the_oracle_works_at_the_size_that_the_model_saw():
    groups = torch.arange(8).repeat_interleave(3).repeat(6, 1)
    image = ScoredImage((2, 8), (6, 24), [WindowScores(groups, torch.rand(8, 2))])
    truth = np.tile(np.arange(8) % 2 * 4, (2, 1))
    assert oracle_map(image, truth, 5).tolist() == truth.tolist()
