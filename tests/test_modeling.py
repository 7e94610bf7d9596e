"""The models: sizes, texts, loading and saving, learning."""

import copy
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    PATCHES,
    VARIANTS,
    assert_same_tensors,
    inputs_of,
    prototype_buffers,
    tiny_config,
    tiny_images,
    tiny_model,
    tiny_texts,
    with_fixed_statistics,
    without_noise,
)
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoModel

from pgseg_hf.modeling_pgseg import PGSegModel
from pgseg_hf.variants import NPR_VARIANTS

SIDES = st.integers(4, 40)


# Any size, any batch


@settings(max_examples=30)
@given(st.sampled_from(list(NPR_VARIANTS)), st.integers(1, 3), SIDES, SIDES)
@torch.no_grad()
def test_any_size_gives_a_grouping_on_the_true_grid(models, variant, batch, height, width):
    model = models[variant]
    output = model.get_image_features(tiny_images(batch, height, width).double(), output_attentions=True)
    assert output.grouping.shape == (batch, 4, height // 4, width // 4)
    torch.testing.assert_close(output.grouping.sum(1), torch.ones_like(output.grouping[:, 0]))
    assert (output.grouping >= 0).all()
    assert output.image_sizes.tolist() == [[height, width]] * batch
    assert output.segment_embeds.shape == (batch, 4, 8)
    assert output.pooler_output.isfinite().all()
    first, second = output.attentions
    torch.testing.assert_close(output.grouping.flatten(2), second @ first)
    torch.testing.assert_close(first.sum(1), torch.ones_like(first[:, 0]))


@settings(max_examples=15)
@given(st.sampled_from(list(NPR_VARIANTS)), st.integers(2, 4), SIDES, SIDES)
@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(models, variant, batch, height, width):
    images = tiny_images(batch, height, width).double()
    together = models[variant].get_image_features(images)
    for index in range(batch):
        alone = models[variant].get_image_features(images[index : index + 1])
        for name in ("pooler_output", "segment_embeds", "grouping", "last_hidden_state"):
            torch.testing.assert_close(alone[name][0], together[name][index], rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_pixels_beyond_the_last_whole_patch_do_not_count(models):
    images = tiny_images(1, 19, 22).double()
    whole, cut = (
        models["corrected"].get_image_features(pixels) for pixels in (images, images[..., :16, :20])
    )
    assert torch.equal(whole.grouping, cut.grouping)
    assert whole.image_sizes.tolist() == [[19, 22]]


@torch.no_grad()
def test_position_embeddings_keep_height_and_width_apart(models):
    embeddings = models["none"].vision_model.embeddings
    tall, wide = embeddings.interpolated_positions(5, 3), embeddings.interpolated_positions(3, 5)
    expected = nn.functional.interpolate(
        embeddings.position_embeddings.unflatten(1, (4, 4)).permute(0, 3, 1, 2), size=(5, 3), mode="bicubic"
    )
    torch.testing.assert_close(tall, expected.flatten(2).transpose(1, 2), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(tall, wide.unflatten(1, (3, 5)).transpose(1, 2).flatten(1, 2))
    assert embeddings.interpolated_positions(4, 4) is embeddings.position_embeddings


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (None, "pixel_values is None"),
        (torch.zeros(3, 16, 16), r"shape \[3, 16, 16\], expected \[batch, 3, height, width\]"),
        (torch.zeros(1, 1, 16, 16), r"shape \[1, 1, 16, 16\]"),
        (torch.zeros(1, 3, 3, 50), "3 x 50 pixels, smaller than a patch of 4 x 4"),
        (torch.zeros(1, 3, 50, 3), "50 x 3 pixels"),
        (torch.full((1, 3, 16, 16), torch.nan), "NaN or infinite"),
        (torch.full((1, 3, 16, 16), -torch.inf), "NaN or infinite"),
    ],
)
def test_bad_pixels_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(input_ids=tiny_texts(1), pixel_values=pixels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, "input_ids has shape None"),
        ({"input_ids": tiny_texts(2)}, r"one text for each image.*\[3, 2\]"),
        ({"tag_input_ids": tiny_texts(3)}, r"tag_input_ids has shape \[3, 12\]"),
        ({"tag_input_ids": tiny_texts(3)[:, None, :5]}, r"tag_input_ids has shape \[3, 1, 5\]"),
        ({"text_targets": torch.ones(2, 3)}, r"text targets have shape \[2, 3\]"),
    ],
)
def test_bad_texts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**(inputs_of() | changes), return_loss=True)


# Texts


@torch.no_grad()
def test_prompts_of_a_label_are_averaged(models):
    ids = tiny_texts(6, words=[1, 2, 3, 4, 5, 6]).unflatten(0, (2, 3))
    together = models["corrected"].get_text_features(ids).pooler_output
    one_by_one = models["corrected"].get_text_features(ids.flatten(0, 1)).pooler_output
    # Vectors are averaged without normalisation; the mean is normalised afterwards.
    torch.testing.assert_close(together, one_by_one.unflatten(0, (2, 3)).mean(1))
    output = models["corrected"](input_ids=ids, pixel_values=tiny_images(3).double())
    assert output.logits_per_image.shape == (3, 2)
    torch.testing.assert_close(output.text_embeds, normalize(together, dim=-1))


@torch.no_grad()
def test_padding_after_the_end_token_does_not_count(models):
    ids = tiny_texts(2, words=4)
    mask = (torch.arange(ids.shape[1]) < 6).long().expand(2, -1)
    garbage = torch.where(mask.bool(), ids, torch.tensor(7))
    features = [
        models["corrected"].get_text_features(*arguments).pooler_output
        for arguments in ((ids,), (ids, mask), (garbage, mask), (ids[:, :6],))
    ]
    for other in features[1:]:
        torch.testing.assert_close(other, features[0])


def test_logits_are_scaled_cosines(models):
    output = models["corrected"](input_ids=tiny_texts(2), pixel_values=tiny_images(3).double())
    for embeds in (output.image_embeds, output.text_embeds, output.segment_embeds):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones_like(embeds[..., 0]))
    scale = models["corrected"].logit_scale.exp()
    torch.testing.assert_close(output.logits_per_image, scale * output.image_embeds @ output.text_embeds.T)
    torch.testing.assert_close(output.logits_per_text, output.logits_per_image.T)
    torch.testing.assert_close(output.segment_logits, scale * output.segment_embeds @ output.text_embeds.T)


@pytest.mark.parametrize("pooling", ["mean", "groups"])
def test_scales_are_clamped_at_100(pooling):
    model = tiny_model(contrastive_pooling=pooling).double()
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
        model.prototype_logit_scale.fill_(6.0)
    output = model(**inputs_of(pixel_values=tiny_images(3).double()), return_loss=True)
    cosines = output.segment_embeds @ output.text_embeds.T
    torch.testing.assert_close(output.segment_logits, 100 * cosines)
    if pooling == "groups":
        expected = output.segment_logits.exp().mean(1).log()
        torch.testing.assert_close(output.logits_per_image, expected)
    losses = [loss.detach() for loss in output.image_prototype_losses]
    output.loss.backward()
    assert model.logit_scale.grad == 0
    assert model.prototype_logit_scale.grad == 0
    with torch.no_grad():
        model.prototype_logit_scale.fill_(math.log(100))
    again = model(**inputs_of(pixel_values=tiny_images(3).double()), return_loss=True)
    torch.testing.assert_close(list(again.image_prototype_losses), losses)


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(2, 5), SIDES, SIDES, st.sampled_from([1, 3, 8.5]))
@torch.no_grad()
def test_mixture_pooling_is_the_chance_to_see_each_text(batch, texts, height, width, looks):
    """The probability to see a text in a number of looks at patches, softly assigned to groups and these to texts."""
    model = tiny_model(
        contrastive_pooling="mixture", mixture_looks=looks, contrastive_loss="sigmoid"
    ).double()
    assert model.logit_bias is None
    output = model(tiny_texts(texts), tiny_images(batch, height, width).double())
    names = output.segment_logits.softmax(-1)
    shares = torch.einsum("bkhw,bkn->bhwn", output.grouping, names).flatten(1, 2).mean(1)
    seen = 1 - (1 - shares.clamp(max=1 - 1e-4)) ** looks
    torch.testing.assert_close(output.logits_per_image.sigmoid(), seen, rtol=1e-3, atol=1e-4)


# Loading and saving


@VARIANTS
def test_round_trip_bit_for_bit(tmp_path, variant):
    model = tiny_model(npr_variant=variant)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for loaded in (
        PGSegModel.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path),
        PGSegModel.from_pretrained(tmp_path, device_map="auto"),
    ):
        assert type(loaded) is PGSegModel
        assert not loaded.training
        assert_same_tensors(loaded, model)
    with torch.no_grad():
        outputs = [m(**inputs_of()).logits_per_image for m in (model, loaded)]
    assert torch.equal(*outputs)
    for tower in (model.vision_model, model.text_model):
        assert_same_tensors(type(tower).from_pretrained(tmp_path), tower)


@pytest.mark.parametrize("variant", ["released", "corrected"])
def test_prototypes_stay_in_float32(tmp_path, variant):
    model = tiny_model(npr_variant=variant, num_text_prototypes=4)
    expected = prototype_buffers(model)
    model.save_pretrained(tmp_path / "float32")
    loaded = PGSegModel.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "half")
    part = copy.deepcopy(model)
    part.vision_model.to(torch.float16)
    candidates = {
        "dtype=": loaded,
        "saved in half": PGSegModel.from_pretrained(tmp_path / "half", dtype="auto"),
        ".to of a part": part,
        ".half": copy.deepcopy(model).half(),
    }
    for name, candidate in candidates.items():
        assert candidate.vision_model.dtype in (torch.bfloat16, torch.float16), name
        for buffer_name, buffer in prototype_buffers(candidate).items():
            assert buffer.dtype == torch.float32, (name, buffer_name)
            assert torch.equal(buffer, expected[buffer_name]), (name, buffer_name)


@VARIANTS
@torch.no_grad()
def test_half_precision_inference_is_close(variant):
    model = tiny_model(std=0.1, npr_variant=variant)
    expected = model(**inputs_of(), output_attentions=True)
    output = model.bfloat16()(**inputs_of(), output_attentions=True)
    assert output.image_embeds.dtype == torch.float32
    assert (output.image_embeds - expected.image_embeds).abs().max() < 0.1
    assert (output.grouping.float() - expected.grouping).abs().max() < 0.1


@pytest.mark.parametrize("variant", ["released", "corrected"])
def test_variant_can_be_switched_on_loading(tmp_path, variant):
    other = {"released": "corrected", "corrected": "released"}[variant]
    model = tiny_model(npr_variant=variant, num_text_prototypes=4)
    model.save_pretrained(tmp_path)
    loaded = PGSegModel.from_pretrained(tmp_path, npr_variant=other)
    ours, theirs = loaded.state_dict(), model.state_dict()
    differing = set(ours) ^ set(theirs)
    assert differing == {"text_prototypes", "released_text_prototypes"}
    assert all(torch.equal(ours[name], theirs[name]) for name in set(ours) & set(theirs))
    assert not any(
        "prototype" in name for name in PGSegModel.from_pretrained(tmp_path, npr_variant="none").state_dict()
    )
    with pytest.raises(ValueError, match="npr_variant is 'paper'"):
        PGSegModel.from_pretrained(tmp_path, npr_variant="paper")
    text_prototypes = loaded.get_buffer(loaded.npr.text_buffer)
    norms = text_prototypes.norm(dim=-1 if other == "corrected" else 1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_fresh_prototypes_are_random_unit_rows():
    model = PGSegModel(tiny_config())
    for name, buffer in prototype_buffers(model).items():
        torch.testing.assert_close(buffer.norm(dim=-1), torch.ones_like(buffer[..., 0]), msg=name)
        assert buffer.std() > 0.05
        assert torch.equal(buffer, PGSegModel(tiny_config()).get_buffer(name)), "the same whatever the seed"
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.prototype_logit_scale.item() == pytest.approx(math.log(1 / 0.1))
    stages = model.vision_model.encoder.stages
    assert stages[0].group_token.std() > 0.01
    assert (stages[1].group_token == 0).all()


# Learning


@pytest.mark.parametrize("fields", [*({"npr_variant": variant} for variant in NPR_VARIANTS), PATCHES])
def test_every_parameter_gets_a_gradient(fields):
    model = with_fixed_statistics(tiny_model(num_text_prototypes=4, **fields))
    torch.manual_seed(0)
    model(**inputs_of(8), return_loss=True).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_training_in_bfloat16_autocast():
    model = tiny_model().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs_of(4), return_loss=True)
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()
    output.loss.backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    changed = [
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    ]
    assert len(changed) > 0.9 * len(before)


def test_a_recomputed_stage_moves_its_prototypes_once():
    """Activation checkpointing of whole stages, as with FSDP."""
    from torch.utils.checkpoint import checkpoint

    def one_step(wrapped: bool):
        model = without_noise(tiny_model())
        with_fixed_statistics(model)
        if wrapped:
            for stage in model.vision_model.encoder.stages:
                plain = stage.forward
                stage.forward = lambda *inputs, plain=plain: checkpoint(plain, *inputs, use_reentrant=False)
        model(**inputs_of(), return_loss=True).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return gradients, {name: buffer for name, buffer in model.named_buffers() if "prototypes" in name}

    (gradients, buffers), (recomputed, moved) = one_step(False), one_step(True)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)
    for name, buffer in buffers.items():
        assert torch.equal(moved[name], buffer), name


def test_arguments_that_are_not_used_are_named(caplog, monkeypatch):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"output_segmentation .*post_process_semantic_segmentation"):
        model(**inputs_of(), output_segmentation=True)
    model(**inputs_of(), output_segmentation=False)
    monkeypatch.setattr(logging.getLogger("pgseg_hf"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        model(**inputs_of())
        assert not caplog.records
        model(**inputs_of(), return_los=True)
    assert "not used: return_los" in caplog.text
