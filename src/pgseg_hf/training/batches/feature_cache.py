"""A cache of a frozen backbone's features, computed once for a fixed number of views per image."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ...data.augmentation import Crop
from ...data.records import Record, UnusableRecord
from ...data.sources import MapSource, Source, records_of
from ...distributed import world_size
from ...files import write_json
from ...modeling_pgseg import PGSegModel
from ...run_records import is_same_run
from ..continuing import bytes_of
from .mixing import Draw, seeded
from .patch_names import CellNamer
from .preparation import Preparation

logger = logging.get_logger(__name__)

BATCH_SIZE = 16
# States of a view.
MISSING, DONE, UNUSABLE = 0, 1, 2
# Minimum number of bytes reserved for the tags of a view, which are stored as a JSON list.
_TAG_BYTES = 1024
_CELLS = ("cell_names", "cell_shares")
_LARGEST = float(np.finfo(np.float16).max)


@dataclass
class CacheOptions:
    """Settings of the feature cache.

    Args:
        folder: folder of the cache, created if it does not exist.
        views: number of random crops of each image.
        seed: seed of the crops. It is independent of the run's seed, so that runs with different seeds share a cache.
        namer: names the cells of the backbone's last stage; the names are cached too.
        whole_images: if set, the backbone processes the whole image, resized to the `short_side` of the augmentation,
            and views are cropped from its features. Views then differ only in position, size and mirroring. Otherwise
            the backbone processes each crop on its own.
    """

    folder: str
    views: int = 2
    seed: int = 0
    namer: CellNamer | None = None
    whole_images: bool = False


class CachedSource:
    """A source whose records have the cached features of their views instead of an image.

    Args:
        source: the map-style source that was cached.
        folder: folder with `features.npy` [records, views, C, h, w], `tags.npy` and `states.npy`, and with a `namer`
            also `cell_names.npy` and `cell_shares.npy` [records, views, h, w, names].
        namer: the namer whose indices are stored in `cell_names.npy`.
    """

    def __init__(self, source: MapSource, folder: Path, namer: CellNamer | None = None):
        self.source, self.folder, self.name = source, folder, source.name
        self.namer = namer
        self._arrays: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory-mapped array would copy the whole file into the worker.
        return {**self.__dict__, "_arrays": None}

    def _files(self) -> dict[str, np.ndarray]:
        if self._arrays is None:
            self._arrays = _map(self.folder, self.namer is not None, "r")
        return self._arrays

    def unusable(self) -> list[int]:
        """Indices of the records without a usable view."""
        return np.flatnonzero((self._files()["states"] != DONE).all(axis=1)).tolist()

    def __getitem__(self, index: int) -> Record:
        arrays = self._files()
        features, tags, states = (arrays[name] for name in ("features", "tags", "states"))
        views = np.flatnonzero(states[index] == DONE)
        if not len(views):
            raise UnusableRecord("not cached", f"record {index} of {self.name} has no usable view.")
        record = self.source[index]
        own = [json.loads(bytes(tags[index, view])) if tags[index, view] else None for view in views]
        named = None
        if self.namer is not None:
            names, shares = (arrays[name] for name in _CELLS)
            named = [
                self.namer.names_of_cells(
                    names[index, view], shares[index, view], record.tags if tags is None else tags
                )
                for view, tags in zip(views, own)
            ]
        found = [features[index, view] for view in views]
        return replace(record, image=b"", views=found, view_tags=own, view_names=named)


def cache_features(
    sources: Sequence[Source], prepare: Preparation, model: PGSegModel, options: CacheOptions
) -> list[CachedSource]:
    """Computes missing features and returns sources that read them. With several processes, each computes its share.

    Args:
        sources: map-style sources; streams have no known length.
        prepare: crops the images, and reads the tags of crops from masks if it has `mask_labels`.
        model: a model with a frozen backbone, on its device.

    Raises:
        ValueError: if a source is a stream, the backbone is not frozen, the cache holds other data, crops or weights,
            or the disk is too small.
    """
    config = model.config.vision_config
    if config.backbone_config is None or not config.freeze_backbone:
        raise ValueError("cache_features needs a frozen backbone; set backbone_config in vision_config.")
    if options.views < 1:
        raise ValueError(f"cache_views is {options.views}, expected at least 1.")
    if options.whole_images and options.namer is not None:
        raise ValueError("cell_names needs crops; use either cell_names or cache_whole_images.")
    tables = [source for source in sources if isinstance(source, MapSource)]
    if len(tables) != len(sources):
        raise ValueError("cache_features does not support streamed sources; load them without streaming.")
    side = prepare.augmentation.options.image_size
    embeddings: Any = model.vision_model.embeddings
    namer = options.namer
    backbone = embeddings.patch_embeddings
    with torch.no_grad():
        blank = torch.zeros(1, 3, side, side, device=model.device)
        shape = tuple(backbone.on_one_grid(maps := backbone.maps(blank)).shape[1:])
        grid = tuple(maps[-1].shape[-2:])
    weights = _fingerprint(
        backbone.backbone, json.dumps(backbone.backbone.config.to_dict(), sort_keys=True, default=str)
    )
    tag_bytes = len(json.dumps(prepare.mask_labels).encode())
    folders = [
        Path(options.folder) / f"{number:02d}-{_safe(table.name)}" for number, table in enumerate(tables)
    ]
    plans = [
        {
            "source": _contents(table),
            "augmentation": json.loads(json.dumps(asdict(prepare.augmentation.options))),
            "mask_labels": prepare.mask_labels,
            "seed": options.seed,
            "backbone": weights,
            "shape": [len(table), options.views, *shape],
            "whole_images": options.whole_images or None,
            "namer": namer and _fingerprint(namer.head, *namer.classes),
            "tag_bytes": tag_bytes if tag_bytes > _TAG_BYTES else None,
        }
        for table in tables
    ]
    _open(dict(zip(folders, plans)), Path(options.folder), None if namer is None else (*grid, namer.kept))
    cached = [CachedSource(table, folder, namer) for table, folder in zip(tables, folders)]
    for number, each in enumerate(cached):
        _Filler(each, number, prepare, model, options).fill()
    if dist.is_initialized():
        dist.barrier()
    return cached


def _map(folder: Path, named: bool, mode: Any) -> dict[str, np.ndarray]:
    names = ["features", "tags", "states", *(_CELLS if named else ())]
    return {name: np.load(folder / f"{name}.npy", mmap_mode=mode) for name in names}


def _open(plans: dict[Path, dict[str, Any]], root: Path, cells: tuple[int, ...] | None) -> None:
    """Creates or checks the files of a cache on the main process; all processes raise a ValueError if that fails."""
    problem: list[str | None] = [None]
    if _rank() == 0:
        try:
            _make_files([plan for plan in plans.items() if not _is_made(*plan)], root, cells)
        except Exception as error:  # any error must reach the other processes, which are waiting
            problem = [str(error) or type(error).__name__]
    if dist.is_initialized():
        dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise ValueError(problem[0])


def _is_made(folder: Path, made_with: dict[str, Any]) -> bool:
    way_out = "Choose another folder, or delete this one."
    return is_same_run(folder / "made_with.json", made_with, way_out) is not None


def _make_files(
    plans: Sequence[tuple[Path, dict[str, Any]]], root: Path, cells: tuple[int, ...] | None
) -> None:
    if not plans:
        return
    files: dict[Path, tuple[np.dtype, tuple[int, ...]]] = {}
    for folder, made_with in plans:
        views = tuple(made_with["shape"][:2])
        arrays: dict[str, tuple[Any, tuple[int, ...]]] = {
            "features": (np.float16, tuple(made_with["shape"])),
            "tags": (f"S{made_with['tag_bytes'] or _TAG_BYTES}", views),
            "states": (np.uint8, views),
        }
        if cells is not None:
            arrays |= {
                "cell_names": (np.uint16, (*views, *cells)),
                "cell_shares": (np.float16, (*views, *cells)),
            }
        files |= {folder / f"{name}.npy": (np.dtype(dtype), dims) for name, (dtype, dims) in arrays.items()}
    size = sum(dtype.itemsize * math.prod(dims) for dtype, dims in files.values())
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    images = sum(made_with["shape"][0] for _, made_with in plans)
    logger.warning(
        f"The features of {images:,} images in {plans[0][1]['shape'][1]} views take {size / 2**30:.1f} GiB in {root}."
    )
    if size > free:
        raise ValueError(
            f"{root} needs {size / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free; choose another folder "
            "or fewer views."
        )
    for path, (dtype, dims) in files.items():
        path.parent.mkdir(exist_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=dims).flush()
    for folder, made_with in plans:
        write_json(made_with, folder / "made_with.json")


class _Filler:
    """Computes this process's share of the missing views of one source."""

    def __init__(
        self, table: CachedSource, number: int, prepare: Preparation, model: PGSegModel, options: CacheOptions
    ):
        self.table, self.number, self.prepare, self.options = table.source, number, prepare, options
        self.folder, self.device = table.folder, model.device
        self.arrays = _map(table.folder, options.namer is not None, "r+")
        self.backbone: Any = model.vision_model.embeddings.patch_embeddings
        self.waiting: list[tuple[int, int, np.ndarray]] = []
        self.whole: tuple[int, Tensor | None] = (-1, None)
        """Index and features of the last record whose whole image was processed."""

    def fill(self) -> None:
        rows, views = np.nonzero(self.arrays["states"] == MISSING)
        own = rows % world_size() == _rank()
        missing = list(zip(rows[own].tolist(), views[own].tolist()))
        if not missing:
            return
        start = time.monotonic()
        unusable = 0
        for row, view in tqdm(missing, desc=f"features of {self.table.name}", disable=_rank() != 0):
            try:
                self._add(row, view)
            except UnusableRecord as error:
                logger.info(f"skipped: {error}")
                self.arrays["states"][row, view] = UNUSABLE
                unusable += 1
        self._write()
        for array in self.arrays.values():
            array.flush()  # type: ignore[attr-defined]
        logger.warning(
            f"Computed {len(missing) - unusable:,} views of {self.table.name} in "
            f"{(time.monotonic() - start) / 60:.1f} minutes, {unusable} unusable. They are in {self.folder}."
        )

    def _add(self, row: int, view: int) -> None:
        rng = seeded(Draw.VIEW, self.options.seed, self.number, row, view)
        image, crop, tags = self.prepare.draw(self.table[row], rng)
        augmentation, features = self.prepare.augmentation, self.arrays["features"]
        if tags is not None:
            self.arrays["tags"][row, view] = json.dumps(tags).encode()
        if self.options.whole_images:
            if self.whole[0] != row:
                self.whole = row, _of_whole_image(self.backbone, augmentation.whole_pixels(image))
            features[row, view] = _cut(self.whole[1], crop, features.shape[-2:])
            self.arrays["states"][row, view] = DONE
            return
        self.waiting.append((row, view, augmentation.crop_pixels(image, crop, rng)))
        if len(self.waiting) == BATCH_SIZE:
            self._write()

    def _write(self) -> None:
        """Computes and stores the features of the waiting crops."""
        if not self.waiting:
            return
        pixels = torch.from_numpy(np.stack([pixels for *_, pixels in self.waiting])).to(self.device)
        with torch.inference_mode():
            maps = self.backbone.maps(pixels)
            found = {"features": self.backbone.on_one_grid(maps).clamp(-_LARGEST, _LARGEST)}
            if self.options.namer is not None:
                found["cell_names"], found["cell_shares"] = self.options.namer.likeliest(maps[-1])
        rows, views = [row for row, *_ in self.waiting], [view for _, view, _ in self.waiting]
        for name, value in found.items():
            self.arrays[name][rows, views] = value.cpu().numpy()
        self.arrays["states"][rows, views] = DONE
        self.waiting.clear()


@torch.inference_mode()
def _of_whole_image(backbone: Any, pixels: np.ndarray) -> Tensor:
    """Features [1, C, h, w] of a whole image [3, H, W]."""
    device = backbone.projection.weight.device
    return backbone.features(torch.from_numpy(pixels)[None].to(device)).float().clamp(-_LARGEST, _LARGEST)


def _cut(features_1Chw: Any, crop: Crop, size: tuple[int, int]) -> np.ndarray:
    """The features of a crop, sampled from the features of the whole image: [C, *size]."""
    (left, top, right, bottom), (width, height) = crop.box, crop.size
    x_S, y_S = (
        2 * (low + (torch.arange(count) + 0.5) / count * (high - low)) / length - 1
        for low, high, count, length in ((left, right, size[1], width), (top, bottom, size[0], height))
    )
    places_1SS2 = torch.stack(torch.meshgrid(x_S, y_S, indexing="xy"), dim=-1)[None].to(features_1Chw.device)
    sampled = torch.nn.functional.grid_sample(
        features_1Chw, places_1SS2, padding_mode="border", align_corners=False
    )[0]
    return (sampled.flip(-1) if crop.flip else sampled).cpu().numpy()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _fingerprint(module: torch.nn.Module, *texts: str) -> str:
    digest = hashlib.sha256("\n".join(texts).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _contents(table: MapSource) -> str:
    """A hash of a source's images and masks in order."""
    digest = hashlib.sha256(str(len(table)).encode())
    for item in records_of(table):
        if isinstance(item, UnusableRecord):
            digest.update(item.reason.encode())
            continue
        for part in [part for part in (item.image, item.mask) if part is not None]:
            digest.update(hashlib.sha256(bytes_of(part)).digest())
    return digest.hexdigest()


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in Path(name).name)[:40] or "source"
