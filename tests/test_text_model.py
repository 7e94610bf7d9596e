"""The text tower with its projection: the same outputs as in a whole model, loading and saving."""

import copy

import pytest
import torch
from tiny_models import (
    BOS,
    EOS,
    assert_same_tensors,
    inputs_of,
    mask_of,
    tiny_config,
    tiny_model,
    tiny_texts,
)
from transformers import AutoModelForTextEncoding, pipeline

from pgseg_hf import (
    PGSegModel,
    PGSegProcessor,
    PGSegTextModelWithProjection,
    Segmenter,
    default_tokenizer,
    load_segmenter,
)
from pgseg_hf.weights import refuse_other_tokenizer


@pytest.mark.parametrize("variant", ["released", "corrected"])
@torch.no_grad()
def test_embeddings_are_those_of_the_whole_model(tmp_path, variant):
    model = tiny_model(npr_variant=variant)
    model.save_pretrained(tmp_path)
    text_model, report = PGSegTextModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    by_auto_class = AutoModelForTextEncoding.from_pretrained(tmp_path)
    assert type(by_auto_class) is PGSegTextModelWithProjection
    assert_same_tensors(by_auto_class, text_model)
    texts = tiny_texts(4, words=[1, 3, 5, 7])
    mask = torch.ones_like(texts)
    expected = model.get_text_features(texts, attention_mask=mask).pooler_output
    assert expected.shape == (4, 8)
    assert torch.equal(text_model(texts, attention_mask=mask), expected)
    prompts = texts.unflatten(0, (2, 2))
    torch.testing.assert_close(text_model(prompts), expected.unflatten(0, (2, 2)).mean(1))


def test_whole_model_takes_its_tensors(tmp_path):
    text_model = PGSegTextModelWithProjection(tiny_config()).eval()
    text_model.save_pretrained(tmp_path)
    model, report = PGSegModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert_same_tensors(PGSegTextModelWithProjection.from_pretrained(tmp_path), text_model)
    embeds = model.get_text_features(tiny_texts(3)).pooler_output
    torch.testing.assert_close(embeds, text_model(tiny_texts(3)))


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"input_ids has shape \[12\], expected"):
        PGSegTextModelWithProjection(tiny_config())(tiny_texts(1)[0])


def padded_both_ways(words=(1, 3, 5, 7)):
    """Texts and masks padded with the end token, on the right and on the left."""
    ids = tiny_texts(len(words), words=list(words))
    mask = mask_of(ids)
    padding = [len(row) - int(row.sum()) for row in mask]
    to_left = [torch.stack([row.roll(by) for row, by in zip(part, padding)]) for part in (ids, mask)]
    assert to_left[0][0, 0] == EOS and to_left[0][0, -1] == EOS and (to_left[0][0] == BOS).sum() == 1
    return (ids, mask), to_left


@pytest.mark.parametrize("with_mask", [True, False])
@torch.no_grad()
def test_texts_are_pooled_at_their_ends_on_whichever_side_they_are_padded(with_mask):
    model = tiny_model()
    (ids, mask), (left_ids, left_mask) = padded_both_ways()
    masks = (mask, left_mask) if with_mask else (None, None)
    expected = model.get_text_features(ids, masks[0])
    assert expected.pooler_output.std(0).min() > 1e-3
    found = model.get_text_features(left_ids, masks[1], output_hidden_states=True)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    for row, of_row in enumerate(mask):
        length = int(of_row.sum())
        own = expected.last_hidden_state[row, :length]
        assert torch.equal(found.last_hidden_state[row, -length:], own)
        assert torch.equal(found.hidden_states[0][row, -1], found.hidden_states[0][row].roll(1, 0)[0])


def test_losses_are_those_of_texts_padded_on_the_right():
    losses = []
    for ids, mask in padded_both_ways((2, 4, 6)):
        model = tiny_model()
        labels = {"label_input_ids": ids[:, None], "label_attention_mask": mask[:, None]}
        inputs = inputs_of(input_ids=ids, attention_mask=mask) | labels
        output = model(**inputs, return_loss=True)
        output.loss.backward()
        losses.append((output.loss, output.text_prototype_loss, model.text_projection[0].weight.grad))
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_tokens_can_be_added_to_the_joint_model(tmp_path):
    model = tiny_model(freeze_text=True)
    inputs = inputs_of()
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
    size = model.config.text_config.vocab_size
    embeddings = model.resize_token_embeddings(size + 1, pad_to_multiple_of=8)
    assert embeddings is model.get_input_embeddings() is model.text_model.get_input_embeddings()
    assert embeddings.num_embeddings == model.config.text_config.vocab_size == 56 > size
    assert not model.train().get_input_embeddings().weight.requires_grad
    inputs["input_ids"][0, 1] = size
    model.save_pretrained(tmp_path)
    loaded = PGSegModel.from_pretrained(tmp_path)
    assert_same_tensors(loaded, model)
    for each in (model, loaded):
        with torch.no_grad():
            logits = each.eval()(**inputs).logits_per_image
        torch.testing.assert_close(logits[:, 1:], expected[:, 1:])
        assert (logits[:, 0] - expected[:, 0]).abs().max() > 1e-3


def test_a_segmenter_with_a_word_of_its_own(tiny_segmenter, tmp_path, photo):
    model = copy.deepcopy(tiny_segmenter.model)
    processor = PGSegProcessor(tiny_segmenter.processor.image_processor, default_tokenizer())
    processor.tokenizer.add_tokens(["<stoat>"])
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="resize_token_embeddings was not called"):
        load_segmenter(str(tmp_path))
    model.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64)
    model.save_pretrained(tmp_path)
    segmenter = load_segmenter(str(tmp_path))
    embeds = segmenter.class_embeddings(["<stoat>", "stoat"])
    assert torch.equal(embeds, processor.get_class_embeddings(model, ["<stoat>", "stoat"]))
    assert not torch.equal(embeds[0], embeds[1])
    with pytest.raises(ValueError, match="resize_token_embeddings was not called"):
        Segmenter(tiny_segmenter.model, processor).class_embeddings(["<stoat>"])
    (tmp_path / "tokenizer.json").rename(tmp_path / "elsewhere")
    segment = pipeline("open-vocabulary-segmentation", model=str(tmp_path))
    with pytest.raises(ValueError, match=r"tokenizer with 2 tokens.* are missing"):
        segment(photo, labels=["dog", "sky"])
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    for load in (load_segmenter, PGSegProcessor.from_pretrained):
        with pytest.raises((ValueError, OSError), match=r"tokenizer.json is a git-lfs pointer"):
            load(str(tmp_path))
    smaller = default_tokenizer(merges=100)
    smaller.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="end token 613, "):
        load_segmenter(str(tmp_path))
    model.config.text_config.eos_token_id = 2  # the largest token, whatever its number
    refuse_other_tokenizer(model.config, smaller, "it")
