"""Int8 models: close to float32, small, saved and loaded, and not trainable."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_backbones import tiny_backbone_model
from tiny_models import tiny_model, tiny_texts
from transformers.activations import GELUActivation

from pgseg_hf import PGSegModel, PGSegVisionModel, int8, load_segmenter
from pgseg_hf.cli import main
from pgseg_hf.export import export_onnx
from pgseg_hf.int8 import Int8Linear, QuantizedInput, rounded
from pgseg_hf.quantization import Float16Conv2d, PGSegInt8Config
from pgseg_hf.run_records import model_record

IMAGES = Path(__file__).parent.parent / "examples" / "images"
LABELS = {
    "horses": ["horse", "person", "sand", "sea", "rock"],
    "dog": ["dog", "ground", "tree"],
    "pizza": ["pizza", "person", "bottle", "table"],
    "bus": ["bus", "car", "road", "tree", "grass"],
    "pagoda": ["building", "tree", "sky", "road", "person"],
    "green-jacket": ["jacket", "pants", "shoe", "hair", "building", "road", "tree"],
    "blue-sweater": ["sweater", "hair", "shoe", "skirt", "road"],
}


def num_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def quantised(model: PGSegModel, folder: Path, **kwargs) -> PGSegModel:
    model.save_pretrained(folder)
    return PGSegModel.from_pretrained(folder, quantization_config=PGSegInt8Config(**kwargs))


@pytest.fixture(scope="module")
def int8_segmenter():
    return load_segmenter(dtype="int8")


def test_masks_of_the_example_photos_agree_with_float32(shipped_segmenter, int8_segmenter):
    same = total = 0
    for name, labels in LABELS.items():
        maps = [
            segmenter(IMAGES / f"{name}.jpg", labels).label_map
            for segmenter in (shipped_segmenter, int8_segmenter)
        ]
        same, total = same + int((maps[0] == maps[1]).sum()), total + maps[0].size
    assert same / total >= 0.98


def test_weights_take_a_third_of_float32(shipped_segmenter, int8_segmenter):
    assert num_bytes(int8_segmenter.model) / num_bytes(shipped_segmenter.model) < 0.34


def test_what_is_saved_is_loaded_to_the_bit(int8_segmenter, tmp_path):
    int8_segmenter.model.save_pretrained(tmp_path)
    int8_segmenter.processor.save_pretrained(tmp_path)
    again = load_segmenter(tmp_path)
    expected, loaded = int8_segmenter.model.state_dict(), again.model.state_dict()
    assert expected.keys() == loaded.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == loaded[name].dtype and torch.equal(tensor, loaded[name]), name
    json.dumps(model_record(again))
    result, other = (segmenter(IMAGES / "dog.jpg", LABELS["dog"]) for segmenter in (int8_segmenter, again))
    np.testing.assert_array_equal(result.label_map, other.label_map)


@pytest.mark.parametrize(("name", "kind"), [("dinov2", Int8Linear), ("efficientnet_lite", Float16Conv2d)])
def test_backbones(name, kind, tmp_path):
    model = tiny_backbone_model(name)
    int8 = quantised(model, tmp_path)
    assert any(isinstance(module, kind) for module in int8.vision_model.embeddings.modules())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, got = (one.get_image_features(pixels).pooler_output for one in (model, int8))
    assert torch.nn.functional.cosine_similarity(expected, got).min() > 0.98


def test_modules_that_are_named_stay_as_they_are(tmp_path):
    int8 = quantised(tiny_model(), tmp_path, modules_to_not_convert=["text_model", "vision_model.encoder"])
    plain = [name for name, module in int8.named_modules() if type(module) is torch.nn.Linear]
    assert plain and all(name.startswith(("text_model.", "vision_model.encoder.")) for name in plain)


def test_modules_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has 'text_modle', which PGSegModel .* vision_model, "):
        quantised(tiny_model(), tmp_path, modules_to_not_convert=["vision_model.encoder", "text_modle"])


def test_another_dtype_is_refused(tmp_path):
    int8 = quantised(tiny_model(), tmp_path)
    for move in (int8.bfloat16, lambda: int8.to("cpu", torch.float64)):
        with pytest.raises(ValueError, match=r"dtype is torch\.(bfloat16|float64), but .* int8"):
            move()
    assert int8.to("cpu", torch.float32) is int8


def test_rounding_is_within_half_a_step_and_keeps_rows_of_zeros():
    weight = torch.randn(5, 7)
    weight[2] = 0
    values, scale = rounded(weight)
    assert values.dtype == torch.int8 and values.abs().amax(1).tolist() == [127, 127, 0, 127, 127]
    assert ((values * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_is_rounded_within_half_a_step(dtype, at_once, monkeypatch):
    if at_once and not int8._rounds_at_once():
        pytest.skip("torch has no quantised tensors any more")
    monkeypatch.setattr(int8, "_rounds_at_once", lambda: at_once)
    for offset in (-9.0, 0.0, 9.0):
        x = (torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) + offset).to(dtype)
        values, scale, zero, kept = QuantizedInput.of(x)
        assert values.dtype == torch.uint8 and kept == dtype
        assert (((values.float() - zero) * scale - x.float()).abs() <= scale * 0.501).all()
        assert torch.equal(QuantizedInput.of(x.T.contiguous().T).values, values)
    with pytest.raises(ValueError, match=r"nan .* nan, expected finite"):
        QuantizedInput.of(torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("has_onednn", [True, False])
def test_either_kernel_multiplies_activates_and_keeps_its_weight(has_onednn, monkeypatch):
    if has_onednn and not int8._has_onednn():
        pytest.skip("torch has no int8 product of oneDNN here")
    monkeypatch.setattr(int8, "_has_onednn", lambda: has_onednn)
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(24, 10), torch.randn(3, 5, 24)
    layer = Int8Linear(plain).eval()
    before = layer.state_dict()["weight"].clone()
    layer.pack()
    assert layer.weight is None and torch.equal(layer.state_dict()["weight"], before)
    for activation in (GELUActivation(), torch.nn.ReLU(), None):
        expected = plain(x) if activation is None else activation(plain(x))
        assert (layer(x, activation) - expected).abs().max() < 0.03
        assert layer(x.bfloat16(), activation).dtype == torch.bfloat16


@pytest.mark.parametrize("has_onednn", [True, False])
def test_packed_weights_are_copied_pickled_and_loaded(has_onednn, monkeypatch):
    if has_onednn and not int8._has_onednn():
        pytest.skip("torch has no int8 product of oneDNN here")
    monkeypatch.setattr(int8, "_has_onednn", lambda: has_onednn)
    layer, other = (Int8Linear(torch.nn.Linear(24, 10)).eval() for _ in range(2))
    x = torch.randn(3, 24)
    layer.pack()
    other.pack()
    assert not layer.zeros.any() and layer.zeros.shape == (10,)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same.weight is None and torch.equal(same(x), layer(x))


@pytest.mark.parametrize("kept", [[], ["vision_model.embeddings"], ["vision_model"]])
def test_a_tower_is_loaded_alone_from_the_folder_of_both_and_from_its_own(kept, tmp_path):
    both = quantised(tiny_model(), tmp_path / "float", modules_to_not_convert=kept)
    both.save_pretrained(tmp_path / "both")
    both.vision_model.save_pretrained(tmp_path / "vision")
    pixels = torch.randn(2, 3, 32, 32)
    expected = both.vision_model(pixels).pooler_output
    for name in ("both", "vision"):
        tower = PGSegVisionModel.from_pretrained(tmp_path / name)
        states = tower(pixels, output_hidden_states=True).hidden_states
        assert not tower.random_weights and {state.dtype for state in states} == {torch.float32}
        torch.testing.assert_close(tower(pixels).pooler_output, expected)


def test_training_is_refused(tmp_path):
    int8 = quantised(tiny_model(), tmp_path)
    assert not any(module.training for module in int8.modules()) and not int8.hf_quantizer.is_trainable
    with pytest.raises(ValueError, match=r"in int8.*cannot be trained.*float32"):
        int8.train()(input_ids=tiny_texts(2), pixel_values=torch.randn(2, 3, 16, 16), return_loss=True)


def test_other_devices_are_refused(tiny_folder):
    with pytest.raises(ValueError, match=r"device_map.*expected the CPU"):
        PGSegModel.from_pretrained(tiny_folder, device_map="meta", quantization_config=PGSegInt8Config())
    with pytest.raises(ValueError, match=r"device is 'meta', expected 'cpu'"):
        load_segmenter(tiny_folder, device="meta", dtype="int8")


def test_the_command_line_takes_int8(tmp_path, int8_segmenter):
    mask = tmp_path / "mask.png"
    options = ["--dtype", "int8", "--output", str(tmp_path / "overlay.png"), "--mask", str(mask)]
    assert main(["segment", str(IMAGES / "dog.jpg"), "--labels", ",".join(LABELS["dog"]), *options]) == 0
    assert mask.is_file()


def test_onnx_refuses_what_is_int8_already(int8_segmenter, tmp_path):
    with pytest.raises(ValueError, match=r"in int8, expected float32"):
        export_onnx(int8_segmenter.model, tmp_path / "onnx", dtype="int8")
