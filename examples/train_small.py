"""Train a small PGSeg from photographs and tags on a CPU, in minutes.

    python examples/train_small.py --data camvid/train --output checkpoint

`--data` is a folder in the `imagefolder` form of `datasets`: `metadata.jsonl` with `file_name` and `tags` in each line.
A picture is seen in random crops. Where a line has a `mask_file_name`, the tags of a crop are those labels of
`labels.json` (in the folder above) that cover more than 2 % of it; no other use is made of a mask. Elsewhere a crop has
its picture's tags. The result is a folder for `from_pretrained`; `examples/evaluate_small.py` measures it.
"""

import argparse
import json
import math
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pgseg_hf import PGSegConfig, PGSegImageProcessorPil, PGSegModel, PGSegProcessor, default_tokenizer
from pgseg_hf.files import folder_written_whole

# A label is a tag of a crop where it covers this share of it.
CROP_TAG_SHARE = 0.02


@dataclass
class Recipe:
    """Settings of a run; each field is a command-line option. Sizes in pixels."""

    data: str
    output: str
    minutes: float = 5.5
    seed: int = 0
    short_side: int = 192
    crop: int = 96
    smallest_crop: int = 24
    largest_crop: int = 96
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.05
    clip: float = 1.0
    hidden_size: int = 128
    patch_size: int = 8
    npr_variant: str = "corrected"
    assignment_weight: float = 0.2
    pooling: str = "groups"
    threads: int = 2


@dataclass
class TaggedPhotos:
    """Photos [P, 3, H, W] (uint8), masks [P, 1, H, W] (uint8, or None), tags bool [P, N], and the N words."""

    pixels: Tensor
    masks: Tensor | None
    tags: Tensor
    words: list[str]


def load_photos(folder: Path, short_side: int) -> TaggedPhotos:
    """Decodes all photos once, scaled to `short_side`; they need one size."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    has_masks = all("mask_file_name" in row for row in rows)
    if has_masks:
        words = json.loads((folder.parent / "labels.json").read_text(encoding="utf-8"))["labels"]
    else:
        words = sorted({tag for row in rows for tag in row["tags"]})
    pixels, masks = [], []
    for row in rows:
        with Image.open(folder / row["file_name"]) as photo:
            factor = short_side / min(photo.size)
            size = (round(photo.width * factor), round(photo.height * factor))
            pixels.append(np.asarray(photo.convert("RGB").resize(size, Image.Resampling.BILINEAR)))
        if has_masks:
            with Image.open(folder / row["mask_file_name"]) as mask:
                masks.append(np.asarray(mask.resize(size, Image.Resampling.NEAREST)))
    tags = torch.tensor([[word in row["tags"] for word in words] for row in rows])
    return TaggedPhotos(
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(np.stack(masks))[:, None] if has_masks else None,
        tags,
        words,
    )


def random_boxes(photos: TaggedPhotos, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Half sides and centres of square crops, [B, 2] as (x, y) in coordinates from -1 to 1."""
    height, width = photos.pixels.shape[-2:]
    side = torch.empty(recipe.batch_size).uniform_(
        recipe.smallest_crop, min(height, width, recipe.largest_crop)
    )
    scale = torch.stack([side / width, side / height], 1)
    return scale, (torch.rand(recipe.batch_size, 2) * 2 - 1) * (1 - scale)


def crop_tags(photos: TaggedPhotos, chosen: Tensor, grid: Tensor) -> Tensor:
    """Tags bool [B, N] of crops: the labels that cover enough of them, or without masks their photos' tags."""
    if photos.masks is None:
        return photos.tags[chosen]
    masks = nn.functional.grid_sample(
        photos.masks[chosen].float(), grid, mode="nearest", padding_mode="border", align_corners=False
    )
    share = torch.stack([(masks == value).float().mean((1, 2, 3)) for value in range(len(photos.words))], 1)
    return share > CROP_TAG_SHARE


def sampling_grid(scale: Tensor, shift: Tensor, crop: int) -> Tensor:
    """Where the pixels of crops come from, [B, crop, crop, 2]; a negative half side flips."""
    theta = torch.zeros(len(scale), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0], scale[:, 1], shift
    return nn.functional.affine_grid(theta, [len(scale), 3, crop, crop], align_corners=False)


def random_crops(photos: TaggedPhotos, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """A batch of random crops, flipped and brightened at random: normalised pixels [B, 3, crop, crop], tags [B, N]."""
    chosen = torch.randint(len(photos.pixels), (recipe.batch_size,))
    scale, shift = random_boxes(photos, recipe)
    scale[:, 0] *= torch.where(torch.rand(recipe.batch_size) < 0.5, -1.0, 1.0)
    grid = sampling_grid(scale, shift, recipe.crop)
    crops = nn.functional.grid_sample(
        photos.pixels[chosen].float(), grid, padding_mode="border", align_corners=False
    )
    gain = torch.empty(recipe.batch_size, 3, 1, 1).uniform_(0.8, 1.2)
    offset = torch.empty(recipe.batch_size, 1, 1, 1).uniform_(-30, 30)
    pixels = (crops * gain + offset).clamp(0, 255) / 255
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return (pixels - mean) / std, crop_tags(photos, chosen, grid)


def build_model(recipe: Recipe) -> PGSegModel:
    """A small model; the text tower is 128 wide so that CLIP's whole vocabulary fits into 13 MB."""
    vision = {
        "hidden_size": recipe.hidden_size,
        "intermediate_size": 4 * recipe.hidden_size,
        "num_attention_heads": recipe.hidden_size // 64,
        "depths": [3, 2, 1],
        "num_group_tokens": [32, 8, 0],
        "num_output_groups": [32, 8, 0],
        "image_size": recipe.crop,
        "patch_size": recipe.patch_size,
        "prototype_projection_dim": 2 * recipe.hidden_size,
        "npr_variant": recipe.npr_variant,
        "drop_path_rate": 0.0,
        "initializer_range": 0.05,
    }
    text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = PGSegConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=128,
        projection_intermediate_dim=256,
        assignment_weight=recipe.assignment_weight if recipe.npr_variant != "none" else 0.0,
        contrastive_pooling=recipe.pooling,
    )
    model = PGSegModel(config)
    model.text_model.get_input_embeddings().requires_grad_(False)  # a dozen words of 49,408 are ever seen
    model.vision_model.set_attn_implementation(
        "eager"
    )  # in bfloat16 on a CPU it trains faster than the fused kernel
    return model


def tag_loss(logits_per_image: Tensor, tags: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid loss over all pairs of crops and words, every word's crops with and without it weighing the same."""
    losses = nn.functional.binary_cross_entropy_with_logits(
        logits_per_image + bias, tags.float(), reduction="none"
    )
    with_tag = (losses * tags).sum(0) / tags.sum(0).clamp(min=1)
    without = (losses * ~tags).sum(0) / (~tags).sum(0).clamp(min=1)
    return (with_tag + without).mean()


def train(photos: TaggedPhotos, recipe: Recipe) -> tuple[PGSegModel, int]:
    """Trains for `recipe.minutes`; returns the model and the number of steps."""
    model = build_model(recipe).train()
    tokens = default_tokenizer()(
        [f"a photo of a {word}." for word in photos.words], padding=True, return_tensors="pt"
    )
    bias = nn.Parameter(torch.zeros(()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    plain = [parameter for parameter in trained if parameter.ndim <= 1] + [bias]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
    )
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (60 * recipe.minutes)) < 1:
        rate = recipe.learning_rate * min(done / recipe.warmup_share, (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels, tags = random_crops(photos, recipe)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(**tokens, pixel_values=pixels, text_targets=tags, return_loss=True)
        naming = tag_loss(outputs.logits_per_image, tags, bias)
        loss = outputs.loss - outputs.contrastive_loss + naming
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*trained, bias], recipe.clip)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            seconds = time.monotonic() - start
            parts = {"tags": naming, "image prototypes": outputs.image_prototype_loss}
            parts |= {"text prototypes": outputs.text_prototype_loss, "assignment": outputs.assignment_loss}
            text = ", ".join(
                f"{name} {value.item():.3f}" for name, value in parts.items() if value is not None
            )
            speed = step * recipe.batch_size / seconds
            left = recipe.minutes - seconds / 60
            print(f"step {step}: {text}; {speed:.0f} images/s, {left:.1f} minutes left", flush=True)
    return model.eval(), step


def save(model: PGSegModel, recipe: Recipe) -> None:
    """Writes model (float16) and processor; an old folder of that name is replaced."""
    size = {"shortest_edge": recipe.short_side, "longest_edge": 2048}
    processor = PGSegProcessor(
        PGSegImageProcessorPil(size=size),
        default_tokenizer(),
        window_size=recipe.crop,
        window_stride=recipe.crop // 2,
    )
    output = Path(recipe.output)
    new = output.with_name(f"{output.name}.new")
    with folder_written_whole(new) as folder:
        model.half().save_pretrained(folder)
        processor.save_pretrained(folder)
    if output.exists():
        shutil.rmtree(output)
    new.rename(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Recipe):
        default = {"required": True} if field.name in ("data", "output") else {"default": field.default}
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, **default)
    recipe = Recipe(**vars(parser.parse_args()))
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    start = time.monotonic()
    photos = load_photos(Path(recipe.data), recipe.short_side)
    print(f"{len(photos.pixels)} photos, words: {', '.join(photos.words)}", flush=True)
    model, steps = train(photos, recipe)
    save(model, recipe)
    minutes = (time.monotonic() - start) / 60
    print(f"{steps} steps of {recipe.batch_size} crops in {minutes:.1f} minutes -> {recipe.output}")


if __name__ == "__main__":
    main()
