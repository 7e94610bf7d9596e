"""Figures of an everyday checkpoint on photographs with masks: COCO instances, Oxford Pets trimaps, street frames.

    python examples/evaluate_everyday.py --coco COCO-MINI --pets Sample_Pets_dataset --street camvid/val \
        --output everyday.json

Protocols, each by the checkpoint's own sizes and settings:

- `present`: the names that an image's masks hold compete in that image; pixels without a mask do not count.
- `all`: COCO's 80 names and 50 of stuff compete in every image; the same pixels.
- `pets`: cat and dog against the background at `--threshold`; the trimaps' borders do not count.
- `street`: the names that a frame's masks hold compete in it, of a folder with `labels.json` above it.
- `unseen`: as `present` or `street`, with words that no text of a training image holds in the place of their name (the
  text tower has read them); IoU of the word over that of the name.

IoU is of a class over all images, mIoU their mean over the classes that occur.
"""

import argparse
import random
from collections.abc import Sequence
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
from pgseg_hf.segmentation import EncodedImage, Segmenter

IGNORED = 255
# What a newcomer would call COCO's categories.
WORDS = {
    "tv": "television",
    "couch": "sofa",
    "cell phone": "phone",
    "dining table": "table",
    "potted plant": "plant",
    "sports ball": "ball",
    "mouse": "computer mouse",
    "remote": "remote control",
    "hair drier": "hair dryer",
    "tie": "necktie",
}
STUFF = [
    "sky",
    "grass",
    "tree",
    "road",
    "wall",
    "floor",
    "building",
    "water",
    "sea",
    "river",
    "mountain",
    "rock",
    "sand",
    "snow",
    "field",
    "ground",
    "sidewalk",
    "fence",
    "ceiling",
    "window",
    "door",
    "curtain",
    "carpet",
    "cabinet",
    "house",
    "bridge",
    "cloud",
    "flower",
    "plate",
    "food",
    "hat",
    "shirt",
    "pants",
    "shoe",
    "lamp",
    "pillow",
    "blanket",
    "towel",
    "mirror",
    "stairs",
    "sign",
    "pole",
    "leaf",
    "fruit",
    "vegetable",
    "paper",
    "box",
    "street",
    "railroad tracks",
    "table cloth",
]
# Words that no text of a training image holds, after those of the same meaning that some do.
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
    """An image and its truth, uint8 [H, W]: numbers of names, 255 for pixels that do not count."""

    path: Path
    truth: np.ndarray


def coco_photos(folder: Path) -> tuple[list[str], list[Photo]]:
    """The names of COCO's categories and the images of `train2017` and `val2017` with their instances, smaller ones in
    front of larger ones."""
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
    """Cats (1) and dogs (2) on a background (0); breeds of cats have a capital letter."""
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


class Evaluation:
    """Confusion matrices by protocol, over images that are encoded once."""

    def __init__(self, segmenter: Segmenter):
        self.segmenter = segmenter
        self.matrices: dict[str, tuple[list[str], ConfusionMatrix]] = {}

    def count(
        self,
        protocol: str,
        photo: Photo,
        encoded: EncodedImage,
        options: SegmentationOptions,
        words: Sequence[str],
        values: Sequence[int],
        names: Sequence[str],
    ) -> None:
        """Adds an image, segmented with some words.

        Args:
            protocol: what is counted together.
            values: of the truth, for each value of the label map.
            names: of the truth's values.
        """
        embeds = self.segmenter.class_embeddings(list(words), options)
        label_map = self.segmenter.score(encoded, embeds, options).label_map()[0].numpy()
        empty = (list(names), ConfusionMatrix(len(names), IGNORED))
        _, matrix = self.matrices.setdefault(protocol, empty)
        matrix.add(photo.truth, np.array(values)[label_map])

    def results(self) -> dict[str, dict[str, Any]]:
        """For each protocol mIoU and IoU of the names that occur, pixel accuracy, and that of the best single name."""
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


def street_photos(folder: Path) -> tuple[list[str], list[Photo]]:
    """The labels of a folder in our own layout by everyday names, and its images with their masks."""
    found = MaskFolder(folder)
    photos = [
        Photo(Path(str(each.image)), load_label_map(each.mask).astype(np.uint8)) for each in found.pictures
    ]
    return [STREET.get(label, label) for label in found.labels], photos


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default=DEFAULT_CHECKPOINT)
    add("--coco", type=Path, help="folder with annotations/, train2017/ and val2017/")
    add("--pets", type=Path, help="folder with images/ and trimaps/")
    add("--street", type=Path, help="folder with metadata.jsonl and masks, as camvid/val")
    add("--pets_count", type=int, default=200)
    add("--patch_weights", type=float, nargs="+", help="by default the checkpoint's own")
    add("--thresholds", type=float, nargs="+", default=[0.5], help="of the background in `pets`")
    add("--top_k", type=int, help="by default the checkpoint's own")
    add("--short_side", type=int, help="by default the checkpoint's own")
    add("--output", type=Path, help="JSON file of the figures")
    return parser.parse_args()


def count_coco(evaluation: Evaluation, folder: Path, settings: Sequence[SegmentationOptions]) -> None:
    """The protocols `present`, `all` and `unseen`."""
    names, photos = coco_photos(folder)
    everything = [*names, *(word for word in STUFF if word not in names)]
    for photo in tqdm(photos, desc="COCO"):
        (encoded,) = evaluation.segmenter.encode([load_image(str(photo.path))])
        present = np.unique(photo.truth[photo.truth != IGNORED]).tolist()
        words = [names[value] for value in present]
        for options in settings:
            suffix = f", patch weight {options.patch_weight}"
            how = (photo, encoded, options)
            evaluation.count("present" + suffix, *how, words, present, names)
            evaluation.count("all" + suffix, *how, everything, range(len(everything)), everything)
            count_unseen(evaluation, how, words, present, names)


def count_street(evaluation: Evaluation, folder: Path, settings: Sequence[SegmentationOptions]) -> None:
    """The protocols `street` and, of its names, `unseen`."""
    names, photos = street_photos(folder)
    for photo in tqdm(photos, desc="street"):
        (encoded,) = evaluation.segmenter.encode([load_image(str(photo.path))])
        present = np.unique(photo.truth[photo.truth != IGNORED]).tolist()
        words = [names[value] for value in present]
        for options in settings:
            how = (photo, encoded, options)
            evaluation.count(f"street, patch weight {options.patch_weight}", *how, words, present, names)
            count_unseen(evaluation, how, words, present, names, ("sidewalk",))


def count_unseen(
    evaluation: Evaluation,
    how: tuple[Photo, EncodedImage, SegmentationOptions],
    words: Sequence[str],
    present: Sequence[int],
    names: Sequence[str],
    among: Sequence[str] = tuple(UNSEEN),
) -> None:
    """An image that holds a name with an unseen word, by its name and by that word."""
    for seen in set(words) & set(among):
        for word in UNSEEN[seen]:
            others = [word if other == seen else other for other in words]
            protocol = f"{seen} as {word}, patch weight {how[2].patch_weight}"
            evaluation.count(protocol, *how, others, present, names)


def main() -> None:
    args = parse_arguments()
    edges = {"shortest_edge": args.short_side, "longest_edge": 2048} if args.short_side else {}
    base = SegmentationOptions(top_k=args.top_k or "auto", **edges)
    segmenter = load_segmenter(args.checkpoint, base)
    weights = args.patch_weights or [segmenter.processor.patch_weight]
    settings = [replace(base, patch_weight=weight) for weight in weights]
    evaluation = Evaluation(segmenter)
    if args.coco:
        count_coco(evaluation, args.coco, settings)
    if args.street:
        count_street(evaluation, args.street, settings)
    for photo in tqdm(pets_photos(args.pets, args.pets_count) if args.pets else [], desc="Pets"):
        (encoded,) = segmenter.encode([load_image(str(photo.path))])
        for threshold in args.thresholds:
            for options in settings:
                protocol = f"pets at {threshold}, patch weight {options.patch_weight}"
                options = replace(options, background_threshold=threshold)
                names = ["background", "cat", "dog"]
                evaluation.count(protocol, photo, encoded, options, ["cat", "dog"], range(3), names)
    results = evaluation.results()
    for protocol, figures in results.items():
        name = protocol.split(" as ")[0]
        own = f", IoU of {name} {figures['iou'][name]:.3f}" if name in figures["iou"] else ""
        print(f"{protocol}: mIoU {figures['mean_iou']:.3f}, pixels {figures['pixel_accuracy']:.3f}{own}")
    if args.output:
        write_json(results, args.output)
        print(f"The figures are in {args.output}.")


if __name__ == "__main__":
    main()
