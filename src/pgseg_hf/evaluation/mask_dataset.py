"""Pictures with masks: what a benchmark is, however its files lie."""

import copy
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.metadata import find_metadata, read_metadata
from ..files import path_inside
from ..folders import find_images
from ..images import ImageSource, NoLabelMap, load_image, load_label_map
from ..prompts import validate_labels
from ..text_files import read_json
from ..values import is_whole
from .confusion import IGNORE_INDEX

Source = ImageSource | Callable[[], ImageSource]
"""A file, its bytes or an image; or a function that gives one, for pictures that lie in tables."""


class BrokenPicture(ValueError):
    """A picture or mask that cannot be decoded, such as a truncated file; `name` is the picture's."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Picture:
    """A picture and its mask, not read yet.

    Args:
        name: unique in its data set; the name of its result files, without an ending.
        image: the picture.
        mask: one integer a pixel.
    """

    name: str
    image: Source
    mask: Source

    @property
    def image_place(self) -> str:
        """What messages call the picture."""
        return str(self.image) if isinstance(self.image, (str, os.PathLike)) else f"picture {self.name}"

    @property
    def mask_place(self) -> str:
        """What messages call the mask."""
        return str(self.mask) if isinstance(self.mask, (str, os.PathLike)) else f"the mask of {self.name}"

    def read(self) -> Image.Image:
        """The picture, RGB.

        Raises:
            BrokenPicture: it cannot be decoded.
        """
        try:
            return load_image(self.image() if callable(self.image) else self.image)
        except ValueError as error:
            raise BrokenPicture(self.name, f"{self.image_place}: {error}") from error


@dataclass
class MaskDataset:
    """Pictures with masks and the names of the masks' values.

    Args:
        name: of the data, for reports.
        labels: name of each value, 0 to N - 1; a background among them where there is one.
        pictures: all of them.
        background: the value that means background, None for none.
        ignore_index: value that does not count; None for none.
        values: for each raw value of the files its label or `ignore_index`, where these are not the same.
        rgb_masks: raw values are red + 256 * green of colour pictures, as in ImageNet-S.
        synonyms: other names of labels.
        released: the names of labels in the released code where they differ, such as `fire_engine`.
        origin: where the pictures come from, where that are no files.
    """

    name: str
    labels: list[str]
    pictures: list[Picture]
    background: int | None = None
    ignore_index: int | None = IGNORE_INDEX
    values: Mapping[int, int] | None = None
    rgb_masks: bool = False
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    released: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""

    def __len__(self) -> int:
        return len(self.pictures)

    def truth(self, picture: Picture) -> np.ndarray:
        """The labels of a picture's pixels, int64 [H, W].

        Raises:
            BrokenPicture: the mask cannot be decoded.
            ValueError: it has values that are no labels.
        """
        try:
            source = picture.mask() if callable(picture.mask) else picture.mask
            raw = _rgb_values(load_image(source)) if self.rgb_masks else load_label_map(source)
        except NoLabelMap as error:
            raise ValueError(f"{picture.mask_place}: {error}") from error
        except ValueError as error:
            raise BrokenPicture(picture.name, f"{picture.mask_place}: {error}") from error
        table = dict(self.values or {value: value for value in range(len(self.labels))})
        if self.ignore_index is not None:
            table.setdefault(self.ignore_index, self.ignore_index)
        present = np.unique(raw)
        strange = [int(value) for value in present if int(value) not in table]
        if strange:
            raise ValueError(
                f"{picture.mask_place} has the value {strange[0]}, expected one of {_ranges(table)}: the values of "
                f"{self.name} with its {len(self.labels)} labels."
            )
        return np.array([table[int(value)] for value in present])[np.searchsorted(present, raw)]

    def check_threshold(self, background_threshold: float | None) -> None:
        """Raises a ValueError for a background threshold where there is no background."""
        if background_threshold is not None and self.background is None:
            raise ValueError(
                f"background_threshold is {background_threshold}, but {self.name} has no background; expected None, or "
                "background in its labels.json."
            )

    def spread(self, count: int) -> "MaskDataset":
        """At most `count` of the pictures, spread evenly over all of them."""
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1 picture.")
        count = min(count, len(self))
        return self.only(self.pictures[index * len(self) // count] for index in range(count))

    def part(self, rank: int, world_size: int) -> "MaskDataset":
        """The pictures of one process: number i belongs to rank i % world_size. There may be none."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of world_size {world_size}, expected 0 <= rank < world_size.")
        return self.only(self.pictures[rank::world_size])

    def only(self, pictures: Iterable[Picture]) -> "MaskDataset":
        """The same labels with some of the pictures."""
        other = copy.copy(self)
        other.pictures = list(pictures)
        return other

    def fingerprint(self) -> str:
        """Equal for the same files with the same meaning: labels and other names, and of each picture its name and
        the place, size and time of its files. The pixels are not looked at."""
        meaning = [self.labels, self.background, self.ignore_index, self.rgb_masks, self.origin]
        tables = [sorted((self.values or {}).items()), sorted((self.synonyms or {}).items())]
        files = [(each.name, file_state(each.image), file_state(each.mask)) for each in self.pictures]
        return digest([meaning, tables, sorted(self.released.items()), files])


def digest(content: Any) -> str:
    """16 digits that stand for a nested list of numbers and texts."""
    return hashlib.sha256(json.dumps(content, default=list).encode()).hexdigest()[:16]


def file_state(source: Source) -> list | None:
    """Place, size and time of change; None for what is no file."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    found = os.stat(source)
    return [str(Path(source).resolve()), found.st_size, found.st_mtime_ns]


def _rgb_values(image: Image.Image) -> np.ndarray:
    channels = np.asarray(image).astype(np.int64)
    return channels[..., 0] + 256 * channels[..., 1]


def _ranges(values: Iterable[int]) -> str:
    """`0 to 20, 255`"""
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and value == parts[-1][-1] + 1:
            parts[-1][1:] = [value]
        else:
            parts.append([value])
    return ", ".join(" to ".join(map(str, part)) for part in parts)


class MaskFolder(MaskDataset):
    """A folder of one's own: `metadata.jsonl` (`.csv`, `.parquet`) with `file_name` and `mask_file_name`, or `images/`
    and `masks/` with files of equal names but for their endings.

    `labels.json`, there or in the folder above, holds `labels`, in the order of the masks' values, and may hold
    `ignore_index` (a value of the masks that does not count, 255 by default, or null), `background` (the value
    that means background, null by default) and `synonyms` (lists of other names by label).

    Args:
        path: the folder.
        background: the label that means background, instead of what `labels.json` says.

    Raises:
        ValueError: files that are missing or make no sense.
    """

    def __init__(self, path: str | os.PathLike, background: str | None = None):
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; expected one with pictures and masks.")
        content = _read_labels(folder)
        metadata = find_metadata(folder)
        pictures = _pairs_of_metadata(metadata) if metadata else _pairs_of_names(folder)
        super().__init__(name=folder.resolve().name, pictures=pictures, **content)
        if background is not None:
            if background not in self.labels:
                raise ValueError(f"background {background!r} is none of the labels {', '.join(self.labels)}.")
            self.background = self.labels.index(background)
        require_files(self)


def require_files(dataset: MaskDataset, hint: str = "") -> None:
    """Looks whether all files of a data set are there.

    Raises:
        ValueError: there are no pictures, or some files are missing, naming the first.
    """
    if not dataset.pictures:
        raise ValueError(f"{dataset.name} has no pictures.{hint}")
    files = [file for each in dataset.pictures for file in (each.image, each.mask) if isinstance(file, Path)]
    names = Counter(picture.name for picture in dataset.pictures)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} pictures of {dataset.name} have the name {name}, expected each once.")
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} pictures or masks of {dataset.name} are missing, the first is {missing[0]}.{hint}"
        )


def _read_labels(folder: Path) -> dict:
    """Labels, ignore_index, background and synonyms."""
    places = [folder / "labels.json", folder.resolve().parent / "labels.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(
            f'{places[0]} is missing, expected {{"labels": [...]}} there or in the folder above.'
        )
    try:
        content = read_json(path)
        labels = validate_labels(content["labels"])
        ignore_index, background = content.get("ignore_index", IGNORE_INDEX), content.get("background")
        synonyms = _checked_synonyms(content.get("synonyms", {}), labels)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f'{path} cannot be read, expected {{"labels": [...]}}: {error}') from error
    for name, value in (("ignore_index", ignore_index), ("background", background)):
        if value is not None and not is_whole(value):
            raise ValueError(f"{name} in {path} is {value!r}, expected a whole number or null.")
    if ignore_index is not None and 0 <= ignore_index < len(labels):
        raise ValueError(f"ignore_index {ignore_index} in {path} is a label; give null or another number.")
    if background is not None and not 0 <= background < len(labels):
        raise ValueError(
            f"background {background} in {path} is no label, expected 0 to {len(labels) - 1} or null."
        )
    return {
        "labels": labels,
        "ignore_index": ignore_index,
        "background": background,
        "synonyms": synonyms,
    }


def _checked_synonyms(synonyms: dict, labels: list[str]) -> dict[str, list[str]]:
    for label, words in synonyms.items():
        if label not in labels:
            raise ValueError(f"synonyms are for {label!r}, which is none of the labels")
        if not isinstance(words, list):
            raise ValueError(f"synonyms of {label!r} are {words!r}, expected a list of words")
    try:
        validate_labels([*labels, *(word for words in synonyms.values() for word in words)])
    except ValueError as error:
        raise ValueError(f"of labels and synonyms together, {error}") from error
    return synonyms


def _pairs_of_metadata(path: Path) -> list[Picture]:
    pictures = []
    rows = read_metadata(path)
    for index in range(len(rows)):
        try:
            row = rows[index]
            image, mask = (path_inside(path.parent, row[key]) for key in ("file_name", "mask_file_name"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{rows.place(index)} has no file_name and mask_file_name: {error!r}."
            ) from error
        pictures.append(Picture(picture_name(row["file_name"]), image, mask))
    return pictures


def _pairs_of_names(folder: Path) -> list[Picture]:
    images, masks = folder / "images", folder / "masks"
    if not images.is_dir() or not masks.is_dir():
        raise ValueError(f"{folder} holds neither metadata.jsonl nor the folders images and masks.")
    by_name: dict[Path, Path] = {}
    for mask in find_images(masks):
        other = by_name.setdefault(mask.relative_to(masks).with_suffix(""), mask)
        if other != mask:
            raise ValueError(f"{other} and {mask} are masks of one picture, expected one.")
    pictures = []
    for image in find_images(images):
        name = image.relative_to(images).with_suffix("")
        mask = by_name.get(name, masks / name.with_suffix(".png"))
        pictures.append(Picture(picture_name(str(image.relative_to(images))), image, mask))
    return pictures


def picture_name(path: str) -> str:
    """A name for result files that stays inside their folder: `a/b.jpg` gives `a/b`."""
    parts = [part for part in Path(path).with_suffix("").parts if part not in ("/", "..", ".")]
    return "/".join(parts)
