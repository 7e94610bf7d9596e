"""The feature cache: training reads the features that the backbone would compute."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import numbered_folder
from PIL import Image
from tiny_backbones import BACKBONES, tiny_backbone_model
from tiny_models import tiny_model

from pgseg_hf import default_tokenizer
from pgseg_hf.data.augmentation import AugmentationOptions
from pgseg_hf.data.sources import SourceSpec, open_source
from pgseg_hf.training.batches.collator import PGSegCollator
from pgseg_hf.training.batches.feature_cache import DONE, UNUSABLE, CacheOptions, cache_features
from pgseg_hf.training.batches.mixing import Draw, seeded
from pgseg_hf.training.batches.preparation import Preparation


@pytest.fixture
def source(tmp_path):
    return open_source(SourceSpec(path=numbered_folder(tmp_path / "data", 5)))


@pytest.fixture
def prepare():
    return Preparation(AugmentationOptions(image_size=32))


@pytest.fixture
def options(tmp_path):
    return CacheOptions(str(tmp_path / "cache"), views=2)


def test_views_are_the_backbones_features_of_crops(source, prepare, options):
    model = tiny_backbone_model().eval()
    (cached,) = cache_features([source], prepare, model, options)
    assert len(cached) == len(source)
    for index in range(len(source)):
        record = cached[index]
        assert record.captions == source[index].captions and len(record.views) == 2
        for view, features in enumerate(record.views):
            rng = seeded(Draw.VIEW, 0, 0, index, view)
            image, crop, _ = prepare.draw(source[index], rng)
            pixels = prepare.augmentation.crop_pixels(image, crop, rng)
            with torch.no_grad():
                expected = model.vision_model.embeddings.features(torch.from_numpy(pixels)[None])[0]
            np.testing.assert_allclose(features, expected.half().numpy(), rtol=2e-3, atol=2e-3)


def test_examples_carry_features_into_a_batch(source, prepare, options):
    (cached,) = cache_features([source], prepare, tiny_backbone_model().eval(), options)
    example = prepare(cached[0], np.random.default_rng(0))
    assert (
        example.pixel_values is None and example.labels == prepare(source[0], np.random.default_rng(0)).labels
    )
    batch = PGSegCollator(default_tokenizer())([example, example])
    assert "pixel_values" not in batch
    assert batch["backbone_features"].shape == (2, *example.backbone_features.shape)


def test_what_is_there_is_not_computed_again(source, prepare, options, monkeypatch):
    model = tiny_backbone_model().eval()
    (cached,) = cache_features([source], prepare, model, options)
    states = np.load(cached.folder / "states.npy", mmap_mode="r+")
    assert (states == DONE).all()
    states[3, 1] = 0  # as if the run had stopped before this view
    states.flush()
    seen = []
    draw = prepare.draw
    monkeypatch.setattr(prepare, "draw", lambda record, rng: seen.append(record.name) or draw(record, rng))
    cache_features([source], prepare, model, options)
    assert seen == [source[3].name]
    cache_features([source], prepare, model, options)
    assert len(seen) == 1


@pytest.mark.parametrize("change", ["backbone", "backbone stages", "augmentation", "source"])
def test_a_cache_of_something_else_is_refused(tmp_path, source, prepare, options, change):
    model = tiny_backbone_model("dinov2").eval()
    cache_features([source], prepare, model, options)
    if change == "backbone stages":
        stages = {"model_type": "dinov2", **BACKBONES["dinov2"][0], "out_features": ["stage1"]}
        other = tiny_backbone_model("dinov2", vision={"backbone_config": stages}).eval()
        parts = [each.vision_model.embeddings.patch_embeddings.backbone for each in (model, other)]
        parts[1].load_state_dict(parts[0].state_dict())
        model = other
    elif change == "backbone":
        with torch.no_grad():
            next(model.vision_model.embeddings.patch_embeddings.backbone.parameters()).add_(1)
    elif change == "augmentation":
        prepare = Preparation(AugmentationOptions(image_size=32, min_scale=0.5))
    else:
        lines = (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()
        (tmp_path / "data" / "metadata.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
        source = open_source(SourceSpec(path=str(tmp_path / "data")))
    with pytest.raises(ValueError, match=f"00-.* of another run: {change.split()[0]}"):
        cache_features([source], prepare, model, options)


def test_images_that_cannot_be_read_are_left_out(tmp_path, prepare, options, monkeypatch):
    folder = Path(numbered_folder(tmp_path / "data", 4))
    name = json.loads((folder / "metadata.jsonl").read_text().splitlines()[2])["file_name"]
    (folder / name).write_bytes(b"no image")
    source = open_source(SourceSpec(path=str(folder)))
    model = tiny_backbone_model().eval()
    (cached,) = cache_features([source], prepare, model, options)
    with pytest.raises(ValueError, match="no usable view"):
        cached[2]
    assert len(cached[1].views) == 2 and cached.unusable() == [2]
    np.load(cached.folder / "states.npy", mmap_mode="r+")[1, 0] = UNUSABLE
    assert len(cached[1].views) == 1 and cached.unusable() == [2], "one view is enough"
    monkeypatch.setattr(prepare, "draw", None)  # unusable views are not tried again
    cache_features([source], prepare, model, options)


def test_only_frozen_backbones_and_tables(source, prepare, options):
    with pytest.raises(ValueError, match="frozen backbone"):
        cache_features([source], prepare, tiny_model(), options)
    with pytest.raises(ValueError, match="frozen backbone"):
        cache_features([source], prepare, tiny_backbone_model(vision={"freeze_backbone": False}), options)


def test_sizes_are_told_as_a_whole_and_a_disk_that_is_too_small(
    source, prepare, options, monkeypatch, caplog
):
    model = tiny_backbone_model().eval()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(ValueError, match="GiB are free"):
        cache_features([source, source], prepare, model, options)
    told = [line for line in caplog.messages if "GiB in" in line]
    assert len(told) == 1 and "10 images in 2 views" in told[0]


def test_values_beyond_float16_are_its_largest(source, prepare, options):
    model = tiny_backbone_model().eval()
    backbone = model.vision_model.embeddings.patch_embeddings.backbone
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.mul_(1e4)
    (cached,) = cache_features([source], prepare, model, options)
    assert all(np.isfinite(view).all() for index in range(len(cached)) for view in cached[index].views)


def test_tags_of_any_length_are_kept(tmp_path, options):
    names = [f"a label with a long name, number {number}" for number in range(64)]
    folder = Path(numbered_folder(tmp_path / "data", 1))
    row = json.loads((folder / "metadata.jsonl").read_text())
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / "mask.png")
    (folder / "metadata.jsonl").write_text(json.dumps(row | {"mask_file_name": "mask.png"}))
    prepare = Preparation(AugmentationOptions(image_size=32, min_scale=1.0), None, names, crop_tag_share=0.0)
    source = open_source(SourceSpec(path=str(folder)))
    (cached,) = cache_features([source], prepare, tiny_backbone_model().eval(), options)
    assert len(json.dumps(cached[0].view_tags[0])) > 1024
