"""Without prototypes the model equals Transformers' GroupViT: the same tensors give the same outputs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TEXT_FIELDS, TINY_FIELDS, assert_same_tensors, mask_of, tiny_texts
from transformers import CLIPTextConfig, CLIPTextModel, GroupViTConfig, GroupViTModel

from pgseg_hf import PGSegModel
from pgseg_hf.groupvit import config_from_groupvit

VISION = TINY_FIELDS["vision_config"] | {"depths": [2, 1, 1], "patch_size": 4}
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
        text_config=TEXT_FIELDS,
        vision_config=VISION | SIZES[size],
        projection_dim=24,
        projection_intermediate_dim=40,
    )


def groupvit_model(size: str = "tiny") -> GroupViTModel:
    """Random weights that all have an effect: none is 0 or 1, as many are before training."""
    torch.manual_seed(0)
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


def images(model: GroupViTModel, count: int) -> torch.Tensor:
    config = model.config.vision_config
    return torch.randn(count, config.num_channels, config.image_size, config.image_size, dtype=model.dtype)


@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),
    [("tiny", torch.float32, 2e-6), *((size, torch.float64, 1e-12) for size in SIZES)],
)
@torch.no_grad()
def test_same_numbers(size, dtype, tolerance):
    theirs = groupvit_model(size).to(dtype)
    ours = same_model(theirs)
    pixels, ids = images(theirs, 3), tiny_texts(4, words=[1, 3, 5, 10])
    words = {"input_ids": ids, "attention_mask": mask_of(ids)}
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
        ours = PGSegModel.from_groupvit(str(tmp_path), npr_variant=variant, image_prototype_weight=0.5)
    assert (ours.config.npr_variant, ours.config.image_prototype_weight) == (variant, 0.5)
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


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    groupvit_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("variant", ["none", "corrected"])
def test_warm_start_leaves_out_what_means_of_patches_have_no_use_for(checkpoint, variant):
    vision = {"segment_source": "patches"}
    model = PGSegModel.from_groupvit(str(checkpoint), npr_variant=variant, vision_config=vision)
    last = "vision_model.encoder.stages.1.downsample."
    parts = ("assign.v_proj", "assign.proj", "norm_new_x", "mlp_channels.fc1", "mlp_channels.fc2")
    assert set(load_file(checkpoint / "model.safetensors")) - set(model.state_dict()) == {
        f"{last}{part}.{kind}" for part in parts for kind in ("weight", "bias")
    }
    model.save_pretrained(checkpoint / "ours")
    assert_same_tensors(PGSegModel.from_pretrained(checkpoint / "ours"), model)


TENSOR = "vision_model.encoder.stages.0.group_token"


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[TENSOR]
    save_file(tensors, folder / "model.safetensors")


def of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "checkpoint"),
        (lambda folder: (folder / "config.json").unlink(), "checkpoint"),
        (lambda folder: (folder / "model.safetensors").unlink(), "checkpoint"),
        (lambda folder: shutil.copy(folder / "model.safetensors", folder / "config.json"), "checkpoint"),
        (
            lambda folder: CLIPTextModel(CLIPTextConfig(**TEXT_FIELDS)).save_pretrained(folder),
            "'clip_text_model'",
        ),
        (without_a_tensor, TENSOR),
        (of_another_size, "vision_model"),
    ],
)
def test_warm_start_refuses_what_is_no_groupvit(tmp_path, change, message):
    folder = tmp_path / "checkpoint"
    groupvit_model().save_pretrained(folder)
    change(folder)
    with pytest.raises(ValueError, match=message):
        PGSegModel.from_groupvit(str(folder))
