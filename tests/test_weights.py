"""Unusable weights, and models that are restored after evaluation."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import pipeline

from pgseg_hf import PGSegModel, PGSegVisionModel, load_segmenter
from pgseg_hf.weights import evaluation_mode, refuse_bad_weights, what_is_wrong_with

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 20983636\n"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "checkpoint")


def test_a_whole_folder_has_nothing_wrong(folder, tmp_path):
    assert what_is_wrong_with(folder) is None
    assert what_is_wrong_with("a/name-on-the-hub") is None
    with pytest.raises(OSError, match=r"has no config\.json: copy the whole folder"):
        PGSegModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: POINTER, "git-lfs pointer.*git lfs pull"),
        (lambda data: b"<!DOCTYPE html><html>sign in</html>", "is a web page"),
        (lambda data: b"", r"is empty \(0 bytes\)"),
        (lambda data: data[:1000], "truncated, 1,000 of"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: b"PK" + bytes(1000), "not a safetensors file"),
    ],
)
def test_the_likely_cause_is_named(folder, change, reason):
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    for model in (PGSegModel, PGSegVisionModel):
        with pytest.raises(OSError, match=f"model.safetensors.*{reason}"):
            model.from_pretrained(folder)


def test_the_command_line_and_the_pipeline_say_it_too(folder):
    (folder / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match="git lfs pull"):
        load_segmenter(str(folder))
    with pytest.raises((OSError, ValueError), match="git lfs pull"):
        pipeline(model=str(folder))


def test_values_that_are_no_numbers_are_refused(folder):
    model = PGSegModel.from_pretrained(folder)
    refuse_bad_weights(model, "it")
    with torch.no_grad():
        model.visual_projection[0].weight[0, 0] = torch.nan
        model.visual_projection[1].running_var[0] = torch.inf
    model.save_pretrained(folder)
    message = (
        r"NaN or infinite values in visual_projection.0.weight, visual_projection.1.running_var: training"
    )
    for load in (load_segmenter, lambda name: pipeline(model=name)):
        with pytest.raises(ValueError, match=message):
            load(str(folder))


def test_a_model_that_was_never_loaded_is_refused(folder):
    with torch.device("meta"):
        model = PGSegModel(PGSegModel.config_class.from_pretrained(folder))
    with pytest.raises(ValueError, match=r"has no values in .* and \d+ more tensors: load the model"):
        refuse_bad_weights(model, "it")


def test_evaluation_leaves_a_model_as_it_was():
    model = tiny_model(npr_variant="released", freeze_text=True).train()
    model.visual_projection[1].eval()
    model.text_projection.requires_grad_(True)
    model.text_projection[1].train()
    state = torch.get_rng_state()

    def whole_state():
        modes = [module.training for module in model.modules()]
        return modes, [p.requires_grad for p in model.parameters()], copy.deepcopy(model.state_dict())

    before = whole_state()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        torch.rand(1)
        for buffer in model.buffers():
            buffer.zero_()
    after = whole_state()
    assert after[:2] == before[:2] and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(after[2][name], tensor) for name, tensor in before[2].items())


def test_random_weights_are_refused_until_they_are_trained(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.0.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for load in (load_segmenter, lambda name: pipeline(model=name)):
        with pytest.raises(ValueError, match=r"these tensors are missing: text_projection\.0\.weight"):
            load(str(folder))
    model = PGSegModel.from_pretrained(folder)
    assert model.random_weights
    refuse_bad_weights(model.train(), "it")
