"""Zero-shot classification of whole images."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.columns import Columns, tags_of
from ..data.records import Record, UnusableRecord
from ..data.sources import MapSource, Source, SourceSpec, open_source
from ..data.tables import TableSource
from ..images import ImageSource, find_images
from ..modeling_pgseg import PGSegModel
from ..processing_pgseg import PGSegProcessor
from ..prompts import IMAGENET_TEMPLATES, SEGMENTATION_TEMPLATES, validate_labels
from ..run_records import hash_of
from ..text_files import read_json
from ..values import whole_number
from .benchmarks.catalogue import read_class_names
from .benchmarks.hub_masks import open_split
from .benchmarks.reading import BrokenImage, LabelledImage, file_digests, read_batches
from .metrics.sums import ImageSums

_TEMPLATES = Path(__file__).parent / "imagenet_templates.json"


def template_sets() -> dict[str, tuple[str, ...]]:
    """Sets of prompt templates by name: "simple" (one), "subset" (CLIP's 7, used for the released results) and "full"
    (CLIP's 80)."""
    full = tuple(read_json(_TEMPLATES)["templates"])
    return {"simple": SEGMENTATION_TEMPLATES, "subset": IMAGENET_TEMPLATES, "full": full}


class ClassFinder:
    """Finds the index of a class from an index, a WordNet id or a class name.

    Args:
        labels: class names by index.
        ids: WordNet ids in the same order.
        listed: class names of the dataset itself. If there are as many as labels, they are in the same order.
    """

    def __init__(self, labels: Sequence[str], ids: Sequence[str] = (), listed: Sequence[str] = ()):
        self.labels = labels
        self._numbers = {str(number): number for number in range(len(labels))}
        for names in (ids, labels):
            self._numbers |= {name.casefold(): number for number, name in enumerate(names)}
        # The dataset's own names are matched by position, unless it has a different number of classes.
        self._listed = {
            tuple(tags_of([name])): number
            for number, name in enumerate(listed if len(listed) == len(labels) else ())
        }

    def __call__(self, tags: Sequence[str], name: str) -> int:
        """Raises a ValueError if the image's tags name no class or several."""
        if tuple(tags) in self._listed:
            return self._listed[tuple(tags)]
        # A tag can list several names of a class, such as "tench, Tinca tinca".
        names = [part.casefold() for tag in tags for part in tags_of(tag)]
        found = {self._numbers[name] for name in names if name in self._numbers}
        if len(found) != 1:
            raise ValueError(
                f"{name} has the label {', '.join(tags)!r}, expected one of the {len(self.labels)} classes, its index "
                "or its WordNet id."
            )
        return found.pop()


@dataclass
class Classes:
    """A classification dataset, with one class for each image.

    Args:
        name: name in reports.
        labels: class names.
        images: returns a new iterator over the images, with a [`BrokenImage`] for each unreadable one.
        fingerprint: returns a string that changes with the images; it may read all of them.
    """

    name: str
    labels: list[str]
    images: Callable[[], Iterator[LabelledImage | BrokenImage]]
    fingerprint: Callable[[], str] = str


def open_imagenet(path: str, split: str = "val", label_column: str | None = None) -> Classes:
    """Opens the images of ImageNet.

    Args:
        path: a folder with one subfolder for each class (its WordNet id or name), directly or in `split/`; tar shards
            with the class in `.cls` files; or a dataset on the Hub (`hub:imagenet-1k`).
        split: subfolder of the images, or split of the dataset.
        label_column: where the class is: suffix in shards ("cls" by default) or column of a table ("label").

    Raises:
        ValueError: there are no images, or a class is not in ImageNet.
    """
    content = read_class_names("imagenet")
    labels, ids = content["labels"], content["wnids"]
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
        return Classes(
            name=f"imagenet {split}",
            labels=labels,
            images=partial(_from_source, source, finder),
            fingerprint=lambda: hash_of(getattr(source, "fingerprint", source.name)),
        )
    root = next((place for place in (folder / split, folder) if place.is_dir()), None)
    if root is None:
        raise ValueError(f"{path} is not a folder; expected a folder, a pattern of tar files or hub:NAME.")
    if root == folder and any((folder / name).is_dir() for name in ("train", "val", "test")):
        raise ValueError(f"{path} has no folder {split!r} for this split.")
    images = find_images(root)
    found = [
        LabelledImage(str(image), image, label=finder([image.parent.name], str(image))) for image in images
    ]
    places = [image.relative_to(root).as_posix() for image in images]
    return Classes(
        name=f"imagenet {split}",
        labels=labels,
        images=lambda: iter(found),
        fingerprint=lambda: hash_of([places, file_digests(images)]),
    )


def _from_source(source: Source, finder: ClassFinder) -> Iterator[LabelledImage | BrokenImage]:
    if isinstance(source, MapSource):
        parts: Iterable = (_record(source, index) for index in range(len(source)))
    else:
        parts = chain.from_iterable(map(source.read_shard, range(source.num_shards)))
    for record in parts:
        if isinstance(record, UnusableRecord):
            yield BrokenImage(str(record), str(record))
        else:
            yield LabelledImage(record.name, record.image, label=finder(record.tags, record.name))


def _record(source: MapSource, index: int) -> Record | UnusableRecord:
    try:
        return source[index]
    except UnusableRecord as error:
        return error


@dataclass(kw_only=True)
class ClassificationScores(ImageSums):
    """Counts of a classification. Scores of other images can be added with `merge`.

    Args:
        hits: number of top-1 and of top-5 hits, int64 [2].
        images, broken, seconds, reused: see [`ImageSums`].
    """

    hits: np.ndarray = field(default_factory=lambda: np.zeros(2, dtype=np.int64))

    def arrays(self) -> dict[str, np.ndarray]:
        return {"hits": self.hits}

    def to_dict(self) -> dict[str, float]:
        """`top1`, `top5` (NaN without images) and `images`."""
        top1, top5 = self.hits / self.images if self.images else (float("nan"), float("nan"))
        return {"top1": float(top1), "top5": float(top5), "images": self.images}


@dataclass
class Classifier:
    """Counts top-1 and top-5 hits of zero-shot classification.

    As in the released code, the short side is resized to 256/224 of the model's image size and the centre is cropped.

    Args:
        model: model in evaluation mode.
        processor: processor of the model.
        labels: class names.
        templates: prompt templates; defaults to CLIP's seven, as in the released code.
        batch_size: number of images in one forward pass of the image encoder.
        skip_broken: log and skip images that cannot be decoded instead of raising.
        readers: number of threads that prefetch images.
    """

    model: PGSegModel
    processor: PGSegProcessor
    labels: Sequence[str]
    templates: Sequence[str] = IMAGENET_TEMPLATES
    batch_size: int = 64
    skip_broken: bool = False
    readers: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_size", "readers"):
            whole_number(getattr(self, name), name)
        self.class_embeds = self.processor.get_class_embeddings(self.model, list(self.labels), self.templates)

    def empty(self) -> ClassificationScores:
        """Scores with all counts at zero."""
        return ClassificationScores()

    @torch.no_grad()
    def __call__(self, images: Iterable[LabelledImage | BrokenImage]) -> ClassificationScores:
        """Evaluates images.

        Raises:
            ValueError: an image is broken and `skip_broken` is False.
        """
        start, scores = time.monotonic(), self.empty()
        how = (self.batch_size, self.readers, self.skip_broken)
        for batch in read_batches(images, self._read, scores, *how):
            features = self.model.get_image_features(
                self._pixels([image for image, _ in batch]).to(self.model.device)
            )
            if not features.pooler_output.isfinite().all():
                raise ValueError(
                    "the model returns NaN or infinity: its weights are broken, or their dtype overflows."
                )
            similarity, _ = self.model.get_logits(features, self.class_embeds)
            best = similarity.topk(min(5, len(self.labels)), dim=1).indices.cpu()
            right = best == torch.tensor([label for _, label in batch])[:, None]
            scores.hits += [int(right[:, 0].sum()), int(right.sum())]
            scores.images += len(batch)
        scores.seconds = time.monotonic() - start
        return scores

    def _read(self, labelled: LabelledImage | BrokenImage) -> tuple[Image.Image, int | None]:
        if isinstance(labelled, BrokenImage):
            raise labelled
        return labelled.read(), labelled.label

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
    images: Iterable[tuple[ImageSource, str]],
    labels: Sequence[str],
    batch_size: int = 64,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of zero-shot classification, see [`Classifier`].

    Args:
        model: model in evaluation mode.
        processor: processor of the model.
        images: pairs of an image and its label.
        labels: all class names.
        batch_size: number of images in one forward pass of the image encoder.

    Returns:
        `top1`, `top5` (NaN without images) and the number of `images`.

    Raises:
        ValueError: an image's label is not in `labels`, an image is broken, or the model is in training mode.
    """
    numbers = {label: number for number, label in enumerate(validate_labels(labels))}

    def labelled() -> Iterator[LabelledImage]:
        for number, (image, label) in enumerate(images):
            if label.strip() not in numbers:
                raise ValueError(f"an image has the label {label!r}, which is not among the labels.")
            yield LabelledImage(str(number), image, label=numbers[label.strip()])

    return Classifier(model, processor, labels, batch_size=batch_size)(labelled()).to_dict()
