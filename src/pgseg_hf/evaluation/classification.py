"""Zero-shot classification of whole pictures by their labels' prompts."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from transformers.utils import logging

from .. import distributed
from ..data.columns import Columns, tags_of
from ..data.records import Record, UnusableRecord
from ..data.sources import MapSource, Source, SourceSpec, open_source
from ..data.tables import TableSource
from ..images import ImageSource, find_images, load_image
from ..modeling_pgseg import PGSegModel
from ..processing_pgseg import PGSegProcessor
from ..prompts import IMAGENET_TEMPLATES, SEGMENTATION_TEMPLATES, validate_labels
from .benchmarks.catalogue import read_class_names
from .benchmarks.hub_masks import open_split
from .benchmarks.mask_dataset import digest, file_digests

logger = logging.get_logger(__name__)

_TEMPLATES = Path(__file__).parent / "imagenet_templates.json"


def template_sets() -> dict[str, tuple[str, ...]]:
    """Sets of prompt templates by name: "simple" (one), "subset" (CLIP's 7, that of the released figures) and "full"
    (CLIP's 80)."""
    content = json.loads(_TEMPLATES.read_text(encoding="utf-8"))
    return {
        "simple": SEGMENTATION_TEMPLATES,
        "subset": IMAGENET_TEMPLATES,
        "full": tuple(content["templates"]),
    }


@dataclass(frozen=True)
class LabelledPicture:
    """A picture with its class, not read yet.

    Args:
        name: what messages call it.
        image: what `load_image` takes.
        label: number of its class.
    """

    name: str
    image: ImageSource
    label: int


class ClassFinder:
    """Numbers of classes from what data sets call them: a number, a WordNet id, or a name.

    Args:
        labels: names in the order of the numbers.
        ids: WordNet ids in the same order.
        listed: class names of the data set itself; where there are as many as labels, in the order of the numbers.
    """

    def __init__(self, labels: Sequence[str], ids: Sequence[str] = (), listed: Sequence[str] = ()):
        self.labels = labels
        self._numbers = {str(number): number for number in range(len(labels))}
        for names in (ids, labels):
            self._numbers |= {name.casefold(): number for number, name in enumerate(names)}
        # The data set's own names count by their place, whatever they are, unless it has other classes.
        self._listed = {
            tuple(tags_of([name])): number
            for number, name in enumerate(listed if len(listed) == len(labels) else ())
        }

    def __call__(self, tags: Sequence[str], name: str) -> int:
        """Raises a ValueError for a picture whose tags name no class or several."""
        if tuple(tags) in self._listed:
            return self._listed[tuple(tags)]
        # One that writes several names, such as "tench, Tinca tinca", means what any of them does.
        names = [part.casefold() for tag in tags for part in tags_of(tag)]
        found = {self._numbers[name] for name in names if name in self._numbers}
        if len(found) != 1:
            raise ValueError(
                f"{name} has the label {', '.join(tags)!r}, expected one of the {len(self.labels)} classes, its number "
                "or its WordNet id."
            )
        return found.pop()


@dataclass
class Classes:
    """Pictures with one class each.

    Args:
        name: for reports.
        labels: names of the classes.
        pictures: gives them, afresh at every call.
        fingerprint: gives what changes with the pictures; it may read them all.
    """

    name: str
    labels: list[str]
    pictures: Callable[[], Iterator[LabelledPicture | UnusableRecord]]
    fingerprint: Callable[[], str] = str


def open_imagenet(path: str, split: str = "val", label_column: str | None = None) -> Classes:
    """ImageNet's pictures.

    Args:
        path: a folder with a folder for each class (its WordNet id or name), there or in `split/`; tar shards, with
            the class in `.cls` or another ending; or a data set of the Hub (`hub:imagenet-1k`).
        split: folder of the pictures, or split of the data set.
        label_column: in shards and tables, "cls" and "label" by default.

    Raises:
        ValueError: there are no pictures, or names of classes that ImageNet does not have.
    """
    content = read_class_names("imagenet")
    labels, ids = list(content["labels"]), content["wnids"]
    finder = ClassFinder(labels, ids)
    folder = Path(path).expanduser()
    if path.startswith("hub:") or ".tar" in path or ".tgz" in path:
        is_hub = path.startswith("hub:")
        column = label_column or ("label" if is_hub else "cls")
        source: Source
        if is_hub:
            source = open_split(path.removeprefix("hub:"), split, Columns(tags=column))
        else:
            source = open_source(SourceSpec(path, kind="webdataset", tags_column=column))
        if isinstance(source, TableSource):
            finder = ClassFinder(labels, ids, source.tag_names)
        pictures = partial(_from_source, source, finder)
        return Classes(f"imagenet {split}", labels, pictures, partial(source_fingerprint, source))
    root = next((place for place in (folder / split, folder) if place.is_dir()), None)
    if root is None:
        raise ValueError(f"{path} is no folder, no pattern of tar files and no hub:NAME.")
    if root == folder and any((folder / name).is_dir() for name in ("train", "val", "test")):
        raise ValueError(f"{path} has no folder {split!r} for that split.")
    images = find_images(root)
    found = [LabelledPicture(str(image), image, finder([image.parent.name], str(image))) for image in images]
    places = [image.relative_to(root).as_posix() for image in images]
    return Classes(
        f"imagenet {split}", labels, lambda: iter(found), lambda: digest([places, file_digests(images)])
    )


def source_fingerprint(source: Source) -> str:
    """Changes with a source's content."""
    return digest(getattr(source, "fingerprint", source.name))


def _from_source(source: Source, finder: ClassFinder) -> Iterator[LabelledPicture | UnusableRecord]:
    for record in _records(source):
        if isinstance(record, UnusableRecord):
            yield record
        else:
            yield LabelledPicture(record.name, record.image, finder(record.tags, record.name))


def _records(source: Source) -> Iterator[Record | UnusableRecord]:
    if not isinstance(source, MapSource):
        for shard in range(source.num_shards):
            yield from source.read_shard(shard)
        return
    for index in range(len(source)):
        try:
            yield source[index]
        except UnusableRecord as error:
            yield error


@dataclass
class ClassificationScores:
    """What was counted; figures of other pictures can be added.

    Args:
        hits: pictures whose class was first, and was among the first five.
        pictures: how many were counted.
        broken: names of pictures that were left out, with the reason.
        reused: how many an earlier run had counted.
    """

    hits: np.ndarray = field(default_factory=lambda: np.zeros(2, dtype=np.int64))
    pictures: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    reused: int = 0

    def merge(self, other: "ClassificationScores") -> None:
        """Adds what was counted on other pictures."""
        self.hits = self.hits + other.hits
        self.pictures += other.pictures
        self.broken |= other.broken

    def to_counts(self) -> dict[str, Any]:
        """For a file, and back by [`~ClassificationScores.from_counts`]."""
        return {"hits": self.hits.tolist(), "pictures": self.pictures, "broken": self.broken}

    @classmethod
    def from_counts(cls, counts: dict[str, Any]) -> "ClassificationScores":
        """Raises a KeyError, TypeError or ValueError for anything else."""
        return cls(
            np.array(counts["hits"], dtype=np.int64).reshape(2),
            int(counts["pictures"]),
            dict(counts["broken"]),
        )

    def sum_over_processes(self, device: str | torch.device = "cpu") -> "ClassificationScores":
        """Adds what all processes counted; every process has to call it."""
        total = distributed.sum_over_processes(
            torch.tensor([*self.hits, self.pictures, self.reused], device=device)
        ).tolist()
        self.hits, self.pictures, self.reused = np.array(total[:2]), total[2], total[3]
        if distributed.world_size() > 1:
            others: list = [None] * distributed.world_size()
            dist.all_gather_object(others, self.broken)
            self.broken = {name: reason for broken in others for name, reason in broken.items()}
        return self

    def to_dict(self) -> dict[str, float]:
        """`top1` and `top5` (NaN without pictures), and `pictures`."""
        top1, top5 = self.hits / self.pictures if self.pictures else (float("nan"), float("nan"))
        return {"top1": float(top1), "top5": float(top5), "pictures": self.pictures}


@dataclass
class Classifier:
    """Counts pictures whose class is the most similar, or among the five most similar.

    As released: short side 256/224 of the model's image size, of which the centre is cropped.

    Args:
        model: in evaluation mode.
        processor: of that model.
        labels: names of the classes.
        templates: CLIP's seven by default, as released.
        batch_size: pictures in one pass of the image encoder, and read at once.
        skip_broken: pictures that cannot be decoded are named and left out; otherwise they are an error.
    """

    model: PGSegModel
    processor: PGSegProcessor
    labels: Sequence[str]
    templates: Sequence[str] = IMAGENET_TEMPLATES
    batch_size: int = 64
    skip_broken: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1.")
        self.class_embeds = self.processor.get_class_embeddings(self.model, list(self.labels), self.templates)

    @torch.no_grad()
    def __call__(self, pictures: Iterable[LabelledPicture | UnusableRecord]) -> ClassificationScores:
        """Counts some pictures.

        Raises:
            ValueError: a broken picture that is not to be left out.
        """
        scores = ClassificationScores()
        iterator = iter(pictures)
        while batch := list(islice(iterator, self.batch_size)):
            images, truth = self._read(batch, scores)
            if not images:
                continue
            features = self.model.get_image_features(self._pixels(images).to(self.model.device))
            if not features.pooler_output.isfinite().all():
                raise ValueError(
                    "the model gives NaN or infinity: its weights are broken, or its type overflows."
                )
            similarity, _ = self.model.get_logits(features, self.class_embeds)
            best = similarity.topk(min(5, len(self.labels)), dim=1).indices.cpu()
            right = best == torch.tensor(truth)[:, None]
            scores.hits += [int(right[:, 0].sum()), int(right.sum())]
            scores.pictures += len(images)
        return scores

    def _read(
        self, batch: Sequence[LabelledPicture | UnusableRecord], scores: ClassificationScores
    ) -> tuple[list[Image.Image], list[int]]:
        images, truth = [], []
        for picture in batch:
            try:
                if isinstance(picture, UnusableRecord):
                    raise picture
                images.append(load_image(picture.image))
                truth.append(picture.label)
            except ValueError as error:
                name = picture.name if isinstance(picture, LabelledPicture) else str(picture)
                if not self.skip_broken:
                    raise ValueError(f"{name}: {error}") from error
                logger.warning(f"left out: {name}: {error}")
                scores.broken[name] = str(error)
        return images, truth

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        side = self.model.config.vision_config.image_size
        return self.processor.image_processor(
            images,
            size={"shortest_edge": round(side * 256 / 224)},
            do_center_crop=True,
            crop_size={"height": side, "width": side},
            return_tensors="pt",
        )["pixel_values"]


def zero_shot_accuracy(
    model: PGSegModel,
    processor: PGSegProcessor,
    pictures: Iterable[tuple[ImageSource, str]],
    labels: Sequence[str],
    batch_size: int = 64,
) -> dict[str, float]:
    """Share of pictures whose label is the most similar one, or among the five most similar, see [`Classifier`].

    Args:
        model: in evaluation mode.
        processor: of that model.
        pictures: each with its one label.
        labels: all that a picture may have.
        batch_size: pictures in one pass of the image encoder, and read at once.

    Returns:
        `top1`, `top5` (NaN without pictures) and `pictures`, their number.

    Raises:
        ValueError: a picture's label that is not among the labels, a broken picture, a model in training mode.
    """
    numbers = {label: number for number, label in enumerate(validate_labels(labels))}

    def labelled() -> Iterator[LabelledPicture]:
        for number, (image, label) in enumerate(pictures):
            if label.strip() not in numbers:
                raise ValueError(f"a picture has the label {label!r}, which is not among the labels.")
            yield LabelledPicture(f"picture {number}", image, numbers[label.strip()])

    return Classifier(model, processor, labels, batch_size=batch_size)(labelled()).to_dict()
