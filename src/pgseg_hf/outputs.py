"""Writes a folder's masks in the formats of other tools: COCO (RLE, polygons, panoptic), YOLO, LabelMe, one PNG per
label, and a CSV table.

All formats are made from the masks of `folders.segment_folder`, so that you can add one later without segmenting again.
Only the table includes the background. pycocotools and OpenCV, `pgseg-hf[formats]`, are imported on demand.
"""

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from .files import folder_written_whole, mask_scores, write_image, write_json, write_text
from .images import load_label_map
from .options import BACKGROUND
from .visualization.colours import label_colours

NEEDS = {
    "coco": ("pycocotools.mask",),
    "coco-polygons": ("pycocotools.mask", "cv2"),
    "yolo": ("cv2",),
    "labelme": ("cv2",),
}
# Largest distance in pixels of a polygon from the mask's edge, and its smallest number of corners.
_TOLERANCE, _CORNERS = 1.0, 3
_HALF = 0.1  # half the width in pixels of a polygon around a single line of pixels


@dataclass
class MaskResult:
    """An image and its mask.

    Args:
        image: path of the image.
        file_name: its name relative to the image folder, with forward slashes.
        mask_name: name of the mask relative to the mask folder, ending in .png.
        mask: path of the mask.
        labels: N labels.
        background: whether value 0 is background and label i has value i + 1.
        colours: "#rrggbb" by name of the labels with their own colour.
        only_present: whether tables omit absent labels.
    """

    image: Path
    file_name: str
    mask_name: Path
    mask: Path
    labels: Sequence[str]
    background: bool
    colours: Mapping[str, str] | None = None
    only_present: bool = False

    def read(self) -> np.ndarray:
        """The label map, int64 [H, W]."""
        return load_label_map(self.mask)

    def present(self) -> Iterator[tuple[int, str, np.ndarray]]:
        """Yields (number from 0, label, mask as uint8 [H, W] of 0 and 1) for each label in the image."""
        label_map = self.read()
        for number, label in enumerate(self.labels):
            mask = label_map == number + self.background
            if mask.any():
                yield number, label, mask.astype(np.uint8)

    def segments(self) -> tuple[int, int, list[dict[str, Any]]]:
        """Width, height, and a dictionary with label, value, pixels, area (share) and mean score for each label and the
        background, which has no score."""
        label_map, names = self.read(), [BACKGROUND, *self.labels] if self.background else self.labels
        scores = mask_scores(self.mask) or [None] * len(names)
        if self.background:  # older masks stored 1
            scores[0] = None
        counts = np.bincount(label_map.ravel(), minlength=len(names))
        shares = counts / label_map.size
        found = [
            {"label": name, "value": value, "pixels": int(count), "area": float(share), "score": score}
            for value, (name, count, share, score) in enumerate(zip(names, counts, shares, scores))
            if count or not self.only_present
        ]
        return label_map.shape[1], label_map.shape[0], found


def check_formats(formats: Sequence[str], output: Path, overwrite: bool = False) -> None:
    """Raises a ValueError if a format's library is not installed or its output already exists."""
    for name in formats:
        try:
            for module in NEEDS.get(name, ()):
                import_module(module)
        except ImportError as error:
            package = module.partition(".")[0]
            raise ValueError(
                f"format {name} needs {package}, which is not installed; run pip install 'pgseg-hf[formats]'."
            ) from error
        if name in _WRITERS and (place := output / _WRITERS[name][0]).exists() and not overwrite:
            raise ValueError(f"{place} already exists; use --overwrite to replace it.")


def write_formats(results: Sequence[MaskResult], formats: Sequence[str], output: Path) -> list[Path]:
    """Writes formats into a folder, each completely or not at all, and replaces existing ones.

    Returns:
        The paths of the files and folders.
    """
    places = []
    for name in dict.fromkeys(formats):
        if name in _WRITERS:
            place, write = _WRITERS[name]
            places.append(output / place)
            write(results, places[-1])
    return places


def _shown(results: Sequence[MaskResult], place: Path) -> Iterable[MaskResult]:
    """The results, with a progress bar."""
    return logging.tqdm(results, desc=f"Writing {place.name}", unit="image", disable=len(results) < 2)


def _write_label_masks(results: Sequence[MaskResult], place: Path) -> None:
    """`NAME/VALUE-LABEL.png`, 255 where the label is."""
    with folder_written_whole(place, replace=True) as folder:
        for result in _shown(results, place):
            for number, label, mask in result.present():
                name = re.sub(r"[^\w -]", "_", label)[:80]
                file = f"{number + result.background}-{name}.png"
                write_image(Image.fromarray(mask * 255), folder / result.mask_name.with_suffix("") / file)


def _write_coco(results: Sequence[MaskResult], place: Path, polygons: bool = False) -> None:
    """Writes one annotation, with RLE or polygons, per label and image; category ids start at 1."""
    from pycocotools import mask as rle  # type: ignore[import-not-found, import-untyped, unused-ignore]

    annotations: list[dict] = []
    for image_id, result in enumerate(_shown(results, place), 1):
        scores = {found["label"]: found["score"] for found in result.segments()[2]}
        for number, label, mask in result.present():
            code = rle.encode(np.asfortranarray(mask))
            shape: Any = {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}
            if polygons:
                shape = [points.round(2).ravel().tolist() for points in _polygons(mask, edges=True)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": number + 1,
                    "segmentation": shape,
                    "area": int(rle.area(code)),
                    "bbox": [float(value) for value in rle.toBbox(code)],
                    "iscrowd": 0,
                    "score": scores[label],
                }
            )
    write_json(_coco(results, annotations), place)


def _write_coco_panoptic(results: Sequence[MaskResult], place: Path) -> None:
    """Writes `panoptic.json`, and PNGs in `panoptic/` whose R + 256 G + 65536 B is a segment's id; 0 is background. The
    id equals the category's."""
    annotations: list[dict] = []
    with folder_written_whole(place, replace=True) as folder:
        for image_id, result in enumerate(_shown(results, place), 1):
            segments = []
            ids = (result.read() + 1 - result.background).astype("<u4")
            for number, _, mask in result.present():
                rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
                left, top = int(columns[0]), int(rows[0])
                segments.append(
                    {
                        "id": number + 1,
                        "category_id": number + 1,
                        "area": int(np.count_nonzero(mask)),
                        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                        "iscrowd": 0,
                    }
                )
            file = {"image_id": image_id, "file_name": result.mask_name.as_posix()}
            annotations.append(file | {"segments_info": segments})
            colours = np.ascontiguousarray(ids).view(np.uint8).reshape(*ids.shape, 4)[:, :, :3]
            write_image(
                Image.fromarray(np.ascontiguousarray(colours)), folder / "panoptic" / result.mask_name
            )
        write_json(_coco(results, annotations), folder / "panoptic.json")


def _coco(results: Sequence[MaskResult], annotations: list[dict]) -> dict[str, Any]:
    """The content of a COCO file. The categories are stuff, with one segment each."""
    images = []
    for image_id, result in enumerate(results, 1):
        with Image.open(result.mask) as mask:
            size = {"width": mask.width, "height": mask.height}
        images.append({"id": image_id, "file_name": result.file_name, **size})
    labels, colours = (results[0].labels, results[0].colours) if results else ((), None)
    rows = label_colours(labels, colours).tolist()
    categories = [
        {"id": number, "name": label, "supercategory": "", "isthing": 0, "color": colour}
        for number, (label, colour) in enumerate(zip(labels, rows), 1)
    ]
    content: dict[str, Any] = {"info": {"description": "pgseg_hf"}, "licenses": [], "images": images}
    return content | {"annotations": annotations, "categories": categories}


def _write_yolo(results: Sequence[MaskResult], place: Path) -> None:
    """Writes `labels/NAME.txt` with class and normalised polygon per line, `images/`, and `data.yaml` with names."""
    with folder_written_whole(place, replace=True) as folder:
        for result in _shown(results, place):
            lines = []
            for number, _, mask in result.present():
                for points in _polygons(mask):
                    shares = points / mask.shape[::-1]
                    lines.append(" ".join([str(number), *(f"{value:.6f}" for value in shares.ravel())]))
            write_text(
                "".join(f"{line}\n" for line in lines),
                folder / "labels" / result.mask_name.with_suffix(".txt"),
            )
            image = folder / "images" / result.mask_name.with_suffix(result.image.suffix)
            image.parent.mkdir(parents=True, exist_ok=True)
            try:
                image.symlink_to(result.image.resolve())
            except OSError:  # Windows, and file systems without links
                shutil.copyfile(result.image, image)
        names = results[0].labels if results else ()
        lines = [
            f"  {number}: {json.dumps(label, ensure_ascii=False)}\n" for number, label in enumerate(names)
        ]
        write_text("".join(["train: images\nval: images\nnames:\n", *lines]), folder / "data.yaml")


def _write_labelme(results: Sequence[MaskResult], place: Path) -> None:
    """Writes `NAME.json` with polygons in pixels."""
    same: dict[str, Any] = {"group_id": None, "description": "", "shape_type": "polygon", "flags": {}}
    with folder_written_whole(place, replace=True) as folder:
        for result in _shown(results, place):
            height, width = result.read().shape
            shapes = [
                {"label": label, "points": points.tolist(), **same}
                for _, label, mask in result.present()
                for points in _polygons(mask)
            ]
            path = result.mask_name.with_suffix(".json")
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
    """Writes one row per image and label, also for absent labels unless the labels are a vocabulary."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "width", "height", "label", "pixels", "area", "score"])
    for result in _shown(results, place):
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


def _polygons(mask: np.ndarray, edges: bool = False) -> list[np.ndarray]:
    """The regions of a mask as polygons [P, 2] of (x, y) with at least three corners. The formats have no holes, so a
    hole is joined to its outline by a cut.

    Args:
        mask: uint8 [H, W].
        edges: whether polygons follow the outer edges of pixels, as in COCO, or pass through the outermost pixels. In
            the latter case both rounding (supervision) and truncating (ultralytics) a corner give its pixel.
    """
    import cv2  # type: ignore[import-not-found, import-untyped, unused-ignore]

    if edges:
        mask = mask.repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = []
    for contour in contours:
        ring = cv2.approxPolyDP(contour, _TOLERANCE, closed=True)
        rings.append((ring if len(ring) >= _CORNERS else contour).reshape(-1, 2))
    parents = [] if hierarchy is None else hierarchy.reshape(-1, 4)[:, 3].tolist()
    polygons = {number: rings[number] for number, parent in enumerate(parents) if parent < 0}
    for number, parent in enumerate(parents):
        if parent >= 0 and len(rings[number]) >= _CORNERS:
            polygons[parent] = _joined(polygons[parent], rings[number])
    wide = [polygon if len(polygon) >= _CORNERS else _widened(polygon) for polygon in polygons.values()]
    return [(polygon + 0.5) / 2 if edges else polygon + 0.25 for polygon in wide]


def _widened(line: np.ndarray) -> np.ndarray:
    """A polygon inside a single pixel, or inside the line of pixels between two."""
    (left, top), (right, bottom) = line[0], line[-1]
    along = np.sign([right - left, bottom - top]) if len(line) > 1 else np.array([1, 0])
    across = np.array([-along[1], along[0]])
    corners = [line[0] - along * _HALF, line[-1] + along * _HALF]
    return np.array(
        [*(each + across * _HALF for each in corners), *(each - across * _HALF for each in corners[::-1])]
    )


def _joined(outline: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Joins an outline and a hole by a cut between their nearest corners."""
    distances = np.square(outline[:, None].astype(np.int64) - hole[None]).sum(axis=2)
    at, start = np.unravel_index(distances.argmin(), distances.shape)
    way = np.concatenate([hole[start:], hole[: start + 1]])
    return np.concatenate([outline[: at + 1], way, outline[at:]])


# Path of each format in the results folder. "png" is missing because the masks are always written.
_WRITERS: dict[str, tuple[str, Callable[[Sequence[MaskResult], Path], None]]] = {
    "masks": ("label-masks", _write_label_masks),
    "coco": ("coco.json", _write_coco),
    "coco-polygons": ("coco-polygons.json", partial(_write_coco, polygons=True)),
    "coco-panoptic": ("coco-panoptic", _write_coco_panoptic),
    "yolo": ("yolo", _write_yolo),
    "labelme": ("labelme", _write_labelme),
    "csv": ("segments.csv", _write_csv),
}
