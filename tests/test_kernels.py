"""Kernels give the same results as the plain layers, are skipped where they do not apply, and can be turned off."""

import pytest
import torch
from tiny_models import inputs_of, tiny_images, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pgseg_hf import kernels
from pgseg_hf.kernels import attention_in_parts, linear, plain_kernels

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float64: 1e-12}
needs_onednn = pytest.mark.skipif(
    torch.float32 not in kernels._onednn_dtypes(), reason="this torch has no oneDNN"
)


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def in_both_ways(work, *arguments):
    """Results with and without kernels."""
    with_kernels = work(*arguments)
    with plain_kernels():
        return with_kernels, work(*arguments)


def _assert_as_close(ours, plain, dtype):
    scale = max([1.0, *plain.abs().flatten().tolist()])
    torch.testing.assert_close(ours, plain, rtol=0, atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_agree(dtype, bias):
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).to(dtype).eval()
    for x in (torch.randn(2, 5, 24), torch.randn(24, 7).T, torch.randn(0, 24), torch.randn(24)):
        x = x.to(dtype)
        with torch.no_grad():
            ours, plain = in_both_ways(linear, layer, x)
        assert torch.equal(plain, layer(x))
        _assert_as_close(ours, plain, dtype)
        assert torch.equal(linear(layer, x), layer(x))  # with gradient


@pytest.mark.parametrize("entries", [1, 4 * 35, 2**20])  # one head at a time, four of the six, all
def test_attention_in_parts_agrees(entries, monkeypatch):
    query, key, value = (torch.randn(3, 2, length, 4).double() for length in (5, 7, 7))
    expected = nn.functional.scaled_dot_product_attention(query, key, value, scale=0.7).transpose(1, 2)
    monkeypatch.setattr(kernels, "_CACHED_SCORES", entries)
    torch.testing.assert_close(attention_in_parts(None, query, key, value, None, 0.7)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["released", "corrected", "tokens"])
def test_image_towers_agree(dtype, variant):
    """Stage by stage on the same input, because hard assignments could differ after rounding."""
    fields = {"vision_config": {"prototype_mixing": "tokens"}} if variant == "tokens" else {}
    model = tiny_model(npr_variant="corrected" if variant == "tokens" else variant, **fields).to(dtype)
    for stage in model.vision_model.encoder.stages:
        if stage.npr is not None:
            stage.npr.projection[1].running_mean.normal_()
            stage.npr.projection[1].running_var.uniform_(0.5, 2.0)
    images = tiny_images(3, 24, 20).to(dtype)
    with torch.no_grad():
        tokens, group_tokens = model.vision_model._embed(images, None)[0], None
        for stage in model.vision_model.encoder.stages:
            seeds = None if stage.npr is None else stage.npr.seeds()
            ours, plain = in_both_ways(stage, tokens, group_tokens, seeds)
            _assert_as_close(ours[4].float(), plain[4].float(), dtype)  # what is grouped
            if plain[2] is not None:
                _assert_as_close(ours[2].float(), plain[2].float(), dtype)  # to which group
            tokens, group_tokens = plain[:2]


@pytest.mark.parametrize(("variant", "training"), [("corrected", True), ("released", False)])
def test_with_gradient_there_are_no_kernels(variant, training):
    def gradients():
        torch.manual_seed(0)
        model = tiny_model(npr_variant=variant, num_text_prototypes=4).train(training)
        output = model(**inputs_of(), return_loss=True)
        (output.logits_per_image.sum() + output.segment_logits.sum()).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    ours, plain = in_both_ways(gradients)
    assert len(ours) == len(plain) and all(map(torch.equal, ours, plain))


def test_in_training_a_layer_is_bit_for_bit_the_same_without_gradient():
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40), torch.randn(7, 24)
    with torch.no_grad():
        without_gradient = linear(layer, x)
    assert torch.equal(linear(layer, x), without_gradient)


@needs_onednn
def test_the_switch_turns_all_of_them_off():
    def operators():
        model = tiny_model(npr_variant="released").bfloat16()
        with torch.no_grad(), Operators() as seen:
            model.vision_model(tiny_images(2).bfloat16())
        return {name for name in seen.names if "mkldnn" in name or "baddbmm" in name or "flash" in name}

    model = tiny_model().vision_model
    with torch.no_grad(), Operators() as seen:
        model(tiny_images(2))
    assert "mkldnn._linear_pointwise.default" in seen.names
    ours, plain = in_both_ways(operators)
    assert "aten.baddbmm.default" in ours and not plain
    with plain_kernels():
        in_both_ways(int)
        assert not kernels._is_on, "one within another leaves it as it was"
    assert kernels._is_on


@needs_onednn
@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_a_torch_whose_operator_is_another_one_goes_without(error, monkeypatch):
    def refuse(*_):
        raise error("no such operator")

    kernels._onednn_dtypes.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", refuse)
    layer, x = nn.Linear(4, 3).eval(), torch.ones(2, 4)
    try:
        with torch.no_grad():
            assert torch.equal(linear(layer, x), layer(x))
    finally:
        kernels._onednn_dtypes.cache_clear()


def test_hooks_of_linear_layers_are_called():
    layer, x, calls = nn.Linear(4, 3).eval(), torch.ones(2, 4), []
    handles = [
        layer.register_forward_hook(lambda *of: calls.append("after")),
        layer.register_forward_pre_hook(lambda *of: calls.append("before")),
    ]
    with torch.no_grad():
        expected = linear(layer, x)
        assert calls == ["before", "after"]
        for handle in handles:
            handle.remove()
        layer.forward = lambda x: calls.append("instead") or expected  # as accelerate does when it offloads
        assert linear(layer, x) is expected and calls[-1] == "instead"
