"""Configurations: the paper's defaults, rejected values and round trips through JSON."""

import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny_models import tiny_config

from pgseg_hf.configuration_pgseg import PGSegConfig, PGSegTextConfig, PGSegVisionConfig
from pgseg_hf.modeling_pgseg import PGSegVisionModel
from pgseg_hf.variants import NPR_VARIANTS


def test_defaults_are_the_papers():
    config = PGSegConfig()
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_attention_heads, vision.intermediate_size) == (384, 6, 1536)
    assert (list(vision.depths), vision.num_hidden_layers) == ([6, 3, 3], 12)
    assert (list(vision.num_group_tokens), list(vision.num_output_groups)) == ([64, 8, 0], [64, 8, 0])
    assert (vision.image_size, vision.patch_size, vision.drop_path_rate) == (224, 16, 0.1)
    assert (vision.num_prototype_iterations, vision.prototype_momentum) == (10, 0.9)
    assert vision.prototype_projection_dim == 4096
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (256, 12, 4)
    assert (text.vocab_size, text.max_position_embeddings, text.hidden_act) == (49408, 77, "quick_gelu")
    assert (text.bos_token_id, text.eos_token_id) == (49406, 49407)
    assert (config.projection_dim, config.projection_intermediate_dim) == (256, 4096)
    assert config.logit_scale_init_value == pytest.approx(math.log(1 / 0.07))
    assert config.prototype_logit_scale_init_value == pytest.approx(math.log(1 / 0.1))
    assert config.max_logit_scale == 100
    assert (config.image_prototype_weight, config.text_prototype_weight) == (0.1, 0.01)
    assert config.rejection_threshold == 0.1
    assert (config.prototype_matching, vision.prototype_mixing) == ("hungarian", "prototypes")
    assert config.npr_variant == vision.npr_variant == "corrected"


OURS, PAPER = ("patches", "groups", 0.2), ("groups", "mean", 0.0)


def details(config):
    return config.vision_config.segment_source, config.contrastive_pooling, config.assignment_weight


def test_details_follow_the_variant_and_the_papers_are_a_word_away():
    assert details(PGSegConfig()) == details(PGSegConfig(npr_variant="corrected")) == OURS
    assert details(PGSegConfig.paper()) == PAPER and PGSegConfig.paper().npr_variant == "corrected"
    for variant in ("none", "released"):
        assert details(PGSegConfig(npr_variant=variant)) == PAPER
        assert details(PGSegConfig(vision_config={"npr_variant": variant})) == PAPER
    given = PGSegConfig.paper(
        vision_config={"image_size": 32, "segment_source": "inputs"}, assignment_weight=0.1
    )
    assert details(given) == ("inputs", "mean", 0.1) and given.vision_config.image_size == 32
    kept = PGSegConfig.from_dict(PGSegConfig.paper().to_dict())
    assert details(kept) == PAPER


VISION_ERRORS = [
    ({"hidden_size": 10, "num_attention_heads": 3}, "hidden_size is 10.*num_attention_heads = 3"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"hidden_size": "wide"}, "'hidden_size'(.|\n)*wide"),
    ({"num_channels": 0}, "num_channels is 0"),
    ({"patch_size": -4}, "patch_size is -4"),
    ({"image_size": 100}, "image_size is 100, expected a multiple of patch_size = 16"),
    ({"image_size": 0}, "image_size is 0"),
    ({"depths": []}, "depths is empty"),
    ({"depths": [10**9, 1, 1]}, "depths is .1000000000, 1, 1., .* at most 10,000"),
    ({"depths": [6, -1, 3]}, r"depths = \[6, -1, 3\]"),
    ({"num_hidden_layers": 11}, "num_hidden_layers is 11.* 12"),
    ({"num_group_tokens": [64, 8]}, "num_group_tokens has 2 entries, but depths has 3"),
    ({"num_group_tokens": [0, 0, 0]}, r"num_group_tokens is \[0, 0, 0\]"),
    ({"num_group_tokens": [0, 8, 0]}, r"num_group_tokens is \[0, 8, 0\]"),
    ({"num_output_groups": [64]}, "num_output_groups has 1 entries"),
    ({"num_output_groups": [64, 0, 0]}, r"num_output_groups is \[64, 0, 0\]"),
    ({"assign_mlp_ratio": [0.5]}, r"assign_mlp_ratio is \[0.5\]"),
    ({"assign_mlp_ratio": [0.5, -4]}, r"assign_mlp_ratio is \[0.5, -4\]"),
    ({"npr_variant": "paper"}, "npr_variant is 'paper', expected one of none, released, corrected"),
    ({"num_prototype_iterations": 0}, "num_prototype_iterations is 0"),
    ({"prototype_projection_dim": -1}, "prototype_projection_dim is -1"),
    ({"dropout": 1.5}, "dropout is 1.5"),
    ({"drop_path_rate": -0.1}, "drop_path_rate is -0.1"),
    ({"attention_dropout": 2.0}, "attention_dropout is 2.0"),
    ({"prototype_momentum": float("nan")}, "prototype_momentum is nan"),
    ({"prototype_mixing": "groups"}, "prototype_mixing is 'groups', expected one of prototypes, tokens"),
    ({"segment_source": "tokens"}, "segment_source is 'tokens', expected one of groups, patches"),
    (
        {"segment_source": "patches", "npr_variant": "released"},
        "segment_source is 'patches', which the released variant .*expected one of groups",
    ),
]
TEXT_ERRORS = [
    ({"hidden_size": 10, "num_attention_heads": 3}, "text_config.hidden_size is 10.*num_attention_heads = 3"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected 0 to 10,000"),
    ({"max_position_embeddings": 1}, "max_position_embeddings is 1"),
    ({"attention_dropout": -1.0}, "attention_dropout is -1.0"),
]
JOINT_ERRORS = [
    ({"projection_dim": 0}, "projection_dim is 0"),
    ({"projection_dim": 2.5}, "'projection_dim'(.|\n)*2.5"),
    ({"vision_config": {"hidden_size": 10, "num_attention_heads": 3}}, "vision_config.hidden_size is 10"),
    ({"projection_intermediate_dim": -1}, "projection_intermediate_dim is -1"),
    ({"max_logit_scale": 0}, "max_logit_scale is 0"),
    ({"image_prototype_weight": -0.1}, "image_prototype_weight is -0.1"),
    ({"text_prototype_weight": float("nan")}, "text_prototype_weight is nan"),
    ({"multi_label_weight": float("inf")}, "multi_label_weight is inf"),
    ({"assignment_weight": -1}, "assignment_weight is -1"),
    ({"num_text_prototypes": 0}, "num_text_prototypes is 0"),
    ({"rejection_threshold": 1.1}, "rejection_threshold is 1.1"),
    ({"prototype_matching": "none"}, "prototype_matching is 'none', expected one of hungarian, order"),
    (
        {"contrastive_loss": "clip"},
        "contrastive_loss is 'clip', expected one of info_nce, multi_positive, sigmoid",
    ),
    ({"logit_bias_init_value": float("inf")}, "logit_bias_init_value is inf"),
    ({"contrastive_pooling": "loudest"}, "contrastive_pooling is 'loudest', expected one of mean, groups"),
    ({"contrastive_pooling": "mixture"}, "'mixture' and .* 'info_nce', expected .* 'sigmoid'"),
    ({"mixture_looks": 0.5}, "mixture_looks is 0.5"),
    ({"mixture_looks": float("inf")}, "mixture_looks is inf"),
    ({"label_balance": 1.5}, "label_balance is 1.5"),
    ({"npr_variant": "paper"}, "npr_variant is 'paper', expected one of none, released, corrected"),
]


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        *((PGSegVisionConfig, *case) for case in VISION_ERRORS),
        *((PGSegTextConfig, *case) for case in TEXT_ERRORS),
        *((PGSegConfig, *case) for case in JOINT_ERRORS),
    ],
)
def test_refused_values_are_named(config_class, fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        config_class(**fields)


def test_the_last_stages_groups_may_be_left_out():
    model = PGSegVisionModel(tiny_config(vision_config={"num_output_groups": [6, 4]}).vision_config)
    assert model.config.num_output_groups == [6, 4]


@pytest.mark.parametrize("variant", NPR_VARIANTS)
def test_npr_variant_at_both_levels_and_set_later(tmp_path, variant):
    above = PGSegConfig(npr_variant=variant)
    below = PGSegConfig(vision_config={"npr_variant": variant})
    given = PGSegConfig(vision_config=PGSegVisionConfig(npr_variant="none"), npr_variant=variant)
    for config in (above, below, given):
        assert config.npr_variant == config.vision_config.npr_variant == variant
    config = PGSegConfig()
    with pytest.raises(ValueError, match="npr_variant is 'paper'"):
        config.npr_variant = "paper"
    config.npr_variant = variant
    config.save_pretrained(tmp_path)
    for each in (config, PGSegConfig.from_pretrained(tmp_path)):
        assert each.vision_config.npr_variant == variant
        assert (each.vision_config.segment_source == "groups") == (variant == "released")


@pytest.mark.parametrize(
    "config",
    [
        PGSegConfig(),
        tiny_config(npr_variant="released", assignment_weight=0.2, contrastive_pooling="groups"),
        tiny_config(
            vision_config={"num_output_groups": [6, 4], "prototype_mixing": "tokens"},
            num_text_prototypes=3,
            prototype_matching="order",
        ),
    ],
    ids=["default", "released", "other"],
)
def test_round_trip_through_json(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = PGSegConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.npr_variant == config.npr_variant
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "pgseg"
    # The variant is stored in one place, so that the two cannot disagree.
    assert "npr_variant" not in stored
    assert stored["vision_config"]["npr_variant"] == config.npr_variant
    assert PGSegVisionConfig.from_pretrained(tmp_path).to_dict() == config.vision_config.to_dict()
    assert PGSegTextConfig.from_pretrained(tmp_path).to_dict() == config.text_config.to_dict()
