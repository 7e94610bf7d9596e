"""Loading checkpoints from good, broken and unsuitable folders."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pgseg_hf import load_segmenter


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="absent is not a folder"):
        load_segmenter(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="not a PGSeg checkpoint"):
        load_segmenter(str(tmp_path))


class Executed:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return type(self.marker).touch, (self.marker,)


def change_fields(file: Path, **fields) -> None:
    content = json.loads(file.read_text())
    content["vision_config"] |= fields
    file.write_text(json.dumps(content))


def drop_a_head(weights: Path) -> None:
    kept = {name: tensor for name, tensor in load_file(weights).items() if "visual_projection" not in name}
    save_file(kept, weights, metadata={"format": "pt"})


def name_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def bring_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Executed(folder / "executed"), protocol=2))


BREAKS = {
    "truncated": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "incomplete": lambda folder: drop_a_head(folder / "model.safetensors"),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "other shapes": lambda folder: change_fields(folder / "config.json", hidden_size=32),
    "other heads": lambda folder: change_fields(folder / "config.json", num_attention_heads=7),
    "empty index": name_no_weights,
    "pickle": bring_code,
    "nested": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "tokenizer of something else": lambda folder: (folder / "tokenizer.json").write_text(
        '{"model": {"type": "BPE"}}'
    ),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_checkpoints_are_refused(tiny_folder, tmp_path, kind):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "broken"))
    BREAKS[kind](folder)
    with pytest.raises(ValueError, match="broken"):
        load_segmenter(str(folder))
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_that_a_folder_names_is_neither_run_nor_asked_for(tiny_folder, tmp_path, monkeypatch, file):
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_folder, folder)
    content = json.loads((folder / file).read_text())
    classes = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor")
    content["auto_map"] = {**dict.fromkeys(classes, "foreign.Any"), "AutoTokenizer": ["foreign.Any", None]}
    content |= {"tokenizer_class": "Foreign"} if file == "tokenizer_config.json" else {}
    (folder / file).write_text(json.dumps(content))
    (folder / "foreign.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Any: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    try:
        load_segmenter(str(folder))
    except ValueError as error:
        assert "foreign is not a PGSeg checkpoint" in str(error)
    assert not (tmp_path / "executed").exists()
