"""Evaluates an everyday checkpoint on photographs with masks: COCO instances, Oxford Pets trimaps, street frames.

    python examples/evaluate_everyday.py --coco COCO-MINI --pets Sample_Pets_dataset --street camvid/val \
        --output everyday.json

All protocols use the checkpoint's own sizes and settings:

- `present`: the names in an image's masks compete in that image; pixels without a mask are ignored.
- `all`: COCO's 80 names and 50 stuff names compete in every image, on the same pixels.
- `pets`: cat and dog against the background at `--thresholds`; the borders of the trimaps are ignored.
- `street`: the names in a frame's masks compete in it; `labels.json` is in the folder above.
- `unseen`: like `present` or `street`, but a name is replaced by a word that no text of a training image contains (the
  text tower has read it); the result is the IoU of the word relative to that of the name.

IoU is computed per class over all images; mIoU is the mean over the classes that occur.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from tqdm.auto import tqdm

from pgseg_hf import DEFAULT_CHECKPOINT, SegmentationOptions, load_segmenter
from pgseg_hf.command_line import CommandParser
from pgseg_hf.evaluation.benchmarks.mask_dataset import MaskFolder
from pgseg_hf.evaluation.metrics.confusion import ConfusionMatrix
from pgseg_hf.files import write_json
from pgseg_hf.images import load_image, load_label_map
from pgseg_hf.segmentation import Segmenter

IGNORED = 255
# Everyday words for COCO's categories.
WORDS = {
    **{"tv": "television", "couch": "sofa", "cell phone": "phone", "dining table": "table"},
    **{"potted plant": "plant", "sports ball": "ball", "mouse": "computer mouse", "remote": "remote control"},
    **{"hair drier": "hair dryer", "tie": "necktie"},
}
STUFF = (
    "sky, grass, tree, road, wall, floor, building, water, sea, river, mountain, rock, sand, snow, field, "
    "ground, sidewalk, fence, ceiling, window, door, curtain, carpet, cabinet, house, bridge, cloud, "
    "flower, plate, food, hat, shirt, pants, shoe, lamp, pillow, blanket, towel, mirror, stairs, sign, "
    "pole, leaf, fruit, vegetable, paper, box, street, railroad tracks, table cloth"
)
# Words for the same thing: those that training texts contain come first, then those that none contains.
UNSEEN = {
    "cat": ("cat", "kitten"),
    "car": ("car", "automobile"),
    "sofa": ("sofa", "couch"),
    "person": ("person", "baby", "infant"),
    "sidewalk": ("sidewalk", "pavement"),
}
STREET = {"pavement": "sidewalk", "pedestrian": "person", "bicyclist": "cyclist"}


@dataclass
class Photo:
    """An image and its ground truth, uint8 [H, W]: indices of names, 255 for ignored pixels."""

    path: Path
    truth: np.ndarray


def coco_photos(folder: Path) -> tuple[list[str], list[Photo]]:
    """The names of COCO's categories, and the images of `train2017` and `val2017` with their instances, smaller ones on
    top."""
    photos: list[Photo] = []
    names: list[str] = []
    for split in ("train2017", "val2017"):
        coco = COCO(str(folder / "annotations" / f"instances_{split}.json"))
        categories = sorted(coco.cats)
        names = [WORDS.get(coco.cats[key]["name"], coco.cats[key]["name"]) for key in categories]
        for key in coco.getImgIds():
            image = coco.loadImgs(key)[0]
            truth = np.full((image["height"], image["width"]), IGNORED, np.uint8)
            found = coco.loadAnns(coco.getAnnIds(key))
            for one in sorted(found, key=lambda one: -one["area"]):
                truth[coco.annToMask(one).astype(bool)] = categories.index(one["category_id"])
            if (truth != IGNORED).any():
                photos.append(Photo(folder / split / image["file_name"], truth))
    return names, photos


def pets_photos(folder: Path, count: int) -> list[Photo]:
    """Cats (1) and dogs (2) on a background (0). File names of cats start with a capital letter."""
    paths = sorted((folder / "images").glob("*.jpg"))
    random.Random(0).shuffle(paths)
    photos = []
    for path in paths:
        trimap = folder / "trimaps" / f"{path.stem}.png"
        if trimap.is_file() and len(photos) < count:
            values = np.asarray(Image.open(trimap))
            animal = 1 if path.stem[0].isupper() else 2
            truth = np.select([values == 1, values == 2], [animal, 0], IGNORED).astype(np.uint8)
            photos.append(Photo(path, truth))
    return photos


def street_photos(folder: Path) -> tuple[list[str], list[Photo]]:
    """The labels of a mask folder as everyday names, and its images with their masks."""
    found = MaskFolder(folder)
    photos = [
        Photo(Path(str(each.image)), load_label_map(each.mask).astype(np.uint8)) for each in found.images
    ]
    return [STREET.get(label, label) for label in found.labels], photos


class Evaluation:
    """Confusion matrices by protocol and settings; each image is encoded only once."""

    def __init__(self, segmenter: Segmenter, settings: Sequence[SegmentationOptions]):
        self.segmenter, self.settings = segmenter, settings
        self.matrices: dict[str, tuple[list[str], ConfusionMatrix]] = {}

    def encoded(self, photos: Sequence[Photo], title: str) -> Iterator[Photo]:
        """Encodes and yields images one by one; [`count`] adds the latest one."""
        for self.photo in tqdm(photos, desc=title):
            (self.image,) = self.segmenter.encode([load_image(str(self.photo.path))])
            yield self.photo

    def count(
        self,
        protocol: str,
        names: Sequence[str],
        words: Sequence[str],
        label_of_score: Sequence[int],
        **changes: Any,
    ) -> None:
        """Segments the current image and adds it to the confusion matrices.

        Args:
            protocol: name of the matrix.
            names: names of the ground truth's values.
            words: labels for the segmentation.
            label_of_score: ground truth value for each value of the label map.
            changes: changes to the settings.
        """
        for settings in self.settings:
            options = replace(settings, **changes)
            embeds = self.segmenter.class_embeddings(list(words), options)
            label_map = self.segmenter.score(self.image, embeds, options).label_map()[0].numpy()
            key, empty = (
                f"{protocol}, patch weight {options.patch_weight}",
                ConfusionMatrix(len(names), IGNORED),
            )
            _, matrix = self.matrices.setdefault(key, (list(names), empty))
            matrix.add(self.photo.truth, np.array(label_of_score)[label_map])

    def count_present(self, protocol: str, names: Sequence[str], unseen: Sequence[str]) -> None:
        """Adds the current image with the names in its masks, and once more for each word of a name in `unseen`."""
        present = np.unique(self.photo.truth[self.photo.truth != IGNORED]).tolist()
        words = [names[value] for value in present]
        self.count(protocol, names, words, present)
        for seen in set(words).intersection(unseen):
            for word in UNSEEN[seen]:
                others = [word if other == seen else other for other in words]
                self.count(f"{seen} as {word}", names, others, present)

    def results(self) -> dict[str, dict[str, Any]]:
        """For each protocol: mIoU and IoU of the names that occur, pixel accuracy, and that of the best single name."""
        found: dict[str, dict[str, Any]] = {}
        for protocol, (names, matrix) in self.matrices.items():
            truth = matrix.counts.sum(1)
            iou = {names[value]: float(matrix.iou()[value]) for value in np.flatnonzero(truth)}
            found[protocol] = {
                "mean_iou": float(np.mean(list(iou.values()))),
                "pixel_accuracy": matrix.pixel_accuracy(),
                "best_single_label_pixel_accuracy": float(truth.max() / truth.sum()),
                "iou": iou,
            }
        return found


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default=DEFAULT_CHECKPOINT)
    add("--coco", type=Path, help="folder with annotations/, train2017/ and val2017/")
    add("--pets", type=Path, help="folder with images/ and trimaps/")
    add("--street", type=Path, help="folder with metadata.jsonl and masks, as camvid/val")
    add("--pets_count", type=int, default=200)
    add("--patch_weights", type=float, nargs="+", help="default: the checkpoint's")
    add("--thresholds", type=float, nargs="+", default=[0.5], help="background thresholds for `pets`")
    add("--top_k", type=int, help="default: the checkpoint's")
    add("--short_side", type=int, help="default: the checkpoint's")
    add("--output", type=Path, help="JSON file for the results")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    edges = {"shortest_edge": args.short_side, "longest_edge": 2048} if args.short_side else {}
    base = SegmentationOptions(top_k=args.top_k or "auto", **edges)
    segmenter = load_segmenter(args.checkpoint, base)
    weights = args.patch_weights or [segmenter.processor.patch_weight]
    settings = [replace(base, patch_weight=weight) for weight in weights]
    evaluation = Evaluation(segmenter, settings)
    if args.coco:
        names, photos = coco_photos(args.coco)
        everything = [*names, *(word for word in STUFF.split(", ") if word not in names)]
        for _ in evaluation.encoded(photos, "COCO"):
            evaluation.count_present("present", names, list(UNSEEN))
            evaluation.count("all", everything, everything, range(len(everything)))
    if args.street:
        names, photos = street_photos(args.street)
        for _ in evaluation.encoded(photos, "street"):
            evaluation.count_present("street", names, ["sidewalk"])
    names = ["background", "cat", "dog"]
    for _ in evaluation.encoded(pets_photos(args.pets, args.pets_count) if args.pets else [], "Pets"):
        for threshold in args.thresholds:
            evaluation.count(
                f"pets at {threshold}", names, names[1:], range(3), background_threshold=threshold
            )
    results = evaluation.results()
    for protocol, figures in results.items():
        name = protocol.split(" as ")[0]
        own = f", IoU of {name} {figures['iou'][name]:.3f}" if name in figures["iou"] else ""
        print(f"{protocol}: mIoU {figures['mean_iou']:.3f}, pixels {figures['pixel_accuracy']:.3f}{own}")
    if args.output:
        write_json(results, args.output)
        print(f"The results are in {args.output}.")


if __name__ == "__main__":
    main()
