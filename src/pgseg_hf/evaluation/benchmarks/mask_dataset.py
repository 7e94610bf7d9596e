"""Images with masks: what a benchmark is, however its files lie."""

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

# Of the colours of masks: #rrggbb as a number.
_COLOURS = (65536, 256, 1)


@dataclass
class MaskDataset:
    """Images with masks and the names of the masks' values.

    Args:
        name: of the data, for reports.
        labels: name of each value, 0 to N - 1; a background among them where there is one.
        images: its images, all of them.
        background: the value that means background, None for none.
        ignore_index: value that does not count; None for none.
        label_of_value: for each raw value of the files its label or `ignore_index`, no others occur; by default labels
            and `ignore_index` are themselves.
        rgb_weights: raw values are the weighted sums of the colours of masks, (1, 256, 0) in ImageNet-S; None for masks
            of one number a pixel.
        synonyms: other names of labels.
        released: the names of labels in the released code where they differ, such as `fire_engine`.
        origin: where the images come from, where that are no files.
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

    # What to do about values that no label has; nothing, where they are a benchmark's.
    _way_out = ""

    def truth(self, labelled: LabelledImage) -> np.ndarray:
        """The labels of an image's pixels, int64 [H, W].

        Raises:
            BrokenImage: the mask cannot be decoded.
            ValueError: it has values that are no labels.
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
                f"{self.name} with its {len(self.labels)} labels. It holds {len(present)} values from "
                f"{shown(present[0])} to {shown(present[-1])}.{self._way_out}"
            )
        return np.array([table[value] for value in present])[np.searchsorted(present, raw)]

    def check_threshold(self, background_threshold: float | None) -> None:
        """Raises a ValueError for a background threshold where there is no background."""
        if background_threshold is not None and self.background is None:
            raise ValueError(
                f"background_threshold is {background_threshold}, but {self.name} has no background; expected None, or "
                "background in its labels.json."
            )

    def spread(self, count: int) -> "MaskDataset":
        """At most `count` of the images, spread evenly over all of them."""
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1 image.")
        count = min(count, len(self))
        return self.only(self.images[index * len(self) // count] for index in range(count))

    def part(self, rank: int, world_size: int) -> "MaskDataset":
        """The images of one process: number i belongs to rank i % world_size. There may be none."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of world_size {world_size}, expected 0 <= rank < world_size.")
        return self.only(self.images[rank::world_size])

    def only(self, images: Iterable[LabelledImage]) -> "MaskDataset":
        """The same labels with some of the images."""
        other = copy.copy(self)
        other.images = list(images)
        return other

    def fingerprint(self) -> str:
        """Equal for the same images with the same meaning, wherever they lie: labels and other names, and of each
        image its name and the contents of its files, which are all read for it."""
        meaning = [self.labels, self.background, self.ignore_index, self.rgb_weights, self.origin]
        tables = [sorted((self.label_of_value or {}).items()), sorted(self.synonyms.items())]
        sources = [source for each in self.images for source in (each.image, each.mask)]
        files = [[each.name for each in self.images], file_digests(sources)]
        return hash_of([meaning, tables, sorted(self.released.items()), files])


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
    that means background, null by default), `synonyms` (lists of other names by label) and `mask_values`: for each
    value of the masks, or colour such as "#ff8000", its label, or null for what does not count. Without these a value
    is the number of its label.

    Args:
        path: the folder.
        background: the label that means background, instead of what `labels.json` says.
        mask_values: instead of what `labels.json` says; where there is no such file, they name the labels too.

    Raises:
        ValueError: files that are missing or make no sense.
    """

    _way_out = (
        " If other values are right, say what they mean: --mask_values 0=LABEL,255=LABEL (VALUE= for what does not "
        'count, #ff8000=LABEL for a colour), or "mask_values" in labels.json.'
    )

    def __init__(
        self,
        path: str | os.PathLike,
        background: str | None = None,
        mask_values: Mapping[str, str | None] | None = None,
    ):
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; expected one with images and masks.")
        content = _read_labels(folder, mask_values)
        metadata = find_metadata(folder)
        images = _pairs_of_metadata(metadata) if metadata else _pairs_of_names(folder)
        super().__init__(name=folder.resolve().name, images=images, **content)
        if background is not None:
            if background not in self.labels:
                raise ValueError(f"background {background!r} is none of the labels {', '.join(self.labels)}.")
            self.background = self.labels.index(background)
        require_files(self)


def require_files(dataset: MaskDataset, hint: str = "") -> None:
    """Looks whether all files of a data set are there.

    Raises:
        ValueError: there are no images, or some files are missing, naming the first.
    """
    if not dataset.images:
        raise ValueError(f"{dataset.name} has no images.{hint}")
    name, count = Counter(each.name for each in dataset.images).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} images of {dataset.name} have the name {name}, expected each once.")
    files = [file for each in dataset.images for file in (each.image, each.mask)]
    missing = [file for file in files if isinstance(file, Path) and not file.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} images or masks of {dataset.name} are missing, the first is {missing[0]}.{hint}"
        )


def parse_mask_values(text: str) -> dict[str, str | None]:
    """`0=background,255=sky,128=`: labels by value or colour, None for what does not count.

    Raises:
        ValueError: something else.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    values = {value.strip(): label.strip() or None for value, _, label in pairs}
    if not all(equals for _, equals, _ in pairs) or len(values) < len(pairs):
        raise ValueError(f"mask_values are {text!r}, expected each value once, such as 0=background,255=sky.")
    return values


def _label_table(mask_values: Mapping[str, str | None], content: dict) -> dict:
    """`label_of_value`, `rgb_weights` and `ignore_index` of a data set whose masks have these values.

    Raises:
        ValueError: values that are none, or of two kinds, or labels that are not among those of the content.
    """
    is_colour = all(str(value).startswith("#") for value in mask_values)
    unknown = -1 if content["ignore_index"] is None else content["ignore_index"]
    table = {}
    for value, label in mask_values.items():
        if not re.fullmatch("#[0-9a-fA-F]{6}" if is_colour else "[0-9]+", str(value)):
            raise ValueError(
                f"mask_values has {value!r}, expected whole numbers, or else colours such as #ff8000."
            )
        if label is not None and label not in content["labels"]:
            raise ValueError(f"mask_values has {label!r}, which is none of {', '.join(content['labels'])}.")
        number = int(str(value).removeprefix("#"), 16 if is_colour else 10)
        table[number] = unknown if label is None else content["labels"].index(label)
    return {"label_of_value": table, "rgb_weights": _COLOURS if is_colour else None, "ignore_index": unknown}


def _read_labels(folder: Path, mask_values: Mapping[str, str | None] | None) -> dict:
    """Labels, background, synonyms, and the meaning of the masks' values."""
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
            f"{folder} holds neither metadata.jsonl nor the folders images and masks; of a folder with splits give one."
        )
    by_name: dict[Path, Path] = {}
    for mask in find_images(masks):
        other = by_name.setdefault(mask.relative_to(masks).with_suffix(""), mask)
        if other != mask:
            raise ValueError(f"{other} and {mask} are masks of one image, expected one.")
    found = []
    for image in find_images(images):
        name = image.relative_to(images).with_suffix("")
        mask = by_name.get(name, masks / name.with_suffix(".png"))
        found.append(LabelledImage(image_name(str(image.relative_to(images))), image, mask))
    return found


def image_name(path: str) -> str:
    """A name for result files that stays inside their folder: `a/b.jpg` gives `a/b`."""
    return "/".join(part for part in Path(path).with_suffix("").parts if part not in ("/", "..", "."))
