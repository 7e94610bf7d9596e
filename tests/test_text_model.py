"""The text tower with its projection: the same numbers as in a whole model, loading and saving."""

import pytest
import torch
from tiny_models import VARIANTS, assert_same_tensors, tiny_config, tiny_model, tiny_texts
from transformers import AutoModelForTextEncoding

from pgseg_hf import PGSegModel, PGSegTextModelWithProjection


@VARIANTS
@torch.no_grad()
def test_embeddings_are_those_of_the_whole_model(tmp_path, variant):
    model = tiny_model(npr_variant=variant)
    model.save_pretrained(tmp_path)
    text_model, report = PGSegTextModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    texts = tiny_texts(4, words=[1, 3, 5, 7])
    mask = torch.ones_like(texts)
    expected = model.get_text_features(texts, attention_mask=mask).pooler_output
    assert expected.shape == (4, 8)
    assert torch.equal(text_model(texts, attention_mask=mask), expected)
    prompts = texts.unflatten(0, (2, 2))
    torch.testing.assert_close(text_model(prompts), expected.unflatten(0, (2, 2)).mean(1))


def test_save_and_load_round_trip(tmp_path):
    model = PGSegTextModelWithProjection(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    for loaded in (
        PGSegTextModelWithProjection.from_pretrained(tmp_path),
        AutoModelForTextEncoding.from_pretrained(tmp_path),
    ):
        assert type(loaded) is PGSegTextModelWithProjection
        assert_same_tensors(loaded, model)


def test_whole_model_takes_its_tensors(tmp_path):
    text_model = PGSegTextModelWithProjection(tiny_config()).eval()
    text_model.save_pretrained(tmp_path)
    by_folder, report = PGSegModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    by_tensors = PGSegModel(tiny_config())
    assert not by_tensors.load_state_dict(text_model.state_dict(), strict=False).unexpected_keys
    for model in (by_folder, by_tensors.eval()):
        torch.testing.assert_close(
            model.get_text_features(tiny_texts(3)).pooler_output, text_model(tiny_texts(3))
        )


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"input_ids has shape \[12\], expected"):
        PGSegTextModelWithProjection(tiny_config())(tiny_texts(1)[0])
