import importlib

import numpy as np
import pytest
import torch
from tiny_backbones import tiny_backbone_model
from tiny_models import CONTEXT, mask_of, tiny_model, tiny_texts

from pgseg_hf.export import export_image_encoder, export_onnx, export_text_encoder

# At least 64 pixels, as a backbone needs.
SIZES = [(1, 64, 64), (3, 70, 99)]


def texts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tiny_texts(count, words=[index % (CONTEXT - 2) for index in range(count)])
    return ids, mask_of(ids)


@pytest.mark.parametrize("variant", ["released", "corrected"])
def test_exported_programs_equal_the_model_at_other_sizes(variant):
    model = tiny_model(npr_variant=variant).train()
    image_program, text_program = export_image_encoder(model).module(), export_text_encoder(model).module()
    assert all(module.training for module in model.modules())
    model.eval()
    for shape in SIZES:
        pixels = torch.randn(shape[0], 3, *shape[1:])
        with torch.no_grad():
            features = model.get_image_features(pixels)
            exported = image_program(pixels)
        expected = (features.pooler_output, features.segment_embeds, features.grouping)
        torch.testing.assert_close(exported, expected, rtol=1e-5, atol=1e-6)
    ids, mask = texts(3)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        exported = text_program(ids, mask)
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
        torch.testing.assert_close(exported, model.get_text_features(ids, mask).pooler_output)


def test_only_float32_is_exported(tmp_path):
    with pytest.raises(ValueError, match=r"the model is in float16, expected float32: load it with dtype"):
        export_onnx(tiny_model().half(), tmp_path / "onnx")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder of ONNX files, and the exported model."""
    pytest.importorskip("onnxscript")
    model = tiny_backbone_model()
    return export_onnx(model, tmp_path_factory.mktemp("plain") / "onnx"), model


@pytest.mark.slow
def test_onnx_in_int8_is_near_the_model_and_smaller(plain, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, model = plain
    int8 = export_onnx(model, tmp_path / "int8", dtype="int8")
    image, text = (onnxruntime.InferenceSession(int8 / f"{name}_encoder.onnx") for name in ("image", "text"))
    kinds = {
        node.op_type for node in importlib.import_module("onnx").load(int8 / "image_encoder.onnx").graph.node
    }
    assert "MatMulInteger" in kinds
    ids, mask = texts(3)
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features, wanted = model.get_image_features(pixels), model.get_text_features(ids, mask).pooler_output
    pooled, _, grouping = image.run(None, {"pixel_values": pixels.numpy()})
    (got,) = text.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    for ours, expected in ((pooled, features.pooler_output), (got, wanted)):
        assert torch.nn.functional.cosine_similarity(torch.from_numpy(ours), expected).min() > 0.98
    assert (grouping.argmax(1) == features.grouping.numpy().argmax(1)).mean() > 0.9
    assert (int8 / "text_encoder.onnx").stat().st_size < (folder / "text_encoder.onnx").stat().st_size


@pytest.mark.slow
def test_onnx_files_equal_the_model_in_onnxruntime(plain):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, model = plain
    image, text = (
        onnxruntime.InferenceSession(folder / f"{name}_encoder.onnx") for name in ("image", "text")
    )
    assert [axis.shape for axis in (*image.get_inputs(), *image.get_outputs())] == [
        ["batch", 3, "height", "width"],
        ["batch", 8],
        ["batch", 4, 8],
        ["batch", 4, "patch_rows", "patch_columns"],
    ]
    assert [axis.shape for axis in (*text.get_inputs(), *text.get_outputs())] == [
        ["texts", CONTEXT],
        ["texts", CONTEXT],
        ["texts", 8],
    ]
    for shape in SIZES:
        pixels = torch.randn(shape[0], 3, *shape[1:])
        with torch.no_grad():
            features = model.get_image_features(pixels)
        expected = (features.pooler_output, features.segment_embeds, features.grouping)
        for got, wanted in zip(image.run(None, {"pixel_values": pixels.numpy()}), expected, strict=True):
            np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4 * float(wanted.abs().max()))
    ids, mask = texts(3)
    with torch.no_grad():
        wanted = model.get_text_features(ids, mask).pooler_output
    (got,) = text.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5 * float(wanted.abs().max()))
