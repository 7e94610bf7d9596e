"""Masks that the benchmarks are measured on and that the downloads do not hold as such.

Every function writes masks beside what was downloaded, never over it. Masks that are there are left as they are, so a
stopped run is continued by the same call; to make them anew, as where the annotations have changed, remove them first.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers.utils import logging

from ...files import mask_source, remove_unfinished, write_mask, write_text
from ...images import MAX_IMAGE_PIXELS, load_label_map
from ...run_records import file_digest
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
    root = Path(root)
    _refuse_mixing(root, split, "instances")
    layout = _Layout(labels={number: label for label, number in enumerate(COCO_CATEGORY_IDS, start=1)})
    source = root / "annotations" / f"instances_{split}.json"
    jobs = [
        _Job(
            root / "annotations" / split / f"{Path(picture.name).stem}_instanceTrainIds.png",
            partial(_semantic_map, picture, np.uint8),
            source,
        )
        for picture in _read_pictures(source, layout)
    ]
    return _write_masks(jobs, marker=(_coco_object_marker(root, split), "instances"))


def prepare_coco_object_from_stuff(root: str | Path, split: str = "val2017") -> PreparationSummary:
    """Masks of COCO-Object from the stuffthingmaps of COCO-Stuff, as in GroupViT's evaluation.

    Reads `annotations/{split}/*.png` and writes `{stem}_instanceTrainIds.png` beside them, 8 bits: 1 to 80 for
    things, 0 for stuff and unlabelled pixels. Source: GroupViT, `convert_dataset/convert_coco_object.py`.

    Raises:
        ValueError: there are no such maps, or one holds values that do not occur in them.
    """
    _refuse_mixing(Path(root), split, "stuffthingmaps")
    table = {value: label for label, value in enumerate(_THING_VALUES, start=1)}
    table.update(dict.fromkeys((*_STUFF_VALUES, _UNLABELLED), 0))
    marker = (_coco_object_marker(Path(root), split), "stuffthingmaps")
    return _relabel_stuff(Path(root), split, table, "_instanceTrainIds.png", marker)


def source_of_coco_object(root: Path, split: str) -> str | None:
    """What the masks of COCO-Object were made from, "instances" or "stuffthingmaps"; None where no preparation said."""
    path = _coco_object_marker(root, split)
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _coco_object_marker(root: Path, split: str) -> Path:
    return root / "annotations" / split / "instanceTrainIds.txt"


def _refuse_mixing(root: Path, split: str, source: str) -> None:
    """The two ways to COCO-Object give other masks: figures say which, and they are not mixed."""
    known = source_of_coco_object(root, split)
    if known not in (None, source):
        marker = _coco_object_marker(root, split)
        raise ValueError(
            f"{marker.parent} holds masks made from the {known}; remove them and {marker.name} to make them from the "
            f"{source}."
        )


def prepare_coco_stuff(root: str | Path, split: str = "val2017") -> PreparationSummary:
    """Masks of COCO-Stuff with 171 classes from its stuffthingmaps, as mmsegmentation names and numbers them.

    Reads `annotations/{split}/*.png` and writes `{stem}_labelTrainIds.png` beside them, 8 bits: 0 to 170, and 255 for
    unlabelled pixels. Source: mmsegmentation, `tools/dataset_converters/coco_stuff164k.py`.

    Raises:
        ValueError: there are no such maps, or one holds values that do not occur in them.
    """
    table = {value: label for label, value in enumerate((*_THING_VALUES, *_STUFF_VALUES))}
    return _relabel_stuff(Path(root), split, {**table, _UNLABELLED: 255}, "_labelTrainIds.png")


def prepare_context(root: str | Path, annotations: str = "trainval_merged.json") -> PreparationSummary:
    """Masks and lists of Pascal Context from the annotations of PASCAL in Detail.

    Writes `SegmentationClassContext/{stem}.png`, 8 bits: 0 for background, 1 to 59 in mmsegmentation's order, and
    `ImageSets/SegmentationContext/train.txt` and `val.txt`. Later annotations are drawn over earlier ones, as
    `Detail.getMask` of the detail API does.

    Args:
        root: the folder `VOCdevkit/VOC2010`.
        annotations: the JSON file, relative to `root`.

    Raises:
        ValueError: the annotations are missing, broken or of another kind, or lists of other pictures are there.
    """
    root = Path(root)
    layout = _Layout(
        labels={number: label for label, number in enumerate(CONTEXT_CATEGORY_IDS)},
        annotations="annos_segmentation",
        image_id="image_id",
        by_area=False,
    )
    jobs = []
    stems: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for picture in _read_pictures(root / annotations, layout):
        phase = picture.entry.get("phase")
        if not isinstance(phase, str) or phase not in stems:
            raise ValueError(f"{picture.where} has the phase {phase!r}, expected train, val or test.")
        stem = Path(picture.name).stem
        stems[phase].append(stem)
        if phase != "test":
            target = root / "SegmentationClassContext" / f"{stem}.png"
            jobs.append(_Job(target, partial(_semantic_map, picture, np.uint8), root / annotations))
    lists = {
        root / "ImageSets" / "SegmentationContext" / f"{phase}.txt": sorted(stems[phase])
        for phase in ("train", "val")
    }
    return _write_masks(jobs, lists)


def prepare_cityscapes(root: str | Path, split: str = "val") -> PreparationSummary:
    """Masks of Cityscapes with 19 classes.

    Reads `gtFine/{split}/*/*_gtFine_labelIds.png` and writes `*_gtFine_labelTrainIds.png` beside them, 8 bits: 0 to
    18, and 255 for what does not count. Source: cityscapesScripts, `helpers/labels.py`.

    Raises:
        ValueError: there are no such maps, or one holds values that are no ids.
    """
    folder = Path(root) / "gtFine" / split
    table = dict.fromkeys(range(_CITYSCAPES_HIGHEST_ID + 1), 255)
    table.update({value: label for label, value in enumerate(CITYSCAPES_IDS)})
    ending = "_gtFine_labelIds.png"
    sources = _visible(folder.glob(f"*/*{ending}"))
    if not sources:
        raise ValueError(f"{folder} holds no CITY/*{ending}; unpack gtFine_trainvaltest.zip into {root}.")
    targets = [
        source.with_name(source.name.removesuffix(ending) + "_gtFine_labelTrainIds.png") for source in sources
    ]
    return _relabel(sources, targets, table)


def prepare_lvis(root: str | Path, annotations: str = "lvis_v1_val.json") -> PreparationSummary:
    """Semantic masks of LVIS v1 from its instances.

    Writes `annotations/lvis_val/{stem}.png`, 16 bits: 0 for background, otherwise the category id, 1 to 1203; of
    overlapping instances the one of the smaller area is on top. The pictures are listed in `lvis_val.txt` with
    their folder, for instance `val2017/000000000139.jpg`; some of them are of train2017.

    Args:
        root: the folder of the annotations; the pictures are not read.
        annotations: the JSON file, relative to `root`; of `lvis_v1_train.json` the results are named `lvis_train`.

    Raises:
        ValueError: the annotations are missing, broken or of another kind, or a list of other pictures is there.
    """
    root = Path(root)
    layout = _Layout(labels={number: number for number in range(1, _LVIS_CATEGORIES + 1)}, name="coco_url")
    result = f"lvis_{Path(annotations).stem.rpartition('_')[2]}"
    jobs, names = [], []
    for picture in _read_pictures(root / annotations, layout):
        names.append(picture.name)
        target = root / "annotations" / result / f"{Path(picture.name).stem}.png"
        jobs.append(_Job(target, partial(_semantic_map, picture, np.uint16), root / annotations))
    return _write_masks(jobs, {root / f"{result}.txt": sorted(names)})


@dataclass(frozen=True)
class _Layout:
    """Where an annotation file keeps what is needed, and the label of each category id."""

    labels: Mapping[int, int]
    annotations: str = "annotations"
    image_id: str = "id"
    name: str = "file_name"
    by_area: bool = True


@dataclass(frozen=True)
class _Instance:
    where: str
    label: int
    segmentation: Any
    order: tuple[bool, float]


@dataclass(frozen=True)
class _Picture:
    where: str
    name: str
    height: int
    width: int
    entry: Mapping[str, Any]
    instances: list[_Instance]


def _read_pictures(path: Path, layout: _Layout) -> list[_Picture]:
    """The pictures of an annotation file, each with its instances in the order in which they are drawn."""
    content = _read_json(path)
    pictures: dict[int, _Picture] = {}
    for place, entry in enumerate(_entries(content, "images", path)):
        where = f"{path}, image {entry.get(layout.image_id, f'at place {place}')}"
        number = _whole_number(entry, layout.image_id, where)
        if number in pictures:
            raise ValueError(f"{where} is there twice, expected one entry an id.")
        height, width = (_whole_number(entry, key, where) for key in ("height", "width"))
        if min(height, width) < 1 or height * width > MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{where} has {height} x {width} (height x width) pixels, expected 1 to {MAX_IMAGE_PIXELS:,}."
            )
        name = _safe_name(entry.get(layout.name), layout.name, where)
        pictures[number] = _Picture(where, name, height, width, entry, [])
    for place, entry in enumerate(_entries(content, layout.annotations, path)):
        where = f"{path}, annotation {entry.get('id', f'at place {place}')}"
        number = _whole_number(entry, "image_id", where)
        if number not in pictures:
            raise ValueError(f"{where} is of image {number}, which is not among the images.")
        pictures[number].instances.append(_instance(entry, layout, where))
    for picture in pictures.values():
        picture.instances.sort(key=lambda instance: instance.order)
    return list(pictures.values())


def _instance(entry: Mapping[str, Any], layout: _Layout, where: str) -> _Instance:
    category = _whole_number(entry, "category_id", where)
    if category not in layout.labels:
        raise ValueError(
            f"{where} has category_id = {category}, expected one of {len(layout.labels)} from "
            f"{min(layout.labels)} to {max(layout.labels)}; is this the right file?"
        )
    order = (False, 0.0)
    if layout.by_area:
        area = entry.get("area")
        # The comparison turns away NaN too.
        if not isinstance(area, (int, float)) or not 0 <= area <= MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{where} has area = {area!r}, expected a number of pixels up to {MAX_IMAGE_PIXELS:,}."
            )
        order = (not entry.get("iscrowd"), -float(area))
    return _Instance(where, layout.labels[category], entry.get("segmentation"), order)


def _semantic_map(picture: _Picture, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """[H, W] with 0 where there is no instance."""
    labels = np.zeros((picture.height, picture.width), dtype=dtype)
    for instance in picture.instances:
        try:
            mask = decode_segmentation(instance.segmentation, picture.height, picture.width)
        except ValueError as error:
            raise ValueError(f"{instance.where}: {error}") from error
        labels[mask] = instance.label
    return labels


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            content = json.load(file)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error.strerror or error}; download it and put it there."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}; download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object of annotations.")
    return content


def _entries(content: Mapping[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    entries = content.get(key)
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
    if key == "coco_url":
        parts = parts[-2:] if len(parts) > 2 else []
    elif len(parts) > 1:
        parts = []
    if not parts or any(
        not 1 <= len(part) <= 200
        or part.startswith(".")
        or not part.isprintable()
        or set(part) & set('\\:*?"<>|')
        for part in parts
    ):
        expected = "an address ending in FOLDER/FILE" if key == "coco_url" else "a file name without folders"
        raise ValueError(f"{where} has {key} = {value!r}, expected {expected}.")
    return "/".join(parts)


def _relabel_stuff(
    root: Path,
    split: str,
    table: Mapping[int, int],
    ending: str,
    marker: tuple[Path, str] | None = None,
) -> PreparationSummary:
    folder = root / "annotations" / split
    sources = [path for path in _visible(folder.glob("*.png")) if "TrainIds" not in path.name]
    if not sources:
        raise ValueError(
            f"{folder} holds no stuffthingmaps (*.png); unpack stuffthingmaps_trainval2017.zip into "
            f"{folder.parent}."
        )
    return _relabel(sources, [path.with_name(path.stem + ending) for path in sources], table, marker)


def _visible(paths: Any) -> list[Path]:
    return sorted(path for path in paths if not path.name.startswith("."))


def _relabel(
    sources: Sequence[Path],
    targets: Sequence[Path],
    table: Mapping[int, int],
    marker: tuple[Path, str] | None = None,
) -> PreparationSummary:
    jobs = [
        _Job(target, partial(_relabelled, source, table), source) for source, target in zip(sources, targets)
    ]
    return _write_masks(jobs, marker=marker)


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
    jobs: Sequence[_Job],
    lists: Mapping[Path, Sequence[str]] | None = None,
    marker: tuple[Path, str] | None = None,
) -> PreparationSummary:
    """Makes and writes the masks that are not there, then the lists: where there is a list, there are its masks. The
    marker, a file and its text, comes before the first mask, unless masks of unknown making are there.

    Raises:
        ValueError: two masks of one name, or masks that were made from other files than those that are there now.
    """
    start = time.monotonic()
    name, count = Counter(job.target for job in jobs).most_common(1)[0] if jobs else (None, 0)
    if count > 1:
        raise ValueError(f"two pictures have the mask {name}, expected pictures of different names.")
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
    texts = {path: "".join(f"{line}\n" for line in lines) for path, lines in (lists or {}).items()}
    for path, text in texts.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise ValueError(f"{path} lists other pictures than the annotations; move it out of the way.")
    waiting = [job for job in jobs if not job.target.is_file()]
    for target, make, source in logging.tqdm(waiting, desc="Preparing masks", unit="mask"):
        mask = Image.fromarray(make())
        if marker is not None and len(waiting) == len(jobs) and not marker[0].exists():
            write_text(f"{marker[1]}\n", marker[0])
        write_mask(mask, target, digests[source])
    for path, text in texts.items():
        if not path.exists():
            write_text(text, path)
    return PreparationSummary(
        written=len(waiting), skipped=len(jobs) - len(waiting), seconds=time.monotonic() - start
    )
