"""Training learns a small dataset, and stays finite in half precision."""

import itertools

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_images, tiny_texts

from pgseg_hf import PGSegConfig, PGSegModel, default_tokenizer
from pgseg_hf.configuration_pgseg import NPR_VARIANTS
from pgseg_hf.scoring import group_map
from pgseg_hf.training.optimization import build_optimizer, cosine_schedule

SIDE = 32
SQUARES = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "yellow": (230, 220, 50)}
GROUNDS = {"grey": (128, 128, 128), "white": (235, 235, 235), "black": (20, 20, 20), "pink": (240, 150, 190)}


def sixteen_pairs():
    """Images [16, 3, S, S] of a coloured square on a coloured background, their captions, and masks of the squares."""
    rng = np.random.default_rng(0)
    images, captions, masks = [], [], []
    for square, ground in itertools.product(SQUARES, GROUNDS):
        mask = np.zeros((SIDE, SIDE), bool)
        top, left = rng.integers(2, 15, 2)
        mask[top : top + 14, left : left + 14] = True
        pixels = np.where(mask[..., None], SQUARES[square], GROUNDS[ground]) + rng.normal(
            0, 8, (SIDE, SIDE, 3)
        )
        images.append(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).float())
        captions.append(f"a {square} square on {ground}")
        masks.append(mask)
    return torch.stack(images), captions, masks


def iou_of_groups(model, outputs, masks):
    """Mean IoU of the squares with the groups that are mostly inside them."""
    values = []
    for grouping, mask in zip(outputs.grouping, masks):
        groups = group_map(grouping, mask.shape).numpy()
        on_square = [group for group in np.unique(groups) if mask[groups == group].mean() > 0.5]
        found = np.isin(groups, on_square)
        values.append((found & mask).sum() / (found | mask).sum())
    return np.mean(values)


def test_sixteen_pairs_are_learnt_and_groups_lie_on_the_objects():
    torch.manual_seed(0)
    config = PGSegConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "depths": [1, 1, 1],
            "num_group_tokens": [8, 4, 0],
            "num_output_groups": [8, 4, 0],
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 4,
            "drop_path_rate": 0.0,
            "initializer_range": 0.05,
        },
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        projection_dim=32,
        projection_intermediate_dim=64,
        contrastive_pooling="groups",
        assignment_weight=0.2,
    )
    pixels, captions, masks = sixteen_pairs()
    inputs = default_tokenizer()(captions, padding=True, return_tensors="pt") | {"pixel_values": pixels}
    model = PGSegModel(config)
    with torch.no_grad():
        untrained = iou_of_groups(model, model.eval()(**inputs), masks)
    model.train()
    optimizer = build_optimizer(model, learning_rate=1e-3)
    schedule = cosine_schedule(optimizer, warmup_steps=30, total_steps=120)
    for _ in range(120):
        model(**inputs, return_loss=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        outputs = model.eval()(**inputs, return_loss=True)
    assert outputs.contrastive_loss < 0.02
    assert torch.equal(outputs.logits_per_image.argmax(1), torch.arange(16))
    assert iou_of_groups(model, outputs, masks) > 0.5 > 2 * untrained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((variant, torch.bfloat16) for variant in NPR_VARIANTS), ("corrected", torch.float16)],
)
def test_many_steps_in_half_precision_stay_finite(variant, dtype):
    torch.manual_seed(0)
    fields = {"assignment_weight": 0.2, "contrastive_pooling": "groups"} if variant == "corrected" else {}
    config = tiny_config(npr_variant=variant, num_text_prototypes=4, guard_prototype_losses=True, **fields)
    model = PGSegModel(config).train()
    optimizer = build_optimizer(model, learning_rate=1e-3)
    schedule = cosine_schedule(optimizer, warmup_steps=50, total_steps=250)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    skipped, left_out, losses = [], 0, []
    for step in range(250):
        with torch.autocast("cpu", dtype):
            outputs = model(
                tiny_texts(8, words=5, seed=step % 8), tiny_images(8, seed=step % 8), return_loss=True
            )
        scaler.scale(outputs.loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        if not norm.isfinite():
            skipped.append(step)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
        losses.append(outputs.loss.item())
        if variant != "none":
            left_out += not (outputs.image_prototype_loss + outputs.text_prototype_loss).isfinite()
    assert np.isfinite(losses).all()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert np.mean(losses[-50:]) < np.mean(losses[:50])
    # A gradient scaler finds its scale by trial and error; bfloat16 needs no scaler.
    assert all(step < 50 for step in skipped) and (dtype == torch.float16 or not skipped)
    assert left_out == 0 or variant == "released"
