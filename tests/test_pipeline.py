import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CLIP_TEXT, WITHOUT_THE_PACKAGE, make_photo, tiny_model
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    pipeline,
)

from pgseg_hf import (
    DEFAULT_CHECKPOINT,
    OpenVocabularySegmentationPipeline,
    PGSegConfig,
    PGSegProcessor,
    SegmentationOptions,
    Segmenter,
    load_segmenter,
)

TASK = "open-vocabulary-segmentation"
LABELS = ["cat", "dog", "grass"]


@pytest.fixture(scope="module")
def segment(tiny_folder):
    return pipeline(TASK, model=tiny_folder)


@pytest.fixture(scope="module")
def saved(tiny_segmenter, tmp_path_factory):
    """A pipeline whose processor has only non-default settings, and the folder where it was saved."""
    old = tiny_segmenter.processor
    processor = PGSegProcessor(
        old.image_processor,
        old.tokenizer,
        templates=["a drawing of {}"],
        window_size=48,
        window_stride=24,
        top_k=2,
    )
    model = tiny_model(
        text_config=CLIP_TEXT, contrastive_pooling="patches", vision_config={"segment_source": "inputs"}
    )
    processor.patch_weight = 0.25
    segment = pipeline(TASK, model=model, processor=processor)
    folder = tmp_path_factory.mktemp("pipeline") / "saved"
    segment.save_pretrained(folder)
    return segment, str(folder)


def test_without_a_model_it_is_the_shipped_one():
    segment = pipeline(TASK)
    assert segment.model.config._name_or_path == DEFAULT_CHECKPOINT and segment.processor.vocabulary


def test_one_image(segment, tiny_segmenter, photo, photo_file):
    result = segment(photo_file, labels=LABELS, background_threshold=0.5)
    expected = tiny_segmenter(photo, LABELS, SegmentationOptions(background_threshold=0.5))
    assert [entry["label"] for entry in result] == [found.label for found in expected.segments()]
    for entry, found in zip(result, expected.segments(), strict=True):
        assert set(entry) == {"label", "score", "mask"}
        assert isinstance(entry["mask"], Image.Image) and entry["mask"].mode == "L"
        np.testing.assert_array_equal(np.asarray(entry["mask"]) == 255, expected.mask(found))
        assert entry["score"] == pytest.approx(found.score, abs=1e-4)


def test_lists_and_generators(segment):
    photos = [make_photo(seed=0), make_photo(60, 80, seed=1)]
    expected = [segment(photo, labels=LABELS) for photo in photos]
    assert segment(photos, labels=LABELS) == expected
    assert list(segment((photo for photo in photos), labels=LABELS, batch_size=2)) == expected


def test_labels_by_the_name_that_zero_shot_pipelines_have(segment, tiny_folder, photo):
    expected = segment(photo, labels=LABELS)
    assert segment(photo, candidate_labels=LABELS) == expected
    assert segment(photo, LABELS) == expected
    assert pipeline(TASK, model=tiny_folder, candidate_labels=LABELS)(photo) == expected
    with pytest.raises(ValueError, match="one of the two"):
        segment(photo, labels=LABELS, candidate_labels=LABELS)


def test_options_of_the_pipeline_hold_for_its_calls(segment, tiny_segmenter, photo, monkeypatch):
    given = {"background_threshold": 0.99, "templates": ("a {}",), "batch_size": 3}
    made = OpenVocabularySegmentationPipeline(
        tiny_segmenter.model, processor=tiny_segmenter.processor, device=-1, labels=LABELS, **given
    )
    used = []
    monkeypatch.setattr(
        Segmenter, "stream", lambda self, images, labels, options: used.append(options) or iter(())
    )
    for call in ({}, {"batch_size": 4}, {"top_k": 1}, {"background_threshold": 0.1}, {}):
        with pytest.raises(StopIteration):
            made(photo, **call)
        assert used[-1] == SegmentationOptions(**given | call)
    made = OpenVocabularySegmentationPipeline(
        tiny_segmenter.model, processor=tiny_segmenter.processor, device=-1, shortest_edge=64
    )
    with pytest.raises(StopIteration):
        made(photo, LABELS, longest_edge=100)
    assert used[-1] == SegmentationOptions(shortest_edge=64, longest_edge=100)


def test_a_saved_pipeline_is_the_same_pipeline(saved, photo):
    segment, folder = saved
    expected = segment(photo, labels=LABELS)
    assert len(expected) == 2
    whole = {"model": AutoModel.from_pretrained(folder), "processor": AutoProcessor.from_pretrained(folder)}
    for again in (
        pipeline(model=folder),
        pipeline(TASK, model=folder),
        pipeline(TASK, model=folder, trust_remote_code=True),
        pipeline(TASK, **whole),
    ):
        assert type(again) is OpenVocabularySegmentationPipeline
        assert again(photo, labels=LABELS) == expected
    processor = whole["processor"]
    assert processor.to_dict() == segment.processor.to_dict()
    segmentation = load_segmenter(folder)(photo, LABELS)
    for entry, found in zip(expected, segmentation.segments(), strict=True):
        np.testing.assert_array_equal(np.asarray(entry["mask"]) == 255, segmentation.mask(found))
    ids = segment.processor.tokenizer(LABELS)["input_ids"]
    assert AutoTokenizer.from_pretrained(folder)(LABELS)["input_ids"] == ids
    image_processor = AutoImageProcessor.from_pretrained(folder)
    pixels = segment.processor.image_processor(photo, return_tensors="pt")["pixel_values"]
    assert torch.equal(image_processor(photo, return_tensors="pt")["pixel_values"], pixels)


def test_options_are_not_saved_and_that_is_said(saved, tmp_path, caplog, monkeypatch):
    segment, _ = saved
    monkeypatch.setattr(logging.getLogger("pgseg_hf"), "propagate", True)
    made = OpenVocabularySegmentationPipeline(
        segment.model, processor=segment.processor, device=-1, background_threshold=0.99
    )
    with caplog.at_level(logging.WARNING):
        segment.save_pretrained(tmp_path)
        assert not caplog.records
        made.save_pretrained(tmp_path)
    assert "'background_threshold': 0.99" in caplog.text


def test_folders_of_parts_are_refused(saved, tmp_path):
    segment, folder_of_all = saved
    segment.model.save_pretrained(tmp_path / "model")
    segment.tokenizer.save_pretrained(tmp_path / "parts")
    segment.image_processor.save_pretrained(tmp_path / "parts")
    for folder in ("model", "parts"):
        for load in (AutoProcessor.from_pretrained, PGSegProcessor.from_pretrained):
            with pytest.raises(OSError, match=r"no processor_config\.json"):
                load(tmp_path / folder)
    with pytest.raises(OSError, match=r"no processor_config\.json"):
        pipeline(model=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="no parts of one, got processor, tokenizer"):
        pipeline(TASK, model=folder_of_all, tokenizer=segment.tokenizer)
    with pytest.raises(ValueError, match="no parts of one, got none"):
        OpenVocabularySegmentationPipeline(segment.model)
    with pytest.raises(ValueError, match="got CLIPVisionModel of model_type 'clip_vision_model'"):
        other = CLIPVisionModel(CLIPVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
        pipeline(TASK, model=other, processor=segment.processor)


def test_a_configuration_names_its_pipeline(saved):
    _, folder = saved
    config = PGSegConfig.from_pretrained(folder)
    assert list(config.custom_pipelines) == [TASK]
    assert TASK not in config.custom_pipelines and "image-segmentation" in config.custom_pipelines
    assert PGSegConfig.from_dict(config.to_dict()).to_json_string() == config.to_json_string()
    assert PGSegConfig().to_dict()["custom_pipelines"] == config.custom_pipelines


_USE_SAVED_PIPELINE = (
    WITHOUT_THE_PACKAGE
    + """
import torch
from transformers import pipeline

torch.set_num_threads(1)
folder, photo, output = sys.argv[1:]
for task in (None, "open-vocabulary-segmentation", "image-segmentation"):
    segment = pipeline(task, model=folder, trust_remote_code=True)
    assert type(segment).__module__.startswith("transformers_modules."), type(segment)
    found = segment(photo, labels=["cat", "dog", "grass"])
    assert task is None or found == before
    before = found
segment.save_pretrained(f"{output}/again")
again = pipeline(model=f"{output}/again", trust_remote_code=True)
assert again(photo, candidate_labels=["cat", "dog", "grass"]) == found
for entry in found:
    entry["mask"].save(f"{output}/{entry['label']}.png")
assert "pgseg_hf" not in sys.modules
"""
)


@pytest.mark.slow
def test_a_saved_pipeline_works_where_the_package_is_not_installed(
    saved, photo, photo_file, tmp_path, monkeypatch
):
    segment, folder = saved
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program = [sys.executable, "-c", _USE_SAVED_PIPELINE, folder, photo_file, str(tmp_path)]
    run = subprocess.run(program, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected = segment(photo, labels=LABELS)
    for entry in expected + pipeline(model=str(tmp_path / "again"))(photo, labels=LABELS):
        mask = Image.open(tmp_path / f"{entry['label']}.png")
        np.testing.assert_array_equal(np.asarray(mask), np.asarray(entry["mask"]))


def test_errors(segment, photo, tmp_path):
    with pytest.raises(ValueError, match="labels are missing"):
        segment(photo)
    with pytest.raises(ValueError, match="unknown argument colour"):
        segment(photo, labels=LABELS, colour="red")
    with pytest.raises(ValueError, match="unknown argument output_segmentation"):
        segment(photo, labels=LABELS, output_segmentation=True)
    with pytest.raises(ValueError, match="broken"):
        (tmp_path / "broken.png").write_bytes(b"no image")
        segment(str(tmp_path / "broken.png"), labels=LABELS)
