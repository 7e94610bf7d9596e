"""Makes the masks of benchmarks whose downloads do not include them.

Masks are written beside the downloaded files, which are never overwritten. Existing masks are kept, so the same call
resumes a stopped run. To make masks again, for instance after the annotations have changed, remove them first.
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
"""The 80 category ids of COCO's instances; the other ids up to 90 were never annotated."""

# Values of the stuffthingmaps (nightrome/cocostuff): COCO's ids minus 1 for things, 91 to 181 for stuff, 255 for
# unlabelled pixels.
_THING_VALUES = tuple(number - 1 for number in COCO_CATEGORY_IDS)
_STUFF_VALUES = tuple(range(91, 182))
_UNLABELLED = 255

# 0 and the ids of the 59 classes in the PASCAL in Detail annotations; the position is the label. Source:
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
"""The 19 evaluated ids in the order of their train ids (cityscapesScripts, `helpers/labels.py`)."""

_CITYSCAPES_HIGHEST_ID = 33
_LVIS_CATEGORIES = 1203
_MARKER = "instanceTrainIds.txt"

# Names of files and folders that cannot lead out of their folder.
_NAME = re.compile(r'(?!\.)[^\\/:*?"<>|]{1,200}')


@dataclass(frozen=True)
class PreparationSummary:
    """Result of a preparation.

    Args:
        written: number of masks written by this run.
        skipped: number of masks that already existed.
        seconds: wall time of making and writing masks, without reading the annotations.
    """

    written: int
    skipped: int
    seconds: float


def prepare_coco_object(root: str | Path, split: str = "val2017") -> PreparationSummary:
    """Makes masks of COCO-Object from the instances of COCO.

    Reads `annotations/instances_{split}.json` and writes `annotations/{split}/{stem}_instanceTrainIds.png` with 8 bits:
    0 for background, 1 to 80 in the order of COCO's categories. If instances overlap, the smaller one is on top; crowds
    are below all others. The released evaluation of GroupViT uses the masks of [`prepare_coco_object_from_stuff`].

    Raises:
        ValueError: the annotations are missing, broken or of the wrong kind.
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
    """Makes masks of COCO-Object from the stuffthingmaps of COCO-Stuff, as in GroupViT's evaluation.

    Reads `annotations/{split}/*.png` and writes `{stem}_instanceTrainIds.png` beside them with 8 bits: 1 to 80 for
    things, 0 for stuff and unlabelled pixels. Source: GroupViT, `convert_dataset/convert_coco_object.py`.

    Raises:
        ValueError: there are no stuffthingmaps, or one has invalid values.
    """
    marker = _coco_object_marker(Path(root), split, "stuffthingmaps")
    table = {value: label for label, value in enumerate(_THING_VALUES, start=1)}
    table |= dict.fromkeys((*_STUFF_VALUES, _UNLABELLED), 0)
    return _write_masks(_stuff_jobs(Path(root), split, table, "_instanceTrainIds.png"), marker=marker)


def source_of_coco_object(root: Path, split: str) -> str | None:
    """The source of COCO-Object's masks, "instances" or "stuffthingmaps"; None if no preparation recorded it."""
    path = root / "annotations" / split / _MARKER
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _coco_object_marker(root: Path, split: str, source: str) -> tuple[Path, str]:
    """The file that records the source of masks, and its text. Masks of different sources are not mixed."""
    known = source_of_coco_object(root, split)
    path = root / "annotations" / split / _MARKER
    if known not in (None, source):
        raise ValueError(
            f"{path.parent} contains masks made from the {known}; remove them and {_MARKER} to make masks from the "
            f"{source}."
        )
    return path, f"{source}\n"


def prepare_coco_stuff(root: str | Path, split: str = "val2017") -> PreparationSummary:
    """Makes masks of COCO-Stuff with 171 classes from its stuffthingmaps, with mmsegmentation's names and values.

    Reads `annotations/{split}/*.png` and writes `{stem}_labelTrainIds.png` beside them with 8 bits: 0 to 170, and 255
    for unlabelled pixels. Source: mmsegmentation, `tools/dataset_converters/coco_stuff164k.py`.

    Raises:
        ValueError: there are no stuffthingmaps, or one has invalid values.
    """
    table = {value: label for label, value in enumerate((*_THING_VALUES, *_STUFF_VALUES))}
    return _write_masks(_stuff_jobs(Path(root), split, {**table, _UNLABELLED: 255}, "_labelTrainIds.png"))


def prepare_context(root: str | Path, annotations: str = "trainval_merged.json") -> PreparationSummary:
    """Makes masks and listings of Pascal Context from the annotations of PASCAL in Detail.

    Writes `SegmentationClassContext/{stem}.png` with 8 bits: 0 for background, 1 to 59 in mmsegmentation's order, and
    `ImageSets/SegmentationContext/train.txt` and `val.txt`. Later annotations are drawn over earlier ones, like in
    `Detail.getMask` of the detail API.

    Args:
        root: the folder `VOCdevkit/VOC2010`.
        annotations: JSON file, relative to `root`.

    Raises:
        ValueError: the annotations are missing, broken or of the wrong kind, or existing listings have other images.
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
    """Makes masks of Cityscapes with 19 classes.

    Reads `gtFine/{split}/*/*_gtFine_labelIds.png` and writes `*_gtFine_labelTrainIds.png` beside them with 8 bits: 0 to
    18, and 255 for ignored pixels. Source: cityscapesScripts, `helpers/labels.py`.

    Raises:
        ValueError: there are no label maps, or one has invalid values.
    """
    folder = Path(root) / "gtFine" / split
    table = dict.fromkeys(range(_CITYSCAPES_HIGHEST_ID + 1), 255)
    table |= {value: label for label, value in enumerate(CITYSCAPES_IDS)}
    ending = "_gtFine_labelIds.png"
    sources = _visible(folder.glob(f"*/*{ending}"))
    if not sources:
        raise ValueError(f"{folder} contains no CITY/*{ending}; unpack gtFine_trainvaltest.zip into {root}.")
    return _write_masks([_relabel_job(path, ending, "_gtFine_labelTrainIds.png", table) for path in sources])


def prepare_lvis(root: str | Path, annotations: str = "lvis_v1_val.json") -> PreparationSummary:
    """Makes semantic masks of LVIS v1 from its instances.

    Writes `annotations/lvis_val/{stem}.png` with 16 bits: 0 for background, otherwise the category id, 1 to 1203. If
    instances overlap, the smaller one is on top. `lvis_val.txt` lists the images with their folder, for instance
    `val2017/000000000139.jpg`; some are in train2017.

    Args:
        root: folder of the annotations; the images are not read.
        annotations: JSON file, relative to `root`. For `lvis_v1_train.json`, the output is named `lvis_train`.

    Raises:
        ValueError: the annotations are missing, broken or of the wrong kind, or an existing listing has other images.
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
    """An image of an annotation file; messages call it `where`."""

    source: Path
    where: str
    name: str
    size: tuple[int, int]
    phase: Any
    instances: list[_Instance] = field(default_factory=list)

    def job(self, target: Path, dtype: type[np.unsignedinteger] = np.uint8) -> "_Job":
        return _Job(target, partial(self.draw, dtype), self.source)

    def draw(self, dtype: type[np.unsignedinteger]) -> np.ndarray:
        """The label map, [H, W], with 0 for pixels without an instance."""
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
    """Reads the images of an annotation file. `labels` maps category ids; the strings are names of JSON fields."""
    content = read_json(path)
    images: dict[int, _Image] = {}
    for place, entry in enumerate(_entries(content, "images", path)):
        where = f"{path}, image {entry.get(image_id, f'at place {place}')}"
        number, height, width = (_whole_number(entry, key, where) for key in (image_id, "height", "width"))
        if number in images:
            raise ValueError(f"{where} occurs twice; ids must be unique.")
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
            raise ValueError(f"{where} has image_id = {number}, which is not among the images.")
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
    # The chained comparison also rejects NaN.
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
        raise ValueError(f"{where} has {key} = {value!r}, expected an integer.")
    return value


def _safe_name(value: Any, key: str, where: str) -> str:
    """A file name from an annotation file, with its folder if it is a URL; it cannot lead out of the root."""
    parts = value.split("/") if isinstance(value, str) else []
    is_address = key == "coco_url"
    kept = parts[2:][-2:] if is_address else parts  # the first two parts of a URL are "http:" and ""
    if len(kept) != 1 + is_address or not all(_NAME.fullmatch(part) and part.isprintable() for part in kept):
        expected = "a URL ending in FOLDER/FILE" if is_address else "a file name without folders"
        raise ValueError(f"{where} has {key} = {value!r}, expected {expected}.")
    return "/".join(kept)


def _stuff_jobs(root: Path, split: str, table: Mapping[int, int], ending: str) -> "list[_Job]":
    folder = root / "annotations" / split
    sources = [path for path in _visible(folder.glob("*.png")) if "TrainIds" not in path.name]
    if not sources:
        raise ValueError(
            f"{folder} contains no stuffthingmaps (*.png); unpack stuffthingmaps_trainval2017.zip into "
            f"{folder.parent}."
        )
    return [_relabel_job(path, ".png", ending, table) for path in sources]


def _visible(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if not path.name.startswith("."))


def _relabel_job(source: Path, ending: str, other: str, table: Mapping[int, int]) -> "_Job":
    target = source.with_name(source.name.removesuffix(ending) + other)
    return _Job(target, partial(_relabelled, source, table), source)


def _relabelled(path: Path, table: Mapping[int, int]) -> np.ndarray:
    """The mask with its values, all below 256, replaced according to the table, uint8 [H, W]."""
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
    """A mask to write, the function that makes it, and the file it is made from."""

    target: Path
    make: Callable[[], np.ndarray]
    source: Path


def _write_masks(
    jobs: list[_Job],
    lists: Mapping[Path, list[str]] | None = None,
    marker: tuple[Path, str] | None = None,
) -> PreparationSummary:
    """Writes missing masks, then the sorted listings, so that the masks of an existing listing are complete. The
    marker, a file and its text, is written before the first mask, unless masks of unknown source exist."""
    start = time.monotonic()
    name, count = Counter(job.target for job in jobs).most_common(1)[0] if jobs else (None, 0)
    if count > 1:
        raise ValueError(f"two images have the mask {name}; the images must have different names.")
    digests = {source: file_digest(source) for source in {job.source for job in jobs}}
    for target, _, source in jobs:
        made_from = mask_source(target) if target.is_file() else None
        if made_from not in (None, digests[source]):
            raise ValueError(
                f"{target} was made from {source.name} with the SHA-256 {made_from}..., which now has "
                f"{digests[source]}...; remove the masks to make them again."
            )
    for folder in {job.target.parent for job in jobs}:
        remove_unfinished(folder)
    texts = {path: "".join(f"{line}\n" for line in sorted(lines)) for path, lines in (lists or {}).items()}
    for path, text in texts.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise ValueError(f"{path} lists other images than the annotations; move or remove it.")
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
