import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from PIL import Image
from tiny_models import CLIP_TEXT, make_photo, tiny_model
from transformers.utils import logging

from pgseg_hf import PGSegImageProcessorPil, PGSegProcessor, Segmenter, default_tokenizer, load_segmenter
from pgseg_hf.variants import NPR_VARIANTS

# No deadline: the first call of a torch function takes far longer than the next ones.
settings.register_profile("pgseg_hf", deadline=None)
settings.load_profile("pgseg_hf")

# Threads do not speed up tiny tensors, and the workers of pytest-xdist would compete for the cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Checks that no test leaves folders with random names, as Gradio creates, in the temporary folder."""
    places = [Path(tempfile.gettempdir()), Path(tempfile.gettempdir(), "gradio")]

    def nameless() -> set[Path]:
        return {
            path for place in places for path in place.glob("*") if re.fullmatch("[0-9a-f]{40,}", path.name)
        }

    before = nameless()
    yield
    assert not nameless() - before


@pytest.fixture(autouse=True)
def warnings_are_shown() -> None:
    """Restores warnings after a test of `--quiet` in this process."""
    logging.set_verbosity_warning()
    logging.get_logger("pgseg_hf").setLevel(logging.NOTSET)
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def tiny_segmenter() -> Segmenter:
    model = tiny_model(text_config=CLIP_TEXT)
    image_processor = PGSegImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 256})
    processor = PGSegProcessor(image_processor, default_tokenizer(), window_size=64, window_stride=32)
    return Segmenter(model, processor)


@pytest.fixture(scope="session")
def shipped_segmenter() -> Segmenter:
    """The shipped checkpoint, for tests that need masks of several labels."""
    return load_segmenter()


@pytest.fixture(scope="session")
def street_photo() -> Image.Image:
    path = Path(__file__).parent.parent / "examples" / "images" / "green-jacket.jpg"
    return Image.open(path).convert("RGB").resize((96, 146))


@pytest.fixture(scope="session")
def tiny_folder(tiny_segmenter, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_segmenter.model.save_pretrained(folder)
    tiny_segmenter.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photo() -> Image.Image:
    return make_photo()


@pytest.fixture
def photo_file(tmp_path, photo) -> str:
    path = tmp_path / "photo.png"
    photo.save(path)
    return str(path)


@pytest.fixture(scope="module")
def models():
    return {variant: tiny_model(npr_variant=variant).double() for variant in NPR_VARIANTS}
