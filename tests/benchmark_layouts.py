"""Miniature copies of the benchmarks' published layouts, with known masks.

Paths and values are repeated here and not taken from the registry, so that each checks the other. Every image has one
raw value in each of its 2 x 2 quarters; each image shifts the values of the one before by one quarter.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_models import make_photo

SIZES = ((8, 8), (10, 12), (9, 11))


@dataclass(frozen=True)
class Published:
    """A published layout.

    Args:
        folder: root folder of the benchmark, inside a folder of datasets.
        names: names of the images in results, in order.
        images, masks: paths, where `{split}` stands for a value of `splits`.
        raw: values in the first image's mask file: top left, top right, bottom left, bottom right.
        labels: label numbers of these values.
        border: raw value of the first image's top row, which is ignored; None for no such row.
        ignored: label number of ignored pixels after loading.
        encoding: "palette", "grey", "16 bits" or "rgb".
        listing: path of the list of names.
        listed: lines of that list.
        splits: name of each split in paths.
    """

    folder: str
    names: tuple[str, ...]
    images: tuple[str, ...]
    masks: tuple[str, ...]
    raw: tuple[int, int, int, int]
    labels: tuple[int, int, int, int]
    border: int | None = None
    ignored: int = 255
    encoding: str = "grey"
    listing: str | None = None
    listed: tuple[str, ...] = ()
    splits: dict[str, str] = field(default_factory=lambda: {"val": "val", "train": "train"})


@dataclass(frozen=True)
class Miniature:
    """The written files, in the order of `names`, and the decoded ground truth [H, W] of each image."""

    names: list[str]
    images: list[Path]
    masks: list[Path]
    truths: list[np.ndarray]
    listing: Path | None


_VOC_NAMES = ("2007_000042", "2007_000033", "2011_003276")  # not sorted: the list's order counts
_VOC = Published(
    folder="VOCdevkit/VOC2012",
    names=_VOC_NAMES,
    images=tuple(f"JPEGImages/{name}.jpg" for name in _VOC_NAMES),
    masks=tuple(f"SegmentationClass/{name}.png" for name in _VOC_NAMES),
    raw=(0, 1, 20, 15),
    labels=(0, 1, 20, 15),
    border=255,
    encoding="palette",
    listing="ImageSets/Segmentation/{split}.txt",
    listed=_VOC_NAMES,
)
_CONTEXT_NAMES = ("2008_000002", "2008_000003")
_CONTEXT = Published(
    folder="VOCdevkit/VOC2010",
    names=_CONTEXT_NAMES,
    images=tuple(f"JPEGImages/{name}.jpg" for name in _CONTEXT_NAMES),
    masks=tuple(f"SegmentationClassContext/{name}.png" for name in _CONTEXT_NAMES),
    raw=(0, 1, 59, 37),
    labels=(0, 1, 59, 37),
    listing="ImageSets/SegmentationContext/{split}.txt",
    listed=_CONTEXT_NAMES,
)
_COCO_NAMES = ("000000000139", "000000000285", "000000581781")
_COCO = Published(
    folder="coco",
    names=_COCO_NAMES,
    images=tuple(f"images/{{split}}/{name}.jpg" for name in _COCO_NAMES),
    masks=tuple(f"annotations/{{split}}/{name}_instanceTrainIds.png" for name in _COCO_NAMES),
    raw=(0, 1, 80, 63),
    labels=(0, 1, 80, 63),
    splits={"val": "val2017", "train": "train2017"},
)
_CITY_NAMES = (
    "frankfurt/frankfurt_000000_000294",
    "frankfurt/frankfurt_000001_007973",
    "lindau/lindau_000000",
)
_IMAGENET_NAMES = ("n01443537/ILSVRC2012_val_00000236", "n12998815/ILSVRC2012_val_00000035")
_IMAGENET_S50 = Published(
    folder="ImageNetS50",
    names=_IMAGENET_NAMES,
    images=tuple(f"{{split}}/{name}.JPEG" for name in _IMAGENET_NAMES),
    masks=tuple(f"{{split}}-segmentation/{name}.png" for name in _IMAGENET_NAMES),
    raw=(0, 1, 50, 33),
    labels=(0, 1, 50, 33),
    border=1000,
    ignored=1000,
    encoding="rgb",
    splits={"val": "validation"},
)
_LVIS_LISTED = ("val2017/000000000139.jpg", "train2017/000000391895.jpg")

LAYOUTS: dict[str, Published] = {
    "voc": _VOC,
    "voc20": replace(_VOC, labels=(255, 0, 19, 14)),
    "context": _CONTEXT,
    "context59": replace(_CONTEXT, labels=(255, 0, 58, 36)),
    "coco_object": _COCO,
    "coco_stuff": replace(
        _COCO,
        folder="coco_stuff164k",
        masks=tuple(f"annotations/{{split}}/{name}_labelTrainIds.png" for name in _COCO_NAMES),
        raw=(0, 79, 80, 170),
        labels=(0, 79, 80, 170),
        border=255,
    ),
    "ade20k": Published(
        folder="ade/ADEChallengeData2016",
        names=("ADE_val_00000001", "ADE_val_00000002"),
        images=("images/{split}/ADE_val_00000001.jpg", "images/{split}/ADE_val_00000002.jpg"),
        masks=("annotations/{split}/ADE_val_00000001.png", "annotations/{split}/ADE_val_00000002.png"),
        raw=(3, 1, 150, 21),
        labels=(2, 0, 149, 20),
        border=0,
        splits={"val": "validation", "train": "training"},
    ),
    "cityscapes": Published(
        folder="cityscapes",
        names=_CITY_NAMES,
        images=tuple(f"leftImg8bit/{{split}}/{name}_leftImg8bit.png" for name in _CITY_NAMES),
        masks=tuple(f"gtFine/{{split}}/{name}_gtFine_labelTrainIds.png" for name in _CITY_NAMES),
        raw=(0, 1, 18, 13),
        labels=(0, 1, 18, 13),
        border=255,
    ),
    "imagenet_s50": _IMAGENET_S50,
    "imagenet_s300": replace(
        _IMAGENET_S50, folder="ImageNetS300", raw=(0, 255, 256, 300), labels=(0, 255, 256, 300)
    ),
    "imagenet_s919": replace(
        _IMAGENET_S50, folder="ImageNetS919", raw=(0, 255, 919, 512), labels=(0, 255, 919, 512)
    ),
    "lvis": Published(
        folder="lvis",
        names=("val2017/000000000139", "train2017/000000391895"),
        images=tuple(f"images/{name}" for name in _LVIS_LISTED),
        masks=("annotations/lvis_{split}/000000000139.png", "annotations/lvis_{split}/000000391895.png"),
        raw=(0, 255, 256, 1203),
        labels=(0, 255, 256, 1203),
        encoding="16 bits",
        listing="lvis_{split}.txt",
        listed=_LVIS_LISTED,
    ),
}


def quarters(values, size) -> np.ndarray:
    """An array [H, W] with one value per quarter, divided as in `KnownGroups`."""
    rows, columns = (np.arange(side) * 2 // side for side in size)
    return np.array(values).reshape(2, 2)[rows[:, None], columns[None]]


def write_benchmark(name: str, root: Path, split: str = "val") -> Miniature:
    """Writes the layout of a benchmark into `root`."""
    layout = LAYOUTS[name]
    where = layout.splits[split]
    images = [root / path.format(split=where) for path in layout.images]
    masks = [root / path.format(split=where) for path in layout.masks]
    truths = []
    for number, (image, mask, size) in enumerate(zip(images, masks, SIZES)):
        raw, truth = (quarters(np.roll(each, number), size) for each in (layout.raw, layout.labels))
        if number == 0 and layout.border is not None:
            raw[0], truth[0] = layout.border, layout.ignored
        write_noise(image, size, seed=number)
        write_mask(mask, raw, layout.encoding)
        truths.append(truth)
    listing = None
    if layout.listing is not None:
        listing = root / layout.listing.format(split=where)
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(layout.listed) + "\n")
        # An image of another split in the same folder.
        write_noise(images[0].with_name("unlisted.jpg"), SIZES[0])
    return Miniature(list(layout.names), images, masks, truths, listing)


def write_noise(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_photo(size[1], size[0], seed).save(path)


def write_mask(path: Path, raw: np.ndarray, encoding: str = "grey") -> None:
    """Writes raw values in the encoding of a benchmark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if encoding == "16 bits":
        image = Image.fromarray(raw.astype(np.uint16))
    elif encoding == "rgb":
        image = Image.fromarray(np.stack([raw % 256, raw // 256, 0 * raw], axis=-1).astype(np.uint8))
    else:
        image = Image.fromarray(raw.astype(np.uint8))
        if encoding == "palette":
            # The brightness falls with the index, so that colours read as grey give other numbers.
            image.putpalette([255 - value // 3 for value in range(768)])
    image.save(path)


# A block in an image, in the forms of COCO annotations.
HEIGHT, WIDTH = 4, 5
# Rows 1 and 2 of columns 1 and 2, counted down the columns: 5 pixels outside, 2 inside, 2 outside, 2 inside, 9 outside.
BLOCK_POLYGON = [[1, 1, 3, 1, 3, 3, 1, 3]]
BLOCK_COUNTS = {"size": [HEIGHT, WIDTH], "counts": [5, 2, 2, 2, 9]}
# From the fourth count on, differences to the count two before: 2 - 2 = 0 and 9 - 2 = 7.
BLOCK_STRING = {"size": [HEIGHT, WIDTH], "counts": "52207"}


def box_polygon(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    """A polygon along the edges of pixels, as in COCO annotations."""
    return [[left, top, right, top, right, bottom, left, bottom]]
