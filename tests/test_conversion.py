"""Conversion of released checkpoints: tensors of the full model, reports, wrong shapes and overrides."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pgseg_hf.configuration_pgseg import PGSegConfig
from pgseg_hf.conversion import (
    convert_released,
    convert_state_dict,
    infer_config,
    read_overrides,
    rename,
    write_converted,
)
from pgseg_hf.modeling_pgseg import PGSegModel

GOLDENS = Path(__file__).parent / "goldens"
OVERRIDES = {"vision_config": {"num_attention_heads": 3}, "text_config": {"num_attention_heads": 1}}
STATE = load_file(GOLDENS / "released_tiny_state_dict.safetensors")


@pytest.fixture
def state():
    return dict(STATE)


# The full model


@pytest.fixture(scope="module")
def full():
    """Dtypes and shapes of the tensors of the full model."""
    return json.loads((GOLDENS / "released_full_keys.json").read_text())


@pytest.fixture(scope="module")
def full_state(full):
    return {name: torch.empty(entry["shape"], device="meta") for name, entry in full["state_dict"].items()}


@pytest.fixture(scope="module")
def full_model(full_state):
    with torch.device("meta"):
        return PGSegModel(infer_config(convert_state_dict(full_state)))


def test_every_tensor_of_the_full_model_has_its_place(full, full_state, full_model):
    assert len(full_state) == 437
    expected = {name: tensor.shape for name, tensor in full_model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in convert_state_dict(full_state).items()} == expected
    kinds = {"param": dict(full_model.named_parameters()), "buffer": dict(full_model.named_buffers())}
    for name, entry in full["state_dict"].items():
        assert all(ours in kinds[entry["kind"]] for ours in rename(name)), name


def test_configuration_of_the_full_model_is_the_default_one(full_model):
    default = PGSegConfig(
        npr_variant="released",
        num_text_prototypes=8,
        vision_config={"drop_path_rate": 0.0, "prototype_projection_dim": 4096},
    )
    assert json.loads(full_model.config.to_json_string()) == json.loads(default.to_json_string())


@given(st.lists(st.integers(1, 400), min_size=2, max_size=2), st.sampled_from([24, 48, 56, 98, 384]))
def test_hidden_widths_survive_being_told_as_ratios(hidden, width):
    converted = convert_state_dict(STATE)
    converted["vision_model.embeddings.patch_embeddings.projection.weight"] = torch.empty(width, 3, 4, 4)
    stage = "vision_model.encoder.stages.0.downsample."
    converted[f"{stage}mlp_inter.fc1.weight"] = torch.empty(hidden[0], 12)
    converted[f"{stage}mlp_channels.fc1.weight"] = torch.empty(hidden[1], width)
    config = infer_config(converted, {"vision_config": {"num_attention_heads": 1}})
    assert [int(ratio * width) for ratio in config.vision_config.assign_mlp_ratio] == hidden


# Reports of a conversion


def test_report_of_a_plain_conversion(state):
    model, report = convert_released(state, OVERRIDES)
    assert (report.unknown, report.missing) == ([], [])
    assert len(report.dropped) == 9
    assert all("mapping_text" in name for name in report.dropped)
    assert not model.training
    assert model.config.npr_variant == "released"
    assert model.dtype == torch.float32


def test_unknown_tensors_are_reported_and_left_out(state):
    state["img_encoder.extra.weight"] = torch.zeros(3)
    state["img_encoder.layers.2.group_token.more"] = torch.zeros(3)
    _, report = convert_released(state, OVERRIDES)
    assert sorted(report.unknown) == ["img_encoder.extra.weight", "img_encoder.layers.2.group_token.more"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_precision_of_the_checkpoint(state, dtype):
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model, _ = convert_released(state, OVERRIDES)
    # Some tensors, such as prototypes, always stay in at least float32.
    assert model.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(model.logit_scale.detach(), state["logit_scale"].to(model.dtype))


NEEDED = sorted(name for name in STATE if rename(name))


def test_a_missing_tensor_is_named():
    for name in NEEDED[::7]:
        with pytest.raises(ValueError) as error:
            convert_released({key: value for key, value in STATE.items() if key != name}, OVERRIDES)
        assert any(part in str(error.value) for part in rename(name)), name


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("img_encoder.norm.weight", [7], r"vision_model.layernorm.weight has shape \[7\], expected \[24\]"),
        ("img_encoder.layers.0.blocks.0.attn.qkv.bias", [71], r"blocks.0.attn.qkv.bias has shape \[71\]"),
        ("img_encoder.layers.0.blocks.0.attn.qkv.bias", [], r"blocks.0.attn.qkv.bias has shape \[\]"),
        (
            "img_encoder.patch_embed.proj.weight",
            [24, 3],
            r"patch_embeddings.projection.weight has shape \[24, 3\]",
        ),
        ("img_encoder.pos_embed", [1, 60, 24], r"position_embeddings has shape \[1, 60, 24\]"),
        ("text_encoder.token_embedding.weight", [], r"token_embedding.weight has shape \[\]"),
    ],
)
def test_a_wrong_shape_is_named(state, name, shape, message):
    state[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        convert_released(state, OVERRIDES)


# Overrides


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"number_of_heads": 3}, "number_of_heads is not a field of PGSegConfig"),
        ({"vision_config": {"heads": 3}}, "vision_config.heads is not a field of PGSegVisionConfig"),
        ({"text_config": {"heads": 3}}, "text_config.heads is not a field of PGSegTextConfig"),
        ({"vision_config": 3}, "vision_config is 3"),
        ({"vision_config": {"num_attention_heads": 5}}, "hidden_size is 24.*num_attention_heads = 5"),
        ({"vision_config": {"num_attention_heads": "three"}}, "'num_attention_heads' expected int, got str"),
        ({"vision_config": {"depths": [2, 1, 2]}}, "num_hidden_layers|missing"),
        ({"vision_config": {"hidden_size": 48}}, r"has shape \[.*\], expected \[48"),
        ({"rejection_threshold": 2.0}, "rejection_threshold is 2.0"),
        ({"npr_variant": "paper"}, "npr_variant is 'paper'"),
    ],
)
def test_wrong_overrides_are_named(state, overrides, message):
    with pytest.raises(ValueError, match=message):
        convert_released(state, overrides)


def test_overrides_reach_the_configuration(state):
    overrides = {
        "vision_config": {"num_attention_heads": 6, "drop_path_rate": 0.1},
        "text_config": {"num_attention_heads": 2},
        "image_prototype_weight": 0.5,
    }
    config = convert_released(state, overrides)[0].config
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (6, 2)
    assert (config.vision_config.drop_path_rate, config.image_prototype_weight) == (0.1, 0.5)


def test_overrides_file(tmp_path):
    path = tmp_path / "overrides.json"
    path.write_text(json.dumps(OVERRIDES))
    assert read_overrides(path) == OVERRIDES
    for content in ("{", "[1, 2]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"overrides\.json"):
            read_overrides(path)


def test_a_disk_that_is_full(tmp_path, state):
    model, _ = convert_released(state, OVERRIDES)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
        with pytest.raises(ValueError, match=r"converted cannot be written: .*choose another output folder"):
            write_converted(model, tmp_path / "converted")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(tmp_path) == []


def test_a_state_dict_may_be_wrapped_as_in_the_file(state):
    bare, wrapped = (
        convert_released(content, OVERRIDES)[0] for content in (state, {"model": state, "epoch": 1})
    )
    assert all(torch.equal(tensor, wrapped.state_dict()[name]) for name, tensor in bare.state_dict().items())
    with pytest.raises(ValueError, match="not a PGSeg checkpoint"):
        convert_released({"model": {"visual.conv1.weight": torch.zeros(2)}, 3: torch.zeros(2)})
