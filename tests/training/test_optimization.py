"""Parameter groups, learning rates and averaged weights, checked by hand and on a tiny model."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_images, tiny_model
from torch import nn

from pgseg_hf.efficientnet_lite import EfficientNetLiteConfig
from pgseg_hf.training.optimization import (
    ExponentialMovingAverage,
    build_optimizer,
    cosine_schedule,
    learning_rate_factor,
    own_settings_kept,
    parameter_groups,
)


def test_groups_of_the_model():
    model = tiny_model()
    model.text_model.requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, others = parameter_groups(model, 0.07)
    assert (decayed["name"], decayed["weight_decay"]) == ("decayed", 0.07)
    assert (others["name"], others["weight_decay"]) == ("not decayed", 0.0)
    decayed_names, other_names = ([names[p] for p in group["params"]] for group in (decayed, others))
    assert {"logit_scale", "prototype_logit_scale", "vision_model.layernorm.weight"} <= set(other_names)
    assert "vision_model.embeddings.position_embeddings" in decayed_names
    assert not any(name.endswith("bias") for name in decayed_names)
    trained = [name for name in names.values() if not name.startswith("text_model.")]
    assert sorted(decayed_names + other_names) == sorted(trained)
    assert decayed_names == [name for name in trained if name in set(decayed_names)], "order of the model"


def test_a_bias_of_two_dimensions_is_not_decayed_and_frozen_models_are_refused():
    module = nn.Module()
    module.bias = nn.Parameter(torch.zeros(2, 3))
    (group,) = parameter_groups(module)
    assert group["name"] == "not decayed"
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(module)


def test_the_optimizer_has_the_recipes_numbers():
    optimizer = build_optimizer(nn.Linear(2, 2))
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (1e-4, (0.9, 0.999))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert not optimizer.defaults["fused"]


@pytest.mark.parametrize("frozen", [True, False])
def test_a_backbone_learns_at_a_rate_of_its_own(frozen):
    backbone = EfficientNetLiteConfig(stem_size=4, hidden_sizes=[4] * 7, depths=[1] * 7)
    vision = {"backbone_config": backbone, "freeze_backbone": frozen, "patch_size": 16, "image_size": 64}
    model = tiny_model(vision_config=vision)
    optimizer = build_optimizer(model, 1e-3, backbone_factor=0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    part = model.vision_model.embeddings.patch_embeddings
    slow = {id(p) for p in part.backbone.parameters()}
    assert id(part.projection.weight) not in slow
    for name, parameter in model.named_parameters():
        if frozen and id(parameter) in slow:
            assert id(parameter) not in rates, name
        else:
            assert rates[id(parameter)] == pytest.approx(1e-4 if id(parameter) in slow else 1e-3), name
    if not frozen:
        stem = part.backbone.stem
        assert (decays[id(stem.convolution.weight)], decays[id(stem.normalization.weight)]) == (0.05, 0.0)
        schedule = cosine_schedule(optimizer, 2, 10)
        for _ in range(5):
            optimizer.step()
            schedule.step()
            fast, *_, last = (group["lr"] for group in optimizer.param_groups)
            assert last == pytest.approx(0.1 * fast)
        # By default, all groups have the same rate.
        assert {group["lr"] for group in build_optimizer(model, 1e-3).param_groups} == {1e-3}


@pytest.mark.gpu
def test_the_optimizer_is_fused_on_cuda():
    assert build_optimizer(nn.Linear(2, 2).cuda()).defaults["fused"]


def rates(optimizer, schedule, steps):
    result = []
    for _ in range(steps):
        result.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return result


def test_learning_rates_by_hand():
    optimizer = build_optimizer(nn.Linear(2, 2))
    optimizer.param_groups[1]["lr"] = 5e-5
    schedule = cosine_schedule(optimizer, warmup_steps=4, total_steps=9)
    expected = [1e-6, 25.75e-6, 50.5e-6, 75.25e-6, 1e-4]
    expected += [1e-5 + 9e-5 * (1 + math.cos(math.pi * part / 4)) / 2 for part in (1, 2, 3)]
    expected += [1e-5] * 4
    for (first, second), wanted in zip(rates(optimizer, schedule, len(expected)), expected, strict=True):
        assert first == pytest.approx(wanted, rel=1e-12)
        assert second == pytest.approx(wanted / 2, rel=1e-12)


@given(st.integers(0, 50), st.integers(1, 200), st.integers(0, 400))
def test_the_rate_rises_then_falls_and_stays_within_its_limits(warmup, rest, step):
    total = warmup + rest
    here, after = (learning_rate_factor(s, warmup, total) for s in (step, step + 1))
    assert 0.01 * (1 - 1e-12) <= here <= 1
    if step < warmup:
        assert here < after
    else:
        assert after <= here
    assert learning_rate_factor(warmup, warmup, total) == 1
    if rest > 1:
        assert learning_rate_factor(total - 1 + step, warmup, total) == pytest.approx(0.1)


def test_a_resumed_schedule_goes_on_and_takes_a_new_length():
    optimizer = build_optimizer(nn.Linear(2, 2))
    schedule = cosine_schedule(optimizer, 3, 12)
    rates(optimizer, schedule, 5)
    states = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    expected = rates(optimizer, schedule, 9)
    for length in (12, 50):
        other = build_optimizer(nn.Linear(2, 2))
        resumed = cosine_schedule(other, 3, length)
        other.load_state_dict(states[0])
        resumed.load_state_dict(states[1])
        if length == 12:
            assert rates(other, resumed, 9) == expected
        else:
            resumed.step()
            assert other.param_groups[0]["lr"] == pytest.approx(1e-4 * learning_rate_factor(6, 3, 50))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": 5, "total_steps": 5}, "warmup_steps is 5 of total_steps 5"),
        ({"warmup_steps": -1, "total_steps": 5}, "warmup_steps is -1"),
        ({"warmup_steps": 0, "total_steps": 5, "floor": 2e-4}, "end at 0.0002"),
        ({"warmup_steps": 0, "total_steps": 5, "start": -1.0}, "start at -1.0"),
    ],
)
def test_schedules_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        cosine_schedule(build_optimizer(nn.Linear(2, 2)), **arguments)


# Averaged weights


def test_the_average_by_hand_with_its_ramp():
    model = nn.Linear(1, 1, bias=False)
    average = ExponentialMovingAverage(model, decay=0.25)
    expected = None
    for decay, value in ((0, 3.0), (2 / 11, -2.0), (0.25, 5.0), (0.25, 7.0)):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-6)


def changed(model, seed):
    """Changes all weights and buffers slightly, like a training step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
            else:
                tensor += 1
    return model


@pytest.fixture
def averaged():
    """A model and the average over three of its states."""
    model = tiny_model()
    average = ExponentialMovingAverage(model, decay=0.9)
    for seed in range(3):
        average.update_parameters(changed(model, seed))
    return model, average


def test_buffers_are_copied_and_weights_averaged(averaged):
    model, average = averaged
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, average.module.get_buffer(name)), name
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, average.module.get_parameter(name)), name


def test_applied_weights_are_the_average_and_the_own_ones_come_back_exactly(averaged):
    model, average = averaged
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pixels = tiny_images()
    before = model.vision_model(pixels).pooler_output
    with average.applied_to(model):
        during = model.vision_model(pixels).pooler_output
        assert torch.equal(during, average.module.vision_model(pixels).pooler_output)
        changed(model, 9)
    assert not torch.equal(during, before)
    assert torch.equal(model.vision_model(pixels).pooler_output, before)
    with pytest.raises(KeyError), average.applied_to(model):
        raise KeyError
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_a_loaded_average_goes_on_exactly(averaged):
    model, average = averaged
    other = ExponentialMovingAverage(tiny_model(seed=1), decay=0.9)
    other.load_state_dict(average.state_dict())
    changed(model, 5)
    for either in (average, other):
        either.update_parameters(model)
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_averages_that_make_no_sense():
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16, expected float32"):
        ExponentialMovingAverage(nn.Linear(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        ExponentialMovingAverage(nn.Linear(2, 2), decay=1.5)


def test_settings_of_its_own_win_over_those_of_a_loaded_state():
    def parts(rate, decay):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        optimizer = build_optimizer(model, rate, decay, betas=(0.9, 0.5 + rate))
        return model, optimizer, cosine_schedule(optimizer, 2, 10, start=0.0, floor=0.0)

    def run(model, optimizer, schedule, steps):
        for _ in range(steps):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return [(group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups]

    model, optimizer, schedule = parts(0.1, 0.05)
    run(model, optimizer, schedule, 4)
    states = optimizer.state_dict(), schedule.state_dict()
    for rate, decay in ((0.1, 0.05), (0.4, 0.2)):
        other, resumed, its_schedule = parts(rate, decay)
        with own_settings_kept(resumed, its_schedule):
            resumed.load_state_dict(copy.deepcopy(states[0]))
            its_schedule.load_state_dict(states[1])
        assert run(other, resumed, its_schedule, 3) == run(*parts(rate, decay), 7)
        assert its_schedule.get_last_lr() == [group["lr"] for group in resumed.param_groups]
        assert all(resumed.state[parameter]["step"] == 7 for parameter in other.parameters())
