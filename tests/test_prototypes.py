"""Non-learnable prototypes as pure functions: estimation, matching, rejection, losses, moving average."""

from itertools import permutations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from pgseg_hf.npr_released import released_prototype_loss
from pgseg_hf.prototypes import (
    Matching,
    cheapest_assignment,
    estimate_prototypes,
    kept_pairs,
    match_on_device,
    match_prototypes,
    ordered_matching,
    prototype_loss,
)

SEEDS = st.integers(0, 2**31 - 1)
ITERATIONS = 4  # more of them amplify rounding; exact comparisons are in float64
SCALE = torch.tensor(10.0, dtype=torch.float64)
LOSSES = {"released": released_prototype_loss, "corrected": prototype_loss}


def draw(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return tensors[0] if len(tensors) == 1 else tensors


def permutation(seed, count):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def pairs(matching, index=0):
    valid = matching.valid[index]
    return list(
        zip(matching.groups[index][valid].tolist(), matching.prototypes[index][valid].tolist(), strict=True)
    )


@given(
    SEEDS, st.integers(1, 3), st.integers(1, 30), st.integers(1, 8), st.integers(2, 12), st.integers(1, 10)
)
def test_responsibilities_sum_to_one_and_prototypes_are_unit_vectors(
    seed, batch, length, count, width, steps
):
    tokens, seeds = draw(seed, (batch, length, width), (1, count, width))
    prototypes, responsibilities = estimate_prototypes(tokens, normalize(seeds, dim=-1), steps)
    assert responsibilities.shape == (batch, length, count)
    torch.testing.assert_close(responsibilities.sum(-1), torch.ones(batch, length, dtype=torch.float64))
    assert (responsibilities >= 0).all()
    norms = prototypes.norm(dim=-1)
    # Below 1 because of the 1e-6 that is added before the division, further below if the mean of the tokens is small.
    assert (norms <= 1).all()
    assume(length >= 2 * count)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-2, rtol=0)


def test_one_step_by_hand():
    tokens = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]]], dtype=torch.float64)
    seeds = torch.eye(2, dtype=torch.float64)
    prototypes, responsibilities = estimate_prototypes(tokens.clone().requires_grad_(), seeds, 1)
    assert not prototypes.requires_grad and not responsibilities.requires_grad
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for p in range(2):
        weights = [
            torch.exp(token @ seeds[p]) / sum(torch.exp(token @ seed) for seed in seeds)
            for token in tokens[0]
        ]
        mean = sum(w * token for w, token in zip(weights, tokens[0], strict=True)) / (1e-6 + sum(weights))
        expected[p] = mean / (1e-6 + (mean**2).sum().sqrt())
        torch.testing.assert_close(responsibilities[0, :, p], torch.stack(weights))
    torch.testing.assert_close(prototypes[0], expected, rtol=1e-12, atol=0)


@given(SEEDS, st.integers(1, 20), st.integers(1, 7))
def test_the_order_of_tokens_and_seeds_is_that_of_the_result(seed, length, count):
    tokens, seeds = draw(seed, (2, length, 6), (1, count, 6))
    of_tokens, of_seeds = permutation(seed, length), permutation(seed, count)
    straight = estimate_prototypes(tokens, seeds, ITERATIONS)
    permuted = estimate_prototypes(tokens[:, of_tokens], seeds[:, of_seeds], ITERATIONS)
    expected = straight.prototypes[:, of_seeds], straight.responsibilities[:, of_tokens][..., of_seeds]
    torch.testing.assert_close(tuple(permuted), expected, rtol=1e-6, atol=1e-8)


@given(SEEDS, st.integers(1, 10), st.integers(0, 10), st.integers(1, 5), st.integers(0, 5))
def test_masked_tokens_and_prototypes_have_no_influence(seed, real, padding, count, absent):
    tokens, seeds, noise = draw(seed, (1, real, 6), (1, count, 6), (1, padding, 6))
    more_seeds = draw(seed + 1, (1, absent, 6))
    token_mask = torch.arange(real + padding)[None] < real
    prototype_mask = torch.arange(count + absent)[None] < count
    plain = estimate_prototypes(tokens, seeds, ITERATIONS)
    masked = estimate_prototypes(
        torch.cat([tokens, 100 * noise], 1),
        torch.cat([seeds, more_seeds], 1),
        ITERATIONS,
        token_mask_BL=token_mask,
        prototype_mask_BP=prototype_mask,
    )
    torch.testing.assert_close(masked.prototypes[:, :count], plain.prototypes, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        masked.responsibilities[:, :real, :count], plain.responsibilities, rtol=1e-6, atol=1e-8
    )
    assert (masked.prototypes[:, count:] == 0).all()
    assert (masked.responsibilities[..., count:] == 0).all()


def test_samples_with_no_tokens_or_no_prototypes_stay_finite():
    tokens, seeds = draw(0, (3, 4, 6), (1, 2, 6))
    token_mask = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    prototype_mask = torch.tensor([[True] * 2, [False] * 2, [False] * 2])
    prototypes, responsibilities = estimate_prototypes(
        tokens, seeds, ITERATIONS, token_mask_BL=token_mask, prototype_mask_BP=prototype_mask
    )
    assert prototypes.isfinite().all()
    assert responsibilities.isfinite().all()
    assert (prototypes[1:] == 0).all()


@pytest.mark.parametrize(
    ("steps", "width", "message"), [(0, 3, "num_iterations is 0"), (10, 4, "3 channels, .* 4")]
)
def test_estimation_refuses_no_steps_and_seeds_of_other_width(steps, width, message):
    with pytest.raises(ValueError, match=message):
        estimate_prototypes(torch.zeros(1, 2, 3), torch.zeros(1, 2, width), steps)


# Matching


@example(seed=0, rows=64, more_columns=0, values=0)  # a stage of the default size
@given(SEEDS, st.integers(1, 9), st.integers(0, 4), st.sampled_from([0, 1, 2, 1000]))
def test_assignment_on_any_device_costs_as_little_as_scipys(seed, rows, more_columns, values):
    """For random costs (0), costs with many ties, and identical costs."""
    costs = 3 * draw(seed, (4, rows, rows + more_columns))
    costs = costs.remainder(values).floor() if values else costs
    ours = cheapest_assignment(costs)
    for table, columns in zip(costs, ours.tolist()):
        assert len(set(columns)) == rows
        expected = table[linear_sum_assignment(table)].sum()
        torch.testing.assert_close(table[range(rows), columns].sum(), expected, rtol=0, atol=1e-11)


@given(SEEDS, st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
def test_matching_on_any_device_is_the_same(seed, groups, prototypes, maximize, masked):
    similarity, present = draw(seed, (3, groups, prototypes), (3, prototypes))
    mask = present > 0 if masked else None
    expected = match_prototypes(similarity, maximize, mask)
    ours = match_on_device(similarity, maximize, mask)
    for of_ours, of_expected in zip(ours, expected):
        assert torch.equal(of_ours, of_expected)


@given(SEEDS, st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_matching_is_the_best_of_all(seed, groups, prototypes, maximize):
    similarity = draw(seed, (2, groups, prototypes))
    matching = match_prototypes(similarity, maximize=maximize)
    assert matching.valid.all()
    assert matching.groups.shape == (2, min(groups, prototypes))
    few, many = min(groups, prototypes), max(groups, prototypes)
    for index in range(2):
        table = similarity[index] if groups <= prototypes else similarity[index].T
        totals = [
            sum(table[row, column] for row, column in enumerate(chosen))
            for chosen in permutations(range(many), few)
        ]
        best = max(totals) if maximize else min(totals)
        ours = pairs(matching, index)
        assert len({row for row, _ in ours}) == len({column for _, column in ours}) == few
        # Matched in float64 if the similarity is float64, else in float32.
        assert abs(sum(similarity[index][pair] for pair in ours) - best) < 1e-12


def test_matching_on_threads_is_the_same(monkeypatch):
    similarity, present = draw(0, (7, 4, 3), (7, 3))
    mask = present > -0.5
    one_by_one = match_prototypes(similarity, prototype_mask_BP=mask)
    monkeypatch.setattr("pgseg_hf.prototypes._WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for ours, expected in zip(match_prototypes(similarity, prototype_mask_BP=mask), one_by_one):
        assert torch.equal(ours, expected)


@given(SEEDS, st.lists(st.booleans(), min_size=1, max_size=5), st.integers(1, 5))
def test_absent_prototypes_stay_unmatched(seed, present, groups):
    similarity = draw(seed, (1, groups, len(present)))
    mask = torch.tensor([present])
    matching = match_prototypes(similarity, prototype_mask_BP=mask)
    columns = mask[0].nonzero()[:, 0]
    assert matching.valid.sum() == min(groups, len(columns))
    alone = match_prototypes(similarity[:, :, columns])
    assert pairs(matching) == [(group, columns[prototype].item()) for group, prototype in pairs(alone)]


@pytest.mark.parametrize(
    ("groups", "expected"), [(2, [[0, 1], [0], []]), (3, [[0, 1, 2], [0], []]), (5, [[0, 1, 2], [0], []])]
)
def test_groups_are_paired_with_prototypes_in_order(groups, expected):
    exists = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    matching = ordered_matching(groups, exists)
    assert matching.valid.shape == (3, min(groups, 3))
    assert [pairs(matching, index) for index in range(3)] == [[(i, i) for i in row] for row in expected]
    assert matching.groups.dtype == torch.long and not matching.groups[~matching.valid].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_matching_refuses_similarities_that_are_not_finite(value):
    similarity = torch.zeros(1, 3, 3)
    similarity[0, 1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        match_prototypes(similarity)


# Rejection, by hand

SIMILARITY = torch.tensor([[[0.9, 0.5, 0.1], [0.2, 0.12, 0.8], [0.3, 0.7, 0.6]]])


def test_rejection_by_the_matched_pair():
    # Best matching: (0, 0), (1, 2), (2, 1); each pair is the largest of its row and column.
    matching = match_prototypes(SIMILARITY.bfloat16())
    assert pairs(matching) == [(0, 0), (1, 2), (2, 1)]
    rows, columns = kept_pairs(SIMILARITY, matching, 0.1)
    assert rows.tolist() == [[True] * 3]
    assert columns.tolist() == [[True] * 3]
    # Pairs (0, 2), (1, 1), (2, 0).
    # Rows, (value - min) / (max - min): (.1-.1)/.8 = 0; (.12-.12)/.68 = 0; (.3-.3)/.4 = 0.
    # Columns: column 2 (.1-.1)/.7 = 0; column 1 (.12-.12)/.58 = 0; column 0 (.3-.2)/.7 = .143.
    worst = match_prototypes(SIMILARITY, maximize=False)
    assert pairs(worst) == [(0, 2), (1, 1), (2, 0)]
    rows, columns = kept_pairs(SIMILARITY, worst, 0.1)
    assert rows.tolist() == [[False] * 3]
    assert columns.tolist() == [[False, False, True]]
    assert kept_pairs(SIMILARITY, worst, 0.15)[1].tolist() == [[False] * 3]


def test_rejection_keeps_what_is_strictly_above_the_threshold():
    similarity = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    matching = match_prototypes(similarity, maximize=False)
    assert [kept.tolist() for kept in kept_pairs(similarity, matching, 0.0)] == [[[False, False]]] * 2
    assert [kept.tolist() for kept in kept_pairs(similarity, matching, -1e-9)] == [[[True, True]]] * 2


def test_rejection_ignores_absent_prototypes():
    # With the third prototype, the matched 0.5 of row 0 would be 0.83 of the way from -2 to 1.
    similarity = torch.tensor([[[0.5, 1.0, -2.0], [0.1, 0.9, -2.0]]])
    mask = torch.tensor([[True, True, False]])
    matching = Matching(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    assert kept_pairs(similarity, matching, 0.1, mask)[0].tolist() == [[False, True]]
    assert kept_pairs(similarity, matching, 0.1)[0].tolist() == [[True, True]]


@given(SEEDS, st.lists(st.booleans(), min_size=2, max_size=5))
def test_pairs_that_do_not_exist_are_never_kept(seed, present):
    similarity = draw(seed, (1, 4, len(present)))
    mask = torch.tensor([present])
    matching = match_prototypes(similarity, prototype_mask_BP=mask)
    rows, columns = kept_pairs(similarity, matching, -1e9, mask)
    assert torch.equal(rows, matching.valid)
    assert torch.equal(columns, matching.valid)


# Prototype loss


def loss_by_hand(similarity, chosen, scale, rows_kept, columns_kept):
    """The loss of one image in plain loops; `chosen[i]` is the prototype of group i."""
    logits = scale * similarity
    rows = [logits[i].exp().sum().log() - logits[i, j] for i, j in enumerate(chosen)]
    columns = [logits[:, j].exp().sum().log() - logits[i, j] for i, j in enumerate(chosen)]
    kept = [
        [term for term, keep in zip(terms, keeps, strict=True) if keep]
        for terms, keeps in ((rows, rows_kept), (columns, columns_kept))
    ]
    return sum(sum(terms) / len(terms) for terms in kept)


def centers_and_prototypes_of(similarity):
    """Vectors with exactly these cosines: prototypes are unit vectors, centres are completed in dimensions of their
    own."""
    groups, count = similarity.shape
    prototypes = torch.eye(count, count + groups, dtype=torch.float64)
    fill = (1 - (similarity**2).sum(1)).sqrt()
    centers = torch.cat([similarity, torch.diag(fill)], 1)
    return 3 * centers[None], 0.5 * prototypes[None]


def test_prototype_loss_by_hand():
    similarity = SIMILARITY[0].double() / 2
    centers, prototypes = centers_and_prototypes_of(similarity)
    scale = torch.tensor(7.0, dtype=torch.float64)
    expected = loss_by_hand(similarity, [0, 2, 1], scale, [True] * 3, [True] * 3)
    torch.testing.assert_close(prototype_loss(centers, prototypes, scale)[0], expected, rtol=1e-12, atol=0)


def test_terms_are_averaged_over_the_whole_batch():
    # Not image by image: the mean of a batch's kept terms weighs images by their number of kept terms.
    centers, prototypes = draw(3, (6, 4, 8), (6, 4, 8))
    prototypes = normalize(prototypes, dim=-1)
    similarity = normalize(centers, dim=-1) @ prototypes.transpose(1, 2)
    matching = match_prototypes(similarity)
    rows, columns = kept_pairs(similarity, matching, 0.8)
    assert len(set(rows.sum(1).tolist())) > 1
    terms = {"rows": 0.0, "columns": 0.0}
    for index in range(6):
        logits = SCALE * similarity[index]
        for i, j in pairs(matching, index):
            terms["rows"] += rows[index, i] * (logits[i].logsumexp(0) - logits[i, j])
            terms["columns"] += columns[index, i] * (logits[:, j].logsumexp(0) - logits[i, j])
    expected = terms["rows"] / rows.sum() + terms["columns"] / columns.sum()
    torch.testing.assert_close(prototype_loss(centers, prototypes, SCALE, 0.8)[0], expected)


@given(SEEDS, st.integers(2, 5), st.floats(1, 50))
def test_the_perfect_matching_has_the_lowest_loss(seed, count, scale):
    # The centres are the prototypes in another order.
    prototypes = normalize(draw(seed, (1, count, 16)), dim=-1)
    order = permutation(seed, count)
    centers = prototypes[:, order]
    scale = torch.tensor(scale, dtype=torch.float64)
    lowest, matching = prototype_loss(centers, prototypes, scale)
    assert matching.prototypes[0].tolist() == order.tolist()
    for chosen in permutations(range(count)):
        other = Matching(matching.groups, torch.tensor([chosen]), matching.valid)
        # Without rejection, which would drop the worst terms of a poor matching.
        loss, _ = prototype_loss(centers, prototypes, scale, threshold=-1.0, matching=other)
        assert lowest <= loss + 1e-9


@given(SEEDS)
def test_the_size_of_vectors_does_not_matter(seed):
    centers, prototypes = draw(seed, (2, 4, 8), (2, 4, 8))
    loss, _ = prototype_loss(centers, prototypes, SCALE)
    assert loss == prototype_loss(centers, prototypes, SCALE, 0.1)[0]
    torch.testing.assert_close(prototype_loss(7 * centers, 0.2 * prototypes, SCALE)[0], loss)


def test_absent_prototypes_have_no_influence_on_the_loss():
    centers, prototypes, noise = draw(0, (1, 4, 8), (1, 3, 8), (1, 2, 8))
    mask = torch.tensor([[True, True, True, False, False]])
    centers.requires_grad_()
    loss, matching = prototype_loss(centers, prototypes, SCALE)
    masked, masked_matching = prototype_loss(
        centers, torch.cat([prototypes, noise], 1), SCALE, prototype_mask_BP=mask
    )
    torch.testing.assert_close(masked, loss)
    assert pairs(masked_matching) == pairs(matching)
    gradients = [torch.autograd.grad(value, centers)[0] for value in (loss, masked)]
    torch.testing.assert_close(*gradients)


def test_released_loss_is_nan_where_no_term_is_kept_and_corrected_is_zero():
    centers = torch.ones(2, 3, 4, dtype=torch.float64, requires_grad=True)
    prototypes = torch.ones(2, 3, 4, dtype=torch.float64)
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    assert released_prototype_loss(centers, prototypes, scale)[0].isnan()
    loss, _ = prototype_loss(centers, prototypes, scale)
    assert loss == 0
    loss.backward()
    assert (centers.grad == 0).all()
    assert scale.grad == 0


def test_corrected_loss_of_images_without_prototypes():
    # Image 0 has no prototypes, image 1 has one, image 2 has all: as images 1 and 2 alone, with finite gradients
    # everywhere.
    centers, prototypes = draw(0, (3, 3, 8), (3, 3, 8))
    centers.requires_grad_()
    mask = torch.tensor([[False] * 3, [False, True, False], [True] * 3])
    prototypes = prototypes * mask[..., None]
    loss, matching = prototype_loss(centers, prototypes, SCALE, prototype_mask_BP=mask)
    assert matching.valid.sum(1).tolist() == [0, 1, 3]
    loss.backward()
    assert centers.grad.isfinite().all()
    assert (centers.grad[0] == 0).all()
    alone, _ = prototype_loss(centers[1:], prototypes[1:], SCALE, prototype_mask_BP=mask[1:])
    torch.testing.assert_close(loss, alone)
    nothing, _ = prototype_loss(centers[:1], prototypes[:1], SCALE, prototype_mask_BP=mask[:1])
    assert nothing == 0


@pytest.mark.parametrize("variant", ["released", "corrected"])
def test_gradient_of_the_loss(variant):
    centers, prototypes = draw(5, (2, 4, 6), (2, 4, 6))
    scale = SCALE.clone().requires_grad_()
    prototypes.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c, s: LOSSES[variant](c, prototypes, s, 0.1)[0], (centers.requires_grad_(), scale)
    )
    LOSSES[variant](centers, prototypes, scale, 0.1)[0].backward()
    assert prototypes.grad is None
    assert centers.grad.abs().max() > 0
