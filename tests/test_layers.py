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


def test_groups_are_drawn_evenly_in_16_bits():
    torch.manual_seed(0)
    assign = tiny_model().vision_model.encoder.stages[0].downsample.assign.bfloat16().train()
    noise = assign.sample_noise(torch.zeros(20_000, 64, dtype=torch.bfloat16))
    assert noise.amax(1).mean().item() == pytest.approx(0.5772 + math.log(64), abs=0.03)
    first_eight = (noise.argmax(1) < 8).double().mean().item()
    assert first_eight == pytest.approx(1 / 8, abs=0.01)  # ties would favour them
    centers, tokens = (torch.randn(2, length, 16, dtype=torch.bfloat16) for length in (5, 9))
    assert assign(centers, tokens)[0].dtype == torch.bfloat16


# Attention, checkpointing, compilation


def test_linear_layers_are_torchs_own():
    """Quantisation tools do not accept subclasses."""
    linears = [module for module in tiny_backbone_model().modules() if isinstance(module, nn.Linear)]
    assert {type(module) for module in linears} == {nn.Linear} and len(linears) > 30


def test_a_changed_layer_of_an_mlp_is_called_as_every_module():
    class Adapted(nn.Module):
        """Adds a parallel path to a layer, as adapters do."""

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
    """They are not stored, except with dropout in an adapter, which would draw different values in a recompute."""
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


@pytest.mark.parametrize(("reentrant", "source"), [(True, "groups"), (False, "patches")])
def test_gradient_checkpointing_changes_nothing(reentrant, source):
    vision = {"drop_path_rate": 0.2, "segment_source": source}
    plain, checkpointed = (
        tiny_model(assignment_weight=0.1, vision_config=vision).double().train() for _ in range(2)
    )
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert checkpointed.is_activation_checkpointing
    inputs = inputs_of(pixel_values=tiny_images(3).double(), tag_input_ids=tiny_texts(6).unflatten(0, (3, 2)))
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        model(**inputs, return_loss=True).loss.backward()
    for (name, parameter), other in zip(plain.named_parameters(), checkpointed.parameters()):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    for (name, buffer), other in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)


@torch.no_grad()
def test_evaluation_compiles_without_graph_breaks():
    torch.compiler.reset()
    model = tiny_model()
    expected = model(**inputs_of())
    output = torch.compile(model, fullgraph=True, backend="eager")(**inputs_of())
    torch.testing.assert_close(output.logits_per_image, expected.logits_per_image)
    torch.testing.assert_close(output.grouping, expected.grouping)
