"""Models with a few thousand weights (except for CLIP's token embeddings), and inputs for them."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pgseg_hf.configuration_pgseg import PGSegConfig
from pgseg_hf.modeling_pgseg import PGSegModel
from pgseg_hf.scoring import WindowScores
from pgseg_hf.variants import NPR_VARIANTS

VARIANTS = pytest.mark.parametrize("variant", NPR_VARIANTS)
PATCHES = {"vision_config": {"segment_source": "patches"}}
BOS, EOS = 48, 49
CONTEXT = 12
# Fields of the text tower of `tiny_config`.
TEXT_FIELDS = {
    "vocab_size": EOS + 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
# `model_config` of settings files: 32 pixels, with CLIP's tokenizer.
TINY_FIELDS: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "depths": [1, 1, 1],
        "num_group_tokens": [6, 4, 0],
        "num_output_groups": [6, 4, 0],
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "projection_dim": 8,
    "projection_intermediate_dim": 24,
}
# For `tiny_config(text_config=CLIP_TEXT)`: a text tower that accepts the tokens of CLIP's tokenizer.
CLIP_TEXT = {
    "vocab_size": 49_408,
    "max_position_embeddings": 77,
    "bos_token_id": 49_406,
    "eos_token_id": 49_407,
    "pad_token_id": 49_407,
}

# First lines of a program that runs as if the package were not installed.
WITHOUT_THE_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pgseg_hf":
            raise ModuleNotFoundError("pgseg_hf is not installed here", name=name)

sys.meta_path.insert(0, Absent())
"""


def tiny_config(
    text_config: dict | None = None, vision_config: dict | None = None, **kwargs: Any
) -> PGSegConfig:
    """Patches of 4 pixels, 4 x 4 of them at 16 pixels, 6 and then 4 groups, 8 joint dimensions, no stochastic depth."""
    vision = {
        **TINY_FIELDS["vision_config"],
        "image_size": 16,
        "patch_size": 4,
        "prototype_projection_dim": 24,
        "drop_path_rate": 0.0,
    }
    fields = {"projection_dim": 8, "projection_intermediate_dim": 24}
    return PGSegConfig.paper(
        text_config=TEXT_FIELDS | (text_config or {}),
        vision_config=vision | (vision_config or {}),
        **(fields | kwargs),
    )


def tiny_model(seed: int = 0, std: float = 0.3, **kwargs: Any) -> PGSegModel:
    """A model with random weights, in evaluation mode; `std` is large enough that everything has an effect."""
    torch.manual_seed(seed)
    model = PGSegModel(tiny_config(**kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit_scale" not in name:
                offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(offset + std * torch.randn_like(parameter))
    return model


def make_photo(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    """Coloured rectangles under noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (height, width, 3))
    for _ in range(6):
        top, left = rng.integers(0, height), rng.integers(0, width)
        pixels[top : top + height // 2, left : left + width // 2] += rng.integers(0, 190, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tiny_images(batch: int = 2, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def tiny_texts(count: int = 2, words: int | list[int] = 5, seed: int = 0) -> Tensor:
    """Token ids [count, CONTEXT] of texts of `words` random words each, padded with the end token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [words] * count if isinstance(words, int) else words
    ids = torch.full((count, CONTEXT), EOS)
    ids[:, 0] = BOS
    for row, length in enumerate(lengths):
        ids[row, 1 : 1 + length] = torch.randint(0, BOS, (length,), generator=generator)
    return ids


def mask_of(ids: Tensor) -> Tensor:
    """The attention mask of these texts, up to the first end token."""
    return ((ids == EOS).cumsum(1) <= 1).long()


def without_noise(model: PGSegModel) -> PGSegModel:
    """Turns Gumbel noise in training off, so that two runs can be compared."""
    for stage in model.vision_model.encoder.stages:
        if stage.downsample is not None:
            stage.downsample.assign.sample_noise = torch.zeros_like
    return model


def with_fixed_statistics(model: PGSegModel) -> PGSegModel:
    """Puts the model in training mode, with BatchNorm using its running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    return model


def inputs_of(batch=3, **kwargs):
    return {"input_ids": tiny_texts(batch), "pixel_values": tiny_images(batch)} | kwargs


def prototype_buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "prototypes" in name}


def moved(model, before):
    return {
        name for name, buffer in prototype_buffers(model).items() if not torch.equal(buffer, before[name])
    }


def assert_same_tensors(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == theirs.state_dict()[name].dtype, name
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def dense(window: WindowScores) -> Tensor:
    """The scores of each pixel of a window, [N, H, W] or [N + 1, H, W]."""
    return window.reader(range(window.scores.shape[1]))(slice(None))
