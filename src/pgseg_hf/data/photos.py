"""A folder of photos with their labels, as people keep them: a table, metadata in the folder, or a folder a label."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..images import find_images
from .columns import CAPTION_NAMES, IMAGE_NAMES, MASK_NAMES, TAG_NAMES, Columns
from .metadata import METADATA_FILES, Rows, find_metadata, read_metadata
from .records import UnusableRecord
from .tables import RowReader

LABEL_NAMES = (*TAG_NAMES, "labels", "label")


@dataclass
class Photo:
    """One photo of a folder.

    Args:
        file_name: its place in the folder, with slashes.
        labels: what is on it; may be empty where there are captions.
        captions: sentences; may be empty.
    """

    file_name: str
    labels: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)

    def to_row(self) -> dict[str, object]:
        """A row of metadata."""
        return {"file_name": self.file_name, "tags": self.labels, "captions": self.captions}


@dataclass
class LabelledPhotos:
    """The photos of a folder that have labels or captions, sorted.

    Args:
        folder: where they lie.
        source: where the labels come from, for messages.
        photos: each one once.
        left_out: reasons, and what was left out for each.
    """

    folder: Path
    source: str
    photos: list[Photo]
    left_out: dict[str, list[str]]

    def count_labels(self) -> Counter[str]:
        """How many photos have each label."""
        return Counter(label for photo in self.photos for label in photo.labels)


def read_photos(
    folder: Path, labels_from: Path | None = None, leave_out: Path | None = None
) -> LabelledPhotos:
    """The labelled photos of a folder.

    Args:
        folder: of the photos, in it or in subfolders.
        labels_from: a table with a column of file names relative to the folder (`file_name`) and one of labels (`tags`,
            `labels`) or captions; a photo may have several rows. By default the folder's own metadata file, and where
            it has none, each photo's label is the name of the folder that it lies in.
        leave_out: a folder that is not searched.

    Raises:
        ValueError: naming the file and what is wrong with it, or that no photo can be used.
    """
    file = labels_from or find_metadata(folder)
    left_out: dict[str, list[str]] = {}
    if file is not None:
        photos = _of_table(folder, file, left_out, leave_out)
    else:
        photos = _of_class_folders(folder, left_out, leave_out)
    source = "the names of folders" if file is None else str(file)
    if not photos:
        seen = "; ".join(f"{len(names)} x {reason} ({names[0]})" for reason, names in left_out.items())
        raise ValueError(f"{folder}: no photo can be used, with labels from {source}: {seen}.")
    spelling = _one_spelling(label for photo in photos.values() for label in photo.labels)
    for photo in photos.values():
        photo.labels = list(dict.fromkeys(spelling[_key(label)] for label in photo.labels))
    return LabelledPhotos(folder, source, [photos[name] for name in sorted(photos)], left_out)


def _of_table(
    folder: Path, file: Path, left_out: dict[str, list[str]], leave_out: Path | None
) -> dict[str, Photo]:
    rows = read_metadata(file)
    reader = RowReader(_columns(rows, file), folder)
    photos: dict[str, Photo] = {}
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
        if not os.path.isfile(record.image):  # unlike Path.is_file, also for names too long for a file
            left_out.setdefault("no such file", []).append(f"{record.image} ({place})")
            continue
        if isinstance(record.mask, Path):
            masks.add(os.path.normpath(record.mask))
        if number := next((label for label in record.tags if label.isnumeric()), None):
            raise ValueError(f"{place} has the label {number!r}, expected a word: the model reads labels.")
        name = os.path.normpath(record.image)
        photo = photos.setdefault(name, Photo(record.image.relative_to(folder).as_posix()))
        photo.labels += record.tags
        photo.captions += [caption for caption in record.captions if caption not in photo.captions]
    for image in find_images(folder, leave_out):
        if (
            os.path.normpath(image) not in photos.keys() | masks
            and "masks" not in image.relative_to(folder).parts
        ):
            left_out.setdefault(f"no row in {file.name}", []).append(str(image))
    for name in [name for name, photo in photos.items() if not (photo.labels or photo.captions)]:
        left_out.setdefault("no label", []).append(photos.pop(name).file_name)
    return {photo.file_name: photo for photo in photos.values()}


def _columns(rows: Rows, file: Path) -> Columns:
    """Which columns a table has, by their usual names."""

    def find(names: Iterable[str]) -> str | None:
        return next((name for name in names if name in rows.column_names), None)

    found = Columns(find(IMAGE_NAMES), find(CAPTION_NAMES), find(LABEL_NAMES), find(MASK_NAMES))
    has = ", ".join(rows.column_names)
    if found.image is None:
        raise ValueError(f"{file} has the columns {has}, expected one of file names, called file_name.")
    if found.tags is None and found.caption is None:
        raise ValueError(
            f"{file} has the columns {has}, expected one of labels, called tags, or of captions."
        )
    return found.among(rows.column_names, str(file))


def _of_class_folders(
    folder: Path, left_out: dict[str, list[str]], leave_out: Path | None
) -> dict[str, Photo]:
    if (folder / "masks").is_dir():
        raise ValueError(
            f"{folder} has masks and no labels: give --labels-from, or one of {', '.join(METADATA_FILES)}."
        )
    photos = {}
    for image in find_images(folder, leave_out):
        place = image.relative_to(folder)
        if len(place.parts) == 1:
            left_out.setdefault("in no folder of a label", []).append(str(image))
            continue
        label = " ".join(image.parent.name.replace("_", " ").split())
        if label.isnumeric():
            raise ValueError(f"{image.parent} is a number, expected a word: the model reads labels.")
        photos[place.as_posix()] = Photo(place.as_posix(), [label])
    if not photos:
        raise ValueError(
            f"{folder} has no labels: give --labels-from FILE, put {METADATA_FILES[1]} with file_name and tags into "
            "it, or sort the photos into folders named by their label."
        )
    return photos


def _key(label: str) -> str:
    return unicodedata.normalize("NFC", " ".join(label.split())).casefold()


def _one_spelling(labels: Iterable[str]) -> dict[str, str]:
    """The most frequent spelling of labels that the tokenizer cannot tell apart."""
    spellings: dict[str, Counter[str]] = {}
    for label in labels:
        spellings.setdefault(_key(label), Counter())[" ".join(label.split())] += 1
    return {key: counts.most_common(1)[0][0] for key, counts in spellings.items()}
