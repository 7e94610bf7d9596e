"""Features of a frozen backbone, computed once: a fixed number of views of each image in a file that training reads."""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.records import Record, UnusableRecord
from ..data.sources import MapSource, Source
from ..files import write_json
from ..modeling_pgseg import PGSegModel
from .continuing import bytes_of
from .mixing import Draw, seeded
from .preparation import Preparation

logger = logging.get_logger(__name__)

BATCH_SIZE = 16
# States of a view.
MISSING, DONE, UNUSABLE = 0, 1, 2
# A cached view's tags, one JSON list a view, at most this long.
_TAG_BYTES = 1024


@dataclass
class CacheOptions:
    """Where features are kept, and how many views of each image.

    Args:
        folder: of the cache; made if it does not exist.
        views: random crops of each image.
        seed: of the crops; not that of a run, so that runs of several seeds share a cache.
    """

    folder: str
    views: int = 2
    seed: int = 0


class CachedSource:
    """A table whose records come with the features of their views instead of an image.

    Args:
        source: the table.
        folder: with `features.npy` [records, views, C, h, w], `tags.npy` and `states.npy`.
    """

    def __init__(self, source: MapSource, folder: Path):
        self.source, self.folder, self.name = source, folder, source.name
        self._arrays: tuple[np.ndarray, ...] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file would be copied into a worker process whole.
        return {**self.__dict__, "_arrays": None}

    def __getitem__(self, index: int) -> Record:
        if self._arrays is None:
            names = ("features", "tags", "states")
            self._arrays = tuple(np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in names)
        features, tags, states = self._arrays
        views = np.flatnonzero(states[index] == DONE)
        if not len(views):
            raise UnusableRecord("not cached", f"record {index} of {self.name} has no usable view.")
        record = self.source[index]
        own = [json.loads(bytes(tags[index, view])) if tags[index, view] else None for view in views]
        return replace(record, image=b"", views=[features[index, view] for view in views], view_tags=own)


def cache_features(
    sources: Sequence[Source], prepare: Preparation, model: PGSegModel, options: CacheOptions
) -> list[CachedSource]:
    """Computes what is not in the cache yet, and gives sources that read it; of several processes each does its
    share.

    Args:
        sources: tables; streams have no known length.
        prepare: crops images, and finds the tags of crops where masks tell them.
        model: with a frozen backbone, on its device.

    Raises:
        ValueError: a stream, a model without a frozen backbone, a cache of other data, crops or weights, or a disk that
            is too small.
    """
    config = model.config.vision_config
    if config.backbone_config is None or not config.freeze_backbone:
        raise ValueError("cache_features needs a frozen backbone; give vision_config a backbone_config.")
    tables = [source for source in sources if isinstance(source, MapSource)]
    if len(tables) != len(sources):
        raise ValueError("cache_features needs tables, and one of the sources is streamed.")
    side = prepare.augmentation.options.image_size
    embeddings: Any = model.vision_model.embeddings
    with torch.no_grad():
        shape = tuple(embeddings.features(torch.zeros(1, 3, side, side, device=model.device)).shape[1:])
    sizes = [(len(table), options.views, *shape) for table in tables]
    weights = _fingerprint(embeddings.patch_embeddings.backbone)
    cached = []
    for number, (table, size) in enumerate(zip(tables, sizes)):
        folder = Path(options.folder) / f"{number:02d}-{_safe(table.name)}"
        made_with = {
            "source": _contents(table),
            "augmentation": json.loads(json.dumps(asdict(prepare.augmentation.options))),
            "mask_labels": prepare.mask_labels,
            "seed": options.seed,
            "backbone": weights,
            "shape": list(size),
        }
        _open(folder, made_with)
        _wait()
        _fill(table, number, folder, prepare, model, options.seed)
        _wait()
        cached.append(CachedSource(table, folder))
    return cached


def _open(folder: Path, made_with: dict[str, Any]) -> None:
    """Makes the files of a cache, or checks that they hold what is wanted."""
    record = folder / "made_with.json"
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        for name in made_with:
            if known.get(name) != made_with[name]:
                raise ValueError(
                    f"{folder} holds features with {name} {known.get(name)}, and this run has {made_with[name]}; "
                    "give another folder, or delete this one."
                )
        return
    if _rank() != 0:
        return
    shape = tuple(made_with["shape"])
    size = int(np.prod(shape)) * 2
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    logger.warning(
        f"Features of {shape[0]:,} images in {shape[1]} views take {size / 2**30:.1f} GiB in {folder}."
    )
    if size > free:
        raise ValueError(
            f"{folder} would take {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; give another folder "
            "or fewer views."
        )
    for name, dtype, dims in (
        ("features", np.float16, shape),
        ("tags", f"S{_TAG_BYTES}", shape[:2]),
        ("states", np.uint8, shape[:2]),
    ):
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=dims).flush()
    write_json(made_with, record)


def _fill(
    table: MapSource, number: int, folder: Path, prepare: Preparation, model: PGSegModel, seed: int
) -> None:
    """Computes the views of this process that are missing."""
    features, tags, states = (
        np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("features", "tags", "states")
    )
    world = dist.get_world_size() if dist.is_initialized() else 1
    rows, views = np.nonzero(states == MISSING)
    own = rows % world == _rank()
    missing = list(zip(rows[own].tolist(), views[own].tolist()))
    if not missing:
        return
    embeddings: Any = model.vision_model.embeddings
    start = time.monotonic()
    waiting: list[tuple[int, int, np.ndarray]] = []
    unusable = 0

    def write() -> None:
        pixels = torch.from_numpy(np.stack([pixels for *_, pixels in waiting])).to(model.device)
        with torch.inference_mode():
            found = embeddings.features(pixels).half().cpu().numpy()
        for (row, view, _), of_view in zip(waiting, found):
            features[row, view] = of_view
            states[row, view] = DONE
        waiting.clear()

    for row, view in tqdm(missing, desc=f"features of {table.name}", disable=_rank() != 0):
        try:
            pixels, own_tags = prepare.view(table[row], seeded(Draw.VIEW, seed, number, row, view))
        except UnusableRecord as error:
            logger.info(f"left out: {error}")
            states[row, view] = UNUSABLE
            unusable += 1
            continue
        if own_tags is not None:
            content = json.dumps(own_tags).encode()
            if len(content) > _TAG_BYTES:
                raise ValueError(f"{table.name}, record {row}: its tags take {len(content)} bytes, too many.")
            tags[row, view] = content
        waiting.append((row, view, pixels))
        if len(waiting) == BATCH_SIZE:
            write()
    if waiting:
        write()
    for array in (features, tags, states):
        array.flush()
    logger.warning(
        f"{len(missing) - unusable:,} views of {table.name} in {(time.monotonic() - start) / 60:.1f} minutes, "
        f"{unusable} unusable; they are in {folder}."
    )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _fingerprint(backbone: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _contents(table: MapSource) -> str:
    """A hash of a table's images and masks, in their order."""
    digest = hashlib.sha256(str(len(table)).encode())
    for index in range(len(table)):
        try:
            record = table[index]
        except UnusableRecord as error:
            digest.update(error.reason.encode())
            continue
        for part in (record.image, record.mask):
            if part is not None:
                digest.update(hashlib.sha256(bytes_of(part)).digest())
    return digest.hexdigest()


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in Path(name).name)[:40] or "source"
