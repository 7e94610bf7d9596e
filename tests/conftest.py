import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from pgseg_hf import (
    PGSegConfig,
    PGSegImageProcessorPil,
    PGSegModel,
    PGSegProcessor,
    Segmenter,
    default_tokenizer,
)

# No deadline: the first call of a torch function takes far longer than the next ones.
settings.register_profile("pgseg_hf", deadline=None)
settings.load_profile("pgseg_hf")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def tiny_config(**overrides) -> PGSegConfig:
    """A model of a few thousand parameters (but for the token embedding) that takes CLIP's tokens."""
    vision = dict(
        hidden_size=24,
        num_attention_heads=3,
        depths=[1, 1, 1],
        num_group_tokens=[12, 8, 0],
        num_output_groups=[12, 8, 0],
        image_size=64,
        patch_size=8,
        intermediate_size=48,
        prototype_projection_dim=16,
    )
    text = dict(hidden_size=16, num_attention_heads=1, num_hidden_layers=1, intermediate_size=32)
    vision.update(overrides.pop("vision_config", {}))
    text.update(overrides.pop("text_config", {}))
    defaults = dict(projection_dim=16, projection_intermediate_dim=24)
    return PGSegConfig(vision_config=vision, text_config=text, **{**defaults, **overrides})


@pytest.fixture(scope="session")
def tiny_segmenter() -> Segmenter:
    torch.manual_seed(0)
    model = PGSegModel(tiny_config()).eval()
    # Random weights see no difference between patches or between words; larger ones give maps of several labels.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim >= 2:
                parameter.mul_(6)
    image_processor = PGSegImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 256})
    processor = PGSegProcessor(image_processor, default_tokenizer(), window_size=64, window_stride=32)
    return Segmenter(model, processor)


@pytest.fixture(scope="session")
def tiny_folder(tiny_segmenter, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_segmenter.model.save_pretrained(folder)
    tiny_segmenter.processor.save_pretrained(folder)
    return str(folder)


def make_photo(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    """Coloured rectangles under noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (height, width, 3))
    for _ in range(6):
        top, left = rng.integers(0, height), rng.integers(0, width)
        pixels[top : top + height // 2, left : left + width // 2] += rng.integers(0, 190, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def photo() -> Image.Image:
    return make_photo()


@pytest.fixture
def photo_file(tmp_path, photo) -> str:
    path = tmp_path / "photo.png"
    photo.save(path)
    return str(path)
