"""Backbones in place of the patch convolution: shapes, freezing, precomputed features, and Transformers' operations on
models."""

import copy
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_backbones import ANY_BACKBONE, BACKBONES, backbone_fields, tiny_backbone_model
from tiny_models import (
    WITHOUT_THE_PACKAGE,
    assert_same_tensors,
    tiny_config,
    tiny_images,
    tiny_model,
    tiny_texts,
    without_noise,
)
from torch.nn.functional import interpolate
from transformers import AutoBackbone

from pgseg_hf.configuration_pgseg import PGSegConfig, PGSegVisionConfig
from pgseg_hf.export import export_image_encoder
from pgseg_hf.modeling_pgseg import PGSegModel, PGSegVisionModel


def patches_of(model):
    return model.vision_model.embeddings.patch_embeddings


def backbone_of(model):
    return patches_of(model).backbone


def inputs_of(batch=2, **kwargs):
    return {"input_ids": tiny_texts(batch), "pixel_values": tiny_images(batch, 32, 32)} | kwargs


def features_of(model, pixel_values):
    return model.vision_model.embeddings.features(pixel_values)


def step(model):
    """One step of AdamW, whose weight decay changes every parameter that has a gradient, even a gradient of 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model(**inputs_of(), return_loss=True).loss.backward()
    optimizer.step()


@ANY_BACKBONE
@torch.no_grad()
def test_the_grid_is_that_of_the_finest_stage(name):
    model = tiny_backbone_model(name)
    pixels = tiny_images(2, 48, 33)
    output = model.get_image_features(pixels)
    grid = max((features.shape[-2:] for features in backbone_of(model)(pixels).feature_maps), key=math.prod)
    assert output.grouping.shape == (2, 4, *grid)
    torch.testing.assert_close(output.grouping.sum(1), torch.ones(2, *grid))
    assert all(side // model.config.vision_config.patch_size in (n, n - 1) for side, n in zip((48, 33), grid))
    assert output.image_sizes.tolist() == [[48, 33]] * 2
    alone = model.get_image_features(pixels[1:])
    torch.testing.assert_close(alone.segment_embeds[0], output.segment_embeds[1], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_stages_are_joined_on_the_finest_grid_each_normalised_by_itself():
    model = tiny_backbone_model("pvt_v2")
    pixels = tiny_images(2, 40, 33)
    fine, coarse = backbone_of(model)(pixels).feature_maps
    assert fine.shape[-2:] != coarse.shape[-2:]
    stretched = interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    features = features_of(model, pixels)
    assert torch.equal(features, torch.cat([fine, stretched], dim=1))
    part = patches_of(model)
    normed = [norm(x.permute(0, 2, 3, 1)) for norm, x in zip(part.norms, (fine, stretched))]
    expected = part.projection(torch.cat(normed, dim=-1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(part(pixels), expected)
    # A stage with values a thousand times larger has the same weight.
    larger = torch.cat([fine, 1000 * stretched], dim=1)
    torch.testing.assert_close(part.project(larger), expected, rtol=1e-2, atol=1e-2)


# Features instead of pixels


@torch.no_grad()
def test_features_give_what_their_pixels_give():
    model = tiny_backbone_model("pvt_v2", contrastive_pooling="patches")
    pixels, ids = tiny_images(3, 48, 32), tiny_texts(3)
    features = features_of(model, pixels)
    expected, output = model.get_image_features(pixels), model.get_image_features(backbone_features=features)
    for key in ("last_hidden_state", "pooler_output", "grouping", "segment_embeds", "patch_embeds"):
        assert torch.equal(getattr(output, key), getattr(expected, key)), key
    stride = model.config.vision_config.patch_size
    assert output.image_sizes.tolist() == [[side * stride for side in features.shape[-2:]]] * 3
    loss = model(ids, pixels, return_loss=True).loss
    assert torch.equal(model(ids, backbone_features=features, return_loss=True).loss, loss)
    part, whole = model.encode_part(backbone_features=features), model.encode_part(pixels)
    assert torch.equal(part.embeds, whole.embeds) and torch.equal(part.patch_embeds, whole.patch_embeds)
    half = model.get_image_features(backbone_features=features.half()).grouping
    torch.testing.assert_close(half, expected.grouping, rtol=0, atol=0.05)


def wrong_inputs():
    pixels, features = torch.zeros(1, 3, 32, 32), torch.zeros(1, 20, 4, 4)
    yield {}, "pixel_values is None"
    yield {"pixel_values": pixels, "backbone_features": features}, "pixel_values are given too"
    for shape in ((1, 19, 4, 4), (1, 3, 32, 32), (20, 4, 4)):
        message = rf"backbone_features has shape {re.escape(str(list(shape)))}.* \[batch, 20, height, width\]"
        yield {"backbone_features": torch.zeros(shape)}, message
    yield {"backbone_features": features.long()}, "type torch.int64"
    yield {"backbone_features": features / 0}, "backbone_features has NaN or infinite"


@pytest.mark.parametrize(("inputs", "message"), list(wrong_inputs()))
def test_wrong_inputs_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_backbone_model().vision_model(**inputs)


def test_features_for_a_model_without_a_backbone_are_refused():
    with pytest.raises(ValueError, match="backbone_features are given, but this model has no backbone"):
        tiny_model().get_image_features(backbone_features=torch.zeros(1, 20, 4, 4))


# Learning


@ANY_BACKBONE
def test_a_frozen_backbone_stays_as_it_is(name):
    model = tiny_backbone_model(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert not any(module.training for module in backbone_of(model).modules())
    step(model)
    assert all(each.grad is None and not each.requires_grad for each in backbone_of(model).parameters())
    prefix = "vision_model.embeddings.patch_embeddings."
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.startswith(prefix + "backbone.") for key in changed)
    assert {prefix + key for key in ("projection.weight", "norms.0.weight", "norms.0.bias")} <= changed


@ANY_BACKBONE
def test_a_backbone_that_is_not_frozen_learns(name):
    model = tiny_backbone_model(name, {"freeze_backbone": False}).train()
    assert all(module.training for module in backbone_of(model).modules())
    step(model)
    gradients = {key: parameter.grad for key, parameter in backbone_of(model).named_parameters()}
    used = {key for key, gradient in gradients.items() if gradient is not None and gradient.any()}
    # Including the first layer. Layers after the last chosen stage get no gradient.
    assert next(key for key in gradients if key.endswith("weight") and "norm" not in key) in used
    assert len(used) >= len(gradients) / 4


@pytest.mark.parametrize("frozen", [True, False])
def test_freezing_outlasts_loading_and_changes_of_mode(tmp_path, frozen):
    tiny_backbone_model(vision={"freeze_backbone": frozen}).save_pretrained(tmp_path)
    model = PGSegModel.from_pretrained(tmp_path)
    for mode in (False, True):
        model.train(mode)
        backbone = backbone_of(model)
        assert {parameter.requires_grad for parameter in backbone.parameters()} == {not frozen}
        assert {module.training for module in backbone.modules()} == {mode and not frozen}
        assert patches_of(model).projection.training == mode
    thawed = PGSegVisionModel.from_pretrained(tmp_path, freeze_backbone=False).train()
    assert all(parameter.requires_grad for parameter in thawed.parameters())


@pytest.mark.parametrize(
    ("name", "frozen", "reentrant"),
    [
        ("efficientnet_lite", False, False),
        ("swin", True, True),
        ("swin", False, True),
        ("pvt_v2", False, False),
    ],
)
def test_gradient_checkpointing_changes_nothing(name, frozen, reentrant):
    """Also for backbones whose embeddings return more than one tensor."""
    model = without_noise(tiny_backbone_model(name, {"freeze_backbone": frozen}).double().train())
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    for each in (model, checkpointed):
        torch.manual_seed(3)
        each(**inputs_of(3, pixel_values=tiny_images(3, 32, 32).double()), return_loss=True).loss.backward()
    assert any(parameter.grad is not None for parameter in model.vision_model.parameters())
    for (key, plain), ours in zip(model.named_parameters(), checkpointed.parameters()):
        assert (plain.grad is None) == (ours.grad is None), key
        if plain.grad is not None:
            torch.testing.assert_close(ours.grad, plain.grad, msg=key)


# Configuration, saving and loading


@ANY_BACKBONE
@torch.no_grad()
def test_round_trip_bit_for_bit(tmp_path, name):
    model = tiny_backbone_model(name)
    model.save_pretrained(tmp_path)
    pixels = tiny_images(2, 48, 33)
    expected = model.get_image_features(pixels)
    for kwargs in ({}, {"device_map": "auto"}):
        loaded = PGSegModel.from_pretrained(tmp_path, **kwargs)
        assert_same_tensors(loaded, model)
        # This includes buffers that are not saved.
        assert torch.equal(loaded.get_image_features(pixels).segment_embeds, expected.segment_embeds)
    assert_same_tensors(PGSegVisionModel.from_pretrained(tmp_path), model.vision_model)


@ANY_BACKBONE
def test_configurations_round_trip(tmp_path, name):
    fields, _ = BACKBONES[name]
    config = tiny_config(vision_config=backbone_fields(name))
    backbone = config.vision_config.backbone_config
    assert backbone.model_type == name
    given = tiny_config(vision_config=backbone_fields(name, backbone_config=backbone))
    config.save_pretrained(tmp_path)
    for other in (given, PGSegConfig.from_dict(config.to_dict()), PGSegConfig.from_pretrained(tmp_path)):
        assert other.vision_config.to_dict() == config.vision_config.to_dict()
        found = other.vision_config.backbone_config
        assert type(found) is type(backbone)
        for key, value in fields.items():
            assert list(np.ravel(getattr(found, key))) == list(np.ravel(value)), key
    assert PGSegVisionConfig.from_pretrained(tmp_path).to_dict() == config.vision_config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone_config": {"model_type": "resnext9000"}}, "model_type 'resnext9000'"),
        ({"backbone_config": {"hidden_size": 8}}, "model_type None"),
        ({"backbone_config": "dinov2"}, "backbone_config is 'dinov2'"),
        (backbone_fields(patch_size=16), "patch_size is 16, expected 8, the stride of the .* stage3, stage5"),
        (backbone_fields(patch_size=4), "patch_size is 4, expected 8"),
        (backbone_fields(num_channels=1), "num_channels is 1, .*backbone_config is 3"),
        ({"backbone_config": {"model_type": "clip"}}, "CLIPConfig"),
    ],
)
def test_backbones_that_are_none_or_do_not_fit_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        PGSegVisionModel(PGSegVisionConfig(**fields))


@pytest.mark.parametrize(("name", "factor"), [("dinov2", 2), ("pvt_v2", 0.5)])
def test_a_patch_size_that_is_not_the_backbones_stride_is_refused(name, factor):
    stride = BACKBONES[name][1]
    other = int(factor * stride)
    model = tiny_backbone_model(name, vision={"patch_size": other, "image_size": 8 * stride})
    with pytest.raises(ValueError, match=f"patch_size is {other}.* about {stride}"):
        model.get_image_features(pixel_values=torch.zeros(1, 3, 8 * stride, 16 * stride))


# Precision, attention, export


@pytest.mark.parametrize("name", ["efficientnet_lite", "swin"])
@torch.no_grad()
def test_bfloat16(tmp_path, name):
    model = tiny_backbone_model(name, std=0.1)
    model.save_pretrained(tmp_path)
    pixels = tiny_images(2, 32, 32)
    expected = model.get_image_features(pixels).grouping
    for half in (PGSegModel.from_pretrained(tmp_path, dtype=torch.bfloat16), model.to(torch.bfloat16)):
        assert {parameter.dtype for parameter in half.vision_model.parameters()} == {torch.bfloat16}
        output = half.get_image_features(pixels)
        assert output.segment_embeds.dtype == torch.bfloat16
        assert (output.grouping.float() - expected).abs().max() < 0.1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["dinov2", "convnextv2"])
@torch.no_grad()
def test_attention_can_be_chosen_whatever_the_backbone_can_do(tmp_path, name, implementation):
    model = tiny_backbone_model(name)
    pixels = tiny_images(2, 32, 32)
    expected = model.get_image_features(pixels).grouping
    model.save_pretrained(tmp_path)
    loaded = PGSegModel.from_pretrained(tmp_path, attn_implementation=implementation)
    model.set_attn_implementation("eager" if implementation == "sdpa" else "sdpa")
    model.set_attn_implementation(implementation)
    for each in (loaded, model):
        assert each.vision_model.config._attn_implementation == implementation
        assert each.text_model.config._attn_implementation == implementation
        torch.testing.assert_close(each.get_image_features(pixels).grouping, expected, rtol=1e-4, atol=1e-5)
        assert isinstance(backbone_of(each), type(AutoBackbone.from_config(backbone_of(each).config)))
        of_backbone = implementation if name == "dinov2" else "eager"
        assert backbone_of(each).config._attn_implementation == of_backbone


def test_attention_can_be_chosen_by_part():
    model = tiny_backbone_model("dinov2")
    assert backbone_of(model).config._attn_implementation == "sdpa"
    by_part = {"": "eager", "backbone_config": "sdpa"}
    model.set_attn_implementation({"": "eager", "vision_config": by_part, "text_config": "sdpa"})
    parts = (model.vision_model, model.text_model, backbone_of(model))
    assert [part.config._attn_implementation for part in parts] == ["eager", "sdpa", "sdpa"]


def test_an_attention_that_the_backbone_or_nothing_can_do_leaves_it_as_it_was():
    model = tiny_backbone_model("swin")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="no_such_attention"):
        model.set_attn_implementation("no_such_attention")
    assert model.vision_model.config._attn_implementation == "flex_attention"
    assert backbone_of(model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["efficientnet_lite", "dinov2"])
@torch.no_grad()
def test_exported_programs_equal_the_model_at_other_sizes(name):
    model = tiny_backbone_model(name)
    program = export_image_encoder(model).module()
    for batch, height, width in ((1, 64, 64), (3, 99, 70)):
        pixels = tiny_images(batch, height, width)
        features = model.get_image_features(pixels)
        expected = (features.pooler_output, features.segment_embeds, features.grouping)
        torch.testing.assert_close(program(pixels), expected, rtol=1e-4, atol=1e-5)


# Code saved with the weights


_USE_SAVED_CODE = """
import torch
from transformers import AutoModel

torch.set_num_threads(1)
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
backbone = model.vision_model.embeddings.patch_embeddings.backbone
assert type(backbone).__name__ == "EfficientNetLiteBackbone"
assert all(type(part).__module__.startswith("transformers_modules.") for part in (model, backbone))
with torch.no_grad():
    torch.save(model(**torch.load(f"{folder}/inputs.pt")).logits_per_image, f"{folder}/logits.pt")
assert "pgseg_hf" not in sys.modules
"""


@pytest.mark.slow
def test_saved_code_works_where_the_package_is_not_installed(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    model = tiny_backbone_model()
    model.save_pretrained(folder)
    torch.save(inputs_of(), folder / "inputs.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program = [sys.executable, "-c", WITHOUT_THE_PACKAGE + _USE_SAVED_CODE, str(folder)]
    run = subprocess.run(program, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(folder / "logits.pt"), model(**inputs_of()).logits_per_image)
