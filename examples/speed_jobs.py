"""The models and jobs that `benchmark_speed.py` measures."""

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from speed_measuring import Job
from torch import Tensor
from transformers import GroupViTConfig, GroupViTModel

from pgseg_hf import PGSegModel, SegmentationOptions, Segmenter, default_tokenizer
from pgseg_hf.groupvit import config_from_groupvit
from pgseg_hf.image_processing_pil_pgseg import PGSegImageProcessorPil
from pgseg_hf.processing_pgseg import PGSegProcessor
from pgseg_hf.prototypes import estimate_prototypes, prototype_loss
from pgseg_hf.quantization import PGSegInt8Config, PGSegInt8Quantizer

GROUPVIT, VARIANTS = "groupvit", ("none", "corrected", "released")
CHECKPOINTED = "corrected, gradient checkpointing"
CONTEXT = 77


@dataclass(frozen=True)
class Scale:
    """The sizes of the models and their inputs.

    images: (pixels per side, batch) of the image encoder.
    training_batches: batches of the training step; on a CPU, the last is also the unit for larger ones.
    photo: width and height; its short side is resized to `short_side`, which is also the side of a window.
    labels: small and large number of labels.
    large_photo, large_labels: sizes for peak memory.
    prototype_batch: batch of the prototype row.
    matmul, cuda_matmul: side of the matrices that measure the machine's rate.
    curve_*: values along the curves.
    """

    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)
    images: tuple[tuple[int, int], ...] = ((224, 8), (448, 1))
    training_batches: tuple[int, ...] = (8, 32)
    photo: tuple[int, int] = (640, 480)
    short_side: int = 448
    labels: tuple[int, int] = (20, 171)
    large_photo: tuple[int, int] = (4000, 3000)
    large_labels: int = 1000
    prototype_batch: int = 1024
    matmul: int = 2048
    cuda_matmul: int = 8192
    curve_sizes: tuple[int, ...] = (224, 320, 448, 640)
    curve_batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    curve_labels: tuple[int, ...] = (5, 20, 59, 171, 847)
    cuda_batches: tuple[int, ...] = (256, 1024, 4096)


FULL = Scale()
QUICK = Scale(
    vision={
        **{"hidden_size": 32, "intermediate_size": 64, "depths": [1, 1, 1], "num_hidden_layers": 3},
        **{"num_group_tokens": [8, 8, 0], "num_output_groups": [8, 8, 0], "num_attention_heads": 2},
        **{"image_size": 32, "patch_size": 8},
    },
    text={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    heads={"projection_dim": 8, "projection_intermediate_dim": 24},
    images=((32, 4), (64, 1)),
    training_batches=(4, 8),
    photo=(64, 48),
    short_side=48,
    labels=(3, 7),
    large_photo=(80, 60),
    large_labels=9,
    prototype_batch=16,
    matmul=64,
    cuda_matmul=64,
    curve_sizes=(32, 64),
    curve_batches=(1, 2),
    curve_labels=(2, 6),
    cuda_batches=(4,),
)
SCALES = {"full": FULL, "quick": QUICK}


def build_model(scale: Scale, contender: str, image_size: int | None = None) -> Any:
    """A model with random weights in evaluation mode. GroupViT accepts only one image size, `image_size`."""
    sized = {} if image_size is None or contender != GROUPVIT else {"image_size": image_size}
    config = GroupViTConfig(
        vision_config=scale.vision | sized, text_config=scale.text, **scale.heads, output_segmentation=False
    )
    torch.manual_seed(0)
    if contender == GROUPVIT:
        return GroupViTModel(config).eval()
    return PGSegModel(config_from_groupvit(config, npr_variant=contender)).eval()


def quantized(model: PGSegModel) -> PGSegModel:
    """Converts the model to int8 in place."""
    PGSegInt8Quantizer(PGSegInt8Config(), pre_quantized=False).postprocess_model(model)
    return model


def pixels(size: int, batch: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def encoding_job(model: Any, pixel_values: Tensor, compiled: bool = False) -> Job:
    """The image tower in evaluation mode; if `compiled`, the first run compiles it."""
    tower, on_device = model.vision_model, pixel_values.to(model.device, model.dtype)
    if compiled:
        tower = torch.compile(tower)

    def job() -> None:
        with torch.no_grad():
            tower(on_device)

    return job


def training_job(scale: Scale, contender: str, pixel_values: Tensor) -> Job:
    """A training step of a contender on the images' device, with one caption per image: forward, loss, backward and
    AdamW; on CUDA under autocast."""
    checkpointing = contender == CHECKPOINTED
    device, batch = pixel_values.device, len(pixel_values)
    model = build_model(scale, "corrected" if checkpointing else contender).to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 40_000, (batch, CONTEXT), generator=generator)
    words[:, 0] = 49_406
    length = torch.randint(6, 20, (batch, 1), generator=generator)
    words[torch.arange(CONTEXT) >= length] = 49_407
    inputs = {
        "input_ids": words.to(device),
        "attention_mask": (torch.arange(CONTEXT) <= length).long().to(device),
        "pixel_values": pixel_values.to(device),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # without temporary tensors

    def job() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return job


def prototype_job(scale: Scale, device: str) -> Job:
    """Prototype estimation, matching and losses of the corrected variant for both stages and the texts, with the
    backward pass to the group centres."""
    vision = build_model(scale, "corrected").config.vision_config
    batch, width = scale.prototype_batch, vision.hidden_size
    groups, last = vision.num_output_groups[:2]
    patches = (vision.image_size // vision.patch_size) ** 2
    torch.manual_seed(0)
    parts = [
        (patches, groups, width),
        (groups, last, width),
        (16, last, scale.heads.get("projection_dim", 256)),
    ]
    inputs = []
    for length, count, channels in parts:
        tokens = torch.randn(batch, length, channels, device=device)
        seeds = torch.nn.functional.normalize(torch.randn(1, count, channels, device=device), dim=-1)
        centers = torch.randn(batch, count, channels, device=device, requires_grad=True)
        inputs.append((tokens, seeds, centers))
    scale_of_loss = torch.tensor(10.0, device=device)

    def job() -> None:
        for tokens, seeds, centers in inputs:
            prototypes = estimate_prototypes(tokens, seeds, vision.num_prototype_iterations).prototypes
            prototype_loss(centers, prototypes, scale_of_loss)[0].backward()
            centers.grad = None

    return job


class PhotoJobs:
    """Jobs that segment a photo, from the file's bytes to the label map, or run its encoder passes alone."""

    def __init__(self, scale: Scale, device: str, size: tuple[int, int] | None = None):
        model = build_model(scale, "corrected").to(device)
        side = scale.short_side
        image_processor = PGSegImageProcessorPil(size={"shortest_edge": side})
        processor = PGSegProcessor(
            image_processor, default_tokenizer(), window_size=side, window_stride=side // 2
        )
        self.segmenter = Segmenter(model, processor, SegmentationOptions())
        self.photo = _photo(*(size or scale.photo))
        windows: list[Tensor] = []
        encode = model.get_image_features
        model.get_image_features = lambda pixel_values: windows.append(pixel_values) or encode(pixel_values)
        self.segmenter(self.photo, self.names(1))
        model.get_image_features = encode
        self.windows = windows

    @staticmethod
    def names(count: int) -> list[str]:
        return [f"thing number {index}" for index in range(count)]

    def encoder_passes(self) -> None:
        with torch.inference_mode():
            for batch in self.windows:
                self.segmenter.model.get_image_features(batch)

    def segmentation(self, labels: int) -> Job:
        names = self.names(labels)
        self.segmenter.class_embeddings(names)  # prompts are encoded once and cached
        return lambda: self.segmenter(self.photo, names)


def _photo(width: int, height: int) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()
