"""The losses of a batch: their parts, shared and missing texts, text prototypes."""

import copy
import warnings

import pytest
import torch
from tiny_models import (
    BOS,
    CONTEXT,
    EOS,
    VARIANTS,
    inputs_of,
    tiny_images,
    tiny_model,
    tiny_texts,
    without_noise,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging

from pgseg_hf import objective
from pgseg_hf.features import TextFeatures, TextOwners, log_odds_of_being_seen
from pgseg_hf.npr import own_texts
from pgseg_hf.prototypes import match_on_device


@VARIANTS
def test_parts_of_the_loss_add_up(variant):
    model = tiny_model(
        npr_variant=variant,
        image_prototype_weight=0.3,
        text_prototype_weight=0.2,
        multi_label_weight=0.7,
        assignment_weight=0.4 if variant == "corrected" else 0.0,
        num_text_prototypes=4,
    ).double()
    arguments = inputs_of(pixel_values=tiny_images(3).double())
    output = model(**arguments)
    assert output.loss is output.contrastive_loss is output.vision_model_output.npr is None
    labels = tiny_texts(6, words=2, seed=1).unflatten(0, (3, 2))
    output = model(**arguments, tag_input_ids=labels, return_loss=True)
    expected = output.contrastive_loss + 0.7 * output.multi_label_loss
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
    """The padding after the longest text is skipped too. Losses and gradients equal those without skipping, which is
    how `output_hidden_states` runs."""
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
            tag_input_ids=labels,
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


@pytest.mark.parametrize("looks", [1, 8, 1e4])
def test_log_odds_of_being_seen_hold_for_shares_of_any_size(looks):
    shares = torch.logspace(-100, -0.1, 300, dtype=torch.float64)
    exact = torch.log(-torch.expm1(looks * torch.log1p(-shares))) - looks * torch.log1p(-shares)
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-5)):
        log_shares = shares.log().to(dtype).requires_grad_()
        odds = log_odds_of_being_seen(log_shares, looks)
        torch.testing.assert_close(odds.double(), exact, rtol=tolerance, atol=tolerance)
        odds.sum().backward()
        assert (log_shares.grad > 0.999).all() and log_shares.grad.isfinite().all()
    whole = log_odds_of_being_seen(torch.zeros(1), looks)
    assert whole.isfinite() and whole > 9


def test_each_image_as_its_own_text_has_the_plain_losses(models):
    arguments = inputs_of(pixel_values=tiny_images(3).double())
    plain, targeted = (
        models["corrected"](**arguments, text_targets=targets, return_loss=True)
        for targets in (None, torch.eye(3))
    )
    assert plain.multi_label_loss is None
    torch.testing.assert_close(targeted.contrastive_loss, plain.contrastive_loss)
    torch.testing.assert_close(targeted.text_prototype_loss, plain.text_prototype_loss)


def test_a_batch_of_images_without_any_text_has_finite_losses(models):
    inputs = inputs_of(pixel_values=tiny_images(3).double(), text_targets=torch.zeros(3, 3))
    output = models["corrected"](**inputs, return_loss=True)
    assert output.contrastive_loss == 0 and output.text_prototype_loss == 0 and output.loss.isfinite()


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
            tag_input_ids=ids,
            tag_attention_mask=used,
            return_loss=True,
        )
        for ids, used in ((labels, mask), (more, more_mask), (garbage, mask))
    ]
    for output in outputs[1:]:
        for name in ("loss", "multi_label_loss", "contrastive_loss", "text_prototype_loss"):
            torch.testing.assert_close(output[name], outputs[0][name])
    unmasked = models["corrected"](
        **inputs_of(pixel_values=tiny_images(3).double()), tag_input_ids=labels, return_loss=True
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
    # The words of other captions and special tokens do not affect an image's text prototypes.
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


def test_text_prototypes_are_estimated_from_labels_where_an_image_has_several():
    words, joint = torch.randn(5, 4, 8), torch.randn(5, 8)
    word_mask = torch.tensor([[False, True, True, False]] * 5)
    texts = TextFeatures(joint, torch.zeros(5, 4), joint, words, word_mask)
    owners = TextOwners(2, label_mask=torch.tensor([[True, True], [True, False]]))
    tokens, mask = own_texts(texts, owners)
    assert torch.equal(tokens[0][mask[0]], joint[2:4])
    assert torch.equal(tokens[1][mask[1]], words[1, 1:3])


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


def test_nan_prototype_losses_of_the_released_variant_are_said_once_in_training(caplog):
    logging.enable_propagation()
    objective.logger.warning_once.cache_clear()
    groups = {"num_group_tokens": [6, 8, 0], "num_output_groups": [6, 8, 0]}
    model = tiny_model(npr_variant="released", vision_config=groups).train()
    try:
        with caplog.at_level("WARNING"):
            assert model(**inputs_of(4), return_loss=True).loss.isnan()
            assert "guard_prototype_losses=True" in caplog.text
            model.config.guard_prototype_losses = True
            assert model(**inputs_of(4), return_loss=True).loss.isfinite()
    finally:
        logging.disable_propagation()


# Waiting for a GPU


class Waits(TorchDispatchMode):
    """Records the operators that on a GPU wait for a value or for an unknown number of values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if name in self.NAMES or by_mask:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def _from_images_to_gradients(model, images, texts, owners):
    features = model.encode_part(pixel_values=images)
    objective.compute_losses(model, features, texts, owners).total.backward()


def _training_parts(device, **fields):
    """A model, images, text features and their owners: the state of a training step after the texts."""
    model = tiny_model(**fields).to(device).train()
    labels, mask = tiny_texts(6, words=2, seed=1).unflatten(0, (3, 2)), torch.ones(3, 2, 12, dtype=torch.long)
    mask[1, 1] = 0
    inputs = inputs_of()
    ids, attention_mask, owners = model.gather_texts(
        inputs["input_ids"].to(device),
        tag_input_ids=labels.to(device),
        tag_attention_mask=mask.to(device),
    )
    texts = model.encode_part(input_ids=ids, attention_mask=attention_mask)
    return model, inputs["pixel_values"].to(device), texts, owners


@pytest.mark.parametrize("fields", [{}, {"assignment_weight": 0.2, "contrastive_pooling": "groups"}])
def test_after_the_texts_nothing_waits_for_a_gpu(fields, monkeypatch):
    """Runs on the CPU and checks for operators that would wait on a GPU."""
    parts = _training_parts("cpu", **fields)
    monkeypatch.setattr("pgseg_hf.prototypes.match_prototypes", match_on_device)
    monkeypatch.setattr("pgseg_hf.modeling_vision._refuse_unfinite", lambda *_: None)
    with Waits() as waits:
        _from_images_to_gradients(*parts)
    assert not waits.seen


def _whole_step(device):
    model = tiny_model().to(device).train()
    inputs = inputs_of() | {"tag_input_ids": tiny_texts(6, words=2, seed=1).unflatten(0, (3, 2))}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return lambda: model(**inputs, return_loss=True).loss.backward()


def test_a_step_asks_a_few_things_about_its_texts(monkeypatch):
    """Where they start and end, which are present, how many are distinct, and which tokens are words."""
    monkeypatch.setattr("pgseg_hf.prototypes.match_prototypes", match_on_device)
    monkeypatch.setattr("pgseg_hf.modeling_vision._refuse_unfinite", lambda *_: None)
    step = _whole_step("cpu")
    with Waits() as waits:
        step()
    assert 0 < len(waits.seen) <= 7


@pytest.mark.gpu
def test_a_step_waits_for_the_gpu_a_few_times():
    step = _whole_step("cuda")
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Synchronisations for these, and copies of token ids to the CPU and back.
    assert sum("synchronizing" in str(warning.message) for warning in caught) <= 12


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"assignment_weight": 0.2}])
def test_after_the_texts_nothing_waits_for_the_gpu(fields):
    parts = _training_parts("cuda", **fields)
    _from_images_to_gradients(*parts)  # work that only the first step does
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _from_images_to_gradients(*parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
