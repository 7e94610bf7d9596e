"""Parts of the image tower: stochastic depth, grouping, attention, checkpointing."""

import math

import pytest
import torch
from tiny_backbones import tiny_backbone_model
from tiny_models import (
    inputs_of,
    tiny_config,
    tiny_images,
    tiny_model,
    tiny_texts,
)
from torch import nn

from pgseg_hf.layers import (
    PGSegDropPath,
    PGSegMLP,
)
from pgseg_hf.modeling_pgseg import PGSegVisionModel
from pgseg_hf.variants import NPR_VARIANTS

# Stochastic depth


def test_drop_path_leaves_out_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = PGSegDropPath(0.25).train()
    x = torch.ones(4000, 2, 3)
    y = drop(x)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y, (kept[:, None, None] / 0.75).expand_as(y))
    assert abs(kept.float().mean() - 0.75) < 0.03
    assert drop.eval()(x) is x
    assert PGSegDropPath(0.0).train()(x) is x


def test_drop_path_rises_linearly_over_the_blocks():
    config = tiny_config(
        vision_config={"depths": [3, 2, 1], "num_hidden_layers": None, "drop_path_rate": 0.1}
    )
    model = PGSegVisionModel(config.vision_config)
    rates = [layer.drop_path.rate for stage in model.encoder.stages for layer in stage.layers]
    assert rates == pytest.approx([0.0, 0.02, 0.04, 0.06, 0.08, 0.1])


# Grouping in training


def test_gumbel_noise_is_standard():
    torch.manual_seed(0)
    assign = tiny_model().vision_model.encoder.stages[0].downsample.assign
    noise = assign.sample_noise(torch.zeros(100, 20, 50, dtype=torch.float64))
    assert noise.shape == (100, 20, 50)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_are_drawn_evenly_in_16_bits(dtype):
    torch.manual_seed(0)
    assign = tiny_model().vision_model.encoder.stages[0].downsample.assign.to(dtype).train()
    noise = assign.sample_noise(torch.zeros(20_000, 64, dtype=dtype))
    assert noise.amax(1).mean().item() == pytest.approx(0.5772 + math.log(64), abs=0.03)
    first_eight = (noise.argmax(1) < 8).double().mean().item()
    assert first_eight == pytest.approx(1 / 8, abs=0.01)  # ties would favour them
    pooled, _ = assign(torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 9, 16, dtype=dtype))
    assert pooled.dtype == dtype


def test_assignment_is_hard_with_the_gradient_of_the_soft_one():
    assign = tiny_model().vision_model.encoder.stages[0].downsample.assign.double().eval()
    with torch.no_grad():
        for linear in (assign.v_proj, assign.proj):
            linear.weight.copy_(torch.eye(16))
            linear.bias.zero_()
    centers = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 9, 16, dtype=torch.float64)
    pooled, logits = assign(centers, tokens)
    chosen = nn.functional.one_hot(logits.argmax(1), 5).double().transpose(1, 2)
    torch.testing.assert_close(pooled, chosen @ tokens / (chosen.sum(2, keepdim=True) + 1))
    weights = torch.randn_like(pooled)
    (ours,) = torch.autograd.grad((pooled * weights).sum(), centers)
    # The same forward value, by hand: soft assignments whose value is moved to the hard ones as a constant.
    logits = assign(centers, tokens)[1]
    soft = logits.softmax(1)
    straight = soft + (chosen - soft).detach()
    expected = straight / (straight.sum(2, keepdim=True) + 1) @ tokens
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weights).sum(), centers)[0])
    assert ours.abs().max() > 0


# Attention, checkpointing, compilation


@torch.no_grad()
def test_attention_implementations_agree(models):
    arguments = inputs_of(pixel_values=tiny_images(3, 24, 20).double())
    outputs = []
    for name in ("eager", "sdpa"):
        models["corrected"].set_attn_implementation(name)
        outputs.append(models["corrected"](**arguments))
    torch.testing.assert_close(outputs[0].logits_per_image, outputs[1].logits_per_image)
    torch.testing.assert_close(outputs[0].grouping, outputs[1].grouping)


@pytest.mark.parametrize("kind", ["none", "released", "corrected", "backbone"])
def test_quantisation_finds_every_linear_layer(kind):
    model = tiny_backbone_model() if kind == "backbone" else tiny_model(npr_variant=kind)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert {type(module) for module in linears} == {nn.Linear}
    assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    found = [
        module for module in quantised.modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)
    ]
    assert len(found) == len(linears) > 30
    with torch.no_grad():
        logits = quantised(**inputs_of()).logits_per_image
        expected = model(**inputs_of()).logits_per_image
    correlation = torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1]
    assert correlation > 0.8 and not torch.equal(logits, expected)


def test_a_changed_layer_of_an_mlp_is_called_as_every_module():
    class Adapted(nn.Module):
        """As adapters wrap a layer: another path beside it."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + 1.0

    mlp = PGSegMLP(tiny_config().vision_config, 4, 6, 4)
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = mlp.fc2(nn.functional.gelu(mlp.fc1(x) + 1.0))
        mlp.fc1 = Adapted(mlp.fc1)
        torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_activations_made_again_give_the_same_gradient(adapted):
    """They are not kept; with dropout in an adapter's place they are, as it would draw anew."""
    torch.manual_seed(0)
    mlp = PGSegMLP(tiny_config().vision_config, 4, 6, 4).double().train()
    if adapted:
        mlp.fc2 = nn.Sequential(nn.Dropout(0.5), mlp.fc2)
    x, kept = torch.randn(5, 4).double(), []
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.clone()) or t, lambda t: t):
        mlp(x).sum().backward()
    gradients = [parameter.grad.clone() for parameter in mlp.parameters()]
    mlp.zero_grad()
    torch.manual_seed(1)
    activations = nn.functional.gelu(mlp.fc1(x))
    mlp.fc2(activations).sum().backward()
    torch.testing.assert_close(gradients, [parameter.grad for parameter in mlp.parameters()])
    if not adapted:
        assert not any(t.shape == activations.shape and torch.allclose(t, activations) for t in kept)


@pytest.mark.parametrize(
    ("reentrant", "source"), [(False, "groups"), (True, "groups"), (False, "patches"), (True, "patches")]
)
def test_gradient_checkpointing_changes_nothing(reentrant, source):
    results = []
    for checkpointing in (False, True):
        vision = {"drop_path_rate": 0.2, "segment_source": source}
        model = tiny_model(assignment_weight=0.1, vision_config=vision).double().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_activation_checkpointing
        torch.manual_seed(3)
        arguments = inputs_of(pixel_values=tiny_images(3).double())
        output = model(**arguments, tag_input_ids=tiny_texts(6).unflatten(0, (3, 2)), return_loss=True)
        output.loss.backward()
        results.append((model, output.loss))
    (plain, loss), (checkpointed, other_loss) = results
    torch.testing.assert_close(loss, other_loss)
    gradients = {name: parameter.grad for name, parameter in checkpointed.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:
            assert gradients[name] is None, name
        else:
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    for (name, buffer), other in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)


@pytest.mark.parametrize("variant", NPR_VARIANTS)
@torch.no_grad()
def test_evaluation_compiles_without_graph_breaks(variant):
    torch.compiler.reset()
    model = tiny_model(npr_variant=variant)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = tiny_model(npr_variant=variant)(**inputs_of())
    output = compiled(**inputs_of())
    torch.testing.assert_close(output.logits_per_image, expected.logits_per_image)
    torch.testing.assert_close(output.grouping, expected.grouping)
