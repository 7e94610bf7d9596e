"""A tour of the library in five steps: load, segment, look at groups and prototypes, fine-tune for a minute, evaluate.

    pip install 'pgseg-hf[train]'
    python examples/tour.py --output_dir tour

Images are written to the output folder. Fine-tuning uses generated scenes and takes about a minute on one core. To use
your own images, pass `--data FOLDER --eval_data FOLDER` (see examples/README.md for both layouts). `tour.ipynb` is the
same tour as a notebook, which `python examples/make_notebook.py` generates from this file.
"""

# %%
import argparse
import builtins
import json
from pathlib import Path

import torch
import train_with_trainer
from PIL import Image

from pgseg_hf import DEFAULT_CHECKPOINT, SegmentationOptions, load_segmenter
from pgseg_hf.command_line import CommandParser
from pgseg_hf.data.scenes import SceneOptions, SceneSource
from pgseg_hf.evaluation import MaskFolder, MaskOptions, evaluate_masks
from pgseg_hf.images import load_image
from pgseg_hf.visualization import (
    draw_contours,
    draw_groups,
    group_palette,
    heat_map,
    overlay,
    palette,
    prototype_maps,
    side_by_side,
)

parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output_dir", type=Path, default=Path("tour"))
parser.add_argument("--model_name_or_path", default=DEFAULT_CHECKPOINT)
parser.add_argument("--data", type=Path, help="folder of images with captions or tags")
parser.add_argument("--eval_data", type=Path, help="folder of images with masks")
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args([] if hasattr(builtins, "__IPYTHON__") else None)
if (args.data is None) != (args.eval_data is None):
    parser.error("--data and --eval_data must be given together")
args.output_dir.mkdir(parents=True, exist_ok=True)


def save(drawn: Image.Image, name: str) -> Image.Image:
    """Writes an image to the output folder and returns it, so that a notebook shows it."""
    drawn.save(args.output_dir / f"{name}.png")
    return drawn


# %% [markdown]
# ## 1. Load
# Load a model and its processor from a folder or the Hub.

# %%
segmenter = load_segmenter(args.model_name_or_path)
parameters = sum(parameter.numel() for parameter in segmenter.model.parameters())
print(f"1. Loaded {args.model_name_or_path}: {parameters:,} parameters")

# %% [markdown]
# ## 2. Segment
# Pass labels and get one label per pixel.

# %%
image = load_image(Path(train_with_trainer.__file__).parent / "images" / "horses.jpg")
labels = ["horse", "person", "sand", "sea", "rock"]
result = segmenter(image, labels)
print("2. Segmented:")
for found in result.segments():
    print(f"   {found.label}: {found.area:.1%} of the pixels, score {found.score:.2f}")
save(draw_contours(image, result.label_map, labels), "contours")
save(overlay(image, result.label_map, labels), "masks")

# %% [markdown]
# With a background at three thresholds, from a single pass of the image encoder.

# %%
encoded = next(segmenter.encode([image]))
embeds = segmenter.class_embeddings(labels)
scored = segmenter.score(encoded, embeds, may_have_background=True)
overlays = []
for threshold in (0.1, 0.3, 0.5):
    label_map, _ = scored.with_background(threshold).label_map()
    overlays.append(overlay(image, label_map, labels, background=True, legend=False))
save(side_by_side(overlays, ["threshold 0.1", "0.3", "0.5"]), "background")

# %% [markdown]
# ## 3. Look at groups and prototypes
# The groups of the whole image, and how similar the labels are to them.

# %%
(window,) = next(segmenter.encode([image], SegmentationOptions(window_size=None))).windows
cosines = torch.nn.functional.normalize(window.features.segment_embeds[0], dim=-1) @ embeds.T
count = len(cosines)
best = cosines.argmax(dim=1).tolist()
print("3. Groups and prototypes:")
for group, label in enumerate(best):
    print(f"   group {group + 1} is most similar to {labels[label]!r} ({cosines[group, label]:.2f})")
names = [str(group + 1) for group in range(count)]
colours = palette(len(labels)), group_palette(count)
save(heat_map(cosines.T, labels, names, best, *colours), "affinities")
save(draw_groups(image, window.groups, count), "groups")

# %% [markdown]
# The prototypes of each stage, if the model has any.

# %%
pixel_values = segmenter.processor(images=image, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    seen = segmenter.model.vision_model(pixel_values, output_npr=True, output_attentions=True)
counts = [stage.prototypes.shape[1] for stage in seen.npr or ()]
maps = [
    draw_groups(image, patches, count, legend=False)
    for patches, count in zip(prototype_maps(seen) if counts else (), counts)
]
titles = [f"stage {stage}: {count} prototypes" for stage, count in enumerate(counts, start=1)]
save(side_by_side(maps, titles), "prototypes") if maps else None

# %% [markdown]
# ## 4. Fine-tune
# Fine-tune on a folder of images with tags, here generated scenes. A second folder has masks for the evaluation.


# %%
def draw_scenes(folder: Path, split: str, length: int) -> Path:
    """Writes a folder of images with tags, and with masks for the split "test"."""
    source = SceneSource(SceneOptions(size=96, length=length, split=split))
    rows = []
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(len(source)):
        record = source[number]
        row = {"file_name": f"images/{number:03d}.png", "tags": record.tags, "caption": record.captions[0]}
        load_image(record.image).save(folder / row["file_name"])
        if split == "test":
            row["mask_file_name"] = f"masks/{number:03d}.png"
            record.mask.save(folder / row["mask_file_name"])
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "labels.json").write_text(json.dumps({"labels": list(source.labels)}))
    return folder


data = args.data or draw_scenes(args.output_dir / "scenes-train", "train", 512)
eval_data = args.eval_data or draw_scenes(args.output_dir / "scenes-test", "test", 32)
checkpoint = str(args.output_dir / "checkpoint")
print(f"4. Fine-tune on {data}: {args.steps} steps.")
train_with_trainer.train(str(data), checkpoint, steps=args.steps, start=args.model_name_or_path)

# %% [markdown]
# ## 5. Evaluate
# Mean IoU before and after fine-tuning, and the best that the groups allow (the oracle).

# %%
dataset = MaskFolder(eval_data)
print(f"5. Evaluate on {len(dataset)} images with masks.")
for name, each in (("before", segmenter), ("after", load_segmenter(checkpoint))):
    scores = evaluate_masks(each, dataset, MaskOptions(oracle=True))
    print(f"   {name}: mean IoU {scores.confusion.mean_iou():.3f}, oracle {scores.oracle.mean_iou():.3f}")
print(f"The fine-tuned checkpoint is {checkpoint}; the images are next to it.")
