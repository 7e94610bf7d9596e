"""Pixel-adaptive mask refinement: invariants, effect on borders, and its formula pixel by pixel."""

import math

import pytest
import torch
from hypothesis import strategies as st

from pgseg_hf.evaluation.metrics.refinement import PixelAdaptiveRefinement

SEEDS = st.integers(0, 10**6)


def random(seed, *shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def neighbours_of(row, column, size, dilations):
    """Rows and columns of a pixel's neighbours, clamped to the image."""
    return [
        (min(max(row + down * dilation, 0), size[0] - 1), min(max(column + right * dilation, 0), size[1] - 1))
        for dilation in dilations
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        if (down, right) != (0, 0)
    ]


def deviation(values):
    center = sum(values) / len(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1))


def one_pixel(scores, image, place, dilations):
    """The new scores of one pixel after one iteration, from lists [C][H][W] and [3][H][W]."""
    row, column = place
    around = neighbours_of(row, column, (len(image[0]), len(image[0][0])), dilations)
    exponents = []
    for y, x in around:
        terms = []
        for channel in image:
            own = channel[row][column]
            patch = [channel[a][b] for a, b in around] + [own] * len(dilations)
            terms.append(-abs(own - channel[y][x]) / (1e-8 + 0.1 * deviation(patch)))
        exponents.append(sum(terms) / 3)
    weights = [math.exp(exponent - max(exponents)) for exponent in exponents]
    return [
        sum(weight * channel[y][x] for weight, (y, x) in zip(weights, around)) / sum(weights)
        for channel in scores
    ]


def by_loops(scores, image, iterations, dilations):
    image, (height, width) = image.tolist(), scores.shape[1:]
    for _ in range(iterations):
        lists = scores.tolist()
        rows = [[one_pixel(lists, image, (y, x), dilations) for x in range(width)] for y in range(height)]
        scores = torch.tensor(rows, dtype=torch.float64).permute(2, 0, 1)
    return scores


@pytest.mark.parametrize(
    ("size", "iterations", "dilations"), [((5, 6), 2, (1, 3)), ((4, 1), 3, (2,)), ((3, 4), 1, (1, 2, 5))]
)
def test_equals_the_formula_pixel_by_pixel(size, iterations, dilations):
    scores, image = random(1, 2, *size, dtype=torch.float64), random(2, 3, *size, dtype=torch.float64)
    image[:, :2] = image[:, :1]  # a flat region
    refined = PixelAdaptiveRefinement(iterations, dilations)(scores, image)
    expected = by_loops(scores, image, iterations, dilations)
    torch.testing.assert_close(refined, expected, rtol=1e-10, atol=1e-12)
    single = PixelAdaptiveRefinement(iterations, dilations)(scores.float(), image.float())
    torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("iterations", [1, 10])
@pytest.mark.parametrize("column", [2, 4])
def test_a_boundary_beside_an_edge_moves_onto_it(column, iterations):
    """The boundary of the scores is one column away from the edge of the colours."""
    right = torch.arange(8) >= 3
    image = torch.where(right, torch.tensor([[[0.9]], [[0.6]], [[0.1]]]), 0.3).expand(3, 8, 8)
    scores = torch.full((2, 8, 8), 0.1)
    scores[0, :, :column], scores[1, :, column:] = 0.9, 0.9
    refined = PixelAdaptiveRefinement(iterations, (1, 2))(scores, image)
    assert not torch.equal(scores.argmax(0), right.long().expand(8, 8))
    assert torch.equal(refined.argmax(0), right.long().expand(8, 8))


@pytest.mark.parametrize("options", [{"iterations": 0}, {}])
def test_the_scores_given_are_not_changed(options):
    scores, image = random(7, 2, 4, 5), random(8, 3, 4, 5)
    before = scores.clone()
    refined = PixelAdaptiveRefinement(**options)(scores, image)
    refined_before = refined.clone()
    assert torch.equal(scores, before)
    scores.zero_()
    assert torch.equal(refined, refined_before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    scores, image = random(11, 2, 6, 7).to(dtype), random(12, 3, 6, 7)
    refine = PixelAdaptiveRefinement(5, (1, 2))
    refined = refine(scores, image)
    assert refined.dtype == dtype
    assert torch.equal(refined, refine(scores.float(), image).to(dtype))


def test_nothing_to_do_and_no_graph():
    scores, image = random(13, 2, 4, 5).requires_grad_(), random(14, 3, 4, 5)
    assert torch.equal(PixelAdaptiveRefinement(iterations=0)(scores, image), scores)
    assert PixelAdaptiveRefinement()(torch.zeros(0, 4, 5), image).shape == (0, 4, 5)
    assert not PixelAdaptiveRefinement()(scores, image).requires_grad


@pytest.mark.parametrize(
    ("scores", "image", "message"),
    [
        (torch.zeros(2, 4, 5), torch.zeros(3, 8, 10), r"\(2, 4, 5\) and the image \(3, 8, 10\)"),
        (torch.zeros(2, 4, 5), torch.zeros(1, 4, 5), r"the image \(1, 4, 5\)"),
        (torch.zeros(4, 5), torch.zeros(3, 4, 5), r"scores have shape \(4, 5\)"),
        (torch.zeros(2, 4, 5), torch.zeros(3, 4, 5, dtype=torch.uint8), "the image torch.uint8"),
        (torch.zeros(2, 4, 5, dtype=torch.long), torch.zeros(3, 4, 5), "scores are torch.int64"),
    ],
)
def test_other_sizes_and_types(scores, image, message):
    with pytest.raises(ValueError, match=message):
        PixelAdaptiveRefinement()(scores, image)


@pytest.mark.parametrize(
    "options",
    [{"iterations": -1}, {"iterations": 1.5}, {"dilations": ()}, {"dilations": (0,)}, {"dilations": (1.0,)}],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PixelAdaptiveRefinement(**options)
