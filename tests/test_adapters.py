"""peft adapters: only the adapter is trained."""

import copy

import pytest
import torch
from tiny_backbones import tiny_backbone_model
from tiny_models import VARIANTS, inputs_of, tiny_model, without_noise
from torch import nn

from pgseg_hf import PGSegModel

peft = pytest.importorskip("peft")


def trained(model, config, steps=3):
    """The model with an adapter after a few training steps on different images."""
    adapted = peft.get_peft_model(model, config)
    without_noise(adapted.base_model.model)
    adapted.train()
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    for step in range(steps):
        inputs = inputs_of(4)
        inputs["pixel_values"] = inputs["pixel_values"] + step
        output = adapted(**inputs, return_loss=True)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


def logits(model):
    with torch.no_grad():
        output = model.eval()(**inputs_of(4))
    return output.logits_per_image


CONFIGS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all": {"target_modules": "all-linear"},
    "statistics": {"target_modules": ["fc1"], "modules_to_save": ["visual_projection", "npr"]},
}


@pytest.mark.parametrize(
    ("kind", "how"), [("corrected", "attention"), ("corrected", "statistics"), ("backbone", "all")]
)
def test_an_adapter_is_loaded_as_it_was_trained(kind, how, tmp_path):
    model = tiny_backbone_model() if kind == "backbone" else tiny_model(npr_variant=kind)
    model.save_pretrained(tmp_path / "base")
    before, tensors = logits(model), copy.deepcopy(model.state_dict())
    adapted = trained(model, peft.LoraConfig(r=2, init_lora_weights=False, **CONFIGS[how]))
    expected = logits(adapted)
    assert (expected - before).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path / "adapter")
    base = PGSegModel.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(base), before)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    torch.testing.assert_close(logits(again.merge_and_unload()), expected, rtol=1e-3, atol=1e-3)
    if how != "statistics":
        with adapted.disable_adapter():
            torch.testing.assert_close(logits(adapted), before)
        after = adapted.unload().state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())


def test_statistics_and_prototypes_are_trained_where_they_are_saved():
    model = tiny_model()
    adapted = trained(model, peft.LoraConfig(r=2, **CONFIGS["statistics"]))
    projection = model.visual_projection
    kept, moved = (
        part[1].running_mean for part in (projection.original_module, projection.modules_to_save["default"])
    )
    assert not torch.equal(kept, moved)
    stage = adapted.base_model.model.vision_model.encoder.stages[0].npr
    assert not torch.equal(stage.original_module.prototypes, stage.modules_to_save["default"].prototypes)


@VARIANTS
def test_a_frozen_model_learns_nothing_by_the_way(variant):
    model = without_noise(tiny_model(npr_variant=variant))
    before = copy.deepcopy(model.state_dict())
    model.requires_grad_(False)
    model.train()
    pixel_values = nn.Parameter(inputs_of(4)["pixel_values"])
    model(
        **inputs_of(4) | {"pixel_values": pixel_values}, return_loss=variant != "released"
    ).logits_per_image.sum().backward()
    for name, tensor in model.state_dict().items():
        if name != "released_text_prototypes":  # updated in every call, as in the released code
            assert torch.equal(tensor, before[name]), name
