"""Conversion of released checkpoints: every tensor of the full model, unsafe and broken files, wrong overrides."""

import json
import os
import pickle
import resource
import zipfile
from collections import OrderedDict, defaultdict
from enum import Enum
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pgseg_hf.conversion import (
    convert_released,
    convert_state_dict,
    infer_config,
    read_overrides,
    read_released_checkpoint,
    rename_key,
    write_converted,
)
from pgseg_hf.modeling_pgseg import PGSegModel
from pgseg_hf.torch_files import read_state_dict

GOLDENS = Path(__file__).parent / "goldens"
OVERRIDES = {"vision_config": {"num_attention_heads": 3}, "text_config": {"num_attention_heads": 1}}
STATE = load_file(GOLDENS / "released_tiny_state_dict.safetensors")


@pytest.fixture
def state():
    return dict(STATE)


def assert_tensors_of(path, expected=STATE):
    tensors = read_released_checkpoint(path)
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


# The full model


def full_keys():
    return json.loads((GOLDENS / "released_full_keys.json").read_text())


def test_every_tensor_of_the_full_model_has_its_place():
    recorded = full_keys()
    released = {
        name: torch.empty(entry["shape"], device="meta") for name, entry in recorded["state_dict"].items()
    }
    assert len(released) == 437
    converted, unknown = convert_state_dict(released)
    assert unknown == []
    config = infer_config(converted)
    with torch.device("meta"):
        model = PGSegModel(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.items()} == expected
    kinds = {"param": dict(model.named_parameters()), "buffer": dict(model.named_buffers())}
    for name, entry in recorded["state_dict"].items():
        for ours in convert_state_dict({name: released[name]})[0]:
            assert ours in kinds[entry["kind"]], name


def test_parameters_of_the_full_model_are_as_many_but_for_those_dropped():
    recorded = full_keys()
    dropped = [name for name in recorded["state_dict"] if rename_key(name) is None]
    assert all(name.startswith("img_encoder.mapping_text.") for name in dropped)
    without = sum(
        torch.Size(recorded["state_dict"][name]["shape"]).numel()
        for name in dropped
        if recorded["state_dict"][name]["kind"] == "param"
    )
    released = {
        name: torch.empty(entry["shape"], device="meta") for name, entry in recorded["state_dict"].items()
    }
    with torch.device("meta"):
        model = PGSegModel(infer_config(convert_state_dict(released)[0]))
    assert recorded["n_parameters"] == 64_677_394
    assert sum(parameter.numel() for parameter in model.parameters()) == recorded["n_parameters"] - without


def test_configuration_of_the_full_model_is_the_default_one():
    released = {
        name: torch.empty(entry["shape"], device="meta") for name, entry in full_keys()["state_dict"].items()
    }
    config = infer_config(convert_state_dict(released)[0])
    default = type(config)(
        npr_variant="released",
        num_text_prototypes=8,
        vision_config={"drop_path_rate": 0.0, "prototype_projection_dim": 4096},
    )
    assert json.loads(config.to_json_string()) == json.loads(default.to_json_string())


@given(st.lists(st.integers(1, 400), min_size=2, max_size=2), st.sampled_from([24, 48, 56, 98, 384]))
def test_hidden_widths_survive_being_told_as_ratios(hidden, width):
    converted, _ = convert_state_dict(STATE)
    converted["vision_model.embeddings.patch_embeddings.projection.weight"] = torch.empty(width, 3, 4, 4)
    stage = "vision_model.encoder.stages.0.downsample."
    converted[f"{stage}mlp_inter.fc1.weight"] = torch.empty(hidden[0], 12)
    converted[f"{stage}mlp_channels.fc1.weight"] = torch.empty(hidden[1], width)
    config = infer_config(converted, {"vision_config": {"num_attention_heads": 1}})
    assert [int(ratio * width) for ratio in config.vision_config.assign_mlp_ratio] == hidden


# What a conversion reports


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
    # Prototypes and the like are never held in less than float32.
    assert model.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(model.logit_scale.detach(), state["logit_scale"].to(model.dtype))


NEEDED = sorted(name for name in STATE if rename_key(name) is not None)


def ours(name):
    """Our names of a released tensor."""
    return list(convert_state_dict({name: STATE[name]})[0])


def test_a_missing_tensor_is_named():
    for name in NEEDED:
        with pytest.raises(ValueError) as error:
            convert_released({key: value for key, value in STATE.items() if key != name}, OVERRIDES)
        assert any(part in str(error.value) for part in ours(name)), name


@settings(max_examples=60)
@given(st.sampled_from(NEEDED), st.lists(st.integers(0, 9), max_size=4))
def test_wrong_shapes_are_named(name, shape):
    if torch.zeros(shape).squeeze().shape == STATE[name].squeeze().shape:
        return
    with pytest.raises(ValueError) as error:
        convert_released(STATE | {name: torch.zeros(shape)}, OVERRIDES)
    # A shape that tells the architecture shows in the other tensors.
    assert "shape" in str(error.value) or "is " in str(error.value)


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
        ({"number_of_heads": 3}, "number_of_heads is no field of PGSegConfig"),
        ({"vision_config": {"heads": 3}}, "vision_config.heads is no field of PGSegVisionConfig"),
        ({"text_config": {"heads": 3}}, "text_config.heads is no field of PGSegTextConfig"),
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


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "3", "\x00"])
def test_overrides_file_that_is_no_object(tmp_path, content):
    path = tmp_path / "overrides.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"overrides\.json"):
        read_overrides(path)
    with pytest.raises(ValueError, match=r"none\.json"):
        read_overrides(tmp_path / "none.json")


def test_overrides_file(tmp_path):
    path = tmp_path / "overrides.json"
    path.write_text(json.dumps(OVERRIDES))
    assert read_overrides(path) == OVERRIDES


# Files: nothing in them is executed, and the tensors come out all the same


class Touch:
    """Unpickling it the usual way makes a file, by os.system."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Call:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Node:
    """Keeps its state the way OmegaConf's nodes do."""

    def __init__(self, **content):
        self.__dict__["_content"] = content
        self.__dict__["_metadata"] = {"element_type": dict[str, int], "ref_type": Path}

    def __getstate__(self):
        return dict(self.__dict__)

    def __setstate__(self, state):
        raise AssertionError("executed")


class Settings(dict):
    def __setitem__(self, key, value):
        if key == "armed":
            raise AssertionError("executed")
        super().__setitem__(key, value)

    def __setstate__(self, state):
        raise AssertionError("executed")

    def __reduce_ex__(self, protocol):
        return Settings, (), {"a": 1}, None, iter(self.items())


class Steps(list):
    def append(self, value):
        raise AssertionError("executed")

    def extend(self, values):
        raise AssertionError("executed")


class Outer:
    class Inner:
        def __init__(self):
            self.value = 3


class Mode(Enum):
    ON = 1


def settings_node():
    armed = Settings()
    dict.__setitem__(armed, "armed", True)
    return armed


def pickled_content(folder):
    marker = folder / "executed"
    evil = [
        Touch(marker),
        Call(exec, f"open({str(marker)!r}, 'w')"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(Path.touch, marker),
        Call(torch.save, {}, str(marker)),
        Call(os.mkdir, str(marker)),
    ]
    steps = Steps()
    list.extend(steps, [1, 2])
    return {
        "model": OrderedDict(STATE),
        "optimizer": {
            "state": {0: {"exp_avg": torch.zeros(2)}},
            "groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}],
        },
        "config": Node(model=Node(type="PGSeg"), list=[Node(), Mode.ON, {1, 2}, defaultdict(list, a=[1])]),
        "metrics": {"best": 49.0, Mode.ON: Outer.Inner(), "steps": steps, "settings": settings_node()},
        "amp": torch.amp.GradScaler("cpu").state_dict(),
        "evil": evil,
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_in_a_file_is_executed(tmp_path, zipped, protocol):
    path = tmp_path / "released.pth"
    torch.save(
        pickled_content(tmp_path), path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol
    )
    assert_tensors_of(path)
    assert not (tmp_path / "executed").exists()


def test_the_unsafe_file_is_unsafe(tmp_path):
    # The usual way of loading executes what the tests above put into the file.
    path = tmp_path / "released.pth"
    torch.save({"evil": Touch(tmp_path / "executed")}, path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()


def test_objects_among_the_tensors_are_left_out(tmp_path):
    path = tmp_path / "released.pth"
    marker = tmp_path / "executed"
    torch.save({"model": {**STATE, "hook": Touch(marker), 3: torch.zeros(1), "epoch": 29}}, path)
    assert_tensors_of(path)
    assert not marker.exists()


def test_parameters_and_data_parallel_names(tmp_path):
    path = tmp_path / "released.pth"
    torch.save({f"module.{name}": torch.nn.Parameter(value, False) for name, value in STATE.items()}, path)
    assert_tensors_of(path)


def file_of(program, path):
    """A checkpoint file around a hand-written pickle, one that torch.save would not write."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return path


def test_rebuilding_functions_cannot_be_changed(tmp_path):
    # BUILD with a (state, slots) pair sets attributes of whatever is on the stack, here of a function of torch.
    function = torch._utils._rebuild_tensor_v2
    before = function.__defaults__, dict(function.__dict__)
    program = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
        b"N}X\x0c\x00\x00\x00__defaults__K\x05\x85s\x86b}X\x05\x00\x00\x00modelK\x01s."
    )
    with pytest.raises(ValueError):
        read_released_checkpoint(file_of(program, tmp_path / "raw.pth"))
    assert (function.__defaults__, dict(function.__dict__)) == before


def test_torchscript_files_are_refused(tmp_path):
    # torch.load hands them to torch.jit.load, which runs the code of their modules' __setstate__.
    class Scripted(torch.nn.Module):
        def forward(self, x):
            return x

    path = tmp_path / "scripted.pth"
    torch.jit.save(torch.jit.script(Scripted()), path)
    with pytest.raises(ValueError, match=r"scripted\.pth.*TorchScript"):
        read_released_checkpoint(path)


def other_checkpoint():
    return {"model": {"visual.conv1.weight": torch.zeros(2), "text.weight": torch.zeros(2)}}


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "html": lambda path: path.write_text("<!DOCTYPE html><title>Quota exceeded</title>"),
    "pickle of a string": lambda path: path.write_bytes(pickle.dumps("hello")),
    "list": lambda path: torch.save([1, 2, 3], path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "no tensors": lambda path: torch.save({"model": {}}, path),
    "model is an object": lambda path: torch.save({"model": Node()}, path),
    "another model": lambda path: torch.save(other_checkpoint(), path),
    "safetensors": lambda path: save_file(STATE, path),
    "another zip": lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "a"),
}
CAUSES = {"empty": "holds nothing", "text": "git lfs pull", "html": "is a web page"}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_files_that_are_no_pgseg_checkpoint(tmp_path, kind):
    path = tmp_path / "file.pth"
    BROKEN[kind](path)
    with pytest.raises(ValueError, match=rf"file\.pth.*{CAUSES.get(kind, '')}"):
        convert_released(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_truncated_files(tmp_path, share, zipped):
    path = tmp_path / "file.pth"
    torch.save({"model": STATE}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"file\.pth"):
        convert_released(path)


def hostile_state(kind):
    stage = "img_encoder.layers.0.blocks.0.norm1.weight"
    changed = dict(STATE)
    if kind == "stage":
        changed[stage.replace("layers.0", "layers.900000000")] = changed[stage]
    elif kind == "block":
        changed[stage.replace("blocks.0", "blocks.90000000")] = changed[stage]
    elif kind == "text layer":
        name = next(name for name in changed if "resblocks.0." in name)
        changed[name.replace("resblocks.0", "resblocks.90000000")] = changed[name]
    elif kind == "stride":
        changed[stage] = torch.zeros(1).expand(10**6, 10**6)
    elif kind == "shared":
        changed |= {
            f"img_encoder.mapping_text.{n}": changed["text_encoder.token_embedding.weight"]
            for n in range(999)
        }
    elif kind == "width":
        changed["img_encoder.patch_embed.proj.weight"] = torch.zeros(10**6, 1, 1, 1)
    return changed


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("stage", r"stages\.900000000\.\.\.\. but none of number 3"),
        ("block", r"90000000.* none of number"),
        ("text layer", r"90000000.* none of number"),
        ("stride", r"a tensor of shape \[1000000, 1000000\] has 4 of its 4,000,000,000,000 bytes"),
        ("shared", r"bytes for tensors of .*, which share them"),
        ("width", r"has shape|missing"),
    ],
)
def test_a_small_file_does_not_make_a_large_model(tmp_path, kind, message, zipped):
    path = tmp_path / "file.pth"
    torch.save({"model": hostile_state(kind)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=message):
        convert_released(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_storage_is_no_larger_than_its_part_of_the_file(tmp_path, zipped):
    path = tmp_path / "file.pth"
    torch.save({"model": {"x": torch.zeros(7)}}, path, _use_new_zipfile_serialization=zipped)
    # The number of floats, as 1 byte and as 4.
    content = path.read_bytes()
    parts = {path.name: content}
    if zipped:
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name) for name in file.namelist()}
    changed = {name: part.replace(b"K\x07", b"J\xff\xff\xff\x0f") for name, part in parts.items()}
    assert changed != parts
    path.write_bytes(changed.get(path.name, b""))
    if zipped:
        with zipfile.ZipFile(path, "w") as file:
            for name, part in changed.items():
                file.writestr(name, part)
    with pytest.raises(ValueError, match="a storage of 268435455 numbers is larger than the file"):
        read_state_dict(path)


def test_memory_that_a_pickle_asks_for(tmp_path):
    # LONG_BINPUT: the unpickler in C makes room for all objects up to this number.
    program = b"\x80\x02}r\xff\xff\xff\x7f."
    with pytest.raises(ValueError, match="no PGSeg checkpoint"):
        convert_released(file_of(program, tmp_path / "raw.pth"))


def test_packed_files(tmp_path):
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(10**7))
    with pytest.raises(ValueError, match="its parts are larger than the file"):
        read_state_dict(path)


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


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth"):
        convert_released(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="is no file"):
        convert_released(tmp_path)


@pytest.mark.parametrize(
    "content", [{}, {"weight": torch.zeros(2)}, {3: torch.zeros(2)}, {"model": {}}, other_checkpoint()]
)
def test_bare_state_dicts_that_are_no_pgseg(content):
    with pytest.raises(ValueError, match="no PGSeg checkpoint"):
        convert_released(content)


def test_a_state_dict_may_be_wrapped_as_in_the_file(state):
    bare, wrapped = (
        convert_released(content, OVERRIDES)[0] for content in (state, {"model": state, "epoch": 1})
    )
    assert all(torch.equal(tensor, wrapped.state_dict()[name]) for name, tensor in bare.state_dict().items())
