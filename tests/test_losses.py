"""Contrastive losses: against loops and by hand, and over two processes against one with both batches."""

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
    gather_rows,
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
    """Of one row of logits, the target spread evenly over the positives."""
    denominator = math.log(sum(math.exp(logit) for logit in row))
    return sum(denominator - row[positive] for positive in positives) / len(positives)


def mean(values):
    return sum(values) / len(values)


# One process


def test_info_nce_by_hand():
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    rows = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2))]
    columns = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    assert info_nce(logits, logits.T).item() == pytest.approx((mean(rows) + mean(columns)) / 2)


@given(SEEDS, st.integers(1, 6))
def test_info_nce_against_loops(seed, batch):
    logits = 3 * draw(seed, batch, batch)
    rows = [cross_entropy(logits[i].tolist(), [i]) for i in range(batch)]
    columns = [cross_entropy(logits[:, i].tolist(), [i]) for i in range(batch)]
    assert info_nce(logits, logits.T).item() == pytest.approx((mean(rows) + mean(columns)) / 2)


def test_info_nce_needs_a_text_for_each_image():
    for first, second in (([2, 3], [3, 2]), ([3, 2], [2, 3])):
        with pytest.raises(ValueError, match=re.escape(f"{first} and per text {second}")):
            info_nce(torch.zeros(first), torch.zeros(second))


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


@given(SEEDS, st.integers(1, 5))
def test_one_positive_a_row_is_info_nce(seed, batch):
    logits = 3 * draw(seed, batch, batch)
    loss = multi_positive_loss(logits, logits.T, torch.eye(batch, dtype=torch.bool))
    torch.testing.assert_close(loss, info_nce(logits, logits.T))


def test_no_positives_at_all_give_zero_and_no_gradient():
    logits = draw(0, 2, 3).requires_grad_()
    loss = multi_positive_loss(logits, logits.T, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_multi_positive_loss_refuses_targets_of_other_shape():
    with pytest.raises(ValueError, match=r"\[3, 2\], expected images x texts = \[2, 3\]"):
        multi_positive_loss(torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool))


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
    """Twice the mean over all pairs, as the balanced loss has a mean for each text's positives and one for the rest."""
    logits, targets = 3 * draw(seed, images, texts), draw(seed + 1, images, texts) > 0
    of_pairs = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.double())
    expected = balance * sigmoid_loss(logits, targets) + (1 - balance) * 2 * of_pairs
    torch.testing.assert_close(sigmoid_loss(logits, targets, balance), expected)


def test_sigmoid_loss_refuses_targets_of_other_shape():
    with pytest.raises(
        ValueError, match=r"text targets have shape \[3, 2\], expected images x texts = \[2, 3\]"
    ):
        sigmoid_loss(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bool))


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


def multi_label_by_loops(logits, mask):
    """`logits` [B, B * M] of images and all labels; absent labels take no part at all."""
    batch, count = mask.shape
    present = [index for index in range(batch * count) if mask.flatten()[index]]
    rows = []
    for image in range(batch):
        own = [place for place, index in enumerate(present) if index // count == image]
        if own:
            rows.append(cross_entropy(logits[image, present].tolist(), own))
    columns = [cross_entropy(logits[:, index].tolist(), [index // count]) for index in present]
    return (mean(rows) + mean(columns)) / 2 if present else 0.0


@given(SEEDS, st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 0.9))
def test_multi_label_loss_against_loops(seed, batch, count, density):
    logits = 3 * draw(seed, batch, batch * count)
    mask = draw(seed + 1, batch, count).sigmoid() < density
    loss = loss_of_present_labels(logits, mask)
    assert loss.item() == pytest.approx(multi_label_by_loops(logits, mask))


def loss_of_present_labels(logits, mask):
    present = mask.flatten()
    owners = TextOwners(0, mask).label_owners(int(present.sum()))
    return multi_label_loss(logits[:, present], logits.T[present], owners)


@given(SEEDS, st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 0.9))
def test_labels_that_do_not_exist_need_no_logits(seed, batch, count, density):
    """Loss and gradient are those of logits for all of them, masked."""
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


def test_one_label_an_image_is_info_nce():
    logits = 3 * draw(0, 4, 4)
    loss = multi_label_loss(logits, logits.T, torch.eye(4, dtype=torch.bool))
    torch.testing.assert_close(loss, info_nce(logits, logits.T))


def test_absent_labels_get_no_gradient():
    logits = draw(0, 2, 6).requires_grad_()
    mask = torch.tensor([[True, False, True], [False, False, False]])
    loss_of_present_labels(logits, mask).backward()
    assert (logits.grad[:, [1, 3, 4, 5]] == 0).all()
    assert (logits.grad[:, [0, 2]] != 0).all()


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
LABELS = (4, 2)  # how many labels an image has at most, in each process


def features():
    return {name: draw(seed, 2 * BATCH, 5) for seed, name in enumerate(("images", "texts"))}


def labels():
    """Label embeddings and masks of both processes; image 1 has none, the second process has fewer."""
    embeds = [draw(10 + rank, BATCH, count, 5) for rank, count in enumerate(LABELS)]
    masks = [draw(20 + rank, BATCH, count) > -1 for rank, count in enumerate(LABELS)]
    masks[0][1] = False
    return embeds, masks


# Texts of both processes by their number: repeated within and across them.
CAPTIONS = ((0, 1, 0), (2, 1, 3))
LABEL_TEXTS = (((4, 5), (5, 6), (4, 7)), ((5, 7), (8, 4), (6, 6)))
SHARED_TEXTS = ((0, 1, 2, 3), (3, 0))
SHARED_OWNERS = (((1, 0, 0, 1), (0, 1, 1, 0), (0, 0, 0, 0)), ((1, 0), (1, 1), (0, 1)))
CASES = (
    "info_nce",
    "multi_positive",
    "sigmoid",
    "shared info_nce",
    "shared multi_positive",
    "shared sigmoid",
    "shared sigmoid of patches",
)


def model_and_inputs(case, ranks=(0, 1)):
    """A model for the kind of loss, and the batch of the given processes together."""
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
            shown = draw(30, 2 * BATCH, 2, 2, 4).abs()
            shown[BATCH:, ..., 2:] = 0
            places = [torch.arange(BATCH) + rank * BATCH for rank in ranks]
            inputs["patch_targets"] = torch.zeros(
                len(inputs["text_targets"]), 2, 2, inputs["text_targets"].shape[1]
            )
            first = 0
            for number, (rank, rows) in enumerate(zip(ranks, places)):
                count = len(SHARED_TEXTS[rank])
                own = slice(number * BATCH, (number + 1) * BATCH)
                inputs["patch_targets"][own, ..., first : first + count] = shown[rows][..., :count]
                first += count
    else:
        inputs["input_ids"] = torch.cat([texts[list(CAPTIONS[rank])] for rank in ranks])
        inputs["tag_input_ids"] = torch.cat([texts[torch.tensor(LABEL_TEXTS[rank])] for rank in ranks])
    return with_fixed_statistics(without_noise(model)), inputs


def local_losses(parts, label_embeds, label_mask):
    """The losses of this process as the model computes them, of features that need a gradient."""
    images, texts = parts["images"], parts["texts"]
    contrastive = info_nce(images @ gather_features(texts).T, texts @ gather_features(images).T)
    own = label_embeds[label_mask]
    of_all, start = gather_rows(own)
    owners = TextOwners(0, label_mask).label_owners(len(own))
    by_labels = multi_label_loss(images @ of_all.T, own @ gather_features(images).T, owners, start)
    return contrastive, by_labels


def train_once(model, inputs):
    output = model(**inputs, return_loss=True)
    output.loss.backward()
    return output


def one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    part = slice(rank * BATCH, (rank + 1) * BATCH)
    result = {"world_size": world_size(), "offset": rank_offset(BATCH)}
    result["sum"] = sum_over_processes(torch.tensor([1.0, rank]))
    result["padded"] = pad_to_longest(torch.ones(BATCH, LABELS[rank])).shape[1]

    parts = {name: value[part].clone().requires_grad_() for name, value in features().items()}
    embeds, masks = labels()
    label_embeds = embeds[rank].requires_grad_()
    contrastive, by_labels = local_losses(parts, label_embeds, masks[rank])
    result |= {"contrastive": contrastive.item(), "multi_label": by_labels.item()}
    (contrastive + by_labels).backward()
    result["gradients"] = {name: value.grad for name, value in parts.items()}
    result["label_gradients"] = label_embeds.grad

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


def test_losses_and_gradients_of_two_processes_are_those_of_one(two_processes):
    # Training averages the gradients of the processes, so theirs are twice those of the mean loss.
    parts = {name: value.requires_grad_() for name, value in features().items()}
    embeds, masks = labels()
    embeds[1] = torch.nn.functional.pad(embeds[1], (0, 0, 0, 2))
    masks[1] = torch.nn.functional.pad(masks[1], (0, 2))
    label_embeds, label_mask = torch.cat(embeds).requires_grad_(), torch.cat(masks)
    contrastive, by_labels = local_losses(parts, label_embeds, label_mask)
    (contrastive + by_labels).backward()
    assert mean([result["contrastive"] for result in two_processes]) == pytest.approx(contrastive.item())
    assert mean([result["multi_label"] for result in two_processes]) == pytest.approx(by_labels.item())
    for name, value in parts.items():
        both = torch.cat([result["gradients"][name] for result in two_processes]) / 2
        torch.testing.assert_close(both, value.grad)
    for rank, result in enumerate(two_processes):
        own = label_embeds.grad[rank * BATCH : (rank + 1) * BATCH, : LABELS[rank]]
        torch.testing.assert_close(result["label_gradients"] / 2, own)


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
    # The same pairs, with the repeated texts written once and shared.
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
