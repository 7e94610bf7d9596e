"""Folders of labelled photos: with a separate table, with metadata in the folder, or with one subfolder per label."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..images import find_images
from .columns import CAPTION_NAMES, IMAGE_NAMES, TAG_NAMES, Columns
from .metadata import METADATA_FILES, Rows, find_metadata, read_metadata
from .records import Record, UnusableRecord
from .tables import RowReader

LABEL_NAMES = (*TAG_NAMES, "labels", "label")


@dataclass
class LabelledPhotos:
    """The photos of a folder that have labels or captions.

    Args:
        folder: folder of the photos.
        source: origin of the labels, for messages.
        photos: distinct photos, sorted. Their tags are the labels, their names the paths in the folder, with slashes.
        left_out: skipped items for each reason.
    """

    folder: Path
    source: str
    photos: list[Record]
    left_out: dict[str, list[str]]

    def count_labels(self) -> Counter[str]:
        """Number of photos for each label."""
        return Counter(label for photo in self.photos for label in photo.tags)


def row_of(photo: Record) -> dict[str, object]:
    """The metadata row of a photo."""
    return {"file_name": photo.name, "tags": photo.tags, "captions": photo.captions}


def read_photos(
    folder: Path, labels_from: Path | None = None, leave_out: Path | None = None
) -> LabelledPhotos:
    """Reads the labelled photos of a folder.

    Args:
        folder: folder with the photos; it may have subfolders.
        labels_from: a table with a column of file names relative to the folder (`file_name`) and a column of labels
            (`tags`, `labels`) or captions. A photo may have several rows. By default the folder's own metadata file;
            without one, the label of each photo is the name of its subfolder.
        leave_out: a folder that is not searched.

    Raises:
        ValueError: if the table is invalid, or no photo can be used.
    """
    file = labels_from or find_metadata(folder)
    left_out: dict[str, list[str]] = {}
    if file is not None:
        photos = _of_table(folder, file, left_out, leave_out)
    else:
        photos = _of_class_folders(folder, left_out, leave_out)
    source = "the folder names" if file is None else str(file)
    if not photos:
        seen = "; ".join(f"{len(names)} x {reason} ({names[0]})" for reason, names in left_out.items())
        raise ValueError(f"{folder}: no photo can be used with labels from {source}: {seen}.")
    spelling = _one_spelling(label for photo in photos.values() for label in photo.tags)
    for photo in photos.values():
        photo.tags = list(dict.fromkeys(spelling[_key(label)] for label in photo.tags))
    return LabelledPhotos(folder, source, [photos[name] for name in sorted(photos)], left_out)


def _of_table(
    folder: Path, file: Path, left_out: dict[str, list[str]], leave_out: Path | None
) -> dict[str, Record]:
    rows = read_metadata(file)
    reader = RowReader(_columns(rows, file), folder)
    photos: dict[str, Record] = {}
    masks = set()
    for index in range(len(rows)):
        place = rows.place(index)
        try:
            record = reader.record(rows[index], place)
        except UnusableRecord as error:
            left_out.setdefault(error.reason, []).append(str(error))
            continue
        except ValueError as error:
            left_out.setdefault("broken row", []).append(str(error))
            continue
        if not isinstance(record.image, Path):
            left_out.setdefault("image in the table instead of a file name", []).append(place)
            continue
        if not os.path.isfile(record.image):  # Path.is_file would raise an error for very long names
            left_out.setdefault("no such file", []).append(f"{record.image} ({place})")
            continue
        if isinstance(record.mask, Path):
            masks.add(os.path.normpath(record.mask))
        if number := next((label for label in record.tags if label.isnumeric()), None):
            raise ValueError(f"{place} has the label {number!r}, expected a word, not a number.")
        name = os.path.normpath(record.image)
        place_of = record.image.relative_to(folder).as_posix()
        photo = photos.setdefault(name, Record(record.image, name=place_of))
        photo.tags += record.tags
        photo.captions += [caption for caption in record.captions if caption not in photo.captions]
    for image in find_images(folder, leave_out):
        if (
            os.path.normpath(image) not in photos.keys() | masks
            and "masks" not in image.relative_to(folder).parts
        ):
            left_out.setdefault(f"no row in {file.name}", []).append(str(image))
    for name in [name for name, photo in photos.items() if not (photo.tags or photo.captions)]:
        left_out.setdefault("no label", []).append(photos.pop(name).name)
    return {photo.name: photo for photo in photos.values()}


def _columns(rows: Rows, file: Path) -> Columns:
    """Finds the columns of a table by their usual names."""
    names, has = rows.column_names, ", ".join(rows.column_names)
    tags = next((name for name in LABEL_NAMES if name in names), None)
    if not any(name in names for name in IMAGE_NAMES):
        raise ValueError(f"{file} has the columns {has}, expected a column file_name.")
    if tags is None and not any(name in names for name in CAPTION_NAMES):
        raise ValueError(f"{file} has the columns {has}, expected a column tags, labels or captions.")
    return Columns(tags=tags).among(names, str(file))


def _of_class_folders(
    folder: Path, left_out: dict[str, list[str]], leave_out: Path | None
) -> dict[str, Record]:
    if (folder / "masks").is_dir():
        raise ValueError(
            f"{folder} has masks but no labels; pass --labels-from, or add one of {', '.join(METADATA_FILES)}."
        )
    photos = {}
    for image in find_images(folder, leave_out):
        place = image.relative_to(folder)
        if len(place.parts) == 1:
            left_out.setdefault("in no folder of a label", []).append(str(image))
            continue
        label = " ".join(image.parent.name.replace("_", " ").split())
        if label.isnumeric():
            raise ValueError(f"{image.parent} is named by a number, expected a word as the label.")
        photos[place.as_posix()] = Record(image, tags=[label], name=place.as_posix())
    if not photos:
        raise ValueError(
            f"{folder} has no labels; pass --labels-from FILE, add {METADATA_FILES[1]} with file_name and tags to it, "
            "or sort the photos into one subfolder per label."
        )
    return photos


def _key(label: str) -> str:
    return unicodedata.normalize("NFC", " ".join(label.split())).casefold()


def _one_spelling(labels: Iterable[str]) -> dict[str, str]:
    """The most frequent spelling of labels that are the same for the tokenizer."""
    spellings: dict[str, Counter[str]] = {}
    for label in labels:
        spellings.setdefault(_key(label), Counter())[" ".join(label.split())] += 1
    return {key: counts.most_common(1)[0][0] for key, counts in spellings.items()}
