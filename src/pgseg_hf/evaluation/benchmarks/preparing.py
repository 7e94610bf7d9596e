"""Masks that the benchmarks are measured on and that the downloads do not hold as such.

Every function writes masks beside what was downloaded, never over it. Masks that are there are left as they are, so a
stopped run is continued by the same call; to make them anew, as where the annotations have changed, remove them first.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers.utils import logging

from ...files import mask_source, remove_unfinished, write_mask, write_text
from ...images import MAX_IMAGE_PIXELS, load_label_map
from ...run_records import file_digest
from ...text_files import read_json
from .coco_masks import decode_segmentation

COCO_CATEGORY_IDS: tuple[int, ...] = tuple(
    number for number in range(1, 91) if number not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
)
"""The 80 category ids of COCO's instances; the others up to 90 were never annotated."""

# Values of the stuffthingmaps (nightrome/cocostuff): things are COCO's ids less 1, stuff is 91 to 181, 255 unlabelled.
_THING_VALUES = tuple(number - 1 for number in COCO_CATEGORY_IDS)
_STUFF_VALUES = tuple(range(91, 182))
_UNLABELLED = 255

# Ids of the 59 classes in the PASCAL in Detail annotations and 0; rising, the place is the label. Source:
# mmsegmentation, tools/dataset_converters/pascal_context.py.
# fmt: off
CONTEXT_CATEGORY_IDS: tuple[int, ...] = (
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85,
    98, 104, 105, 113, 115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296,
    308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)
# fmt: on
"""Category ids of Pascal Context in the order of its labels, background first."""

CITYSCAPES_IDS: tuple[int, ...] = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The 19 ids that count, in the order of their train ids (cityscapesScripts, `helpers/labels.py`)."""

_CITYSCAPES_HIGHEST_ID = 33
_LVIS_CATEGORIES = 1203
_MARKER = "instanceTrainIds.txt"

# A file's or folder's name that stays where it is put.
_NAME = re.compile(r'(?!\.)[^\\/:*?"<>|]{1,200}')


@dataclass(frozen=True)
class PreparationSummary:
    """What a preparation did.

    Args:
        written: masks of this run.
        skipped: masks that were there already.
        seconds: wall time of making and writing them.
    """

    written: int
    skipped: int
    seconds: float


def prepare_coco_object(root: str | Path, split: str = "val2017") -> PreparationSummary:
    """Masks of COCO-Object from the instances of COCO.

    Reads `annotations/instances_{split}.json` and writes `annotations/{split}/{stem}_instanceTrainIds.png`, 8 bits:
    0 for background, 1 to 80 in the order of COCO's categories. Of overlapping instances the one of the smaller area
    is on top; crowds lie below all others. The released evaluation of GroupViT uses the masks of
    [`prepare_coco_object_from_stuff`] instead.

    Raises:
        ValueError: the annotations are missing, broken or of another kind.
    """
    marker = _coco_object_marker(Path(root), split, "instances")
    labels = {number: label for label, number in enumerate(COCO_CATEGORY_IDS, start=1)}
    source = Path(root) / "annotations" / f"instances_{split}.json"
    jobs = [
        image.job(marker[0].with_name(f"{Path(image.name).stem}_instanceTrainIds.png"))
        for image in _read_images(source, labels)
    ]
    return _write_masks(jobs, marker=marker)


def prepare_coco_object_from_stuff(root: str | Path, split: str = "val2017") -> PreparationSummary:
    """Masks of COCO-Object from the stuffthingmaps of COCO-Stuff, as in GroupViT's evaluation.

    Reads `annotations/{split}/*.png` and writes `{stem}_instanceTrainIds.png` beside them, 8 bits: 1 to 80 for
    things, 0 for stuff and unlabelled pixels. Source: GroupViT, `convert_dataset/convert_coco_object.py`.

    Raises:
        ValueError: there are no such maps, or one holds values that do not occur in them.
    """
    marker = _coco_object_marker(Path(root), split, "stuffthingmaps")
    table = {value: label for label, value in enumerate(_THING_VALUES, start=1)}
    table |= dict.fromkeys((*_STUFF_VALUES, _UNLABELLED), 0)
    return _write_masks(_stuff_jobs(Path(root), split, table, "_instanceTrainIds.png"), marker=marker)


def source_of_coco_object(root: Path, split: str) -> str | None:
    """What the masks of COCO-Object were made from, "instances" or "stuffthingmaps"; None where no preparation said."""
    path = root / "annotations" / split / _MARKER
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _coco_object_marker(root: Path, split: str, source: str) -> tuple[Path, str]:
    """The file that says what masks were made from, and what it says. The two ways to COCO-Object give other masks:
    figures say which, and they are not mixed."""
    known = source_of_coco_object(root, split)
    path = root / "annotations" / split / _MARKER
    if known not in (None, source):
        raise ValueError(
            f"{path.parent} holds masks made from the {known}; remove them and {_MARKER} to make others from the "
            f"{source}."
        )
    return path, f"{source}\n"


def prepare_coco_stuff(root: str | Path, split: str = "val2017") -> PreparationSummary:
    """Masks of COCO-Stuff with 171 classes from its stuffthingmaps, as mmsegmentation names and numbers them.

    Reads `annotations/{split}/*.png` and writes `{stem}_labelTrainIds.png` beside them, 8 bits: 0 to 170, and 255 for
    unlabelled pixels. Source: mmsegmentation, `tools/dataset_converters/coco_stuff164k.py`.

    Raises:
        ValueError: there are no such maps, or one holds values that do not occur in them.
    """
    table = {value: label for label, value in enumerate((*_THING_VALUES, *_STUFF_VALUES))}
    return _write_masks(_stuff_jobs(Path(root), split, {**table, _UNLABELLED: 255}, "_labelTrainIds.png"))


def prepare_context(root: str | Path, annotations: str = "trainval_merged.json") -> PreparationSummary:
    """Masks and lists of Pascal Context from the annotations of PASCAL in Detail.

    Writes `SegmentationClassContext/{stem}.png`, 8 bits: 0 for background, 1 to 59 in mmsegmentation's order, and
    `ImageSets/SegmentationContext/train.txt` and `val.txt`. Later annotations are drawn over earlier ones, as
    `Detail.getMask` of the detail API does.

    Args:
        root: the folder `VOCdevkit/VOC2010`.
        annotations: the JSON file, relative to `root`.

    Raises:
        ValueError: the annotations are missing, broken or of another kind, or lists of other images are there.
    """
    root = Path(root)
    labels = {number: label for label, number in enumerate(CONTEXT_CATEGORY_IDS)}
    jobs = []
    stems: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for image in _read_images(root / annotations, labels, "annos_segmentation", "image_id", by_area=False):
        if not isinstance(image.phase, str) or image.phase not in stems:
            raise ValueError(f"{image.where} has the phase {image.phase!r}, expected train, val or test.")
        stem = Path(image.name).stem
        stems[image.phase].append(stem)
        if image.phase != "test":
            jobs.append(image.job(root / "SegmentationClassContext" / f"{stem}.png"))
    folder = root / "ImageSets" / "SegmentationContext"
    return _write_masks(jobs, {folder / f"{phase}.txt": stems[phase] for phase in ("train", "val")})


def prepare_cityscapes(root: str | Path, split: str = "val") -> PreparationSummary:
    """Masks of Cityscapes with 19 classes.

    Reads `gtFine/{split}/*/*_gtFine_labelIds.png` and writes `*_gtFine_labelTrainIds.png` beside them, 8 bits: 0 to
    18, and 255 for what does not count. Source: cityscapesScripts, `helpers/labels.py`.

    Raises:
        ValueError: there are no such maps, or one holds values that are no ids.
    """
    folder = Path(root) / "gtFine" / split
    table = dict.fromkeys(range(_CITYSCAPES_HIGHEST_ID + 1), 255)
    table |= {value: label for label, value in enumerate(CITYSCAPES_IDS)}
    ending = "_gtFine_labelIds.png"
    sources = _visible(folder.glob(f"*/*{ending}"))
    if not sources:
        raise ValueError(f"{folder} holds no CITY/*{ending}; unpack gtFine_trainvaltest.zip into {root}.")
    return _write_masks([_relabel_job(path, ending, "_gtFine_labelTrainIds.png", table) for path in sources])


def prepare_lvis(root: str | Path, annotations: str = "lvis_v1_val.json") -> PreparationSummary:
    """Semantic masks of LVIS v1 from its instances.

    Writes `annotations/lvis_val/{stem}.png`, 16 bits: 0 for background, otherwise the category id, 1 to 1203; of
    overlapping instances the one of the smaller area is on top. The images are listed in `lvis_val.txt` with
    their folder, for instance `val2017/000000000139.jpg`; some of them are of train2017.

    Args:
        root: the folder of the annotations; the images are not read.
        annotations: the JSON file, relative to `root`; of `lvis_v1_train.json` the results are named `lvis_train`.

    Raises:
        ValueError: the annotations are missing, broken or of another kind, or a list of other images is there.
    """
    root = Path(root)
    result = f"lvis_{Path(annotations).stem.rpartition('_')[2]}"
    labels = {number: number for number in range(1, _LVIS_CATEGORIES + 1)}
    images = _read_images(root / annotations, labels, name="coco_url")
    folder = root / "annotations" / result
    jobs = [image.job(folder / f"{Path(image.name).stem}.png", np.uint16) for image in images]
    return _write_masks(jobs, {root / f"{result}.txt": [image.name for image in images]})


class _Instance(NamedTuple):
    order: tuple[bool, float]
    label: int
    segmentation: Any
    where: str


@dataclass
class _Image:
    """An image of an annotation file, and how messages call it."""

    source: Path
    where: str
    name: str
    size: tuple[int, int]
    phase: Any
    instances: list[_Instance] = field(default_factory=list)

    def job(self, target: Path, dtype: type[np.unsignedinteger] = np.uint8) -> "_Job":
        return _Job(target, partial(self.draw, dtype), self.source)

    def draw(self, dtype: type[np.unsignedinteger]) -> np.ndarray:
        """The labels of the pixels, [H, W] with 0 where there is no instance."""
        labels = np.zeros(self.size, dtype=dtype)
        for instance in sorted(self.instances, key=lambda instance: instance.order):
            try:
                labels[decode_segmentation(instance.segmentation, *self.size)] = instance.label
            except ValueError as error:
                raise ValueError(f"{instance.where}: {error}") from error
        return labels


def _read_images(
    path: Path,
    labels: Mapping[int, int],
    annotations: str = "annotations",
    image_id: str = "id",
    name: str = "file_name",
    by_area: bool = True,
) -> list[_Image]:
    """The images of an annotation file; `labels` by category id, the rest are names of fields."""
    content = read_json(path)
    images: dict[int, _Image] = {}
    for place, entry in enumerate(_entries(content, "images", path)):
        where = f"{path}, image {entry.get(image_id, f'at place {place}')}"
        number, height, width = (_whole_number(entry, key, where) for key in (image_id, "height", "width"))
        if number in images:
            raise ValueError(f"{where} is there twice, expected one entry an id.")
        if min(height, width) < 1 or height * width > MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{where} has {height} x {width} (height x width) pixels, expected 1 to {MAX_IMAGE_PIXELS:,}."
            )
        file = _safe_name(entry.get(name), name, where)
        images[number] = _Image(path, where, file, (height, width), entry.get("phase"))
    for place, entry in enumerate(_entries(content, annotations, path)):
        where = f"{path}, annotation {entry.get('id', f'at place {place}')}"
        number, category = (_whole_number(entry, key, where) for key in ("image_id", "category_id"))
        if number not in images:
            raise ValueError(f"{where} is of image {number}, which is not among the images.")
        if category not in labels:
            raise ValueError(
                f"{where} has category_id = {category}, expected one of {len(labels)} from {min(labels)} to "
                f"{max(labels)}; is this the right file?"
            )
        order = _drawing_order(entry, where) if by_area else (False, 0.0)
        images[number].instances.append(_Instance(order, labels[category], entry.get("segmentation"), where))
    return list(images.values())


def _drawing_order(entry: Mapping[str, Any], where: str) -> tuple[bool, float]:
    """Crowds first, then large instances, so that small ones are on top."""
    area = entry.get("area")
    # The comparison turns away NaN too.
    if not isinstance(area, (int, float)) or not 0 <= area <= MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{where} has area = {area!r}, expected a number of pixels up to {MAX_IMAGE_PIXELS:,}."
        )
    return not entry.get("iscrowd"), -float(area)


def _entries(content: Any, key: str, path: Path) -> list[dict[str, Any]]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} has no list {key!r} of objects; is this the right file?")
    return entries


def _whole_number(entry: Mapping[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if type(value) is not int:
        raise ValueError(f"{where} has {key} = {value!r}, expected a whole number.")
    return value


def _safe_name(value: Any, key: str, where: str) -> str:
    """A file name from an annotation file, and its folder where it comes from an address; it stays in the root."""
    parts = value.split("/") if isinstance(value, str) else []
    is_address = key == "coco_url"
    kept = parts[2:][-2:] if is_address else parts  # an address begins with http: and nothing
    if len(kept) != 1 + is_address or not all(_NAME.fullmatch(part) and part.isprintable() for part in kept):
        expected = "an address ending in FOLDER/FILE" if is_address else "a file name without folders"
        raise ValueError(f"{where} has {key} = {value!r}, expected {expected}.")
    return "/".join(kept)


def _stuff_jobs(root: Path, split: str, table: Mapping[int, int], ending: str) -> "list[_Job]":
    folder = root / "annotations" / split
    sources = [path for path in _visible(folder.glob("*.png")) if "TrainIds" not in path.name]
    if not sources:
        raise ValueError(
            f"{folder} holds no stuffthingmaps (*.png); unpack stuffthingmaps_trainval2017.zip into "
            f"{folder.parent}."
        )
    return [_relabel_job(path, ".png", ending, table) for path in sources]


def _visible(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if not path.name.startswith("."))


def _relabel_job(source: Path, ending: str, other: str, table: Mapping[int, int]) -> "_Job":
    target = source.with_name(source.name.removesuffix(ending) + other)
    return _Job(target, partial(_relabelled, source, table), source)


def _relabelled(path: Path, table: Mapping[int, int]) -> np.ndarray:
    """uint8 [H, W], the values of a mask, all below 256, replaced by those of the table."""
    lookup = np.full(256, -1, dtype=np.int16)
    lookup[list(table)] = list(table.values())
    values = load_label_map(path)
    bytes_only = values.clip(0, 255)
    labels = lookup[bytes_only]
    unknown = np.unique(values[(labels < 0) | (values != bytes_only)])
    if unknown.size:
        raise ValueError(
            f"{path} has the values {unknown[:10].tolist()}, which do not occur in the original masks; is it one of "
            "them?"
        )
    return labels.astype(np.uint8)


class _Job(NamedTuple):
    """A mask, what makes it, and the file that it is made from."""

    target: Path
    make: Callable[[], np.ndarray]
    source: Path


def _write_masks(
    jobs: list[_Job],
    lists: Mapping[Path, list[str]] | None = None,
    marker: tuple[Path, str] | None = None,
) -> PreparationSummary:
    """Makes and writes the masks that are not there, then the lists, sorted: where there is a list, there are its
    masks. The marker, a file and its text, comes before the first mask, unless masks of unknown making are there.

    Raises:
        ValueError: two masks of one name, or masks that were made from other files than those that are there now.
    """
    start = time.monotonic()
    name, count = Counter(job.target for job in jobs).most_common(1)[0] if jobs else (None, 0)
    if count > 1:
        raise ValueError(f"two images have the mask {name}, expected images of different names.")
    digests = {source: file_digest(source) for source in {job.source for job in jobs}}
    for target, _, source in jobs:
        made_from = mask_source(target) if target.is_file() else None
        if made_from not in (None, digests[source]):
            raise ValueError(
                f"{target} was made from {source.name} with the SHA-256 {made_from}..., which now has "
                f"{digests[source]}...; remove the masks to make them anew."
            )
    for folder in {job.target.parent for job in jobs}:
        remove_unfinished(folder)
    texts = {path: "".join(f"{line}\n" for line in sorted(lines)) for path, lines in (lists or {}).items()}
    for path, text in texts.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise ValueError(f"{path} lists other images than the annotations; move it out of the way.")
    waiting = [job for job in jobs if not job.target.is_file()]
    for target, make, source in logging.tqdm(waiting, desc="Preparing masks", unit="mask"):
        mask = Image.fromarray(make())
        if marker is not None and len(waiting) == len(jobs) and not marker[0].exists():
            write_text(marker[1], marker[0])
        write_mask(mask, target, digests[source])
    for path, text in texts.items():
        if not path.exists():
            write_text(text, path)
    return PreparationSummary(len(waiting), len(jobs) - len(waiting), time.monotonic() - start)
