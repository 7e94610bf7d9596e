"""Train a small PGSeg from photos with image-level tags, on one CPU core, in about half an hour.

    python examples/train_small.py --data ccp/train --output checkpoint

`--data` is a folder in the `imagefolder` form of `datasets`: `metadata.jsonl` with `file_name` and `tags` in each
line. No mask is read. The result is a folder for `PGSegModel.from_pretrained`, written once training has ended;
`examples/evaluate_small.py` measures it. The shipped checkpoint `pgseg-small-ccp` was made by this script.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pgseg_hf.configuration_pgseg import PGSegConfig
from pgseg_hf.image_processing_pil_pgseg import PGSegImageProcessorPil
from pgseg_hf.modeling_pgseg import PGSegModel, PGSegOutput
from pgseg_hf.processing_pgseg import PGSegProcessor
from pgseg_hf.prompts import SEGMENTATION_TEMPLATES
from pgseg_hf.tokenization import default_tokenizer

# Words that taggers of Clothing Co-Parsing use for the same things. A tag in no group is a group of its own.
GROUPS = {
    "hair": ["hair"],
    "skin": ["skin"],
    "dress": ["dress", "romper"],
    "coat": ["coat", "jacket", "blazer", "cape", "vest", "suit"],
    "shirt": ["shirt", "blouse", "top", "t-shirt", "bodysuit", "bra"],
    "sweater": ["sweater", "sweatshirt", "jumper", "hoodie", "cardigan"],
    "pants": ["pants", "jeans", "leggings"],
    "skirt": ["skirt"],
    "shorts": ["shorts"],
    "stockings": ["stockings", "tights", "socks"],
    "shoes": [
        *("shoes", "heels", "pumps", "sandals", "flats"),
        *("wedges", "loafers", "sneakers", "clogs", "boots"),
    ],
    "bag": ["bag", "purse", "wallet"],
    "scarf": ["scarf"],
    "hat": ["hat"],
    "belt": ["belt"],
    "sunglasses": ["sunglasses", "glasses"],
    "accessories": [
        *("accessories", "bracelet", "necklace", "earrings"),
        *("ring", "watch", "gloves", "tie"),
    ],
}
OBJECTIVES = ("contrastive", "sigmoid", "patches")


@dataclass
class Recipe:
    """Settings of a training run; each field is a command-line option. Sizes are in pixels.

    minutes: wall time of the training loop, over which the learning rate rises (`warmup`, a share) and falls to 0.
    objective: what compares photos with words: the model's own `contrastive` loss, or a binary cross-entropy for each
        word, of the model's image logits (`sigmoid`) or of logits pooled from patches (`patches`).
    height, width: of the photos in training; `cache_scale` times larger in memory, for the crops.
    inference_side: short side that the saved processor resizes photos to.
    crop_scale: smallest share of a photo that a training crop shows.
    average_decay: of the moving average of the weights, which is what is saved.
    skip_tags: tags to leave out, with commas between them.
    """

    data: str
    output: str
    minutes: float = 27.0
    seed: int = 0
    objective: str = "patches"
    height: int = 96
    width: int = 64
    patch_size: int = 8
    cache_scale: float = 1.6
    inference_side: int = 96
    crop_scale: float = 0.7
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    hidden_size: int = 128
    depth: int = 2
    group_tokens: int = 32
    groups: int = 8
    initializer_range: float = 0.08
    npr_variant: str = "corrected"
    naming_weight: float = 10.0
    assignment_weight: float = 0.1
    pooling: str = "groups"
    average_decay: float = 0.995
    validation_photos: int = 100
    skip_tags: str = ""
    threads: int = 1


@dataclass
class TaggedPhotos:
    """Photos [P, 3, H, W] as uint8, which tag groups each shows, bool [P, G], and (height, width) to train at."""

    pixels: Tensor
    targets: Tensor
    size: tuple[int, int]


@dataclass
class Vocabulary:
    """The tag groups and their words: `group_of_word` [N] is the group's index for each word."""

    groups: list[str]
    words: list[str]
    group_of_word: Tensor
    input_ids: Tensor
    attention_mask: Tensor


def group_of(tag: str) -> str:
    return next((name for name, words in GROUPS.items() if tag in words), tag)


def read_metadata(folder: Path) -> list[dict]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: --data must be a folder with metadata.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def shuffled(rows: list[dict]) -> list[dict]:
    """In a fixed random order, whatever the seed of the run, so that the held-out photos are always the same."""
    return random.Random(0).sample(rows, len(rows))


def build_vocabulary(rows: list[dict], skip_tags: list[str]) -> Vocabulary:
    tags = sorted({tag for row in rows for tag in row["tags"]} - set(skip_tags))
    groups = sorted({group_of(tag) for tag in tags} - set(skip_tags))
    words = sorted(tag for tag in tags if group_of(tag) in groups)
    prompts = [SEGMENTATION_TEMPLATES[0].format(word) for word in words]
    tokens = default_tokenizer()(prompts, padding=True, return_tensors="pt")
    group_of_word = torch.tensor([groups.index(group_of(word)) for word in words])
    return Vocabulary(groups, words, group_of_word, tokens["input_ids"], tokens["attention_mask"])


def load_photos(
    folder: Path, rows: list[dict], vocabulary: Vocabulary, size: tuple[int, int], cache_scale: float
) -> TaggedPhotos:
    """Decodes all photos once, at `cache_scale` times the size of the training crops."""
    height, width = (round(side * cache_scale) for side in size)
    pixels = torch.empty(len(rows), 3, height, width, dtype=torch.uint8)
    targets = torch.zeros(len(rows), len(vocabulary.groups), dtype=torch.bool)
    for index, row in enumerate(rows):
        with Image.open(folder / row["file_name"]) as photo:
            resized = photo.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        pixels[index] = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        for group in {group_of(tag) for tag in row["tags"]} & set(vocabulary.groups):
            targets[index, vocabulary.groups.index(group)] = True
    return TaggedPhotos(pixels, targets, size)


def normalized(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (pixels.float() / 255 - mean) / std


def random_crops(pixels: Tensor, size: tuple[int, int], smallest: float) -> Tensor:
    """Random crops (of `smallest` to all of the area), flips, brightness and contrast of uint8 photos [B, 3, H, W].

    Returns:
        normalised pixels [B, 3, h, w], (h, w) being `size`.
    """
    batch = len(pixels)
    area = torch.empty(batch).uniform_(smallest, 1)
    aspect = torch.empty(batch).uniform_(-0.2, 0.2).exp()
    sides_B2 = torch.stack([area.sqrt() * aspect, area.sqrt() / aspect], 1).clamp(max=1)
    shift_B2 = (torch.rand(batch, 2) * 2 - 1) * (1 - sides_B2)
    flip = (torch.rand(batch) < 0.5).float() * 2 - 1
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = sides_B2[:, 0] * flip, sides_B2[:, 1], shift_B2
    grid = nn.functional.affine_grid(theta, [batch, 3, *size], align_corners=False)
    crops = nn.functional.grid_sample(pixels.float(), grid, align_corners=False)
    gain, offset = (torch.empty(batch, 1, 1, 1).uniform_(-0.2, 0.2) for _ in range(2))
    return normalized((crops * (1 + gain) + 255 * offset).clamp(0, 255))


def build_model(recipe: Recipe) -> PGSegModel:
    """A new small model; its text tower is 128 wide so that the whole vocabulary fits into 13 MB."""
    stage_depths = (recipe.depth, 1, 1)
    model = PGSegModel(
        PGSegConfig(
            text_config={
                **{"hidden_size": 128, "intermediate_size": 512},
                **{"num_hidden_layers": 2, "num_attention_heads": 4},
                "initializer_range": recipe.initializer_range,
            },
            vision_config={
                "hidden_size": recipe.hidden_size,
                "intermediate_size": 4 * recipe.hidden_size,
                "num_attention_heads": recipe.hidden_size // 64,
                "depths": stage_depths,
                "num_group_tokens": (recipe.group_tokens, recipe.groups, 0),
                "num_output_groups": (recipe.group_tokens, recipe.groups, 0),
                "image_size": math.isqrt(recipe.height * recipe.width)
                // recipe.patch_size
                * recipe.patch_size,
                "patch_size": recipe.patch_size,
                "prototype_projection_dim": 256,
                "npr_variant": recipe.npr_variant,
                "initializer_range": recipe.initializer_range,
            },
            projection_dim=128,
            projection_intermediate_dim=256,
            assignment_weight=recipe.assignment_weight,
            contrastive_pooling=recipe.pooling,
        )
    )
    with torch.no_grad():
        positions = model.vision_model.embeddings.position_embeddings
        positions.copy_(waves(model.vision_model.embeddings.grid, positions.shape[-1]))
    model.text_model.get_input_embeddings().requires_grad_(False)  # a few dozen words of 49,408 are ever seen
    model.set_attn_implementation("eager")  # in bfloat16 on a CPU, faster than the fused kernels
    return model


def waves(grid: int, width: int) -> Tensor:
    """Sines and cosines of row and column, [1, grid * grid, width]: with few photos, places are hard to learn."""
    frequencies = math.pi * 2.0 ** torch.linspace(-1, 2.5, width // 4)
    angles = torch.linspace(-1, 1, grid)[:, None] * frequencies / 2
    side = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = side[:, None].expand(-1, grid, -1), side[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(1, grid * grid, width)


def patch_logits(outputs: PGSegOutput) -> Tensor:
    """Logits of words for images, [B, N], from where the label map takes its names: a patch mixes its groups' logits
    by its soft assignment, and the image takes the log-mean-exp over its patches. A group without patches, which no
    map would show, cannot name anything."""
    patches_BKL = outputs.grouping.flatten(2).float()
    logits_BLN = patches_BKL.transpose(1, 2) @ outputs.segment_logits.float()
    return logits_BLN.logsumexp(1) - math.log(logits_BLN.shape[1])


def naming_loss(outputs: PGSegOutput, bias_N: Tensor, targets_BN: Tensor, recipe: Recipe) -> Tensor:
    """The part of the loss that compares photos with words, bool targets."""
    if recipe.objective == "contrastive":
        return outputs.contrastive_loss
    logits_BN = outputs.logits_per_image if recipe.objective == "sigmoid" else patch_logits(outputs)
    return nn.functional.binary_cross_entropy_with_logits(logits_BN + bias_N, targets_BN.float())


def log_odds(targets: Tensor) -> Tensor:
    """Of each tag group over all photos [P, G]: where the bias of a tag begins."""
    share = targets.float().mean(0).clamp(0.005, 0.995)
    return (share / (1 - share)).log()


def build_optimizer(model: PGSegModel, bias: nn.Parameter, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW without weight decay on 1-D parameters and on the embeddings, most of whose words are never seen."""
    decayed: list[nn.Parameter] = []
    others = [bias]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or "embedding" in name
        (others if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


@torch.no_grad()
def move_average(average: PGSegModel, model: PGSegModel, decay: float) -> None:
    """Moving average of weights and statistics."""
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        if fast.requires_grad:
            slow.lerp_(fast, 1 - decay)
    for slow, fast in zip(average.buffers(), model.buffers(), strict=True):
        slow.lerp_(fast, 1 - decay) if slow.is_floating_point() else slow.copy_(fast)


@torch.no_grad()
def tag_precision(model: PGSegModel, photos: TaggedPhotos, vocabulary: Vocabulary) -> tuple[float, float]:
    """Average precision of ranking whole photos, mean over tag groups: by the logits of patches, and of images."""
    model.eval()
    by_patches, by_images = [], []
    columns = torch.tensor([vocabulary.words.index(group) for group in vocabulary.groups])
    for pixels in photos.pixels.split(50):
        resized = nn.functional.interpolate(normalized(pixels), photos.size, mode="bilinear", antialias=True)
        outputs = model(vocabulary.input_ids, resized, attention_mask=vocabulary.attention_mask)
        by_patches.append(patch_logits(outputs)[:, columns])
        by_images.append(outputs.logits_per_image[:, columns])
    return (
        mean_average_precision(torch.cat(by_patches), photos.targets),
        mean_average_precision(torch.cat(by_images), photos.targets),
    )


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Of each column of scores [P, G] as a ranking of the rows, where some but not all of them are relevant."""
    precisions = []
    for column, relevant in zip(scores.T, targets.T, strict=True):
        ranked = relevant[column.argsort(descending=True)].float()
        if 0 < ranked.sum() < len(ranked):
            precision_at = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
            precisions.append(float((precision_at * ranked).sum() / ranked.sum()))
    return sum(precisions) / len(precisions)


def train(
    photos: TaggedPhotos, validation: TaggedPhotos, vocabulary: Vocabulary, recipe: Recipe
) -> tuple[PGSegModel, int]:
    """Trains for `recipe.minutes`; returns the averaged model and the number of steps."""
    model, average = build_model(recipe), build_model(recipe)
    average.load_state_dict(model.state_dict())
    bias = nn.Parameter(log_odds(photos.targets))
    optimizer = build_optimizer(model, bias, recipe)
    started, step, last_report = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - started) / (60 * recipe.minutes)) < 1:
        warm = min(1.0, share / recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * (1 + math.cos(math.pi * share)) / 2
        chosen = torch.randint(len(photos.pixels), (recipe.batch_size,))
        targets = photos.targets[chosen]
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(
                vocabulary.input_ids,
                random_crops(photos.pixels[chosen], photos.size, recipe.crop_scale),
                attention_mask=vocabulary.attention_mask,
                text_targets=targets[:, vocabulary.group_of_word],
                return_loss=True,
            )
        naming = naming_loss(
            outputs, bias[vocabulary.group_of_word], targets[:, vocabulary.group_of_word], recipe
        )
        loss = outputs.loss - outputs.contrastive_loss + recipe.naming_weight * naming
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        step += 1
        move_average(average, model, min(recipe.average_decay, step / (step + 10)))
        if time.monotonic() - last_report > 20:
            last_report = time.monotonic()
            report_progress(outputs, naming, step, started, recipe)
        if step % 250 == 0:
            by_patches, by_images = tag_precision(average, validation, vocabulary)
            print(
                f"step {step}: tag precision {by_patches:.3f} by patches, {by_images:.3f} by images",
                flush=True,
            )
    return average.eval(), step


def report_progress(outputs: PGSegOutput, naming: Tensor, step: int, started: float, recipe: Recipe) -> None:
    seconds = time.monotonic() - started
    parts = {
        "naming": naming,
        "image prototypes": outputs.image_prototype_loss,
        "text prototypes": outputs.text_prototype_loss,
        "assignment": outputs.assignment_loss,
    }
    losses = ", ".join(f"{name} {value.item():.3f}" for name, value in parts.items() if value is not None)
    print(
        f"step {step}: {losses}; {step * recipe.batch_size / seconds:.0f} images/s, "
        f"{recipe.minutes - seconds / 60:.1f} minutes left",
        flush=True,
    )


def save_checkpoint(model: PGSegModel, recipe: Recipe) -> None:
    """Writes model (float16) and processor to the output folder, which appears whole or not at all."""
    output = Path(recipe.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    size = {"shortest_edge": recipe.inference_side, "longest_edge": 2048}
    processor = PGSegProcessor(PGSegImageProcessorPil(size=size), default_tokenizer(), window_size=None)
    model.to(torch.float16).save_pretrained(temporary)
    processor.save_pretrained(temporary)
    leave_out_code(temporary)
    temporary.chmod(0o755)
    (temporary / "model.safetensors").chmod(0o644)
    if output.exists():
        shutil.rmtree(output)
    temporary.rename(output)


def leave_out_code(folder: Path) -> None:
    """Drops the copy of the package's code that `save_pretrained` adds for use without the package."""
    for module in folder.glob("*.py"):
        module.unlink()
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        for part in (settings, settings.get("image_processor", {})):
            part.pop("auto_map", None)
        (folder / name).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_arguments() -> Recipe:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Recipe):
        required = field.default is MISSING
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=str if required else type(field.default),
            default=None if required else field.default,
            required=required,
            choices=OBJECTIVES if field.name == "objective" else None,
        )
    return Recipe(**vars(parser.parse_args()))


def main() -> None:
    recipe = parse_arguments()
    started = time.monotonic()
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    random.seed(recipe.seed)
    folder = Path(recipe.data)
    rows = shuffled(read_metadata(folder))
    vocabulary = build_vocabulary(rows, recipe.skip_tags.split(","))
    size, held_out = (recipe.height, recipe.width), recipe.validation_photos
    validation = load_photos(folder, rows[:held_out], vocabulary, size, recipe.cache_scale)
    photos = load_photos(folder, rows[held_out:], vocabulary, size, recipe.cache_scale)
    print(
        f"{len(rows) - held_out} photos, {held_out} held out; words: {', '.join(vocabulary.words)}",
        flush=True,
    )
    model, steps = train(photos, validation, vocabulary, recipe)
    by_patches, by_images = tag_precision(model, validation, vocabulary)
    save_checkpoint(model, recipe)
    print(
        f"Trained {steps} steps of {recipe.batch_size} photos in {(time.monotonic() - started) / 60:.1f} minutes; "
        f"tag precision on the held-out photos {by_patches:.3f} by patches, {by_images:.3f} by images; "
        f"checkpoint in {recipe.output}"
    )


if __name__ == "__main__":
    main()
