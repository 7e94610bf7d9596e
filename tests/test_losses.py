"""Contrastive losses: compared with loops and hand-computed values, and for two processes with one process and both
batches."""

import math
import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_images, tiny_model, tiny_texts, with_fixed_statistics, without_noise

from pgseg_hf.distributed import (
    gather_features,
    pad_to_longest,
    rank_offset,
    sum_over_processes,
    world_size,
)
from pgseg_hf.features import TextOwners
from pgseg_hf.losses import info_nce, multi_label_loss, multi_positive_loss, share_texts, sigmoid_loss

SEEDS = st.integers(0, 2**31 - 1)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cross_entropy(row, positives):
    """Cross-entropy of one row of logits with a target spread evenly over the positives."""
    denominator = math.log(sum(math.exp(logit) for logit in row))
    return sum(denominator - row[positive] for positive in positives) / len(positives)


def mean(values):
    return sum(values) / len(values)


# One process


@given(SEEDS, st.integers(1, 6))
def test_info_nce_against_loops(seed, batch):
    logits = 3 * draw(seed, batch, batch)
    rows = [cross_entropy(logits[i].tolist(), [i]) for i in range(batch)]
    columns = [cross_entropy(logits[:, i].tolist(), [i]) for i in range(batch)]
    assert info_nce(logits, logits.T).item() == pytest.approx((mean(rows) + mean(columns)) / 2)


@given(SEEDS, st.integers(1, 5), st.integers(1, 6), st.floats(0.1, 0.9))
def test_multi_positive_loss_against_loops(seed, images, texts, density):
    logits = 3 * draw(seed, images, texts)
    targets = draw(seed + 1, images, texts).sigmoid() < density
    sides = []
    for table, positives in ((logits, targets), (logits.T, targets.T)):
        rows = [
            cross_entropy(row.tolist(), chosen.nonzero()[:, 0].tolist())
            for row, chosen in zip(table, positives, strict=True)
            if chosen.any()
        ]
        sides.append(mean(rows) if rows else 0.0)
    assert multi_positive_loss(logits, logits.T, targets).item() == pytest.approx(mean(sides))


@pytest.mark.parametrize(
    ("loss", "shapes", "message"),
    [
        (info_nce, ((2, 3), (3, 2)), "[2, 3] and per text [3, 2]"),
        (multi_positive_loss, ((2, 3), (3, 2), (3, 2)), "[3, 2], expected images x texts = [2, 3]"),
        (sigmoid_loss, ((2, 3), (3, 2)), "[3, 2], expected images x texts = [2, 3]"),
    ],
)
def test_other_shapes_are_refused(loss, shapes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(*(torch.zeros(shape, dtype=torch.bool) for shape in shapes))


def test_no_positives_at_all_give_zero_and_no_gradient():
    logits = draw(0, 2, 3).requires_grad_()
    loss = multi_positive_loss(logits, logits.T, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@given(SEEDS, st.integers(1, 5), st.integers(1, 5), st.floats(-1, 1))
def test_sigmoid_loss_against_loops(seed, images, texts, density):
    logits, targets = 3 * draw(seed, images, texts), draw(seed + 1, images, texts) > density
    by_text = []
    for column, own in zip(logits.T.tolist(), targets.T.tolist()):
        positives = [math.log1p(math.exp(-logit)) for logit, is_own in zip(column, own) if is_own]
        negatives = [math.log1p(math.exp(logit)) for logit, is_own in zip(column, own) if not is_own]
        by_text.append(sum(mean(terms) for terms in (positives, negatives) if terms))
    assert sigmoid_loss(logits, targets).item() == pytest.approx(mean(by_text))


@given(SEEDS, st.integers(1, 5), st.integers(1, 5), st.floats(0, 1))
def test_balance_of_the_sigmoid_loss_leads_to_all_pairs_alike(seed, images, texts, balance):
    """Twice the mean over all pairs: the balanced loss has one mean for each text's positives and one for the rest."""
    logits, targets = 3 * draw(seed, images, texts), draw(seed + 1, images, texts) > 0
    of_pairs = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.double())
    expected = balance * sigmoid_loss(logits, targets) + (1 - balance) * 2 * of_pairs
    torch.testing.assert_close(sigmoid_loss(logits, targets, balance), expected)


@given(SEEDS, st.integers(1, 5), st.lists(st.integers(0, 3), min_size=1, max_size=7))
def test_equal_texts_become_one(seed, images, words):
    owners = draw(seed, images, len(words)) > 0
    embeds = torch.nn.functional.one_hot(torch.tensor(words)).double()
    shared = share_texts(embeds, torch.tensor(words)[:, None], owners)
    named = [row.argmax().item() for row in shared.embeds]
    assert sorted(named) == sorted(set(words))
    for image in range(images):
        own = {word for word, owned in zip(words, owners[image].tolist()) if owned}
        assert {word for word, owned in zip(named, shared.image_targets[image].tolist()) if owned} == own
    assert shared.own.tolist() == list(range(len(named)))
    assert torch.equal(shared.text_targets, shared.image_targets.T)


def loss_of_present_labels(logits, mask):
    present = mask.flatten()
    owners = TextOwners(0, mask).label_owners(int(present.sum()))
    return multi_label_loss(logits[:, present], logits.T[present], owners)


@given(SEEDS, st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 0.9))
def test_labels_that_do_not_exist_need_no_logits(seed, batch, count, density):
    """Loss and gradient equal those of masked logits for all labels."""
    logits = (3 * draw(seed, batch, batch * count)).requires_grad_()
    mask = draw(seed + 1, batch, count).sigmoid() < density
    present = mask.flatten()
    (ours,) = torch.autograd.grad(loss_of_present_labels(logits, mask), logits)
    owners = torch.block_diag(*mask.double())
    in_rows = logits.masked_fill(~present, -1e9).log_softmax(1) * owners
    of_images = -(in_rows.sum(1) / mask.sum(1).clamp(min=1)).sum() / mask.any(1).sum().clamp(min=1)
    of_labels = -(logits.log_softmax(0) * owners).sum() / present.sum().clamp(min=1)
    expected = (of_images + of_labels) / 2
    torch.testing.assert_close(loss_of_present_labels(logits, mask), expected)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, logits)[0])


def test_without_other_processes_everything_stays_local():
    values = torch.arange(6.0).reshape(2, 3).requires_grad_()
    assert world_size() == 1
    assert rank_offset(5) == 0
    assert gather_features(values) is values
    assert pad_to_longest(values) is values
    summed = sum_over_processes(values)
    assert torch.equal(summed, values)
    assert not summed.requires_grad


# Two processes, each with half of the batch

BATCH = 3


# Indices of the texts of both processes, repeated within and across them; -1 for none.
CAPTIONS = ((0, 1, 0), (2, 1, 3))
LABEL_TEXTS = (((4, 5), (-1, -1), (4, 7)), ((5, 7), (8, 4), (6, -1)))  # some images have fewer, or none
SHARED_TEXTS = ((0, 1, 2, 3), (3, 0))
SHARED_OWNERS = (((1, 0, 0, 1), (0, 1, 1, 0), (0, 0, 0, 0)), ((1, 0), (1, 1), (0, 1)))
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))
CASES = (
    "info_nce",
    "info_nce of patches",
    "multi_positive",
    "sigmoid",
    "shared info_nce",
    "shared multi_positive",
    "shared sigmoid",
    "shared sigmoid of patches",
)


def model_and_inputs(case, ranks=(0, 1)):
    """A model for a kind of loss, and the combined batch of the given processes."""
    kind = case.removeprefix("shared ").removesuffix(" of patches")
    pooling = {"contrastive_pooling": "patches"} if "patches" in case else {}
    options = {"assignment_weight": 0.2, "text_prototype_weight": 0.1, "contrastive_loss": kind, **pooling}
    model = tiny_model(**options).double()
    texts = tiny_texts(9, words=7)
    images = tiny_images(2 * BATCH).double().unflatten(0, (2, BATCH))
    inputs = {"pixel_values": torch.cat([images[rank] for rank in ranks])}
    if case.startswith("shared"):
        inputs["input_ids"] = torch.cat([texts[list(SHARED_TEXTS[rank])] for rank in ranks])
        owners = [torch.tensor(SHARED_OWNERS[rank]).bool() for rank in ranks]
        inputs["text_targets"] = torch.block_diag(*owners).bool()
        if pooling:
            # For all ranks, although each rank only knows its own texts.
            shown = [draw(30 + rank, BATCH, 2, 2, len(SHARED_TEXTS[rank])).abs() for rank in ranks]
            targets = [torch.block_diag(*(of_rank[:, i, j] for of_rank in shown)) for i, j in CELLS]
            inputs["patch_targets"] = torch.stack(targets, 1).unflatten(1, (2, 2))
    else:
        inputs["input_ids"] = torch.cat([texts[list(CAPTIONS[rank])] for rank in ranks])
        labels = torch.cat([torch.tensor(LABEL_TEXTS[rank]) for rank in ranks])
        inputs["tag_input_ids"] = texts[labels.clamp(min=0)]
        inputs["tag_attention_mask"] = (labels >= 0).long()[..., None].expand(-1, -1, texts.shape[1])
    return with_fixed_statistics(without_noise(model)), inputs


def train_once(model, inputs):
    output = model(**inputs, return_loss=True)
    output.loss.backward()
    return output


def one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    result = {"world_size": world_size(), "offset": rank_offset(BATCH)}
    result["sum"] = sum_over_processes(torch.tensor([1.0, rank]))
    result["padded"] = pad_to_longest(torch.ones(BATCH, 4 - rank)).shape[1]

    for case in CASES:
        model, inputs = model_and_inputs(case, [rank])
        if rank == 1 and case.startswith("shared"):
            inputs["input_ids"] = inputs["input_ids"][:, :-2]  # padded to another length
        result[case] = {
            "loss": train_once(model, inputs).loss.item(),
            "gradients": {name: value.grad for name, value in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
        }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    mp.spawn(one_of_two_processes, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_processes_share_sums_and_lengths(two_processes):
    assert [result["world_size"] for result in two_processes] == [2, 2]
    assert [result["offset"] for result in two_processes] == [0, BATCH]
    assert all(result["sum"].tolist() == [2.0, 1.0] for result in two_processes)
    assert [result["padded"] for result in two_processes] == [4, 4]


@pytest.mark.parametrize("case", CASES)
def test_model_in_two_processes_learns_as_in_one(two_processes, case):
    model, inputs = model_and_inputs(case)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "prototypes" in name}
    output = train_once(model, inputs)
    if "tag_input_ids" in inputs:
        assert output.multi_label_loss > 0
    results = [result[case] for result in two_processes]
    assert mean([result["loss"] for result in results]) == pytest.approx(output.loss.item())
    for name, parameter in model.named_parameters():
        parts = [result["gradients"][name] for result in results]
        torch.testing.assert_close(mean(parts), parameter.grad, rtol=1e-6, atol=1e-9)
    buffers = dict(model.named_buffers())
    assert len(before) == 3
    for name, old in before.items():
        first, second = (result["buffers"][name] for result in results)
        assert torch.equal(first, second), name
        torch.testing.assert_close(first, buffers[name])
        assert not torch.equal(first, old), name


@pytest.mark.parametrize("kind", ["multi_positive", "sigmoid"])
def test_captions_that_repeat_are_no_negatives(kind):
    # The same pairs, with repeated texts given once and shared.
    model = model_and_inputs(kind)[0].eval()
    images, texts = tiny_images(4).double(), tiny_texts(2, words=7)
    repeated = model(texts[[0, 1, 0, 0]], images, return_loss=True)
    targets = torch.tensor([[1, 0], [0, 1], [1, 0], [1, 0]]).bool()
    shared = model(texts, images, text_targets=targets, return_loss=True)
    torch.testing.assert_close(repeated.contrastive_loss, shared.contrastive_loss)
    model.config.contrastive_loss = "info_nce"
    paired = model(texts[[0, 1, 0, 0]], images, return_loss=True)
    assert (paired.contrastive_loss - shared.contrastive_loss).abs() > 0.1


def test_padding_does_not_make_texts_differ():
    model = model_and_inputs("multi_positive")[0].eval()
    ids = tiny_texts(2, words=3)
    longer = model(ids[[0, 1, 0]], tiny_images(3).double(), return_loss=True)
    shorter = model(ids[[0, 1, 0], :6], tiny_images(3).double(), return_loss=True)
    torch.testing.assert_close(longer.contrastive_loss, shorter.contrastive_loss)
