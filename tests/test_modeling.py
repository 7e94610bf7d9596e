"""The models: sizes, losses by part, prototypes in training, precision, loading and saving, learning."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    BOS,
    CONTEXT,
    EOS,
    tiny_config,
    tiny_images,
    tiny_model,
    tiny_texts,
    with_fixed_statistics,
    without_noise,
)
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoModel, GroupViTConfig, GroupViTModel

from pgseg_hf.configuration_pgseg import NPR_VARIANTS
from pgseg_hf.layers import (
    PGSegDropPath,
    PGSegLinear,
    PGSegMLP,
    PGSegProjection,
    attention_in_parts,
    mean_of_groups,
)
from pgseg_hf.modeling_pgseg import PGSegModel, PGSegVisionModel
from pgseg_hf.prototypes import updated_prototypes

VARIANTS = pytest.mark.parametrize("variant", NPR_VARIANTS)
SIDES = st.integers(4, 40)


def inputs_of(batch=3, **kwargs):
    return {"input_ids": tiny_texts(batch), "pixel_values": tiny_images(batch)} | kwargs


def prototype_buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "prototypes" in name}


def moved(model, before):
    return {
        name for name, buffer in prototype_buffers(model).items() if not torch.equal(buffer, before[name])
    }


# Any size, any batch


@pytest.fixture(scope="module")
def models():
    return {variant: tiny_model(npr_variant=variant).double() for variant in NPR_VARIANTS}


@settings(max_examples=30)
@given(st.sampled_from(NPR_VARIANTS), st.integers(1, 3), SIDES, SIDES)
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
@given(st.sampled_from(NPR_VARIANTS), st.integers(2, 4), SIDES, SIDES)
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
        (torch.zeros(1, 16, 16, 3), r"shape \[1, 16, 16, 3\]"),
        (torch.zeros(1, 3, 3, 50), "3 x 50 pixels, smaller than a patch of 4 x 4"),
        (torch.zeros(1, 3, 50, 3), "50 x 3 pixels"),
        (torch.full((1, 3, 16, 16), torch.nan), "NaN or infinite"),
        (torch.full((1, 3, 16, 16), -torch.inf), "NaN or infinite"),
    ],
)
def test_bad_pixels_are_refused(pixels, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model.get_image_features(pixels)
    with pytest.raises(ValueError, match=message):
        model(input_ids=tiny_texts(1), pixel_values=pixels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, "input_ids has shape None"),
        ({"input_ids": tiny_texts(2)}, r"one text for each image.*\[3, 2\]"),
        ({"label_input_ids": tiny_texts(3)}, r"label_input_ids has shape \[3, 12\]"),
        ({"label_input_ids": tiny_texts(3)[:, None, :5]}, r"label_input_ids has shape \[3, 1, 5\]"),
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
    # Of the vectors as they are; the mean is normalised afterwards.
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
@given(st.integers(1, 3), st.integers(2, 5), SIDES, SIDES)
@torch.no_grad()
def test_mixture_pooling_is_the_share_that_each_text_is_given(batch, texts, height, width):
    """Of the patches, softly assigned to groups and these to texts."""
    model = tiny_model(contrastive_pooling="mixture", contrastive_loss="sigmoid").double()
    assert model.logit_bias is None
    output = model(tiny_texts(texts), tiny_images(batch, height, width).double())
    names = output.segment_logits.softmax(-1)
    shares = torch.einsum("bkhw,bkn->bhwn", output.grouping, names).flatten(1, 2).mean(1)
    torch.testing.assert_close(
        output.logits_per_image.sigmoid(), shares.clamp(max=1 - 1e-4), rtol=1e-3, atol=1e-4
    )


# Losses


@VARIANTS
@pytest.mark.parametrize("labels", [False, True])
def test_parts_of_the_loss_add_up(variant, labels):
    model = tiny_model(
        npr_variant=variant,
        image_prototype_weight=0.3,
        text_prototype_weight=0.2,
        multi_label_weight=0.7,
        assignment_weight=0.4 if variant == "corrected" else 0.0,
        num_text_prototypes=4,
    ).double()
    arguments = inputs_of(pixel_values=tiny_images(3).double())
    if labels:
        arguments["label_input_ids"] = tiny_texts(6, words=2, seed=1).unflatten(0, (3, 2))
    output = model(**arguments, return_loss=True)
    expected = output.contrastive_loss
    assert (output.multi_label_loss is not None) == labels
    if labels:
        expected = expected + 0.7 * output.multi_label_loss
    if variant == "none":
        assert output.image_prototype_loss is output.text_prototype_loss is None
    else:
        assert len(output.image_prototype_losses) == 2
        torch.testing.assert_close(output.image_prototype_loss, sum(output.image_prototype_losses))
        expected = expected + 0.3 * output.image_prototype_loss + 0.2 * output.text_prototype_loss
    assert (output.assignment_loss is not None) == (variant == "corrected")
    if variant == "corrected":
        expected = expected + 0.4 * output.assignment_loss
    torch.testing.assert_close(output.loss, expected, equal_nan=variant == "released")


@VARIANTS
def test_equal_texts_pass_the_transformer_once(variant):
    """And the padding after the longest does not. The losses and gradients are those of all passes over all tokens, which
    is what `output_hidden_states` gets."""
    model = without_noise(tiny_model(npr_variant=variant, num_text_prototypes=4)).double()
    model.config.contrastive_loss = "multi_positive"
    shapes = []
    model.text_model.register_forward_pre_hook(
        lambda module, arguments, fields: shapes.append(tuple(fields["input_ids"].shape)), with_kwargs=True
    )
    labels = tiny_texts(2, words=[3, 6], seed=1)[torch.tensor([0, 1, 0, 0, 1, 1])].unflatten(0, (3, 2))
    captions = tiny_texts(2)[torch.tensor([0, 1, 0])]
    results = []
    for details in (False, True):
        torch.manual_seed(0)
        fresh = copy.deepcopy(model).train()
        output = fresh(
            captions,
            tiny_images(3).double(),
            attention_mask=torch.ones_like(captions),
            label_input_ids=labels,
            return_loss=True,
            output_hidden_states=details,
        )
        output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in fresh.named_parameters()}
        results.append((output.loss, output.text_embeds, gradients, dict(fresh.named_buffers())))
    assert shapes == [(4, 1 + 6 + 1), (9, CONTEXT)]
    torch.testing.assert_close(results[0], results[1], equal_nan=True)


def test_texts_without_an_end_keep_all_their_tokens():
    model = tiny_model().train()
    texts = tiny_texts(3)
    texts[1] = texts[1].masked_fill(texts[1] == model.config.text_config.eos_token_id, 5)
    shapes = []
    model.text_model.register_forward_pre_hook(
        lambda module, arguments, fields: shapes.append(tuple(fields["input_ids"].shape)), with_kwargs=True
    )
    assert model(texts, tiny_images(3), return_loss=True).loss.isfinite()
    assert shapes == [(3, CONTEXT)]


def test_no_losses_unless_asked_for():
    output = tiny_model()(**inputs_of())
    assert output.loss is None
    assert output.contrastive_loss is None
    assert output.vision_model_output.npr is None
    assert all(isinstance(value, (torch.Tensor, tuple)) for value in output.to_tuple())


def test_each_image_as_its_own_text_is_the_plain_contrastive_loss(models):
    arguments = inputs_of(pixel_values=tiny_images(3).double())
    plain, targeted = (
        models["corrected"](**arguments, text_targets=targets, return_loss=True)
        for targets in (None, torch.eye(3))
    )
    torch.testing.assert_close(targeted.contrastive_loss, plain.contrastive_loss)


def test_shared_texts_may_come_in_any_order_and_number(models):
    texts, order = tiny_texts(5), [3, 0, 4, 1, 2]
    targets = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    losses = [
        models["corrected"](
            **inputs_of(pixel_values=tiny_images(3).double(), input_ids=ids, text_targets=chosen),
            return_loss=True,
        )
        for ids, chosen in ((texts, targets), (texts[order], targets[:, order]))
    ]
    torch.testing.assert_close(losses[0].contrastive_loss, losses[1].contrastive_loss)
    assert all(loss.loss.isfinite() for loss in losses)


def test_absent_labels_do_not_matter(models):
    labels, mask = tiny_texts(6, words=2, seed=1).unflatten(0, (3, 2)), torch.ones(3, 2, 12, dtype=torch.long)
    mask[1, 1] = 0
    more = torch.cat([labels, tiny_texts(6, words=3, seed=2).unflatten(0, (3, 2))], 1)
    more_mask = torch.cat([mask, torch.zeros_like(mask)], 1)
    garbage = labels.clone()
    garbage[1, 1] = tiny_texts(1, words=9, seed=3)[0]
    outputs = [
        models["corrected"](
            **inputs_of(pixel_values=tiny_images(3).double()),
            label_input_ids=ids,
            label_attention_mask=used,
            return_loss=True,
        )
        for ids, used in ((labels, mask), (more, more_mask), (garbage, mask))
    ]
    for output in outputs[1:]:
        for name in ("loss", "multi_label_loss", "contrastive_loss", "text_prototype_loss"):
            torch.testing.assert_close(output[name], outputs[0][name])
    unmasked = models["corrected"](
        **inputs_of(pixel_values=tiny_images(3).double()), label_input_ids=labels, return_loss=True
    )
    assert not torch.isclose(unmasked.multi_label_loss, outputs[0].multi_label_loss)


@pytest.mark.parametrize("words", [0, 1, [0, 1, 10]])
def test_captions_of_few_words_have_finite_losses(words):
    model = without_noise(tiny_model().train())
    output = model(**inputs_of(input_ids=tiny_texts(3, words)), return_loss=True)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if words == 0:
        assert output.text_prototype_loss == 0


def test_text_prototypes_are_estimated_from_an_images_own_words(models):
    # Another caption's words, or the special tokens, do not matter to an image's text prototypes.
    model = models["corrected"]
    ids = tiny_texts(2, words=[5, 3])
    features = model.encode_part(input_ids=ids)
    tokens, mask = features.words, features.word_mask
    assert mask.sum(1).tolist() == [5, 3]
    assert mask[:, 0].tolist() == [False, False]
    states = model.text_model(input_ids=ids[1:]).last_hidden_state[0, 1:4]
    torch.testing.assert_close(tokens[1, 1:4], model.text_projection(states))
    assert (ids[~mask] >= BOS).all()
    assert (ids[mask] < EOS).all()
    assert not tokens.requires_grad


def test_corrected_text_loss_teaches_the_segment_tokens(models):
    model = tiny_model(text_prototype_weight=1.0)
    model(**inputs_of(), return_loss=True).text_prototype_loss.backward()
    assert model.visual_projection[3].weight.grad.abs().max() > 0
    assert model.text_projection[3].weight.grad is None
    released = tiny_model(npr_variant="released", num_text_prototypes=4)
    released(**inputs_of(), return_loss=True).text_prototype_loss.backward()
    assert released.visual_projection[3].weight.grad is None
    assert released.prototype_logit_scale.grad is not None


def test_released_text_prototypes_need_as_many_groups():
    with pytest.raises(ValueError, match=r"\[3, 4\] images x groups, \[3, 8\] texts x prototypes"):
        tiny_model(npr_variant="released")(**inputs_of(), return_loss=True)


# Stochastic depth


def test_drop_path_leaves_out_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = PGSegDropPath(0.25).train()
    x = torch.ones(4000, 2, 3)
    y = drop(x)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y, (kept[:, None, None] / 0.75).expand_as(y))
    assert abs(kept.float().mean() - 0.75) < 0.03
    assert drop.eval()(x) is x
    assert PGSegDropPath(0.0).train()(x) is x


def test_drop_path_rises_linearly_over_the_blocks():
    config = tiny_config(
        vision_config={"depths": [3, 2, 1], "num_hidden_layers": None, "drop_path_rate": 0.1}
    )
    model = PGSegVisionModel(config.vision_config)
    rates = [layer.drop_path.rate for stage in model.encoder.stages for layer in stage.layers]
    assert rates == pytest.approx([0.0, 0.02, 0.04, 0.06, 0.08, 0.1])


# Grouping in training


def test_gumbel_noise_is_standard():
    torch.manual_seed(0)
    assign = tiny_model().vision_model.encoder.stages[0].downsample.assign
    noise = assign.sample_noise(torch.zeros(100, 20, 50, dtype=torch.float64))
    assert noise.shape == (100, 20, 50)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_assignment_is_hard_with_the_gradient_of_the_soft_one():
    assign = tiny_model().vision_model.encoder.stages[0].downsample.assign.double().eval()
    with torch.no_grad():
        for linear in (assign.v_proj, assign.proj):
            linear.weight.copy_(torch.eye(16))
            linear.bias.zero_()
    centers = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(2, 9, 16, dtype=torch.float64)
    pooled, logits = assign(centers, tokens)
    chosen = nn.functional.one_hot(logits.argmax(1), 5).double().transpose(1, 2)
    torch.testing.assert_close(pooled, chosen @ tokens / (chosen.sum(2, keepdim=True) + 1))
    weights = torch.randn_like(pooled)
    (ours,) = torch.autograd.grad((pooled * weights).sum(), centers)
    # The same forward value, by hand: soft assignments whose value is moved to the hard ones as a constant.
    logits = assign(centers, tokens)[1]
    soft = logits.softmax(1)
    straight = soft + (chosen - soft).detach()
    expected = straight / (straight.sum(2, keepdim=True) + 1) @ tokens
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weights).sum(), centers)[0])
    assert ours.abs().max() > 0


# Prototypes


def test_corrected_prototypes_move_in_training_with_gradient_alone():
    model = tiny_model()
    before = prototype_buffers(model)
    assert set(before) == {
        "text_prototypes",
        "vision_model.encoder.stages.0.npr.prototypes",
        "vision_model.encoder.stages.1.npr.prototypes",
    }
    model(**inputs_of(), return_loss=True)
    with torch.no_grad():
        model.train()(**inputs_of(), return_loss=True)
    assert moved(model, before) == set()
    model(**inputs_of(), return_loss=True)
    assert moved(model, before) == set(before)
    for buffer in prototype_buffers(model).values():
        torch.testing.assert_close(buffer.norm(dim=-1), torch.ones_like(buffer[..., 0]))


def test_prototypes_move_to_the_mean_of_the_batch_once_a_forward():
    model = tiny_model().train()
    stage, before = model.vision_model.encoder.stages[0], prototype_buffers(model)
    seen = []
    stage.register_forward_hook(lambda module, args, output: seen.append(output[3][1]))
    model.vision_model(tiny_images(3))
    old = before["vision_model.encoder.stages.0.npr.prototypes"][0]
    torch.testing.assert_close(stage.npr.prototypes[0], updated_prototypes(old, seen[0].mean(0), 0.9))
    torch.testing.assert_close(stage.npr.prototypes[0], normalize(0.9 * old + 0.1 * seen[0].mean(0), dim=-1))


def test_text_prototypes_that_no_text_has_stay():
    model = tiny_model().train()
    before = model.text_prototypes.clone()
    model(**inputs_of(input_ids=tiny_texts(3, words=[1, 2, 2])), return_loss=True)
    assert torch.equal(model.text_prototypes[:, 2:], before[:, 2:])
    assert not torch.isclose(model.text_prototypes[:, :2], before[:, :2]).all(-1).any()


@pytest.mark.parametrize("training", [False, True])
def test_released_text_prototypes_move_at_every_call_and_image_prototypes_never(training):
    model = tiny_model(npr_variant="released", num_text_prototypes=4).train(training)
    before = prototype_buffers(model)
    model.get_image_features(tiny_images(2))
    assert moved(model, before) == set()
    with torch.no_grad():
        model.get_text_features(tiny_texts(5))
    assert moved(model, before) == {"released_text_prototypes"}
    # One call with many prompts is one update.
    once = model.released_text_prototypes.clone()
    model.released_text_prototypes.copy_(before["released_text_prototypes"])
    with torch.no_grad():
        model.get_text_features(tiny_texts(5)[None])
    assert torch.equal(model.released_text_prototypes, once)
    model(**inputs_of(), return_loss=True)
    assert moved(model, before) == {"released_text_prototypes"}


def test_gradient_reaches_the_projection_of_prototypes_but_not_their_estimation():
    stage = tiny_model().vision_model.encoder.stages[0].double()
    for released in (False, True):
        stage.npr.released = released
        tokens = torch.randn(2, 16, 16, dtype=torch.float64, requires_grad=True)
        part = stage.npr.reconstruct(stage.npr.estimate(tokens, stage.npr.prototypes), tokens.dtype)
        stage.zero_grad()
        part.square().sum().backward()
        assert tokens.grad is None
        assert stage.npr.projection[3].weight.grad.abs().max() > 0


@torch.no_grad()
def test_size_of_the_prototypes_part_at_higher_resolution():
    sizes = {}
    for variant in ("released", "corrected"):
        npr = tiny_model(npr_variant=variant, num_text_prototypes=4).vision_model.encoder.stages[0].npr
        for layer in (npr.projection[0], npr.projection[1], npr.projection[3]):
            layer.bias.zero_()
        few, many = torch.randn(8, 36, 16), torch.randn(8, 36 * 16, 16)
        small, large = (
            npr.reconstruct(npr.estimate(tokens, npr.prototypes), tokens.dtype).std().item()
            for tokens in (few, many)
        )
        sizes[variant] = large / small
    assert sizes["corrected"] == pytest.approx(1, abs=0.25)
    assert sizes["released"] < 0.3


@torch.no_grad()
def test_corrected_part_is_the_mapped_prototypes_mixed_by_the_responsibilities(models):
    npr = models["corrected"].vision_model.encoder.stages[0].npr
    estimate = npr.estimate(torch.randn(2, 20, 16, dtype=torch.float64), npr.prototypes)
    expected = torch.zeros(2, 20, 16, dtype=torch.float64)
    for index in range(6):
        mapped = npr.projection(estimate.prototypes[:, index])
        expected += estimate.responsibilities[:, :, index, None] * mapped[:, None]
    torch.testing.assert_close(npr.reconstruct(estimate, torch.float64), expected)


@torch.no_grad()
def test_part_mixed_by_tokens_is_the_released_one_in_the_corrected_variant():
    tokens = torch.randn(2, 20, 16, dtype=torch.float64)
    parts = []
    for variant, mixing in (("released", "prototypes"), ("corrected", "tokens"), ("corrected", "prototypes")):
        model = tiny_model(
            npr_variant=variant, vision_config={"prototype_mixing": mixing}, num_text_prototypes=4
        )
        npr = model.double().vision_model.encoder.stages[0].npr
        npr.projection.load_state_dict(
            parts[0][0].projection.state_dict() if parts else npr.projection.state_dict()
        )
        parts.append((npr, npr.reconstruct(npr.estimate(tokens, npr.prototypes), torch.float64)))
    torch.testing.assert_close(parts[1][1], parts[0][1])
    assert (parts[2][1] - parts[0][1]).abs().max() > 0.01


def test_matching_in_order_changes_the_prototype_losses_alone():
    """Both levels; where the best matching is another one, the loss in order is larger."""
    inputs = inputs_of(pixel_values=tiny_images(3).double())
    best, ordered, released = (
        without_noise(
            tiny_model(prototype_matching=matching, npr_variant=variant, num_text_prototypes=4)
        ).double()(**inputs, return_loss=True)
        for matching, variant in (("hungarian", "corrected"), ("order", "corrected"), ("order", "released"))
    )
    torch.testing.assert_close(ordered.contrastive_loss, best.contrastive_loss)
    assert all(mine > its for mine, its in zip(ordered.image_prototype_losses, best.image_prototype_losses))
    assert ordered.text_prototype_loss != best.text_prototype_loss
    default = without_noise(tiny_model(npr_variant="released", num_text_prototypes=4)).double()
    expected = default(**inputs, return_loss=True).image_prototype_loss
    torch.testing.assert_close(released.image_prototype_loss, expected, equal_nan=True)


PATCHES = {"vision_config": {"segment_source": "patches"}}


@pytest.mark.parametrize("variant", ["none", "corrected"])
@torch.no_grad()
def test_segments_are_the_means_of_the_first_stages_patches(variant):
    """By the soft assignment to the last stage's groups, at another size than the configured one."""
    model = without_noise(tiny_model(npr_variant=variant, **PATCHES)).double().vision_model
    grouped = []
    model.encoder.stages[0].downsample.register_forward_pre_hook(
        lambda module, arguments: grouped.append(arguments[0])
    )
    output = model(tiny_images(3, 24, 40).double(), output_hidden_states=True)
    weights = output.grouping.flatten(2)
    assert weights.shape[1] == 4
    means = torch.einsum("bkl,blc->bkc", weights, grouped[0]) / weights.sum(2, keepdim=True)
    torch.testing.assert_close(output.hidden_states[2], means, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(
        output.hidden_states[2], means, rtol=1e-6, atol=1e-6
    )  # 1e-3 more in the denominator
    blocks = model.encoder.stages[2](output.hidden_states[2], None)[0]
    torch.testing.assert_close(output.last_hidden_state, model.layernorm(blocks))


@torch.no_grad()
def test_a_group_without_patches_has_a_mean_near_zero():
    assignment = torch.tensor([[[1.0, 1.0, 0.5], [1e-9, 0.0, 1e-9]]])
    means = mean_of_groups(torch.tensor([[[2.0], [4.0], [6.0]]]), assignment)
    torch.testing.assert_close(means, torch.tensor([[[9 / 2.501], [8e-9 / 0.001]]]))


def test_default_width_of_the_projection_of_prototypes():
    config = tiny_config(vision_config={"prototype_projection_dim": None, "intermediate_size": 48})
    stages = PGSegVisionModel(config.vision_config).encoder.stages
    assert [stage.npr.projection[0].out_features for stage in stages[:2]] == [128] * 2


def test_initial_weights_are_the_released_ones():
    """Those too that modules without tensors of their own set, which transformers leaves out for code like ours."""
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    model = PGSegModel(tiny_config(text_config=text, projection_intermediate_dim=256))
    for linear in (model.visual_projection[0], model.text_projection[3]):
        bound = linear.in_features**-0.5
        for tensor in (linear.weight, linear.bias):
            assert 0.8 * bound < tensor.abs().max() <= bound
    layer = model.text_model.encoder.layers[0]
    assert layer.mlp.fc1.weight.std().item() == pytest.approx((2 * 64) ** -0.5, rel=0.05)
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(64**-0.5 * (2 * 2) ** -0.5, rel=0.05)


def test_prototypes_start_the_same_whatever_the_seed():
    first, second = (tiny_model(seed).state_dict() for seed in (0, 1))
    for name in ("text_prototypes", "vision_model.encoder.stages.0.npr.prototypes"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name].norm(dim=-1), torch.ones(first[name].shape[:2]))


def test_projection_by_running_statistics():
    projection = PGSegProjection(4, 6, 3)
    x = torch.randn(20, 4)
    for _ in range(3):
        projection.train()(x + torch.randn(20, 4))
    before = {name: buffer.clone() for name, buffer in projection.named_buffers()}
    frozen = projection.train()(x, use_running_stats=True)
    assert all(torch.equal(buffer, before[name]) for name, buffer in projection.named_buffers())
    torch.testing.assert_close(frozen, projection.eval()(x))
    assert not torch.allclose(frozen, projection.train()(x))


# GroupViT


@pytest.fixture(scope="module")
def groupvit(tmp_path_factory):
    torch.manual_seed(0)
    config = GroupViTConfig(
        text_config={
            "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 12, "bos_token_id": 48, "eos_token_id": 49,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "depths": [2, 1, 1], "num_hidden_layers": 4,
            "num_group_tokens": [6, 4, 0], "num_output_groups": [6, 4, 0], "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4,
        },
        projection_dim=8, projection_intermediate_dim=24,
    )  # fmt: skip
    model = GroupViTModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit_scale" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("groupvit")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("variant", ["none", "released", "corrected"])
@torch.no_grad()
def test_without_the_prototypes_part_it_is_groupvit(groupvit, variant):
    theirs, folder = groupvit
    ours = PGSegModel.from_groupvit(str(folder), npr_variant=variant)
    for stage in ours.vision_model.encoder.stages[:2]:
        if stage.npr is not None:
            stage.npr.projection[3].weight.zero_()
            stage.npr.projection[3].bias.zero_()
    images, ids = tiny_images(3), tiny_texts(3)
    vision, expected = ours.vision_model(images), theirs.vision_model(images)
    torch.testing.assert_close(vision.last_hidden_state, expected.last_hidden_state, rtol=0, atol=5e-6)
    torch.testing.assert_close(vision.pooler_output, expected.pooler_output, rtol=0, atol=5e-6)
    exact = [model.double()(input_ids=ids, pixel_values=images.double()) for model in (ours, theirs)]
    for name in ("logits_per_image", "text_embeds", "image_embeds"):
        torch.testing.assert_close(exact[0][name], exact[1][name], rtol=1e-10, atol=1e-10)
    theirs.float()


def test_warm_start_names_what_is_new(groupvit, caplog):
    with caplog.at_level("WARNING"):
        model = PGSegModel.from_groupvit(str(groupvit[1]), image_prototype_weight=0.5)
    new = {name for name in model.state_dict() if "npr" in name or "prototype" in name}
    assert model.config.image_prototype_weight == 0.5
    assert all(name in caplog.text for name in new if not name.endswith("num_batches_tracked"))
    assert "patch_embeddings" not in caplog.text
    rest = set(model.state_dict()) - new
    assert rest == set(groupvit[0].state_dict())


@pytest.mark.parametrize("variant", ["none", "corrected"])
def test_warm_start_leaves_out_what_means_of_patches_have_no_use_for(groupvit, variant, tmp_path):
    model = PGSegModel.from_groupvit(str(groupvit[1]), npr_variant=variant, **PATCHES)
    left_out = set(groupvit[0].state_dict()) - set(model.state_dict())
    assert {name.split("stages.")[1].split(".", 3)[0:3][0] for name in left_out} == {"1"}
    assert {name.split("downsample.")[1].rsplit(".", 1)[0] for name in left_out} == {
        "assign.v_proj",
        "assign.proj",
        "norm_new_x",
        "mlp_channels.fc1",
        "mlp_channels.fc2",
    }
    model.save_pretrained(tmp_path)
    assert_same_tensors(PGSegModel.from_pretrained(tmp_path), model)


def test_warm_start_refuses_other_models(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'pgseg' checkpoint, expected 'groupvit'"):
        PGSegModel.from_groupvit(str(tmp_path))


# Loading and saving


def assert_same_tensors(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == theirs.state_dict()[name].dtype, name
        assert torch.equal(tensor, theirs.state_dict()[name]), name


@VARIANTS
@pytest.mark.parametrize("shard", [None, "10KB"])
def test_round_trip_bit_for_bit(tmp_path, variant, shard):
    model = tiny_model(npr_variant=variant)
    model.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard is not None)
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


def test_towers_load_from_a_joint_checkpoint(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert_same_tensors(PGSegVisionModel.from_pretrained(tmp_path), model.vision_model)
    assert_same_tensors(type(model.text_model).from_pretrained(tmp_path), model.text_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["released", "corrected"])
def test_prototypes_stay_in_float32(tmp_path, dtype, variant):
    model = tiny_model(npr_variant=variant, num_text_prototypes=4)
    expected = prototype_buffers(model)
    model.save_pretrained(tmp_path / "float32")
    loaded = PGSegModel.from_pretrained(tmp_path / "float32", dtype=dtype)
    loaded.save_pretrained(tmp_path / "half")
    candidates = {
        "dtype=": loaded,
        "saved in half": PGSegModel.from_pretrained(tmp_path / "half", dtype="auto"),
        ".to": tiny_model(npr_variant=variant, num_text_prototypes=4).to(dtype),
        ".to of a part": tiny_model(npr_variant=variant, num_text_prototypes=4),
        ".half or .bfloat16": tiny_model(npr_variant=variant, num_text_prototypes=4),
    }
    candidates[".to of a part"].vision_model.to(dtype)
    half = candidates[".half or .bfloat16"]
    half.half() if dtype == torch.float16 else half.bfloat16()
    for name, candidate in candidates.items():
        assert candidate.vision_model.dtype == dtype, name
        for buffer_name, buffer in prototype_buffers(candidate).items():
            assert buffer.dtype == torch.float32, (name, buffer_name)
            assert torch.equal(buffer, expected[buffer_name]), (name, buffer_name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@VARIANTS
@torch.no_grad()
def test_half_precision_inference_is_close(dtype, variant):
    model = tiny_model(std=0.1, npr_variant=variant)
    expected = model(**inputs_of(), output_attentions=True)
    output = model.to(dtype)(**inputs_of(), output_attentions=True)
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
    text_prototypes = loaded.get_buffer(loaded._text_prototype_name)
    norms = text_prototypes.norm(dim=-1 if other == "corrected" else 1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_fresh_prototypes_are_random_unit_rows():
    model = PGSegModel(tiny_config())
    for name, buffer in prototype_buffers(model).items():
        torch.testing.assert_close(buffer.norm(dim=-1), torch.ones_like(buffer[..., 0]), msg=name)
        assert buffer.std() > 0.05
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.prototype_logit_scale.item() == pytest.approx(math.log(1 / 0.1))
    stages = model.vision_model.encoder.stages
    assert stages[0].group_token.std() > 0.01
    assert (stages[1].group_token == 0).all()


# Attention, checkpointing, compilation


@torch.no_grad()
def test_attention_implementations_agree(models):
    arguments = inputs_of(pixel_values=tiny_images(3, 24, 20).double())
    outputs = []
    for name in ("eager", "sdpa"):
        models["corrected"].set_attn_implementation(name)
        outputs.append(models["corrected"](**arguments))
    torch.testing.assert_close(outputs[0].logits_per_image, outputs[1].logits_per_image)
    torch.testing.assert_close(outputs[0].grouping, outputs[1].grouping)


def test_attention_in_parts_equals_attention(monkeypatch):
    query, key, value = (torch.randn(3, 2, length, 4).double() for length in (5, 7, 7))
    expected = nn.functional.scaled_dot_product_attention(query, key, value, scale=0.7).transpose(1, 2)
    for entries in (1, 4 * 35, 2**20):  # one head at a time, four of the six, all
        monkeypatch.setattr("pgseg_hf.layers._CACHED_SCORES", entries)
        torch.testing.assert_close(attention_in_parts(query, key, value, 0.7), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("gelu", [False, True])
def test_linear_layers_give_the_same_without_gradient(dtype, tolerance, gelu):
    torch.manual_seed(0)
    layer = PGSegLinear(24, 40).to(dtype).eval()
    for x in (torch.randn(2, 5, 24), torch.randn(24, 7).T, torch.randn(0, 24), torch.randn(24)):
        x = x.to(dtype)
        with_gradient = layer(x, gelu=gelu)
        assert with_gradient.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(layer(x, gelu=gelu), with_gradient, rtol=0, atol=tolerance)
            expected = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
            expected = nn.functional.gelu(expected) if gelu else expected
            torch.testing.assert_close(layer(x, gelu=gelu).float(), expected, rtol=0, atol=2 * tolerance)


def test_linear_layers_in_training_are_bit_for_bit_the_same_without_gradient():
    torch.manual_seed(0)
    layer, x = PGSegLinear(24, 40), torch.randn(7, 24)
    with torch.no_grad():
        without_gradient = layer(x, gelu=True)
    assert torch.equal(layer(x, gelu=True), without_gradient)


def test_a_changed_layer_of_an_mlp_is_called_as_every_module():
    class Adapted(nn.Module):
        """As adapters wrap a layer: another path beside it."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + 1.0

    mlp = PGSegMLP(tiny_config().vision_config, 4, 6, 4)
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = mlp.fc2(nn.functional.gelu(mlp.fc1(x) + 1.0))
        mlp.fc1 = Adapted(mlp.fc1)
        torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("mixing", ["released", "tokens"])
def test_mixing_after_the_first_layer_changes_nothing(mixing):
    fields = {"npr_variant": "released"} if mixing == "released" else {}
    vision = {} if mixing == "released" else {"prototype_mixing": mixing}
    model = tiny_model(**fields, vision_config=vision).double()
    npr = model.vision_model.encoder.stages[0].npr
    norm = npr.projection[1]
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    estimate = npr.estimate(torch.randn(2, 9, 16).double(), npr.seeds())
    expected = npr.reconstruct(estimate, torch.float64)  # with gradient: mixed, then projected
    with torch.no_grad():
        torch.testing.assert_close(npr.reconstruct(estimate, torch.float64), expected)


@pytest.mark.parametrize(
    ("reentrant", "source"), [(False, "groups"), (True, "groups"), (False, "patches"), (True, "patches")]
)
def test_gradient_checkpointing_changes_nothing(reentrant, source):
    results = []
    for checkpointing in (False, True):
        vision = {"drop_path_rate": 0.2, "segment_source": source}
        model = tiny_model(assignment_weight=0.1, vision_config=vision).double().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_activation_checkpointing
        torch.manual_seed(3)
        arguments = inputs_of(pixel_values=tiny_images(3).double())
        output = model(**arguments, label_input_ids=tiny_texts(6).unflatten(0, (3, 2)), return_loss=True)
        output.loss.backward()
        results.append((model, output.loss))
    (plain, loss), (checkpointed, other_loss) = results
    torch.testing.assert_close(loss, other_loss)
    gradients = {name: parameter.grad for name, parameter in checkpointed.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:
            assert gradients[name] is None, name
        else:
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    for (name, buffer), other in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)


@pytest.mark.parametrize("variant", NPR_VARIANTS)
@torch.no_grad()
def test_evaluation_compiles_without_graph_breaks(variant):
    torch.compiler.reset()
    model = tiny_model(npr_variant=variant)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = tiny_model(npr_variant=variant)(**inputs_of())
    output = compiled(**inputs_of())
    torch.testing.assert_close(output.logits_per_image, expected.logits_per_image)
    torch.testing.assert_close(output.grouping, expected.grouping)


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


@pytest.mark.parametrize("pooling", ["mean", "groups"])
@pytest.mark.parametrize("variant", ["none", "corrected"])
def test_a_handful_of_pairs_is_learnt(variant, pooling):
    torch.manual_seed(0)
    model = PGSegModel(tiny_config(npr_variant=variant, contrastive_pooling=pooling)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    arguments, losses = inputs_of(6), []
    for _ in range(60):
        output = model(**arguments, return_loss=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.contrastive_loss.item())
    assert losses[0] > 1.5
    assert sum(losses[-5:]) / 5 < 0.5


def test_a_recomputed_stage_moves_its_prototypes_once():
    """Activation checkpointing of whole stages, as FSDP may do it."""
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


def test_single_shared_text_gives_prototypes_of_its_words():
    model = without_noise(tiny_model()).eval()
    inputs = inputs_of()
    by_captions = model(**inputs, return_loss=True).text_prototype_loss
    identity = torch.eye(len(inputs["input_ids"]), dtype=torch.bool)
    torch.testing.assert_close(
        model(**inputs, text_targets=identity, return_loss=True).text_prototype_loss, by_captions
    )
