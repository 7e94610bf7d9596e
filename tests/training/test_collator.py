"""The collator: both layouts, checked by hand and with a tiny model."""

import logging
import pickle

import numpy as np
import pytest
import torch
from tiny_models import CLIP_TEXT, tiny_model

from pgseg_hf import PGSegImageProcessorPil, PGSegProcessor, default_tokenizer
from pgseg_hf.training.batches.collator import PGSegCollator
from pgseg_hf.training.batches.preparation import Example


@pytest.fixture(scope="module")
def tokenizer():
    return default_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model(text_config=CLIP_TEXT).train()


def example(caption, *labels, seed=0):
    pixels = np.random.default_rng(seed).normal(size=(3, 16, 16)).astype(np.float32)
    return Example(pixels, caption, list(labels))


BATCH = [
    example("a dog on grass", "a photo of a dog.", "a photo of grass.", seed=1),
    example("nothing named", seed=2),
    example("two dogs", "a photo of a dog.", "a photo of a hat.", "a photo of grass.", seed=3),
]


def decode(tokenizer, ids):
    return [tokenizer.decode(row, skip_special_tokens=True).replace(" .", ".") for row in ids]


def test_paired(tokenizer):
    batch = PGSegCollator(tokenizer)(BATCH)
    texts = {"input_ids", "attention_mask", "tag_input_ids", "tag_attention_mask"}
    assert set(batch) == texts | {"pixel_values", "return_loss"} and batch["return_loss"] is True
    assert batch["pixel_values"].dtype == torch.float32
    assert np.array_equal(batch["pixel_values"], np.stack([one.pixel_values for one in BATCH]))
    assert batch["input_ids"].shape == (3, 77) and batch["tag_input_ids"].shape == (3, 3, 77)
    assert decode(tokenizer, batch["input_ids"]) == [one.caption for one in BATCH]
    present = batch["tag_attention_mask"].any(-1)
    assert present.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    for row, (ids, is_there) in enumerate(zip(batch["tag_input_ids"], present)):
        assert decode(tokenizer, ids[is_there]) == BATCH[row].labels
    assert (batch["tag_input_ids"][~present] == tokenizer.pad_token_id).all()


def test_paired_is_what_the_processor_makes(tokenizer):
    words = [["dog", "grass"], [], ["hat"]]
    captions = ["a caption of eight tokens.", "a", "a b"]
    prompts = [[f"a photo of a {word}." for word in of_image] for of_image in words]
    examples = [example(caption, *labels) for caption, labels in zip(captions, prompts)]
    batch = PGSegCollator(tokenizer)(examples)
    processor = PGSegProcessor(PGSegImageProcessorPil(), tokenizer)
    expected = processor(text=captions, tags=words, return_tensors="pt")
    assert set(expected) == set(batch) - {"pixel_values", "return_loss"}
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("examples", [BATCH, [example("a dog"), example("a cat")]])
def test_a_fixed_number_of_labels(tokenizer, examples):
    assert "tag_input_ids" not in PGSegCollator(tokenizer, num_labels=0)(examples)
    batch = PGSegCollator(tokenizer, num_labels=2)(examples)
    assert batch["tag_input_ids"].shape == (len(examples), 2, 77)
    counts = batch["tag_attention_mask"].any(-1).sum(1)
    assert counts.tolist() == [min(2, len(one.labels)) for one in examples]


def test_padding_and_truncation(tokenizer):
    long = example("dog " * 200, "a hat")
    longest = PGSegCollator(tokenizer, padding="longest")([example("a dog", "a photo of a hat.")])
    assert longest["input_ids"].shape == (1, 8) and longest["tag_input_ids"].shape == (1, 1, 8)
    batch = PGSegCollator(tokenizer, context_length=16)([long])
    assert batch["input_ids"].shape == (1, 16) and batch["tag_input_ids"].shape == (1, 1, 16)
    assert batch["input_ids"][0, -1] == tokenizer.eos_token_id and batch["attention_mask"].all()


def test_texts_that_are_cut_are_counted_and_told(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pgseg_hf"), "propagate", True)
    collator = PGSegCollator(tokenizer, context_length=17)
    collator([example("a dog", "a photo of a hat.")])
    assert (collator.cut_texts, caplog.records) == (0, [])
    collator([example("dog " * 200, "hat " * 16), example("dog " * 200, "a dog")])
    assert collator.cut_texts == 2  # equal texts count once
    assert "texts of more than 17 tokens" in caplog.text


def test_shared(tokenizer):
    collator = PGSegCollator(tokenizer, layout="shared")
    batch = collator(BATCH)
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "text_targets", "return_loss"}
    texts = ["a photo of a dog.", "a photo of grass.", "nothing named", "a photo of a hat."]
    assert decode(tokenizer, batch["input_ids"]) == texts
    assert batch["text_targets"].tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]]
    sent = pickle.loads(pickle.dumps(collator))(BATCH)
    assert torch.equal(batch["input_ids"], sent["input_ids"])


def test_texts_that_the_tokenizer_cannot_tell_apart_are_one(tokenizer):
    examples = [example("x", "A  Dog", "a hat"), example("x", "a dog"), example("x", "a dog")]
    batch = PGSegCollator(tokenizer, layout="shared")(examples)
    assert batch["input_ids"].shape == (2, 77)
    assert batch["text_targets"].int().tolist() == [[1, 1], [1, 0], [1, 0]]


def test_shared_with_the_texts_given(tokenizer):
    texts = ["a photo of a hat.", "a photo of a dog.", "never seen", "A photo of grass."]
    collator = PGSegCollator(tokenizer, layout="shared", texts=texts)
    batch = collator([BATCH[0], BATCH[2]])
    assert len(batch["input_ids"]) == 4
    assert batch["text_targets"].int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 1]]
    with pytest.raises(ValueError, match=r"'nothing named' .* 4 texts"):
        collator(BATCH)


@pytest.mark.parametrize("options", [{}, {"num_labels": 5}, {"layout": "shared"}, {"padding": "longest"}])
def test_the_model_takes_it_and_learns(tokenizer, model, options):
    output = model(**PGSegCollator(tokenizer, **options)(BATCH))
    assert output.loss.isfinite()
    assert (output.multi_label_loss is None) == (options.get("layout") == "shared")
    model.zero_grad()
    output.loss.backward()
    grads = [parameter.grad for parameter in model.text_projection.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert any(grad.abs().sum() > 0 for grad in grads)


def test_absent_labels_change_no_loss(tokenizer, model):
    losses = []
    for options in ({}, {"num_labels": 6}):
        torch.manual_seed(0)
        model.eval()
        losses.append(model(**PGSegCollator(tokenizer, **options)(BATCH)).loss)
    assert torch.allclose(*losses)
    captions = [example("a dog"), example("a cat", seed=4)]
    with_rows = model(**PGSegCollator(tokenizer, num_labels=3)(captions))
    without = model(**PGSegCollator(tokenizer)(captions))
    assert with_rows.multi_label_loss == 0
    assert torch.allclose(with_rows.loss, without.loss)


def test_mappings_are_examples_too(tokenizer):
    rows = [vars(one) for one in BATCH]
    rows[1] = {"pixel_values": torch.from_numpy(BATCH[1].pixel_values), "caption": BATCH[1].caption}
    collator = PGSegCollator(tokenizer)
    batch, expected = collator(rows), collator(BATCH)
    assert all(torch.equal(batch[name], expected[name]) for name in set(batch) - {"return_loss"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "mixed"}, "layout is 'mixed'"),
        ({"padding": "short"}, "padding is 'short'"),
        ({"context_length": 2}, "context_length is 2"),
        ({"num_labels": -1}, "num_labels is -1"),
        ({"num_labels": 2, "layout": "shared"}, "num_labels is 2"),
        ({"texts": ["a"]}, "texts .*'shared'"),
        ({"texts": [], "layout": "shared"}, "at least one"),
    ],
)
def test_options_that_make_no_sense(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        PGSegCollator(tokenizer, **options)


def test_a_tokenizer_without_a_limit_needs_a_context_length():
    tokenizer = default_tokenizer()
    tokenizer.model_max_length = int(1e30)
    with pytest.raises(ValueError, match="context_length is 1000"):
        PGSegCollator(tokenizer)
    with pytest.raises(ValueError, match="no examples"):
        PGSegCollator(tokenizer, 77)([])


def test_several_processes_have_batches_of_one_kind(tokenizer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"num_labels is None, .*several processes"):
        PGSegCollator(tokenizer)(BATCH)
    assert "tag_input_ids" in PGSegCollator(tokenizer, num_labels=2)(BATCH)
    assert "text_targets" in PGSegCollator(tokenizer, layout="shared")(BATCH)
