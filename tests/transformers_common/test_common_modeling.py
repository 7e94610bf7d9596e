"""Transformers' common model tests, run on our models and configurations in the sizes of its GroupViT tests."""

import tempfile
import unittest
from collections.abc import Callable

from testers import ConfigTester, ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask
from torch import nn
from transformers.testing_utils import torch_device

from pgseg_hf import (
    PGSegConfig,
    PGSegModel,
    PGSegTextConfig,
    PGSegTextModel,
    PGSegVisionConfig,
    PGSegVisionModel,
)

NO_LOSS = "a tower by itself has no loss"
EAGER = "the released variant attends eagerly unless asked otherwise"
MOVES = "each forward of the released variant moves its text prototypes and so the loss of the next one"


def skipped(reason: str) -> Callable:
    """Replaces a test of the mixins."""
    return unittest.skip(reason)(lambda self: None)


class VisionModelTester:
    """Tiny vision models and inputs; the mixins read these names."""

    is_training = True
    batch_size = 12
    num_channels = 3
    hidden_size = 32
    depths = (2, 1, 1)
    num_attention_heads = 4
    num_group_tokens = (64, 8, 0)
    num_output_groups = (64, 8, 8)

    def __init__(self, input_size: tuple[int, int] | None = None, **fields: object):
        self.fields = {"image_size": 30, "patch_size": 2, "segment_source": "groups"} | fields
        self.image_size, self.patch_size = self.fields["image_size"], self.fields["patch_size"]
        self.input_size = input_size or (self.image_size, self.image_size)
        self.num_hidden_layers = max(self.depths)
        self.expected_num_hidden_layers = len(self.depths) + 1
        self.seq_length = self.input_size[0] // self.patch_size * (self.input_size[1] // self.patch_size)

    def get_config(self) -> PGSegVisionConfig:
        return PGSegVisionConfig(
            hidden_size=self.hidden_size,
            depths=self.depths,
            num_group_tokens=self.num_group_tokens,
            num_output_groups=self.num_output_groups,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            dropout=0.1,
            attention_dropout=0.1,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PGSegVisionConfig, dict]:
        pixel_values = floats_tensor([self.batch_size, self.num_channels, *self.input_size])
        return self.get_config(), {"pixel_values": pixel_values}


class TextModelTester:
    """Tiny text models and inputs."""

    is_training = True
    batch_size = 12
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def get_config(self) -> PGSegTextConfig:
        return PGSegTextConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            attention_dropout=0.1,
            max_position_embeddings=512,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PGSegTextConfig, dict]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        attention_mask = random_attention_mask([self.batch_size, self.seq_length]).cummin(dim=1).values
        attention_mask[:, 0] = 1
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class JointModelTester:
    """Both towers together, with the losses."""

    is_training = True

    def __init__(self, contrastive_pooling: str = "mean", **vision: object):
        self.contrastive_pooling = contrastive_pooling
        self.vision_model_tester = VisionModelTester(**vision)
        self.text_model_tester = TextModelTester()
        self.batch_size = self.text_model_tester.batch_size

    def get_config(self) -> PGSegConfig:
        return PGSegConfig(
            text_config=self.text_model_tester.get_config().to_dict(),
            vision_config=self.vision_model_tester.get_config().to_dict(),
            projection_dim=64,
            contrastive_pooling=self.contrastive_pooling,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PGSegConfig, dict]:
        _, text = self.text_model_tester.prepare_config_and_inputs_for_common()
        _, vision = self.vision_model_tester.prepare_config_and_inputs_for_common()
        return self.get_config(), {**text, **vision, "return_loss": True}


class PGSegVisionModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (PGSegVisionModel,)
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    settings = {}

    def setUp(self):
        self.model_tester = VisionModelTester(**self.settings)
        self.config_tester = ConfigTester(
            self, config_class=PGSegVisionConfig, has_text_modality=False, hidden_size=48
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        outputs = PGSegVisionModel(config).eval()(**inputs)
        batch, groups, width = (
            self.model_tester.batch_size,
            self.model_tester.num_output_groups[-1],
            config.hidden_size,
        )
        self.assertEqual(outputs.last_hidden_state.shape, (batch, groups, width))
        self.assertEqual(outputs.pooler_output.shape, (batch, width))

    test_inputs_embeds = skipped("an image tower has no inputs_embeds")
    test_training = skipped(NO_LOSS)
    test_training_gradient_checkpointing = skipped(NO_LOSS)
    test_training_gradient_checkpointing_use_reentrant_false = skipped(NO_LOSS)
    test_training_gradient_checkpointing_use_reentrant_true = skipped(NO_LOSS)

    def test_model_get_set_embeddings(self):
        """The mixin's test expects token embeddings; here they are a convolution."""
        model = PGSegVisionModel(self.model_tester.get_config())
        self.assertIsInstance(model.get_input_embeddings(), nn.Module)
        self.assertIsNone(model.get_output_embeddings())

    def test_attention_outputs(self):
        """The mixin expects square attention per layer; this model, like GroupViT, has one assignment per stage."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        stages = sum(tokens > 0 for tokens in config.num_group_tokens)
        model = PGSegVisionModel._from_config(config, attn_implementation="eager").to(torch_device).eval()
        by_argument = model(**inputs, output_attentions=True)
        model.config.output_attentions = True
        by_config = model(**inputs)
        with_states = model(**inputs, output_attentions=True, output_hidden_states=True)
        self.assertEqual(len(with_states), len(by_config) + 1)
        groups = config.num_output_groups
        for outputs in (by_argument, by_config, with_states):
            self.assertEqual(len(outputs.attentions), stages)
            for stage, assignment in enumerate(outputs.attentions):
                length = groups[stage - 1] if stage else self.model_tester.seq_length
                self.assertEqual(assignment.shape, (self.model_tester.batch_size, groups[stage], length))

    def test_retain_grad_hidden_states_attentions(self):
        """The mixin also expects a gradient of the attentions; the soft assignment is only an output."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        outputs = PGSegVisionModel(config).to(torch_device)(
            **inputs, output_attentions=True, output_hidden_states=True
        )
        outputs.hidden_states[0].retain_grad()
        outputs.attentions[0].retain_grad()
        outputs[0].flatten()[0].backward()
        self.assertIsNotNone(outputs.hidden_states[0].grad)
        self.assertIsNone(outputs.attentions[0].grad)


class PGSegTextModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (PGSegTextModel,)
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = TextModelTester()
        self.config_tester = ConfigTester(self, config_class=PGSegTextConfig, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()

    test_inputs_embeds = skipped("CLIP's text tower takes no inputs_embeds")
    test_training = skipped(NO_LOSS)
    test_training_gradient_checkpointing = skipped(NO_LOSS)
    test_training_gradient_checkpointing_use_reentrant_false = skipped(NO_LOSS)
    test_training_gradient_checkpointing_use_reentrant_true = skipped(NO_LOSS)


class PGSegModelTest(ModelTesterMixin, unittest.TestCase):
    # The tester reads the width from `backbone_config` if the field exists, even if it is None; the shapes are checked
    # in test_modeling.py.
    skip_test_image_features_output_shape = True
    all_model_classes = (PGSegModel,)
    _is_composite = True
    additional_model_inputs = ["pixel_values"]
    test_attention_outputs = False  # tested for each tower
    test_can_init_all_missing_weights_before_2023 = True

    settings = {}

    def setUp(self):
        self.model_tester = JointModelTester(**self.settings)
        self.config_tester = ConfigTester(
            self,
            config_class=PGSegConfig,
            has_text_modality=False,
            common_properties=["projection_dim", "projection_intermediate_dim", "logit_scale_init_value"],
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        outputs = PGSegModel(config).eval()(**inputs)
        images, texts = len(inputs["pixel_values"]), len(inputs["input_ids"])
        self.assertEqual(outputs.logits_per_image.shape, (images, texts))
        self.assertEqual(outputs.logits_per_text.shape, (texts, images))

    def _image_features_get_expected_num_attentions(self, model_tester=None):
        """The mixin expects one attention per layer; this model, like GroupViT, has one per grouping stage."""
        return sum(tokens > 0 for tokens in self.model_tester.vision_model_tester.num_group_tokens)

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return self.model_tester.vision_model_tester.expected_num_hidden_layers

    def test_load_vision_text_config(self):
        config = self.model_tester.get_config()
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            self.assertEqual(
                PGSegVisionConfig.from_pretrained(folder).to_dict(), config.vision_config.to_dict()
            )
            self.assertEqual(PGSegTextConfig.from_pretrained(folder).to_dict(), config.text_config.to_dict())

    test_hidden_states_output = skipped("tested for each tower")
    test_inputs_embeds = skipped("tested for each tower")
    test_retain_grad_hidden_states_attentions = skipped("tested for each tower")


class PGSegVisionModelWithoutPrototypesTest(PGSegVisionModelTest):
    """A GroupViT, on images of a size other than the configured one."""

    settings = {"npr_variant": "none", "input_size": (27, 44)}


class PGSegVisionModelWithBackboneTest(PGSegVisionModelTest):
    settings = {
        "image_size": 32,
        "patch_size": 8,
        "backbone_config": {
            "model_type": "efficientnet_lite",
            "stem_size": 4,
            "hidden_sizes": [4, 6, 8, 10, 12, 14, 16],
            "depths": [1, 1, 2, 1, 1, 1, 1],
            "out_features": ["stage3", "stage5"],
        },
    }


class ReleasedPGSegVisionModelTest(PGSegVisionModelTest):
    settings = {"npr_variant": "released", "image_size": 32}

    test_sdpa_can_dispatch_non_composite_models = skipped(EAGER)


class PGSegModelWithoutPrototypesTest(PGSegModelTest):
    """A GroupViT whose segments are means of patches, each compared with the texts."""

    settings = {
        "npr_variant": "none",
        "input_size": (27, 44),
        "contrastive_pooling": "groups",
        "segment_source": "patches",
    }


class PGSegModelWithBackboneTest(PGSegModelTest):
    """With a trainable backbone and names on patches."""

    test_all_params_have_gradient = False  # DINOv2's mask token has none

    settings = {
        "image_size": 16,
        "patch_size": 4,
        "freeze_backbone": False,
        "contrastive_pooling": "patches",
        "backbone_config": {
            "model_type": "dinov2",
            "image_size": 16,
            "patch_size": 4,
            "hidden_size": 32,  # the mixin takes the backbone's for the tower's
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_ratio": 2,
            "out_features": ["stage1", "stage2"],
        },
    }


class ReleasedPGSegModelTest(PGSegModelTest):
    settings = ReleasedPGSegVisionModelTest.settings

    test_sdpa_can_dispatch_composite_models = skipped(EAGER)
    test_determinism = skipped(MOVES)
    test_model_outputs_equivalence = skipped(MOVES)
    test_save_load = skipped(MOVES)
