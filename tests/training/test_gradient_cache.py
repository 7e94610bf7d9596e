"""Gradient caching: chunks give the gradients, losses and buffers of the full batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from tiny_backbones import tiny_backbone_model
from tiny_models import tiny_images, tiny_model, tiny_texts, with_fixed_statistics, without_noise

from pgseg_hf.training.gradient_cache import GradientCache, average_gradients, split_evenly

BATCH = 7
VARIANTS = {
    "none": {"npr_variant": "none"},
    "released": {"npr_variant": "released", "num_text_prototypes": 4},
    "corrected": {"text_prototype_weight": 0.1},
    "assignment": {"assignment_weight": 0.2, "contrastive_pooling": "groups"},
    "patches": {"assignment_weight": 0.2, "vision_config": {"segment_source": "patches"}},
    "multi_positive": {"contrastive_loss": "multi_positive"},
    "sigmoid": {"contrastive_loss": "sigmoid", "contrastive_pooling": "groups"},
    "mixture": {"contrastive_loss": "sigmoid", "contrastive_pooling": "mixture", "label_balance": 0.3},
    "named patches": {"contrastive_pooling": "patches"},
    "named patches, sigmoid": {"contrastive_loss": "sigmoid", "contrastive_pooling": "patches"},
}


def inputs_of(layout, batch=BATCH, dtype=torch.float64):
    inputs = {"pixel_values": tiny_images(batch).to(dtype), "input_ids": tiny_texts(batch, words=6)}
    if layout == "labels":
        labels = tiny_texts(5, words=4, seed=1)[torch.arange(batch * 3) % 5].unflatten(0, (batch, 3))
        inputs["tag_input_ids"] = labels
        inputs["tag_attention_mask"] = torch.ones_like(labels)
        inputs["tag_attention_mask"][2, 1:] = 0
    if layout == "shared":
        inputs["input_ids"] = tiny_texts(5, words=6)
        inputs["text_targets"] = torch.randn(batch, 5, generator=torch.Generator().manual_seed(0)) > 0
    return inputs


def state_after(model, inputs, chunk_size=None):
    """Total loss, gradients and buffers after one step, without gradient caching if there is no chunk size."""
    model = copy.deepcopy(model)
    if chunk_size is None:
        losses = model(**inputs, return_loss=True)
        losses.loss.backward()
        total = losses.loss
    else:
        total = GradientCache(model, chunk_size).backward(inputs | {"return_loss": True})["total"]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return total.detach(), gradients, dict(model.named_buffers())


def assert_same(plain, cached, tolerance):
    torch.testing.assert_close(cached[0], plain[0], rtol=tolerance, atol=tolerance)
    largest = max(value.abs().max().item() for value in plain[1].values() if value is not None)
    for expected, got in zip(plain[1:], cached[1:]):
        for name, value in expected.items():
            if name.endswith("num_batches_tracked"):
                continue
            if value is None:
                assert got[name] is None or not got[name].any(), name
                continue
            scale = max(value.abs().max().item(), largest / 100)
            torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize(
    ("variant", "layout"),
    [*((variant, "labels") for variant in VARIANTS)]
    + [(variant, layout) for variant in ("corrected", "mixture") for layout in ("pairs", "shared")],
)
def test_chunks_give_the_gradients_of_the_whole_batch(variant, layout):
    model = with_fixed_statistics(without_noise(tiny_model(**VARIANTS[variant]).double()))
    inputs = inputs_of(layout)
    assert_same(state_after(model, inputs), state_after(model, inputs, 2), 1e-9)


@pytest.mark.parametrize("frozen", ["text", "images"])
def test_chunks_of_a_frozen_tower(frozen):
    model = with_fixed_statistics(without_noise(tiny_model(freeze_text=frozen == "text").double()))
    if frozen == "images":
        for part in (model.vision_model, model.visual_projection):
            part.requires_grad_(False)
    inputs = inputs_of("pairs")
    assert_same(state_after(model, inputs), state_after(model, inputs, 3), 1e-9)


@pytest.mark.parametrize("pooling", ["mean", "patches"])
def test_chunks_of_backbone_features(pooling):
    model = tiny_backbone_model(contrastive_pooling=pooling)
    model = with_fixed_statistics(without_noise(model.double()))
    inputs = inputs_of("labels") | {"pixel_values": tiny_images(BATCH, 32, 32).double()}
    plain = state_after(model, inputs)
    features = model.vision_model.embeddings.features(inputs.pop("pixel_values"))
    assert_same(plain, state_after(model, inputs | {"backbone_features": features}, 3), 1e-9)


@pytest.mark.parametrize("variant", ["released", "corrected", "assignment"])
def test_one_chunk_is_a_plain_step_with_its_noise_and_batch_statistics(variant):
    fields = VARIANTS[variant] | {"vision_config": {"drop_path_rate": 0.3, "attention_dropout": 0.1}}
    model = tiny_model(**fields).double().train()
    torch.manual_seed(3)
    plain = state_after(model, inputs_of("labels"))
    torch.manual_seed(3)
    assert_same(plain, state_after(model, inputs_of("labels"), BATCH * 4), 1e-9)


def test_second_pass_repeats_the_randomness_of_the_first(monkeypatch):
    model = tiny_model(vision_config={"drop_path_rate": 0.3}).train()
    encode, seen = model.encode_part, []
    monkeypatch.setattr(model, "encode_part", lambda **chunk: seen.append(encode(**chunk)) or seen[-1])
    GradientCache(model, 2).backward(inputs_of("pairs", batch=8, dtype=torch.float32))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == 8
    for one, two in zip(first, second):
        assert torch.equal(one.embeds, two.embeds)
    assert not torch.equal(first[0].embeds, first[1].embeds)


def test_running_statistics_move_by_the_mean_of_the_chunks():
    model = without_noise(tiny_model().double().train())
    inputs = inputs_of("pairs", batch=6)
    by_chunk = []
    for rows in (slice(0, 3), slice(3, 6)):
        part = copy.deepcopy(model)
        part(**{name: value[rows] for name, value in inputs.items()}, return_loss=True)
        by_chunk.append(part.visual_projection[1].running_mean)
    GradientCache(model, 3).backward(inputs)
    torch.testing.assert_close(model.visual_projection[1].running_mean, sum(by_chunk) / 2)
    assert not torch.equal(*by_chunk)


def test_a_loss_that_is_not_finite_leaves_the_towers_without_gradient():
    model = tiny_model().train()
    with torch.no_grad():
        model.visual_projection[3].bias.fill_(float("nan"))
    losses = GradientCache(model, 2).backward(inputs_of("pairs", batch=4, dtype=torch.float32))
    assert losses["total"].isnan()
    assert all(parameter.grad is None for parameter in model.vision_model.parameters())


@given(st.integers(0, 300), st.integers(2, 50))
def test_chunks_cover_the_batch_evenly(count, size):
    chunks = split_evenly(count, size)
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert sum(sizes) == count
    assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert all(2 <= part <= size + 1 for part in sizes) or count < 2


def test_chunks_of_one_are_refused():
    with pytest.raises(ValueError, match="chunk_size is 1"):
        GradientCache(tiny_model(), 1)


def one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = with_fixed_statistics(without_noise(tiny_model(assignment_weight=0.2).double()))
    part = slice(rank * 4, (rank + 1) * 4)
    inputs = {name: value[part] for name, value in inputs_of("labels", batch=8).items()}
    GradientCache(model, 2).backward(inputs)
    average_gradients(model.parameters())
    good = {name: parameter.grad for name, parameter in model.named_parameters()}, dict(model.named_buffers())

    model = tiny_model(contrastive_loss="sigmoid").train()
    inputs = inputs_of("labels", batch=4, dtype=torch.float32)
    if rank == 1:
        inputs["pixel_values"][0] = 1e30
    total = GradientCache(model, 2).backward(inputs)["total"]
    average_gradients(model.parameters())
    torch.save((good, (total, model.vision_model.layernorm.weight.grad)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_and_a_bad_loss_ends_the_step_of_both(tmp_path):
    mp.spawn(one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    model = with_fixed_statistics(without_noise(tiny_model(assignment_weight=0.2).double()))
    plain = state_after(model, inputs_of("labels", batch=8))
    for rank in (0, 1):
        (gradients, buffers), (total, gradient) = torch.load(tmp_path / f"{rank}.pt")
        assert_same(plain, (plain[0], gradients, buffers), 1e-9)
        assert total.isfinite() == (rank == 0) and not gradient.any()
