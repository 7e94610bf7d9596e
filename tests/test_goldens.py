"""The converted model reproduces outputs recorded from the released implementation.

Each test runs on the recordings in `goldens/` (trimmed, see `goldens/trim.py`) and, if available, on the full ones.
Float32 agrees within 1e-5 of the recorded tensor's largest entry, float64 within 1e-9.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import dense
from torch import Tensor

from pgseg_hf import SegmentationOptions, Segmenter
from pgseg_hf.conversion import convert_released, convert_state_dict, rename
from pgseg_hf.layers import PGSegAssignAttention
from pgseg_hf.modeling_pgseg import PGSegModel, PGSegOutput
from pgseg_hf.npr_released import released_prototype_loss
from pgseg_hf.prototypes import estimate_prototypes, match_prototypes, tokens_to_weights
from pgseg_hf.scoring import (
    WindowScores,
    best_labels,
    dense_probabilities,
    group_map,
    group_scores,
    merge_windows,
    window_starts,
)

TRIMMED = Path(__file__).parent / "goldens"
FULL = Path(__file__).parents[2] / "shared" / "goldens"
# The recorded model's numbers of heads, which the shapes do not show.
OVERRIDES = {"vision_config": {"num_attention_heads": 3}, "text_config": {"num_attention_heads": 1}}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
PRECISIONS = {"float32": (torch.float32, ""), "float64": (torch.float64, "_f64")}
# Gradients whose largest entry is below this are zero except for rounding; 13 recorded parameters have such gradients.
ZERO_GRADIENT = 1e-4


class Recordings:
    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"released_tiny_{name}.safetensors")

    def summary(self) -> dict:
        return json.loads((TRIMMED / "released_tiny.json").read_text())

    def model(self, dtype: torch.dtype = torch.float32) -> PGSegModel:
        return convert_released(self.load("state_dict"), OVERRIDES)[0].to(dtype)


@pytest.fixture(scope="module", params=[TRIMMED, FULL], ids=["trimmed", "full"])
def recordings(request):
    if not request.param.is_dir():
        pytest.skip(f"{request.param} is not available")
    return Recordings(request.param)


@pytest.fixture(params=list(PRECISIONS))
def precision(request):
    return PRECISIONS[request.param]


def assert_recorded(name: str, ours: Tensor, recorded: Tensor, largest: float | None = None) -> None:
    """`recorded` may hold every n-th entry of a flattened tensor, or have further dimensions of size 1.

    Args:
        largest: the largest entry of the whole tensor, if `recorded` is only part of it.
    """
    ours = ours.detach()
    assert ours.dtype == recorded.dtype, name
    if recorded.ndim == 1:
        ours = ours.flatten()[:: math.ceil(ours.numel() / recorded.numel())]
    assert ours.squeeze().shape == recorded.squeeze().shape, name
    if not ours.dtype.is_floating_point:
        assert torch.equal(ours, recorded), name
        return
    largest = recorded.abs().max().item() if largest is None else largest
    difference = (ours.squeeze() - recorded.squeeze()).abs().max().item()
    assert difference <= TOLERANCE[recorded.dtype] * largest, f"{name} differs by {difference / largest:.1e}"


def recorded_parts(model: PGSegModel) -> dict[str, Tensor]:
    """The values that pass through the stages in the next forward, by the recordings' names, filled in while it
    runs."""
    parts: dict[str, Tensor] = {}

    def watch(stage, index):
        def after(module, args, output):
            parts[f"stage{index}.npr.in_x"] = args[0]
            parts[f"stage{index}.npr.in_group"] = output.group_tokens
            parts[f"stage{index}.attn.ori_center"] = output.features.centers
            parts[f"stage{index}.npr.mu"] = output.features.prototypes
            parts[f"stage{index}.attn.soft"] = output.logits.softmax(1)

        reconstruct = stage.npr.reconstruct

        def reconstruct_and_keep(estimate, dtype):
            parts[f"stage{index}.npr.recon"] = reconstruct(estimate, dtype)
            return parts[f"stage{index}.npr.recon"]

        stage.register_forward_hook(after)
        stage.npr.reconstruct = reconstruct_and_keep

    for index in (0, 1):
        watch(model.vision_model.encoder.stages[index], index)
    model.vision_model.register_forward_hook(
        lambda module, args, output: parts.update(x=output.pooler_output, feat=output.last_hidden_state)
    )
    return parts


@pytest.mark.parametrize("size", ["", "48x64", "68x50"])
@torch.no_grad()
def test_evaluation_of_images(recordings, precision, size):
    dtype, suffix = precision
    recorded, model = recordings.load(f"eval{suffix}"), recordings.model(dtype)
    image = recordings.load("inputs")[f"image_{size}" if size else "image"].to(dtype)
    ours = recorded_parts(model)
    features = model.get_image_features(image, output_attentions=True)
    ours |= {"image_x": features.pooler_output, "image_feat": features.segment_embeds}
    for index, name in enumerate(("attn_map_0", "attn_map_1")):
        grid = features.grouping.shape[-2:]
        groups = features.attentions[0].unflatten(2, grid) if index == 0 else features.grouping
        ours[name] = torch.nn.functional.interpolate(
            groups, size=image.shape[-2:], mode="bilinear", align_corners=False
        ).movedim(1, -1)
    prefix = f"{size}." if size else ""
    names = [name for name in ours if prefix + name in recorded]
    assert len(names) >= 14
    for name in names:
        assert_recorded(prefix + name, ours[name], recorded[prefix + name])
    for index in (0, 1):
        name = f"{prefix}stage{index}.attn.hard"
        if name in recorded:
            chosen = ours[f"stage{index}.attn.soft"].argmax(1)
            assert torch.equal(chosen, recorded[name][:, 0].argmax(1))


@torch.no_grad()
def test_evaluation_of_texts(recordings, precision):
    dtype, suffix = precision
    recorded, model = recordings.load(f"eval{suffix}"), recordings.model(dtype)
    inputs = recordings.load("inputs")
    output, prototypes = model._encode_text(inputs["text"], None)
    assert_recorded("text_pooled", output.pooler_output, recorded["text_pooled"])
    assert_recorded("text_mu", prototypes, recorded["text_mu"])
    assert_recorded("buffer", model.released_text_prototypes, recorded["text_npr_mu_buffer_after"])
    text_x = recordings.model(dtype).get_text_features(inputs["text"]).pooler_output
    assert_recorded("text_x", text_x, recorded["text_x"])


@torch.no_grad()
def test_zero_shot_classification(recordings, precision):
    # 7 classes in 3 templates each: one call of the text tower, so one update of its prototypes.
    dtype, suffix = precision
    recorded, model = recordings.load(f"eval{suffix}"), recordings.model(dtype)
    inputs = recordings.load("inputs")
    classes = model.get_text_features(inputs["class_ids"]).pooler_output
    classes = torch.nn.functional.normalize(classes, dim=-1)
    assert_recorded("class_text_embedding", classes, recorded["class_text_embedding"])
    name = "text_npr_mu_buffer_after_build"
    assert_recorded(name, model.released_text_prototypes, recorded[name])
    output = recordings.model(dtype)(input_ids=inputs["class_ids"], pixel_values=inputs["image"].to(dtype))
    assert_recorded("text_embeds", output.text_embeds, recorded["class_text_embedding"])
    cosines = output.logits_per_image / model.logit_scale.exp()
    assert_recorded("zero_shot_logits", cosines, recorded["zero_shot_logits"])


def segment_window(
    model: PGSegModel, pixels: Tensor, classes: Tensor, threshold: float | None, top: int = 0, left: int = 0
) -> WindowScores:
    features = model.get_image_features(pixels)
    image_logits, segment_logits = model.get_logits(features, classes)
    groups = group_map(features.grouping[0], tuple(pixels.shape[-2:]))
    return WindowScores(groups, group_scores(segment_logits[0], image_logits[0], threshold), top, left)


@pytest.mark.parametrize("background", [None, 0.95, 0.2])
@pytest.mark.parametrize("size", ["48x64", "68x50"])
@torch.no_grad()
def test_predictions(recordings, precision, size, background):
    dtype, suffix = precision
    recorded, model = recordings.load(f"eval{suffix}"), recordings.model(dtype)
    inputs = recordings.load("inputs")
    classes = model.get_text_features(inputs["class_ids"]).pooler_output
    window = segment_window(model, inputs[f"image_{size}"].to(dtype), classes, background)
    name = f"{size}.pred.bg{int(background is not None)}.t{background or 0.95}"
    shape = tuple(window.groups.shape)
    scores, channels, count = merge_windows([window], shape)
    labels, best = best_labels(scores, channels, count)
    recorded_labels = recorded[f"{name}.labels"] if f"{name}.labels" in recorded else recorded[name].argmax(1)
    assert torch.equal(labels, recorded_labels[0].long())
    assert torch.equal(best, dense(window).amax(0))
    if name in recorded:
        assert_recorded(name, dense(window), recorded[name])


@pytest.mark.parametrize("background", [None, 0.95, 0.2])
@torch.no_grad()
def test_sliding_window(recordings, background):
    # Crops of 48 pixels, stride 24; interpolated to 100 x 90 before the softmax and argmax.
    recorded, model = recordings.load("slide"), recordings.model()
    classes = model.get_text_features(recordings.load("inputs")["class_ids"]).pooler_output
    image, size, original = recorded["image_80x72"], (80, 72), (100, 90)
    windows = [
        segment_window(model, image[..., top : top + 48, left : left + 48], classes, background, top, left)
        for top in window_starts(80, 48, 24)
        for left in window_starts(72, 48, 24)
    ]
    assert [window.top for window in windows] == [0, 0, 24, 24, 32, 32]
    name = f"slide.bg{int(background is not None)}.t{background or 0.95}"
    rescaled = f"{name}.prob_rescaled_100x90"
    scores, channels, num_channels = merge_windows(windows, size)
    for key, target in ((f"{name}.logits", size), (rescaled, original)):
        labels, _ = best_labels(scores, channels, num_channels, target)
        known = recorded[f"{key}.labels"] if f"{key}.labels" in recorded else recorded[key].argmax(1)
        assert torch.equal(labels, known[0].long()), key
    if f"{name}.logits" in recorded:
        dense = scores.new_zeros(num_channels, *size)
        dense[channels] = scores
        assert_recorded(name, dense, recorded[f"{name}.logits"])
    if rescaled in recorded:
        assert_recorded(rescaled, dense_probabilities(windows, size, original), recorded[rescaled])


@pytest.mark.parametrize("background", [None, 0.95, 0.2])
@torch.no_grad()
def test_the_segmenters_sliding_window(recordings, background, monkeypatch):
    recorded, model = recordings.load("slide"), recordings.model()
    classes = model.get_text_features(recordings.load("inputs")["class_ids"]).pooler_output
    segmenter = Segmenter(model, processor=None)
    monkeypatch.setattr(segmenter, "_pixel_values", lambda image, options: recorded["image_80x72"])
    options = SegmentationOptions(48, 24, background, batch_size=4, top_k=5, patch_weight=0)
    (encoded,) = segmenter.encode([Image.new("RGB", (90, 100))], options)
    assert (encoded.size, encoded.resized, len(encoded.windows)) == ((100, 90), (80, 72), 6)
    scored = segmenter.score(encoded, classes, options)
    name = f"slide.bg{int(background is not None)}.t{background or 0.95}.prob_rescaled_100x90"
    known = recorded[f"{name}.labels"] if f"{name}.labels" in recorded else recorded[name].argmax(1)
    assert torch.equal(scored.label_map()[0], known[0].long())
    if background is not None:
        plain = SegmentationOptions(top_k=5, patch_weight=0)
        later = segmenter.score(encoded, classes, plain).with_background(background)
        assert torch.equal(later.label_map()[0], known[0].long())


def train_step(recordings: Recordings, dtype: torch.dtype, noise: dict[int, Tensor], monkeypatch):
    """One training forward and backward with the given noise by number of groups; no noise where it is missing."""

    def stored(self, logits):
        found = noise.get(logits.shape[1])
        return torch.zeros_like(logits) if found is None else found.squeeze(1).to(logits.dtype)

    monkeypatch.setattr(PGSegAssignAttention, "sample_noise", stored)
    inputs, model = recordings.load("inputs"), recordings.model(dtype).train()
    parts = recorded_parts(model)
    output = model(input_ids=inputs["text"], pixel_values=inputs["image"].to(dtype), return_loss=True)
    output.loss.backward()
    return model, output, parts


def assert_losses(output: PGSegOutput, recorded: dict[str, Tensor]) -> None:
    first, second = output.image_prototype_losses
    assert_recorded("loss", output.contrastive_loss, recorded["loss"])
    assert_recorded("loss1", first, recorded["loss1"])
    assert_recorded("loss2", second, recorded["loss2"])
    assert_recorded("loss3", output.text_prototype_loss, recorded["loss3"])
    assert_recorded("loss_pg", output.loss - output.contrastive_loss, recorded["loss_pg"])


def assert_buffers(model: PGSegModel, recorded: dict[str, Tensor]) -> None:
    prefix = "after."
    after = convert_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in recorded.items() if name.startswith(prefix)}
    )
    buffers = dict(model.named_buffers())
    assert len(after) == 15
    for name, tensor in after.items():
        assert_recorded(name, buffers[name], tensor)


@pytest.mark.parametrize(
    ("name", "norms", "dtype"),
    [
        ("nogumbel", "nogumbel", torch.float32),
        ("nogumbel_f64", "nogumbel_f64", torch.float64),
        ("gumbel_seed1234", "gumbel", torch.float32),
    ],
)
def test_training_losses_buffers_and_gradient_norms(recordings, name, norms, dtype, monkeypatch):
    recorded = recordings.load(f"train_{name}")
    stored = {tensor.shape[2]: tensor for name, tensor in recorded.items() if name.startswith("gumbel.")}
    model, output, parts = train_step(recordings, dtype, stored, monkeypatch)
    assert_losses(output, recorded)
    assert_buffers(model, recorded)
    check_norms(model, recordings.summary()[f"grad_norm_{norms}"])
    names = [name for name in parts if name in recorded]
    assert len(names) == 8
    for name in names:
        assert_recorded(name, parts[name], recorded[name])


def test_gumbel_noise_is_drawn_as_the_released_code_draws_it(recordings):
    recorded = recordings.load("train_gumbel_seed1234")
    inputs, model = recordings.load("inputs"), recordings.model().train()
    torch.manual_seed(1234)
    output = model(input_ids=inputs["text"], pixel_values=inputs["image"], return_loss=True)
    assert_losses(output, recorded)


def test_every_gradient(recordings, monkeypatch):
    recorded = recorded_gradients(recordings)
    model, _, _ = train_step(recordings, torch.float32, {}, monkeypatch)
    parameters = dict(model.named_parameters())
    assert set(recorded) == set(parameters)
    zero = 0
    for name, (tensor, largest) in recorded.items():
        gradient = parameters[name].grad[~tensor.isnan()]
        tensor = tensor[~tensor.isnan()]
        if largest < ZERO_GRADIENT:
            assert gradient.abs().max() < ZERO_GRADIENT, name
            zero += 1
        else:
            difference = (gradient - tensor).abs().max() / largest
            assert difference <= TOLERANCE[torch.float32], f"{name} differs by {difference:.1e}"
    assert zero == 13


def recorded_gradients(recordings: Recordings) -> dict[str, tuple[Tensor, float]]:
    """Recorded gradients by our names, NaN for entries that were not kept, each with the largest entry of the whole
    tensor."""
    largest = recordings.summary()["largest_gradient_nogumbel"]
    state, gradients = recordings.load("state_dict"), {}
    for name, tensor in recordings.load("grads_nogumbel").items():
        whole = torch.full((state[name].numel(),), torch.nan)
        whole[:: math.ceil(whole.numel() / tensor.numel())] = tensor.flatten()
        converted = convert_state_dict({name: whole.reshape(state[name].shape)})
        gradients |= {ours: (part, largest[name]) for ours, part in converted.items()}
    return gradients


def check_norms(model: PGSegModel, norms: dict[str, float]) -> None:
    dtype = model.dtype
    parameters = dict(model.named_parameters())
    checked = 0
    for name, norm in norms.items():
        names = rename(name)
        if not names or norm < 10 * ZERO_GRADIENT:
            continue
        ours = torch.stack([parameters[part].grad.norm() for part in names]).norm().item()
        assert abs(ours - norm) <= TOLERANCE[dtype] * norm, f"{name}: {ours} against {norm}"
        checked += 1
    assert checked >= 180


@pytest.mark.parametrize("level", ["1", "2", "3"])
def test_prototype_losses_on_their_own(recordings, precision, level):
    # Loss and matching alone, from the recorded centres and prototypes. All similarities of the text prototypes are 1
    # or -1, so that their matching has ties.
    dtype, suffix = precision
    recorded = recordings.load(f"train_nogumbel{suffix}")
    inp, target = recorded[f"match{level}.inp"], recorded[f"match{level}.target"]
    scale = recordings.load("state_dict")["img_encoder.logit_scale"].to(dtype).exp()
    loss, matching = released_prototype_loss(inp, target, scale)
    assert_recorded("loss", loss, recorded[f"loss{level}"])
    if level != "3":
        assert torch.equal(matching.groups, torch.arange(inp.shape[1]).expand(len(inp), -1))
        assert torch.equal(matching.prototypes, recorded[f"match{level}.target_index"])
        similarity = torch.nn.functional.normalize(inp, dim=-1) @ target.transpose(1, 2)
        assert torch.equal(
            match_prototypes(similarity, maximize=False).prototypes, recorded[f"match{level}.target_index"]
        )


@pytest.mark.parametrize("stage", [0, 1])
def test_prototype_estimation_on_its_own(recordings, stage):
    recorded, state = recordings.load("eval"), recordings.load("state_dict")
    tokens = recorded[f"stage{stage}.npr.in_x"]
    seeds = state[f"img_encoder.layers.{stage}.downsample_spatial.mu"]
    prototypes = estimate_prototypes(tokens, seeds, 10).prototypes
    assert_recorded("mu", prototypes, recorded[f"stage{stage}.npr.mu"])
    weights = tokens_to_weights(estimate_prototypes(tokens, prototypes, 1).responsibilities)
    assert_recorded("attn_map", weights.transpose(1, 2), recorded[f"stage{stage}.npr.attn_map"])
