"""Models and processors for training, sharded weights, and label names of masks."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from data_files import write_folder
from PIL import Image
from tiny_backbones import tiny_backbone_model
from tiny_models import tiny_config, tiny_images, tiny_model, tiny_texts, with_fixed_statistics, without_noise
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

from pgseg_hf.data.sources import SourceSpec, open_source
from pgseg_hf.efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteConfig
from pgseg_hf.layers import PGSegStage
from pgseg_hf.training import building
from pgseg_hf.training.arguments import DataArguments, ModelArguments
from pgseg_hf.training.building import (
    _tell_what_masks_leave_out,
    build_model,
    build_processor,
    full_weights,
    without_scalars,
)
from pgseg_hf.training.gradient_cache import average_gradients


def test_models_from_nothing_from_fields_and_from_a_checkpoint(tmp_path, tiny_folder):
    fields = tiny_config().to_dict()
    torch.manual_seed(0)
    model = build_model(
        ModelArguments(model_config=fields, npr_variant="released", contrastive_pooling="groups")
    )
    assert model.training
    assert model.config.vision_config.hidden_size == 16
    assert (model.config.npr_variant, model.config.contrastive_pooling) == ("released", "groups")
    assert model.config.guard_prototype_losses
    (tmp_path / "fields.yaml").write_text("projection_dim: 24\nvision_config: {depths: [1, 1, 1]}\n")
    arguments = ModelArguments(model_config=str(tmp_path / "fields.yaml"), freeze_token_embeddings=True)
    model = build_model(arguments)
    assert (model.config.projection_dim, list(model.config.vision_config.depths)) == (24, [1, 1, 1])
    assert not model.text_model.get_input_embeddings().weight.requires_grad
    model = build_model(ModelArguments(model_name_or_path=tiny_folder, contrastive_loss="sigmoid"))
    assert model.config.contrastive_loss == "sigmoid"
    assert model.logit_bias.item() == 0
    with pytest.raises(ValueError, match="model_name_or_path and groupvit_name_or_path"):
        build_model(ModelArguments(model_name_or_path=tiny_folder, groupvit_name_or_path="x"))
    with pytest.raises(ValueError, match=r"model_config .*absent.json.* cannot be read"):
        build_model(ModelArguments(model_config="absent.json"))


def test_values_that_are_none_of_the_configuration(tiny_folder):
    for place in ({}, {"model_name_or_path": str(tiny_folder)}):
        with pytest.raises(ValueError, match="npr_variant is 'foo'"):
            build_model(ModelArguments(npr_variant="foo", **place))


def test_processors_see_photos_as_training_does(tiny_folder):
    config = tiny_config()
    config.text_config.vocab_size = 49_408
    processor = build_processor(ModelArguments(), DataArguments(), config)
    assert (processor.image_processor.size["shortest_edge"], processor.window_size) == (32, 32)
    assert processor.tokenizer.model_max_length == 12
    processor = build_processor(ModelArguments(), DataArguments(short_side=64), config)
    assert (processor.image_processor.size["shortest_edge"], processor.window_size) == (64, 16)
    processor = build_processor(ModelArguments(model_name_or_path=tiny_folder), DataArguments(), config)
    assert processor.window_size == 64
    with pytest.raises(ValueError, match=r"vocab_size is 50, .*tokenizer has 49408 tokens"):
        build_processor(ModelArguments(), DataArguments(), tiny_config())


@pytest.fixture
def backbone_folder(tmp_path):
    torch.manual_seed(0)
    config = EfficientNetLiteConfig(stem_size=4, hidden_sizes=[4, 4, 6, 6, 8, 8, 10], depths=[1] * 7)
    folder = tmp_path / "backbone"
    EfficientNetLiteBackbone(config).save_pretrained(folder)
    return str(folder)


def test_models_on_a_pretrained_backbone(backbone_folder):
    saved = EfficientNetLiteBackbone.from_pretrained(backbone_folder).state_dict()
    fields = tiny_config().to_dict()
    fields["vision_config"] |= {"patch_size": 16, "image_size": 64, "backbone_config": None}
    chosen = {
        "patch_size": 4,
        "backbone_config": {"out_features": ["stage2", "stage7"]},
        "freeze_backbone": False,
    }
    for vision, stages in (({}, ["stage5", "stage7"]), (chosen, ["stage2", "stage7"])):
        given = fields | {"vision_config": fields["vision_config"] | vision}
        model = build_model(ModelArguments(model_config=given, backbone_name_or_path=backbone_folder))
        backbone = model.vision_model.embeddings.patch_embeddings.backbone
        assert model.config.vision_config.backbone_config.out_features == stages
        assert backbone.out_features == stages
        assert backbone_folder not in model.config.to_json_string()
        for name, tensor in backbone.state_dict().items():
            assert torch.equal(tensor, saved[name]), name
        frozen = not vision
        assert model.training and backbone.training != frozen
        assert all(parameter.requires_grad != frozen for parameter in backbone.parameters())
    with pytest.raises(ValueError, match=r"backbone_name_or_path .* are for a new model"):
        build_model(ModelArguments(model_name_or_path="x", backbone_name_or_path=backbone_folder))


def test_processors_normalise_as_the_backbone_was_trained(backbone_folder):
    config = tiny_config()
    config.text_config.vocab_size = 49_408
    config.vision_config.backbone_config = EfficientNetLiteConfig()
    processor = build_processor(
        ModelArguments(backbone_name_or_path=backbone_folder), DataArguments(whole_image=True), config
    )
    assert processor.window_size is None
    image = processor.image_processor
    pixels = torch.tensor([0.0, 127.0, 255.0])
    expected = (pixels - 127) / 128
    torch.testing.assert_close((pixels / 255 - image.image_mean[0]) / image.image_std[0], expected)


def plain_model(backbone):
    if backbone is None:
        return tiny_model(contrastive_loss="sigmoid")
    return tiny_backbone_model(
        "dinov2", {"freeze_backbone": backbone == "frozen"}, contrastive_loss="sigmoid"
    )


def one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    part = slice(4 * rank, 4 * rank + 4)
    inputs = {"input_ids": tiny_texts(8)[part], "pixel_values": tiny_images(8)[part], "return_loss": True}
    found = {}
    for backbone in (None, "frozen", "trained"):
        model = with_fixed_statistics(without_noise(plain_model(backbone)))
        plain = copy.deepcopy(model)
        model = without_scalars(model)
        for module in model.modules():
            if isinstance(module, PGSegStage | CLIPEncoderLayer | Dinov2Layer):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for each in (model, plain):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
            each(**inputs).loss.backward()
            if each is plain:
                average_gradients(plain.parameters())
            optimizer.step()
        found[backbone] = full_weights(model), plain.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_divided_weights_learn_as_whole_ones(tmp_path):
    mp.spawn(one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        for backbone, (sharded, plain) in torch.load(tmp_path / f"{rank}.pt").items():
            before = plain_model(backbone).state_dict()
            assert sharded.keys() == plain.keys()
            for name, value in plain.items():
                assert sharded[name].shape == value.shape, name
                torch.testing.assert_close(sharded[name], value, msg=name)
            assert not torch.equal(plain["logit_scale"], before["logit_scale"])
            parts = [name for name in plain if ".backbone." in name]
            changed = any(not torch.equal(plain[name], before[name]) for name in parts)
            assert changed == (backbone == "trained")


def test_fine_tuning_a_model_of_mixture_pooling_with_another_loss_compares_with_groups(tmp_path, caplog):
    tiny_model(contrastive_pooling="mixture", contrastive_loss="sigmoid").save_pretrained(tmp_path)
    folder = str(tmp_path)
    assert build_model(ModelArguments(model_name_or_path=folder)).config.contrastive_pooling == "mixture"
    with caplog.at_level("WARNING"):
        model = build_model(ModelArguments(model_name_or_path=folder, contrastive_loss="multi_positive"))
    assert model.config.contrastive_pooling == "groups" and "mixture pooling" in caplog.text
    other = {"contrastive_loss": "info_nce", "contrastive_pooling": "mixture"}
    with pytest.raises(ValueError, match=r"contrastive_loss is 'info_nce', expected .*'sigmoid'"):
        build_model(ModelArguments(model_name_or_path=folder, **other))
    model.config.contrastive_pooling = "mixture"
    with pytest.raises(ValueError, match="contrastive_loss is 'multi_positive', expected the loss 'sigmoid'"):
        model(tiny_texts(2), tiny_images(2), return_loss=True)


def test_masks_of_255_are_told(tmp_path, caplog):
    rows = [
        {"file_name": f"{number}.png", "mask_file_name": f"{number}-mask.png", "tags": "sky"}
        for number in range(2)
    ]
    folder = write_folder(tmp_path / "data", rows)
    for row in rows:
        values = np.zeros((8, 8), dtype=np.uint8)
        values[:3] = 255
        Image.fromarray(values).save(tmp_path / "data" / row["mask_file_name"])
    _tell_what_masks_leave_out([open_source(SourceSpec(path=folder))])
    assert "48 of 128 pixels (37.5%)" in caplog.text and "are 255" in caplog.text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"labels": ["sky", "road"], "background": 0}, ["", "road"]),
        ({"labels": ["", "car", "bus", "car"]}, ["", "car", "bus", "car"]),
        ({"labels": ["sky", "road"], "mask_values": {"0": "sky", "1": "road", "255": None}}, ["sky", "road"]),
        ({"labels": ["sky", "road"], "mask_values": {"0": "road"}}, "mask_values .*0 .*'road'"),
        ({"names": []}, "mask_labels .*crop_tags .*labels.json"),
        (None, "crop_tags needs a labels.json"),
    ],
)
def test_names_of_masks_for_crops(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "labels.json").write_text(json.dumps(content))
    (tmp_path / "inner" / "train").mkdir(parents=True)
    place = tmp_path if content is not None else tmp_path / "inner" / "train"
    arguments = (SimpleNamespace(mask_labels=None), [SimpleNamespace(path=place)], [])
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            building._mask_labels(*arguments)
    else:
        assert building._mask_labels(*arguments) == expected
