"""EfficientNet-Lite against the public package, and its weights."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoBackbone, AutoConfig

from pgseg_hf.efficientnet_lite import (
    EfficientNetLiteBackbone,
    EfficientNetLiteConfig,
    convert_efficientnet_lite,
)

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
    """What some blocks of the public network return."""
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


@pytest.mark.parametrize("size", [(224, 224), (64, 96), (32, 160)])
@torch.no_grad()
def test_features_equal_the_public_packages(size):
    public = public_model()
    backbone, head = convert_efficientnet_lite(public.state_dict())
    pixel_values = torch.randn(2, 3, *size)
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
        (lambda state: state.clear(), "EfficientNet-Lite"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, named):
    state = dict(public_model().state_dict())
    change(state)
    with pytest.raises(ValueError, match=named):
        convert_efficientnet_lite(state)


def tiny_config(**fields):
    return EfficientNetLiteConfig(stem_size=4, hidden_sizes=[4, 4, 6, 6, 8, 8, 10], depths=[1] * 7, **fields)


def test_chosen_stages_have_their_strides_and_channels():
    config = tiny_config(out_features=["stage2", "stage3", "stage7"])
    maps = EfficientNetLiteBackbone(config).eval()(torch.randn(1, 3, 64, 96)).feature_maps
    for name, features in zip(config.out_features, maps):
        stride = config.strides[name]
        assert features.shape[2:] == (64 // stride, 96 // stride)
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


def test_grids_of_odd_sizes_round_up():
    backbone = EfficientNetLiteBackbone(tiny_config(out_features=["stem", "stage5", "stage7"])).eval()
    maps = backbone(torch.randn(1, 3, 33, 65)).feature_maps
    assert [tuple(features.shape[2:]) for features in maps] == [(17, 33), (3, 5), (2, 3)]
