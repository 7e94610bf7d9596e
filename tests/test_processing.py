"""The processor: captions, labels and tags to token ids, labels to embeddings, saving and loading."""

import copy
import logging
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CLIP_TEXT, tiny_model
from transformers import AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pgseg_hf.configuration_pgseg import PGSegConfig
from pgseg_hf.image_processing_pil_pgseg import PGSegImageProcessorPil
from pgseg_hf.processing_pgseg import PGSegProcessor
from pgseg_hf.prompts import IMAGENET_TEMPLATES
from pgseg_hf.tokenization import default_tokenizer

START, END = 49406, 49407
CONTEXT = 16


@pytest.fixture(scope="module")
def processor():
    image_processor = PGSegImageProcessorPil(size={"height": 8, "width": 12})
    return PGSegProcessor(image_processor, default_tokenizer(CONTEXT))


@pytest.fixture(scope="module")
def images():
    return [Image.new("RGB", (20, 10), "red"), Image.new("RGB", (10, 20), "blue")]


def words(processor, ids, mask) -> str:
    return processor.tokenizer.decode(ids[: int(sum(mask))], skip_special_tokens=True)


class TextModel(torch.nn.Module):
    """What `get_class_embeddings` needs from a model: text features that depend on all tokens and weights."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.text_model = torch.nn.Embedding(49_408, 6)
        self.text_projection = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.to(dtype).eval()
        self.prompt_counts: list[int] = []

    def get_text_features(self, input_ids, attention_mask):
        self.prompt_counts.append(len(input_ids))
        mask = attention_mask[..., None].to(self.text_projection[0].weight.dtype)
        pooled = (self.text_model(input_ids) * mask).sum(1)
        return BaseModelOutputWithPooling(pooler_output=self.text_projection(pooled))


def test_images_and_captions(processor, images):
    inputs = processor(images=images, text=["a cat", "two dogs on grass"], return_tensors="pt")
    assert set(inputs) == set(processor.model_input_names) == {"pixel_values", "input_ids", "attention_mask"}
    assert inputs["pixel_values"].shape == (2, 3, 8, 12)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, CONTEXT)
    assert inputs["input_ids"][0].tolist() == [START, 320, 2368, END] + [END] * (CONTEXT - 4)
    assert inputs["attention_mask"].sum(1).tolist() == [4, 6]
    expected = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)


def test_long_text_keeps_its_end_token(processor):
    inputs = processor(text=["word " * 50, "word"], return_tensors="pt")
    assert inputs["input_ids"][0, -1] == END
    assert inputs["attention_mask"].sum(1).tolist() == [CONTEXT, 3]
    inputs = processor(labels=["very " * 50 + "long"], return_tensors="pt")
    assert inputs["input_ids"][0, -1] == END
    assert inputs["input_ids"].shape == (1, CONTEXT)


def test_texts_and_labels_that_are_cut_are_told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pgseg_hf"), "propagate", True)
    processor = PGSegProcessor(PGSegImageProcessorPil(), default_tokenizer(18))
    processor(text=["a cat"], labels=None)
    processor(labels=["cat", "dog " * 11])
    assert not caplog.records
    processor(text=["a cat", "dog " * 17])
    assert "texts of more than 18 tokens" in caplog.text
    processor(labels=["cat", "dog " * 17])
    assert "1 of 2 labels" in caplog.text and "18 tokens; the first is 'dog dog" in caplog.text


@pytest.mark.parametrize("templates", [["a photo of a {}."], ["a photo of a {}.", "{}"]])
def test_labels_that_are_the_same_where_they_are_cut_are_refused(processor, templates):
    model = tiny_model(text_config=CLIP_TEXT)
    labels = ["cat", *("very " * 20 + last for last in ("old", "young"))]
    message = "old' and '.*young' are the same .* 16 tokens .*shorten"
    with pytest.raises(ValueError, match=message):
        processor(labels=labels, templates=templates)
    with pytest.raises(ValueError, match=message):
        processor.get_class_embeddings(model, labels, templates)


def test_labels_with_one_template(processor):
    inputs = processor(labels=[" cat", "dog"], return_tensors="pt")
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, CONTEXT)
    assert inputs["input_ids"].dtype == torch.int64
    as_text = processor(text=["a photo of a cat.", "a photo of a dog."], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], as_text["input_ids"])
    assert torch.equal(inputs["attention_mask"], as_text["attention_mask"])


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_labels_with_several_templates(processor, return_tensors):
    inputs = processor(
        labels=["cat", "dog", "sky"], templates=["a {}", "the {} itself"], return_tensors=return_tensors
    )
    ids, mask = np.asarray(inputs["input_ids"]), np.asarray(inputs["attention_mask"])
    assert ids.shape == mask.shape == (3, 2, CONTEXT)
    texts = [[words(processor, ids[n, t], mask[n, t]) for t in range(2)] for n in range(3)]
    assert texts == [["a cat", "the cat itself"], ["a dog", "the dog itself"], ["a sky", "the sky itself"]]


def test_tags_are_padded_to_the_image_with_most(processor, images):
    tags = [["cat"], [], ["sofa", "old lamp"]]
    inputs = processor(images=[images[0]] * 3, text=["x", "y", "z"], tags=tags, return_tensors="pt")
    ids, mask = inputs["tag_input_ids"], inputs["tag_attention_mask"]
    assert ids.shape == mask.shape == (3, 2, CONTEXT)
    assert (mask.sum(-1) > 0).tolist() == [[True, False], [False, False], [True, True]]
    assert (ids[mask.sum(-1) == 0] == processor.tokenizer.pad_token_id).all()
    assert words(processor, ids[0, 0], mask[0, 0]) == "a photo of a cat ."
    assert words(processor, ids[2, 1], mask[2, 1]) == "a photo of a old lamp ."
    assert inputs["input_ids"].shape == (3, CONTEXT)

    without_any = processor(tags=[[], []], return_tensors="pt")
    assert without_any["tag_input_ids"].shape == (2, 1, CONTEXT)
    assert without_any["tag_input_ids"].dtype == torch.int64
    assert without_any["tag_attention_mask"].sum() == 0


def test_padding_and_size_can_be_chosen_in_the_call(processor, images):
    inputs = processor(
        images=images, labels=["cat", "traffic light"], padding="longest", size={"height": 4, "width": 4},
        return_tensors="pt",
    )  # fmt: skip
    assert inputs["input_ids"].shape == (2, 9)
    assert inputs["pixel_values"].shape == (2, 3, 4, 4)
    tags = processor(tags=[["cat"], ["a", "b"]], padding=False, return_tensors="pt")["tag_input_ids"]
    assert tags.shape == (2, 2, 8)
    nested = processor(labels=["cat"], text_kwargs={"max_length": 5}, return_tensors="pt")["input_ids"]
    assert nested.tolist() == [[START, 320, 1125, 539, END]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to process"),
        ({"text": "a cat", "labels": ["cat"]}, "not both"),
        ({"text": []}, "empty list"),
        ({"text": [1]}, "string"),
        ({"text": "a cat", "templates": ["{}"]}, "templates .* labels and tags"),
        ({"labels": "cat, dog"}, r"\['cat', 'dog'\]"),
        ({"labels": []}, "no labels"),
        ({"labels": ["cat", "Cat"]}, "repeats"),
        ({"labels": ["cat"], "templates": ["a cat"]}, "exactly once"),
        ({"tags": "cat"}, "'cat'"),
        ({"tags": []}, "tags must be"),
        ({"tags": ["cat"]}, "image 0.*list of strings"),
        ({"tags": [["cat"], ["dog", ""]]}, "image 1.*empty"),
        ({"tags": [["cat"]], "text": ["a", "b"]}, "1 images.* 2 texts"),
        ({"tags": [["cat"], ["dog"]], "images": Image.new("RGB", (9, 9))}, "2 images.* 1 images"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_bad_calls_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(return_tensors="pt", **arguments)


@pytest.mark.parametrize("templates", [None, IMAGENET_TEMPLATES])
def test_save_and_load_round_trip(processor, images, templates, tmp_path):
    if templates is not None:
        processor = PGSegProcessor(processor.image_processor, processor.tokenizer, templates=templates)
    processor.save_pretrained(tmp_path)
    PGSegConfig().save_pretrained(tmp_path)
    expected = processor(images=images, labels=["cat", "dog"], return_tensors="pt")
    for loaded in (PGSegProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is PGSegProcessor
        assert loaded.templates == processor.templates
        assert loaded.to_dict()["image_processor"] == processor.to_dict()["image_processor"]
        inputs = loaded(images=images, labels=["cat", "dog"], return_tensors="pt")
        assert all(torch.equal(inputs[key], expected[key]) for key in expected)
    overridden = PGSegProcessor.from_pretrained(tmp_path, templates=["{}"])
    assert overridden.templates == ["{}"]


def test_arguments_of_the_last_call_are_not_saved(processor, tmp_path):
    processor(labels=["cat"], max_length=5)
    processor.save_pretrained(tmp_path)
    loaded = PGSegProcessor.from_pretrained(tmp_path)
    assert loaded(labels=["cat"], return_tensors="pt")["input_ids"].shape == (1, CONTEXT)


def reference_embedding(processor, model, prompts):
    tokens = processor(text=prompts, return_tensors="pt")
    with torch.no_grad():
        features = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
    mean = features.mean(0)
    return mean / mean.norm()


@pytest.mark.parametrize(
    ("dtype", "batch_size"), [(torch.float32, 1), (torch.float64, 3), (torch.float64, 256)]
)
def test_class_embeddings_are_the_normalised_mean_of_unnormalised_features(processor, dtype, batch_size):
    model = TextModel(dtype)
    labels, templates = ["cat", "dog", "old lamp"], ["a {}", "the {}.", "{} in snow"]
    embeddings = processor.get_class_embeddings(model, labels, templates, batch_size=batch_size)
    assert max(model.prompt_counts) <= batch_size
    assert embeddings.dtype == dtype
    assert embeddings.shape == (3, 4)
    assert not embeddings.requires_grad
    for label, embedding in zip(labels, embeddings):
        prompts = [template.replace("{}", label) for template in templates]
        expected = reference_embedding(processor, model, prompts)
        torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_embeddings_keep_their_dtype(processor):
    embeddings = processor.get_class_embeddings(TextModel(torch.bfloat16), ["cat", "dog"])
    assert embeddings.dtype == torch.bfloat16
    assert embeddings.float().norm(dim=-1) == pytest.approx(1, abs=1e-2)


def test_embedding_leaves_the_tokenizer_as_it_is_for_other_threads(processor):
    processor.get_class_embeddings(TextModel(), ["cat"])
    backend = processor.tokenizer.backend_tokenizer
    state = backend.padding, backend.truncation
    changes = []
    with mock.patch.object(
        type(processor.tokenizer), "set_truncation_and_padding", lambda _, **kwargs: changes.append(kwargs)
    ):
        processor.get_class_embeddings(TextModel(), ["dog", "a lamp in the corner"])
    assert {kwargs["padding_strategy"].value for kwargs in changes} == {"do_not_pad"}
    assert (backend.padding, backend.truncation) == state


@pytest.mark.parametrize(
    ("training", "arguments", "message"),
    [
        (False, {"batch_size": 0}, "batch_size is 0"),
        (False, {"labels": ["cat", "cat"]}, "repeats"),
        (False, {"templates": ["cat"]}, "exactly once"),
        (True, {}, r"model\.eval"),
    ],
)
def test_embedding_refuses_training_mode_and_bad_arguments(processor, training, arguments, message):
    model = TextModel().train(training)
    with pytest.raises(ValueError, match=message):
        processor.get_class_embeddings(model, **{"labels": ["cat"]} | arguments)
    assert model.prompt_counts == []


def test_processor_can_be_copied_and_pickled_after_use(processor, images):
    expected = processor(images=images, labels=["cat"], return_tensors="pt")
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        inputs = other(images=images, labels=["cat"], return_tensors="pt")
        assert all(torch.equal(inputs[key], expected[key]) for key in expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_padded_on_the_right_whatever_the_tokenizer_says(tiny_segmenter, side):
    labels = ["cat", "a very long-haired dog"]
    asked = tiny_segmenter.processor(labels=labels, tags=[["sky"], ["sky", "wood"]])
    expected = tiny_segmenter.processor.get_class_embeddings(tiny_segmenter.model, labels)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    tokenizer = default_tokenizer()
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side
    processor = PGSegProcessor(tiny_segmenter.processor.image_processor, tokenizer)
    found = processor(labels=labels, tags=[["sky"], ["sky", "wood"]])
    for name, rows in asked.items():
        assert found[name] == rows
    assert torch.equal(processor.get_class_embeddings(tiny_segmenter.model, labels), expected)
    # Left padding on request; the model encodes the same text.
    left = processor(labels=labels, padding_side="left", return_tensors="pt")
    assert left["attention_mask"][0, 0] == 0
    with torch.no_grad():
        embeds = tiny_segmenter.model.get_text_features(**left).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(embeds, dim=-1), expected)
