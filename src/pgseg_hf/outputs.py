"""A folder's masks in the formats of other tools: COCO, YOLO, LabelMe, a PNG for each label, and a table.

All are made from the masks that `folders.segment_folder` left, so that a format can be had later without segmenting
again. Background is left out, but for the table. pycocotools and OpenCV, `pgseg-hf[formats]`, are imported when asked
for.
"""

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .files import folder_written_whole, mask_scores, write_image, write_json, write_text
from .images import load_label_map
from .options import BACKGROUND

NEEDS = {"coco": "pycocotools.mask", "yolo": "cv2", "labelme": "cv2"}
# Pixels that a polygon may be beside the mask's edge, and the corners that it has at least.
_TOLERANCE, _CORNERS = 1.0, 3


@dataclass
class MaskResult:
    """A picture and its mask.

    Args:
        image: the picture's file.
        file_name: its name in the folder of the pictures, with slashes.
        name: the mask's name in its folder, ending in .png.
        mask: the mask's file.
        labels: N labels.
        background: whether value 0 is background, and label i has value i + 1.
    """

    image: Path
    file_name: str
    name: Path
    mask: Path
    labels: Sequence[str]
    background: bool

    def read(self) -> np.ndarray:
        """The label map, int64 [H, W]."""
        return load_label_map(self.mask)

    def present(self) -> Iterator[tuple[int, str, np.ndarray]]:
        """Number from 0, label and mask, uint8 [H, W] of 0 and 1, of the labels that are in the picture."""
        label_map = self.read()
        for number, label in enumerate(self.labels):
            mask = label_map == number + self.background
            if mask.any():
                yield number, label, mask.astype(np.uint8)

    def segments(self) -> tuple[int, int, list[dict[str, Any]]]:
        """Width, height, and label, value, pixels, area (share) and mean score of all labels and the background."""
        label_map, names = self.read(), [BACKGROUND, *self.labels] if self.background else self.labels
        scores = mask_scores(self.mask) or [None] * len(names)
        counts = np.bincount(label_map.ravel(), minlength=len(names))
        shares = counts / label_map.size
        found = [
            {"label": name, "value": value, "pixels": int(count), "area": float(share), "score": score}
            for value, (name, count, share, score) in enumerate(zip(names, counts, shares, scores))
        ]
        return label_map.shape[1], label_map.shape[0], found


def check_formats(formats: Sequence[str], output: Path, overwrite: bool = False) -> None:
    """Raises a ValueError for a format whose library is not installed, or that would write over what is there."""
    for name in formats:
        try:
            import_module(NEEDS.get(name, "json"))
        except ImportError as error:
            package = NEEDS[name].partition(".")[0]
            raise ValueError(
                f"format {name} needs {package}, which is not installed, expected pip install 'pgseg-hf[formats]'."
            ) from error
        if name in _WRITERS and (place := output / _WRITERS[name][0]).exists() and not overwrite:
            raise ValueError(f"{place} exists already; --overwrite makes it anew from the masks.")


def write_formats(results: Sequence[MaskResult], formats: Sequence[str], output: Path) -> list[Path]:
    """Writes the formats into a folder, each whole or not at all; one that is there gives way.

    Returns:
        the files and folders.
    """
    places = []
    for name in dict.fromkeys(formats):
        if name in _WRITERS:
            place, write = _WRITERS[name]
            places.append(output / place)
            write(results, places[-1])
    return places


def _write_label_masks(results: Sequence[MaskResult], place: Path) -> None:
    """`NAME/VALUE-LABEL.png`, 255 where the label is."""
    with folder_written_whole(place, replace=True) as folder:
        for result in results:
            for number, label, mask in result.present():
                name = re.sub(r"[^\w -]", "_", label)[:80]
                file = f"{number + result.background}-{name}.png"
                write_image(Image.fromarray(mask * 255), folder / result.name.with_suffix("") / file)


def _write_coco(results: Sequence[MaskResult], place: Path) -> None:
    """One annotation with run lengths for each label of each picture; categories count from 1."""
    from pycocotools import mask as rle  # type: ignore[import-not-found, import-untyped, unused-ignore]

    images: list[dict] = []
    annotations: list[dict] = []
    for result in results:
        width, height, segments = result.segments()
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": result.file_name, "width": width, "height": height})
        for number, _, mask in result.present():
            code = rle.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": number + 1,
                    "segmentation": {"size": [height, width], "counts": code["counts"].decode("ascii")},
                    "area": int(rle.area(code)),
                    "bbox": [float(value) for value in rle.toBbox(code)],
                    "iscrowd": 0,
                    "score": segments[number + result.background]["score"],
                }
            )
    labels = results[0].labels if results else ()
    categories = [
        {"id": number, "name": label, "supercategory": ""} for number, label in enumerate(labels, 1)
    ]
    content = {"info": {"description": "pgseg_hf"}, "licenses": [], "images": images}
    write_json(content | {"annotations": annotations, "categories": categories}, place)


def _write_yolo(results: Sequence[MaskResult], place: Path) -> None:
    """`labels/NAME.txt` with class and polygon in shares of the sides, `images/` beside it, `data.yaml` with names."""
    with folder_written_whole(place, replace=True) as folder:
        for result in results:
            lines = []
            for number, _, mask in result.present():
                # Centres of pixels, so that both rounding and cutting off give the pixel.
                for points in _polygons(mask):
                    shares = (points + 0.5) / mask.shape[::-1]
                    lines.append(" ".join([str(number), *(f"{value:.6f}" for value in shares.ravel())]))
            write_text(
                "".join(f"{line}\n" for line in lines), folder / "labels" / result.name.with_suffix(".txt")
            )
            image = folder / "images" / result.name.with_suffix(result.image.suffix)
            image.parent.mkdir(parents=True, exist_ok=True)
            try:
                image.symlink_to(result.image.resolve())
            except OSError:  # Windows, and disks without links
                shutil.copyfile(result.image, image)
        names = results[0].labels if results else ()
        lines = [f"  {number}: {json.dumps(label)}\n" for number, label in enumerate(names)]
        write_text("".join(["train: images\nval: images\nnames:\n", *lines]), folder / "data.yaml")


def _write_labelme(results: Sequence[MaskResult], place: Path) -> None:
    """`NAME.json` with the polygons in pixels."""
    same: dict[str, Any] = {"group_id": None, "description": "", "shape_type": "polygon", "flags": {}}
    with folder_written_whole(place, replace=True) as folder:
        for result in results:
            height, width = result.read().shape
            shapes = [
                {"label": label, "points": points.astype(float).tolist(), **same}
                for _, label, mask in result.present()
                for points in _polygons(mask)
            ]
            path = result.name.with_suffix(".json")
            image = result.image.resolve()
            with suppress(ValueError):  # on another drive
                image = Path(os.path.relpath(image, (place / path).parent.resolve()))
            content = {
                "version": "5.5.0",
                "flags": {},
                "shapes": shapes,
                "imagePath": image.as_posix(),
                "imageData": None,
                "imageHeight": height,
                "imageWidth": width,
            }
            write_json(content, folder / path)


def _write_csv(results: Sequence[MaskResult], place: Path) -> None:
    """A line for each picture and label, absent ones too."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "width", "height", "label", "pixels", "area", "score"])
    for result in results:
        width, height, segments = result.segments()
        for found in segments:
            score = "" if found["score"] is None else f"{found['score']:.6f}"
            writer.writerow(
                [
                    result.file_name,
                    width,
                    height,
                    found["label"],
                    found["pixels"],
                    f"{found['area']:.6f}",
                    score,
                ]
            )
    write_text(table.getvalue(), place)


def _polygons(mask: np.ndarray) -> list[np.ndarray]:
    """The regions of a mask as polygons [P, 2] of pixels (x, y), without specks that have no three corners. These
    formats know no holes: a hole hangs on its outline by a cut to and fro."""
    import cv2  # type: ignore[import-not-found, import-untyped, unused-ignore]

    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [cv2.approxPolyDP(ring, _TOLERANCE, closed=True).reshape(-1, 2) for ring in contours]
    parents = [] if hierarchy is None else hierarchy.reshape(-1, 4)[:, 3].tolist()
    polygons = {number: rings[number] for number, parent in enumerate(parents) if parent < 0}
    for number, parent in enumerate(parents):
        if parent >= 0 and len(rings[number]) >= _CORNERS:
            polygons[parent] = _joined(polygons[parent], rings[number])
    return [polygon for polygon in polygons.values() if len(polygon) >= _CORNERS]


def _joined(outline: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """An outline with a hole, cut where their corners are nearest."""
    distances = np.square(outline[:, None].astype(np.int64) - hole[None]).sum(axis=2)
    at, start = np.unravel_index(distances.argmin(), distances.shape)
    way = np.concatenate([hole[start:], hole[: start + 1]])
    return np.concatenate([outline[: at + 1], way, outline[at:]])


# Where in the folder of results each format lies. The masks themselves, "png", are there always.
_WRITERS: dict[str, tuple[str, Callable[[Sequence[MaskResult], Path], None]]] = {
    "masks": ("label-masks", _write_label_masks),
    "coco": ("coco.json", _write_coco),
    "yolo": ("yolo", _write_yolo),
    "labelme": ("labelme", _write_labelme),
    "csv": ("segments.csv", _write_csv),
}
