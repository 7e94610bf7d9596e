"""Exports the two encoders with `torch.export` and ONNX, for any batch and image size."""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .files import folder_written_whole
from .modeling_pgseg import PGSegModel
from .weights import evaluation_mode

# Stride of the coarsest stage of most backbones, which is computed even if it is not used.
BACKBONE_STRIDE = 32

# Names of the dynamic axes; patches have their own grid.
ONNX_AXES = {
    "pixel_values": {0: "batch", 2: "height", 3: "width"},
    "image_embeds": {0: "batch"},
    "segment_embeds": {0: "batch"},
    "grouping": {0: "batch", 2: "patch_rows", 3: "patch_columns"},
    "input_ids": {0: "texts"},
    "attention_mask": {0: "texts"},
    "text_embeds": {0: "texts"},
}


class ImageEncoder(nn.Module):
    """Maps pixels [B, 3, H, W] to image embeddings [B, D], segment embeddings [B, K, D] (both not normalised) and the
    grouping [B, K, h, w]: all that segmentation needs from an image."""

    def __init__(self, model: PGSegModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.model.get_image_features(pixel_values)
        return features.pooler_output, features.segment_embeds, features.grouping


class TextEncoder(nn.Module):
    """Maps token ids and attention mask [N, T] to text embeddings [N, D], not normalised."""

    def __init__(self, model: PGSegModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.get_text_features(input_ids, attention_mask).pooler_output


def export_image_encoder(model: PGSegModel) -> torch.export.ExportedProgram:
    """Exports [`ImageEncoder`] with dynamic batch, height and width.

    Height and width must be at least two patches, and at least 64 pixels with a backbone. Not every backbone of
    Transformers can be exported for any size: EfficientNet-Lite, DINOv2, ConvNeXt and PVTv2 can, Swin cannot.
    """
    vision = model.config.vision_config
    unit = vision.patch_size if vision.backbone_config is None else max(vision.patch_size, BACKBONE_STRIDE)
    example = torch.zeros(
        2, vision.num_channels, 3 * unit + 1, 5 * unit + 2, dtype=model.dtype, device=model.device
    )
    sides = {2: torch.export.Dim("height", min=2 * unit), 3: torch.export.Dim("width", min=2 * unit)}
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1), **sides}}
    with torch.no_grad(), evaluation_mode(model):
        return torch.export.export(ImageEncoder(model), (example,), dynamic_shapes=shapes)


def export_text_encoder(model: PGSegModel) -> torch.export.ExportedProgram:
    """Exports [`TextEncoder`] with a dynamic number of texts, each padded to the full context length."""
    text = model.config.text_config
    ids = torch.full((2, text.max_position_embeddings), text.eos_token_id, device=model.device)
    shapes = {name: {0: torch.export.Dim("texts", min=1)} for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), evaluation_mode(model):
        return torch.export.export(TextEncoder(model), (ids, torch.ones_like(ids)), dynamic_shapes=shapes)


def export_onnx(
    model: PGSegModel, output: str | os.PathLike, dtype: Literal["float32", "int8"] = "float32"
) -> Path:
    """Exports both encoders to ONNX.

    Writes `image_encoder.onnx` and `text_encoder.onnx`, with the axes of `ONNX_AXES`, to a new folder. The folder
    appears only once both are complete. Needs the extra `export` (onnx, onnxruntime, onnxscript).

    Args:
        model: the model, on the CPU in float32.
        output: the folder to create.
        dtype: `"float32"`, or `"int8"` for onnxruntime's dynamic quantisation: 8-bit weights of linear layers and
            embeddings, and inputs of linear layers rounded in each call. Convolutions stay float32.

    Raises:
        ValueError: if the model has another dtype, `dtype` is unknown, or the folder is not empty or not writable.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "the model is in int8, expected float32: load it in float32 and pass dtype='int8' here."
        )
    if model.dtype != torch.float32:
        raise ValueError(
            f"the model is in {str(model.dtype).removeprefix('torch.')}, expected float32: load it with "
            'dtype="float32", or call model.float().'
        )
    if dtype not in ("float32", "int8"):
        raise ValueError(f"dtype is {dtype!r}, expected 'float32' or 'int8'.")
    with folder_written_whole(output) as folder:
        for name, program, outputs in (
            ("image_encoder", export_image_encoder(model), ["image_embeds", "segment_embeds", "grouping"]),
            ("text_encoder", export_text_encoder(model), ["text_embeds"]),
        ):
            onnx_program: Any = torch.onnx.export(program, dynamo=True, output_names=outputs, verbose=False)
            for value in (*onnx_program.model.graph.inputs, *onnx_program.model.graph.outputs):
                axes = ONNX_AXES[value.name]
                value.shape = type(value.shape)(axes.get(axis, size) for axis, size in enumerate(value.shape))
            path = folder / f"{name}.onnx"
            onnx_program.save(path, external_data=False)
            if dtype == "int8":
                _quantize_onnx(path)
    return Path(output)


def _quantize_onnx(path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The quantiser transposes a weight once per product that uses it, and the weights of the heads are used twice.
    model = onnx.load(path)
    weights = {weight.name: weight for weight in model.graph.initializer}
    turned = set()
    for node in model.graph.node:
        turns = [attribute for attribute in node.attribute if attribute.name == "transB" and attribute.i]
        if node.op_type != "Gemm" or not turns or node.input[1] not in weights:
            continue
        turns[0].i = 0
        if node.input[1] not in turned:
            turned.add(node.input[1])
            weight = weights[node.input[1]]
            values = onnx.numpy_helper.to_array(weight).T.copy()
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    model.graph.ClearField("value_info")  # it holds the shapes before the transposition
    onnx.save(model, path)
    quantize_dynamic(path, path, ["MatMul", "Gemm", "Gather"], per_channel=True, weight_type=QuantType.QInt8)
