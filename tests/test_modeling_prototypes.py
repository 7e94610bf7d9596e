"""Prototypes in the models: when they are updated, which gradient they get, and what they add to the tokens."""

import pytest
import torch
from tiny_models import (
    PATCHES,
    inputs_of,
    moved,
    prototype_buffers,
    tiny_config,
    tiny_images,
    tiny_model,
    tiny_texts,
    without_noise,
)
from torch.nn.functional import normalize

from pgseg_hf import npr
from pgseg_hf.layers import mean_of_groups
from pgseg_hf.modeling_pgseg import PGSegModel
from pgseg_hf.npr import PGSegStagePrototypes
from pgseg_hf.projection import PGSegProjection
from pgseg_hf.prototypes import updated_prototypes
from pgseg_hf.variants import NPR_VARIANTS


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
    """At both levels; where the best matching is different, the loss in order is larger."""
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


@pytest.mark.parametrize("variant", ["none", "corrected"])
@torch.no_grad()
def test_segments_are_the_means_of_the_first_stages_patches(variant):
    """By the soft assignment to the last stage's groups, at a size other than the configured one."""
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
    )  # 1e-3 is added to the denominator
    blocks = model.encoder.stages[2](output.hidden_states[2], None)[0]
    torch.testing.assert_close(output.last_hidden_state, model.layernorm(blocks))


@torch.no_grad()
def test_a_group_without_patches_has_a_mean_near_zero():
    assignment = torch.tensor([[[1.0, 1.0, 0.5], [1e-9, 0.0, 1e-9]]])
    means = mean_of_groups(torch.tensor([[[2.0], [4.0], [6.0]]]), assignment)
    torch.testing.assert_close(means, torch.tensor([[[9 / 2.501], [8e-9 / 0.001]]]))


def test_initial_weights_are_the_released_ones():
    """Including those set by modules without tensors of their own, which transformers skips for custom code."""
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    model = PGSegModel(tiny_config(text_config=text, projection_intermediate_dim=256))
    for linear in (model.visual_projection[0], model.text_projection[3]):
        bound = linear.in_features**-0.5
        for tensor in (linear.weight, linear.bias):
            assert 0.8 * bound < tensor.abs().max() <= bound
    layer = model.text_model.encoder.layers[0]
    assert layer.mlp.fc1.weight.std().item() == pytest.approx((2 * 64) ** -0.5, rel=0.05)
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(64**-0.5 * (2 * 2) ** -0.5, rel=0.05)


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


# Another variant


class StillPrototypes(PGSegStagePrototypes):
    """Prototypes that are never updated."""

    def moves(self):
        return False


@pytest.fixture
def halved():
    class HalvedNPR(npr.CorrectedNPR, name="halved"):
        stage_prototypes = StillPrototypes

        def stage_loss(self, batch, centers_BKC, prototypes_BPC):
            loss, matching = super().stage_loss(batch, centers_BKC, prototypes_BPC)
            return loss / 2, matching

    yield "halved"
    del NPR_VARIANTS["halved"], npr._VARIANTS["halved"]


def test_a_new_variant_is_one_class(tmp_path, halved):
    corrected, other = (
        without_noise(
            tiny_model(npr_variant=variant, assignment_weight=0.0, contrastive_pooling="mean")
        ).double()
        for variant in ("corrected", halved)
    )
    before = prototype_buffers(other)
    expected, losses = (model.train()(**inputs_of(), return_loss=True) for model in (corrected, other))
    for part, of_corrected in zip(losses.image_prototype_losses, expected.image_prototype_losses):
        torch.testing.assert_close(part, of_corrected / 2)
    torch.testing.assert_close(losses.text_prototype_loss, expected.text_prototype_loss)
    assert moved(other, before) == {"text_prototypes"}
    other.save_pretrained(tmp_path)
    assert PGSegModel.from_pretrained(tmp_path).config.npr_variant == halved
