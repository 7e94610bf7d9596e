"""A tour of the library in five stops: load, segment, look at groups and prototypes, fine-tune for a minute, evaluate.

    pip install 'pgseg-hf[train]'
    python examples/tour.py --output_dir tour

Pictures go to the output folder. The fine-tuning takes scenes that are drawn on the spot, about a minute on one core;
with `--data FOLDER --eval_data FOLDER` it takes your own pictures (see examples/README.md for both layouts).
"""

import argparse
import json
from pathlib import Path

import torch
from train_with_trainer import train

from pgseg_hf import DEFAULT_CHECKPOINT, SegmentationOptions, Segmenter, load_segmenter
from pgseg_hf.command_line import CommandParser
from pgseg_hf.data.scenes import SceneOptions, SceneSource
from pgseg_hf.evaluation import MaskFolder, MaskOptions, evaluate_masks
from pgseg_hf.images import load_image
from pgseg_hf.visualization import (
    draw_contours,
    draw_groups,
    heat_map,
    overlay,
    palette,
    prototype_maps,
    side_by_side,
)

PHOTO = Path(__file__).parent / "images" / "horses.jpg"
LABELS = ["horse", "person", "sand", "sea", "rock"]
WHOLE = SegmentationOptions(window_size=None)


def main() -> None:
    """Walks the tour."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("tour"))
    parser.add_argument("--model_name_or_path", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--data", type=Path, help="a folder of pictures with captions or tags")
    parser.add_argument("--eval_data", type=Path, help="a folder of pictures with masks")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    if (args.data is None) != (args.eval_data is None):
        parser.error("--data and --eval_data belong together")
    args.output_dir.mkdir(parents=True, exist_ok=True)

    print("1. Load: a model and its processor, from a folder or the Hub.")
    segmenter = load_segmenter(args.model_name_or_path)
    parameters = sum(parameter.numel() for parameter in segmenter.model.parameters())
    print(f"   {args.model_name_or_path}: {parameters:,} parameters")

    segment(segmenter, args.output_dir)
    look_inside(segmenter, args.output_dir)
    data, eval_data = args.data, args.eval_data
    if data is None:
        data, eval_data = draw_scenes(args.output_dir)
    fine_tune_and_evaluate(segmenter, data, eval_data, args.model_name_or_path, args.output_dir, args.steps)


def segment(segmenter: Segmenter, output: Path) -> None:
    """Masks of words, with and without a background, from one pass of the image encoder."""
    print("2. Segment: words in, a label for each pixel out.")
    image = load_image(PHOTO)
    result = segmenter(image, LABELS)
    for found in result.segments():
        print(f"   {found.label}: {found.area:.1%} of the pixels, score {found.score:.2f}")
    overlay(image, result.label_map, LABELS).save(output / "masks.png")
    draw_contours(image, result.label_map, LABELS).save(output / "contours.png")

    encoded = next(segmenter.encode([image]))
    scored = segmenter.score(encoded, segmenter.class_embeddings(LABELS), may_have_background=True)
    pictures = []
    for threshold in (0.1, 0.3, 0.5):
        label_map, _ = scored.with_background(threshold).label_map()
        pictures.append(overlay(image, label_map, LABELS, background=True, legend=False))
    side_by_side(pictures, ["threshold 0.1", "0.3", "0.5"]).save(output / "background.png")


def look_inside(segmenter: Segmenter, output: Path) -> None:
    """Groups of the whole photo, how well the labels fit them, and the prototypes of each stage."""
    print("3. Look at groups and prototypes: groups.png, affinities.png, prototypes.png.")
    image = load_image(PHOTO)
    (window,) = next(segmenter.encode([image], WHOLE)).windows
    embeds = segmenter.class_embeddings(LABELS)
    cosines = torch.nn.functional.normalize(window.segments, dim=-1) @ embeds.T
    count = len(cosines)
    draw_groups(image, window.groups, count).save(output / "groups.png")
    best = cosines.argmax(dim=1).tolist()
    names = [str(group + 1) for group in range(count)]
    heat_map(cosines.T, LABELS, names, best, palette(len(LABELS)), palette(count)).save(
        output / "affinities.png"
    )
    for group, label in enumerate(best):
        print(f"   group {group + 1} is most like {LABELS[label]!r} ({cosines[group, label]:.2f})")

    pixel_values = segmenter.processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = segmenter.model.vision_model(pixel_values, output_npr=True, output_attentions=True)
    if not seen.npr:
        print("   this model has no prototypes")
        return
    counts = [prototypes.shape[1] for _, prototypes, *_ in seen.npr]
    pictures = [
        draw_groups(image, patches, count, legend=False)
        for patches, count in zip(prototype_maps(seen), counts)
    ]
    titles = [f"stage {stage}: {count} prototypes" for stage, count in enumerate(counts, start=1)]
    side_by_side(pictures, titles).save(output / "prototypes.png")


def draw_scenes(output: Path) -> tuple[Path, Path]:
    """A folder with tags to learn from and a folder with masks to be measured on, of drawn scenes."""
    folders = output / "scenes-train", output / "scenes-test"
    for folder, split, length in zip(folders, ("train", "test"), (512, 32)):
        source = SceneSource(SceneOptions(size=96, length=length, split=split))
        rows = []
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for number in range(len(source)):
            record = source[number]
            row = {
                "file_name": f"images/{number:03d}.png",
                "tags": record.tags,
                "caption": record.captions[0],
            }
            load_image(record.image).save(folder / row["file_name"])
            if split == "test":
                row["mask_file_name"] = f"masks/{number:03d}.png"
                record.mask.save(folder / row["mask_file_name"])
            rows.append(json.dumps(row))
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
        (folder / "labels.json").write_text(json.dumps({"labels": list(source.labels)}))
    return folders


def fine_tune_and_evaluate(
    segmenter: Segmenter, data: Path, eval_data: Path, start: str, output: Path, steps: int
) -> None:
    """Mean IoU before and after some steps on a folder."""
    dataset, options = MaskFolder(eval_data), MaskOptions(oracle=True)
    before = evaluate_masks(segmenter, dataset, options)
    print(f"4. Fine-tune on {data}: {steps} steps.")
    train(str(data), str(output / "checkpoint"), steps=steps, start=start)
    print(f"5. Evaluate on {len(dataset)} pictures with masks.")
    after = evaluate_masks(load_segmenter(str(output / "checkpoint")), dataset, options)
    for name, scores in (("before", before), ("after", after)):
        print(f"   {name}: mean IoU {scores.confusion.mean_iou():.3f}, oracle {scores.oracle.mean_iou():.3f}")
    print(f"The fine-tuned checkpoint is {output / 'checkpoint'}, pictures are beside it.")


if __name__ == "__main__":
    main()
