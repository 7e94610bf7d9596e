"""Datasets of images with masks, independent of the layout of their files."""

import copy
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...data.mask_labels import IGNORE_INDEX, check_mask_labels, find_mask_labels, read_mask_labels
from ...data.metadata import find_metadata, read_metadata
from ...files import path_inside
from ...images import NoLabelMap, find_images, load_label_map
from ...run_records import hash_of
from .reading import BrokenImage, LabelledImage, file_digests

# Weights of red, green and blue that turn a mask's colour into the number #rrggbb.
_COLOURS = (65536, 256, 1)


@dataclass
class MaskDataset:
    """Images with masks and the labels of the masks' values.

    Args:
        name: name in reports.
        labels: name of each value, 0 to N - 1, including a background.
        images: all images of the dataset.
        background: value of the background; None if there is none.
        ignore_index: value that is ignored; None if there is none.
        label_of_value: maps each raw value of the files to a label or `ignore_index`; other raw values are an error.
            Defaults to the identity.
        rgb_weights: weights of red, green and blue; the raw value of a coloured mask is the weighted sum, with
            (1, 256, 0) in ImageNet-S; None for masks with one number per pixel.
        synonyms: other names of labels.
        released: label names in the released code, where they differ, such as `fire_engine`.
        origin: source of images that are not files.
    """

    name: str
    labels: list[str]
    images: list[LabelledImage]
    background: int | None = None
    ignore_index: int | None = IGNORE_INDEX
    label_of_value: Mapping[int, int] | None = None
    rgb_weights: tuple[int, int, int] | None = None
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    released: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""

    def __len__(self) -> int:
        return len(self.images)

    # Advice for values without a label; a benchmark has none.
    _way_out = ""

    def truth(self, labelled: LabelledImage) -> np.ndarray:
        """Reads the ground truth of an image, int64 [H, W].

        Raises:
            BrokenImage: the mask cannot be decoded.
            ValueError: the mask has values without a label.
        """
        try:
            source = labelled.mask() if callable(labelled.mask) else labelled.mask
            raw = load_label_map(source, self.rgb_weights)
        except NoLabelMap as error:
            raise ValueError(f"{labelled.mask_place}: {error}{self._way_out}") from error
        except ValueError as error:
            raise BrokenImage(labelled.name, f"{labelled.mask_place}: {error}") from error
        unknown = [] if self.ignore_index is None else [self.ignore_index]
        table = self.label_of_value or {value: value for value in [*range(len(self.labels)), *unknown]}
        present = np.unique(raw).tolist()
        strange = [value for value in present if value not in table]
        if strange:
            shown = "#{:06x}".format if self.rgb_weights == _COLOURS else str
            raise ValueError(
                f"{labelled.mask_place} has the value {shown(strange[0])}, expected one of "
                f"{', '.join(map(shown, table)) if self.rgb_weights == _COLOURS else _ranges(table)}: the values of "
                f"{self.name} with its {len(self.labels)} labels. The mask has {len(present)} values from "
                f"{shown(present[0])} to {shown(present[-1])}.{self._way_out}"
            )
        return np.array([table[value] for value in present])[np.searchsorted(present, raw)]

    def check_threshold(self, background_threshold: float | None) -> None:
        """Raises a ValueError for a background threshold if there is no background."""
        if background_threshold is not None and self.background is None:
            raise ValueError(
                f"background_threshold is {background_threshold}, but {self.name} has no background; expected None, or "
                "a background in labels.json."
            )

    def spread(self, count: int) -> "MaskDataset":
        """A subset of at most `count` images, evenly spaced."""
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1 image.")
        count = min(count, len(self))
        return self.only(self.images[index * len(self) // count] for index in range(count))

    def part(self, rank: int, world_size: int) -> "MaskDataset":
        """The images of one process, possibly none: image i belongs to rank i % world_size."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of world_size {world_size}, expected 0 <= rank < world_size.")
        return self.only(self.images[rank::world_size])

    def only(self, images: Iterable[LabelledImage]) -> "MaskDataset":
        """A copy with other images."""
        other = copy.copy(self)
        other.images = list(images)
        return other

    def fingerprint(self) -> str:
        """A hash of the labels, their other names and mask values, and the names and file contents of all images, which
        does not depend on their location. Reads all files."""
        meaning = [self.labels, self.background, self.ignore_index, self.rgb_weights, self.origin]
        tables = [sorted((self.label_of_value or {}).items()), sorted(self.synonyms.items())]
        sources = [source for each in self.images for source in (each.image, each.mask)]
        files = [[each.name for each in self.images], file_digests(sources)]
        return hash_of([meaning, tables, sorted(self.released.items()), files])


def _ranges(values: Iterable[int]) -> str:
    """Formats values as ranges: `0 to 20, 255`."""
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and value == parts[-1][-1] + 1:
            parts[-1][1:] = [value]
        else:
            parts.append([value])
    return ", ".join(" to ".join(map(str, part)) for part in parts)


class MaskFolder(MaskDataset):
    """A custom dataset in a folder with `metadata.jsonl` (`.csv`, `.parquet`) with the columns `file_name` and
    `mask_file_name`, or with `images/` and `masks/` whose files have the same names except for the suffix.

    `labels.json`, in the folder or its parent, has the `labels` in the order of the masks' values. Optional keys are
    `ignore_index` (a value of the masks that is ignored, 255 by default, or null), `background` (the value of the
    background, null by default), `synonyms` (lists of other names by label) and `mask_values`, which maps each value of
    the masks, or a colour such as "#ff8000", to its label, or to null to ignore it. Without `mask_values`, a value is
    the index of its label.

    Args:
        path: the folder.
        background: label of the background; overrides `labels.json`.
        mask_values: labels by mask value; overrides `labels.json`. Without that file, it also defines the labels.

    Raises:
        ValueError: a file is missing or invalid.
    """

    _way_out = (
        " If the masks are correct, define their values: --mask-values 0=LABEL,255=LABEL (VALUE= to ignore a value, "
        '#ff8000=LABEL for a colour), or "mask_values" in labels.json.'
    )

    def __init__(
        self,
        path: str | os.PathLike,
        background: str | None = None,
        mask_values: Mapping[str, str | None] | None = None,
    ):
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; expected one with images and masks.")
        content = _read_labels(folder, mask_values)
        metadata = find_metadata(folder)
        images = _pairs_of_metadata(metadata) if metadata else _pairs_of_names(folder)
        super().__init__(name=folder.resolve().name, images=images, **content)
        if background is not None:
            if background not in self.labels:
                raise ValueError(f"background is {background!r}, expected one of {', '.join(self.labels)}.")
            self.background = self.labels.index(background)
        require_files(self)


def require_files(dataset: MaskDataset, hint: str = "") -> None:
    """Checks that all files of a dataset exist.

    Raises:
        ValueError: there are no images, two have the same name, or files are missing.
    """
    if not dataset.images:
        raise ValueError(f"{dataset.name} has no images.{hint}")
    name, count = Counter(each.name for each in dataset.images).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} images of {dataset.name} have the name {name}; names must be unique.")
    files = [file for each in dataset.images for file in (each.image, each.mask)]
    missing = [file for file in files if isinstance(file, Path) and not file.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} images or masks of {dataset.name} are missing, the first is {missing[0]}.{hint}"
        )


def parse_mask_values(text: str) -> dict[str, str | None]:
    """Parses `0=background,255=sky,128=` into labels by value or colour, None for ignored values.

    Raises:
        ValueError: the text has another form, or a value occurs twice.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    values = {value.strip(): label.strip() or None for value, _, label in pairs}
    if not all(equals for _, equals, _ in pairs) or len(values) < len(pairs):
        raise ValueError(f"mask_values is {text!r}, expected each value once, such as 0=background,255=sky.")
    return values


def _label_table(mask_values: Mapping[str, str | None], content: dict) -> dict:
    """`label_of_value`, `rgb_weights` and `ignore_index` for `mask_values`."""
    is_colour = all(str(value).startswith("#") for value in mask_values)
    unknown = -1 if content["ignore_index"] is None else content["ignore_index"]
    table = {}
    for value, label in mask_values.items():
        if not re.fullmatch("#[0-9a-fA-F]{6}" if is_colour else "[0-9]+", str(value)):
            raise ValueError(
                f"mask_values has {value!r}, expected only integers or only colours such as #ff8000."
            )
        if label is not None and label not in content["labels"]:
            raise ValueError(f"mask_values has {label!r}, expected one of {', '.join(content['labels'])}.")
        number = int(str(value).removeprefix("#"), 16 if is_colour else 10)
        table[number] = unknown if label is None else content["labels"].index(label)
    return {"label_of_value": table, "rgb_weights": _COLOURS if is_colour else None, "ignore_index": unknown}


def _read_labels(folder: Path, mask_values: Mapping[str, str | None] | None) -> dict:
    """Fields of [`MaskDataset`] from `labels.json` and `mask_values`."""
    path = find_mask_labels([folder])
    if path is not None:
        content = read_mask_labels(path)
    elif mask_values:
        names = dict.fromkeys(label for label in mask_values.values() if label is not None)
        content = check_mask_labels({"labels": list(names)})
    else:
        raise ValueError(
            f'{folder} has no labels.json, expected {{"labels": [...]}} there or in the folder above, or mask_values.'
        )
    own_values = content.pop("mask_values")
    if mask_values:
        return content | _label_table(mask_values, content)
    try:
        return content | (_label_table(own_values, content) if own_values else {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _pairs_of_metadata(path: Path) -> list[LabelledImage]:
    images = []
    rows = read_metadata(path)
    for index in range(len(rows)):
        try:
            row = rows[index]
            image, mask = (path_inside(path.parent, row[key]) for key in ("file_name", "mask_file_name"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            place = rows.place(index)
            raise ValueError(f"{place} has no file_name and mask_file_name: {error!r}.") from error
        images.append(LabelledImage(image_name(row["file_name"]), image, mask))
    return images


def _pairs_of_names(folder: Path) -> list[LabelledImage]:
    images, masks = folder / "images", folder / "masks"
    if not images.is_dir() or not masks.is_dir():
        raise ValueError(
            f"{folder} has neither metadata.jsonl nor the folders images and masks; if it has splits, choose one."
        )
    by_name: dict[Path, Path] = {}
    for mask in find_images(masks):
        other = by_name.setdefault(mask.relative_to(masks).with_suffix(""), mask)
        if other != mask:
            raise ValueError(f"{other} and {mask} are masks of the same image; remove one of them.")
    found = []
    for image in find_images(images):
        name = image.relative_to(images).with_suffix("")
        mask = by_name.get(name, masks / name.with_suffix(".png"))
        found.append(LabelledImage(image_name(str(image.relative_to(images))), image, mask))
    return found


def image_name(path: str) -> str:
    """A name for output files that cannot leave their folder: `a/b.jpg` becomes `a/b`."""
    return "/".join(part for part in Path(path).with_suffix("").parts if part not in ("/", "..", "."))
