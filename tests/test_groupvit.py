"""Without prototypes the model is transformers' GroupViT: the same tensors give the same numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, GroupViTConfig, GroupViTModel, GroupViTVisionModel

from pgseg_hf import PGSegModel, PGSegVisionModel
from pgseg_hf.groupvit import config_from_groupvit

TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 58,
    "eos_token_id": 59,
    "pad_token_id": 59,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depths": [2, 1, 1],
    "num_group_tokens": [16, 8, 0],
    "num_output_groups": [16, 8, 0],
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
# Fields of the vision configuration that differ from VISION.
SIZES = {
    "tiny": {},
    "deeper": {
        "depths": [6, 3, 3],
        "patch_size": 2,
        "num_group_tokens": [64, 8, 0],
        "num_output_groups": [64, 8, 8],
    },
    "one grouping stage": {"depths": [2, 2], "num_group_tokens": [8, 0], "num_output_groups": [8, 0]},
    "three grouping stages": {
        "depths": [1, 1, 1, 1],
        "num_group_tokens": [16, 8, 4, 0],
        "num_output_groups": [16, 8, 4, 0],
    },
    "grouping last": {"depths": [1, 1], "num_group_tokens": [16, 8], "num_output_groups": [16, 8]},
    "other details": {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-3,
        "assign_eps": 0.5,
        "assign_mlp_ratio": [1, 2],
        "num_channels": 4,
    },
}


def groupvit_config(size: str) -> GroupViTConfig:
    return GroupViTConfig(
        text_config=TEXT,
        vision_config=VISION | SIZES[size],
        projection_dim=24,
        projection_intermediate_dim=40,
    )


def groupvit_model(size: str = "tiny", seed: int = 0) -> GroupViTModel:
    """Random weights that all have an effect: none is 0 or 1 as at the start of training."""
    torch.manual_seed(seed)
    model = GroupViTModel(groupvit_config(size)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.copy_(0.5 + torch.rand_like(tensor))
            elif tensor.is_floating_point() and "logit_scale" not in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def same_model(theirs: GroupViTModel, attn_implementation: str = "eager") -> PGSegModel:
    ours = PGSegModel(config_from_groupvit(theirs.config, npr_variant="none")).eval()
    ours.vision_model.set_attn_implementation(attn_implementation)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(theirs.dtype)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Equal to within `tolerance` of the largest entry."""
    assert ours.shape == theirs.shape
    difference = ((ours.double() - theirs.double()).abs().max() / theirs.abs().max()).item()
    assert difference <= tolerance


def texts(count: int, length: int = 10) -> dict[str, torch.Tensor]:
    """Texts of different lengths, padded with the end token."""
    ids = torch.randint(0, 58, (count, length))
    ids[:, 0] = 58
    lengths = torch.randint(3, length + 1, (count,))
    padding = torch.arange(length) >= lengths[:, None] - 1
    mask = torch.arange(length) < lengths[:, None]
    return {"input_ids": ids.masked_fill(padding, 59), "attention_mask": mask.long()}


def images(model: GroupViTModel, count: int) -> torch.Tensor:
    config = model.config.vision_config
    return torch.randn(count, config.num_channels, config.image_size, config.image_size, dtype=model.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_same_numbers(size, seed, dtype, tolerance):
    theirs = groupvit_model(size, seed).to(dtype)
    ours = same_model(theirs)
    pixels, words = images(theirs, 3), texts(4)
    flags = {"output_attentions": True, "output_hidden_states": True}
    vision, expected = (model.vision_model(pixels, **flags) for model in (ours, theirs))
    for name in ("last_hidden_state", "pooler_output"):
        assert_same(vision[name], expected[name], tolerance)
    assert len(vision.hidden_states) == len(expected.hidden_states)
    for assignment, theirs_of_stage in zip(vision.attentions, expected.attentions, strict=True):
        assert assignment.shape == theirs_of_stage.shape
    joint, joint_expected = (model(pixel_values=pixels, **words) for model in (ours, theirs))
    # The heads and the norm add their own rounding.
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        assert_same(joint[name], joint_expected[name], 3 * tolerance)
    for features in ("get_image_features", "get_text_features"):
        inputs = words if "text" in features else {"pixel_values": pixels}
        result, expected = (getattr(model, features)(**inputs).pooler_output for model in (ours, theirs))
        assert_same(result, expected, 3 * tolerance)


@torch.no_grad()
def test_other_attention_kernels_stay_close():
    theirs = groupvit_model()
    pixels = images(theirs, 3)
    ours = same_model(theirs, "sdpa").vision_model(pixels).last_hidden_state
    assert_same(ours, theirs.vision_model(pixels).last_hidden_state, 1e-5)


@torch.no_grad()
def test_vision_models_alone_agree():
    config = groupvit_config("tiny")
    theirs = GroupViTVisionModel(config.vision_config).eval().double()
    ours = PGSegVisionModel(config_from_groupvit(config, npr_variant="none").vision_config).eval().double()
    ours.load_state_dict(theirs.vision_model.state_dict())
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_same(ours(pixels).last_hidden_state, theirs(pixels).last_hidden_state, 1e-12)


@torch.no_grad()
def test_prototypes_that_map_to_zero_leave_groupvit(tmp_path):
    theirs = groupvit_model()
    theirs.save_pretrained(tmp_path)
    ours = PGSegModel.from_groupvit(str(tmp_path))
    pixels = images(theirs, 3)
    expected = theirs.vision_model(pixels).last_hidden_state
    assert (ours.vision_model(pixels).last_hidden_state - expected).abs().max() > 1e-3
    for name, tensor in ours.state_dict().items():
        if name not in theirs.state_dict():
            tensor.zero_()
    assert_same(ours.vision_model(pixels).last_hidden_state, expected, 2e-6)


@pytest.mark.parametrize("variant", ["none", "released", "corrected"])
def test_warm_start_takes_over_every_tensor(tmp_path, caplog, variant):
    theirs = groupvit_model()
    theirs.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        ours = PGSegModel.from_groupvit(str(tmp_path), npr_variant=variant)
    assert ours.config.npr_variant == variant
    assert not ours.training
    tensors = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensors.pop(name), tensor), name
    assert all(".npr." in name or "prototype" in name for name in tensors)
    assert bool(tensors) == (variant != "none")
    (message,) = [record.message for record in caplog.records if "newly initialised" in record.message]
    named = message.split("newly initialised: ")[1].rstrip(".").split(", ")
    assert sorted(named) == sorted(tensors) or (variant == "none" and named == ["nothing"])


def test_warm_start_takes_a_half_precision_checkpoint(tmp_path):
    theirs = groupvit_model().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = PGSegModel.from_groupvit(tmp_path)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.visual_projection[0].weight, theirs.visual_projection[0].weight.float())


def test_warm_start_refuses_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        PGSegModel.from_groupvit(str(tmp_path / "nowhere"))


def test_warm_start_refuses_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=tmp_path.name):
        PGSegModel.from_groupvit(str(tmp_path))


def test_warm_start_refuses_another_kind_of_model(tmp_path):
    CLIPTextModel(CLIPTextConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'clip_text_model' checkpoint, expected 'groupvit'"):
        PGSegModel.from_groupvit(str(tmp_path))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    groupvit_model().save_pretrained(tmp_path)
    return tmp_path


def test_warm_start_refuses_a_checkpoint_without_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=checkpoint.name):
        PGSegModel.from_groupvit(str(checkpoint))


def test_warm_start_refuses_a_checkpoint_that_lacks_a_tensor(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    missing = "vision_model.encoder.stages.0.group_token"
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != missing},
        checkpoint / "model.safetensors",
    )
    with pytest.raises(ValueError, match=missing):
        PGSegModel.from_groupvit(str(checkpoint))


def test_warm_start_refuses_weights_of_another_size(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 64
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vision_model"):
        PGSegModel.from_groupvit(str(checkpoint))


def test_warm_start_refuses_a_broken_configuration(checkpoint):
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "config.json")
    with pytest.raises(ValueError, match=checkpoint.name):
        PGSegModel.from_groupvit(str(checkpoint))
