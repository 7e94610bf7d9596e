"""Warm start from a GroupViT checkpoint."""

import pytest
import torch
from tiny_models import (
    PATCHES,
    assert_same_tensors,
    tiny_images,
    tiny_model,
    tiny_texts,
)
from transformers import GroupViTConfig, GroupViTModel

from pgseg_hf.modeling_pgseg import PGSegModel


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
