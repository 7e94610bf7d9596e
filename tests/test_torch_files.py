"""Untrusted `.pth` files: no code in them is executed, and broken or hostile files are refused by name."""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict, defaultdict
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pgseg_hf.conversion import convert_released, read_released_checkpoint
from pgseg_hf.torch_files import read_state_dict

STATE = load_file(Path(__file__).parent / "goldens/released_tiny_state_dict.safetensors")
ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def assert_tensors_of(path, expected=STATE):
    tensors = read_released_checkpoint(path)
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


class Touch:
    """Creates a file through `os.system` when it is unpickled in the usual way."""

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
@ZIPPED
def test_nothing_in_a_file_is_executed(tmp_path, zipped, protocol):
    path = tmp_path / "released.pth"
    torch.save(
        pickled_content(tmp_path), path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol
    )
    assert_tensors_of(path)
    assert not (tmp_path / "executed").exists()


def test_the_unsafe_file_is_unsafe(tmp_path):
    # A plain torch.load executes the code that the tests above put into the file.
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
    """A checkpoint file with a hand-written pickle that torch.save would not write."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return path


def test_rebuilding_functions_cannot_be_changed(tmp_path):
    # BUILD with a (state, slots) pair sets attributes of the object on the stack, here of a torch function.
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
    # torch.load passes them to torch.jit.load, which runs the __setstate__ code of their modules.
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
CAUSES = {"empty": "is empty", "text": "git lfs pull", "html": "is a web page"}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_files_that_are_no_pgseg_checkpoint(tmp_path, kind):
    path = tmp_path / "file.pth"
    BROKEN[kind](path)
    with pytest.raises(ValueError, match=rf"file\.pth.*{CAUSES.get(kind, '')}"):
        convert_released(path)


@ZIPPED
@pytest.mark.parametrize("share", [0.01, 0.9, 0.999])
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


@ZIPPED
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("stage", r"stages\.900000000\.\.\.\. but none with number 3"),
        ("block", r"90000000.* none with number"),
        ("text layer", r"90000000.* none with number"),
        ("stride", r"a tensor of shape \[1000000, 1000000\] has 4 bytes, expected 4,000,000,000,000"),
        ("shared", r"bytes for tensors of .* share memory"),
        ("width", r"has shape|missing"),
    ],
)
def test_a_small_file_does_not_make_a_large_model(tmp_path, kind, message, zipped):
    path = tmp_path / "file.pth"
    torch.save({"model": hostile_state(kind)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=message):
        convert_released(path)


@ZIPPED
@pytest.mark.parametrize("count", [2**28 - 1, -1])
def test_a_storage_is_no_larger_than_its_part_of_the_file(tmp_path, zipped, count):
    path = tmp_path / "file.pth"
    torch.save({"model": {"x": torch.zeros(7)}}, path, _use_new_zipfile_serialization=zipped)
    # The number of floats, written as 1 byte and as 4 bytes.
    content = path.read_bytes()
    parts = {path.name: content}
    if zipped:
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name) for name in file.namelist()}
    changed = {name: part.replace(b"K\x07", struct.pack("<ci", b"J", count)) for name, part in parts.items()}
    assert changed != parts
    path.write_bytes(changed.get(path.name, b""))
    if zipped:
        with zipfile.ZipFile(path, "w") as file:
            for name, part in changed.items():
                file.writestr(name, part)
    with pytest.raises(ValueError, match=f"a storage of {count} numbers is larger than the file"):
        read_state_dict(path)


def test_memory_that_a_pickle_asks_for(tmp_path):
    # LONG_BINPUT: the unpickler in C allocates memory for all objects up to this number.
    program = b"\x80\x02}r\xff\xff\xff\x7f."
    with pytest.raises(ValueError, match="not a PGSeg checkpoint"):
        convert_released(file_of(program, tmp_path / "raw.pth"))


@pytest.mark.parametrize("name", ["none.pth", "."])
def test_no_file(tmp_path, name):
    with pytest.raises(ValueError, match="is not a file"):
        convert_released(tmp_path / name)


def test_packed_files(tmp_path):
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", os.urandom(10**4) + bytes(10**4))
    with pytest.raises(ValueError, match="its parts are larger than the file"):
        read_state_dict(path)
