"""The supported benchmarks: classes, mask values, ignored values and file layouts.

The layouts are those of mmsegmentation's dataset preparation (its `docs/.../2_dataset_prepare.md`), and for ImageNet-S
and LVIS those of the original downloads. Masks that a download lacks are made by `preparing`. How images are segmented
is defined separately, in `protocols`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ...data.mask_labels import IGNORE_INDEX
from ...files import path_inside
from ...text_files import read_json, read_text, split_lines
from .mask_dataset import MaskDataset, MaskFolder, image_name, require_files
from .reading import LabelledImage

BACKGROUND = "background"
_CLASS_NAMES = Path(__file__).parent / "class_names"


@dataclass(frozen=True)
class Layout:
    """File layout of a benchmark, relative to its folder. `{split}` stands for the split's name in paths.

    Args:
        images: folder of the images.
        masks: folder of the masks.
        image_suffix: suffix of the images' names.
        mask_suffix: suffix of the masks' names.
        listing: file with one name per line; without it, all images of the folder are used except hidden ones.
        nested: whether images and masks are in matching subfolders.
        flat_masks: whether the listed names include folders, but all masks are in one folder.
    """

    images: str
    masks: str
    image_suffix: str = ".jpg"
    mask_suffix: str = ".png"
    listing: str | None = None
    nested: bool = False
    flat_masks: bool = False

    def of_split(self, root: Path, split: str) -> list[LabelledImage]:
        """All images of a split, in the order of the listing, or sorted."""
        images, masks = root / self.images.format(split=split), root / self.masks.format(split=split)
        return [
            LabelledImage(
                image_name(f"{name}.png"),
                images / f"{name}{self.image_suffix}",
                masks / f"{Path(name).name if self.flat_masks else name}{self.mask_suffix}",
            )
            for name in self._names(root, images, split)
        ]

    def _names(self, root: Path, images: Path, split: str) -> list[str]:
        if self.listing is None:
            found = images.glob(f"{'**/' if self.nested else ''}*{self.image_suffix}")
            visible = [path.relative_to(images) for path in found if not path.name.startswith(".")]
            return sorted(path.as_posix().removesuffix(self.image_suffix) for path in visible)
        listing = root / self.listing.format(split=split)
        lines = [line for line in split_lines(read_text(listing)) if line.strip()]
        names = [line.split()[0].removesuffix(self.image_suffix) for line in lines]
        try:
            for name in names:
                path_inside(root, name)
        except ValueError as error:
            raise ValueError(f"{listing}: {error}") from error
        return names

    def is_at(self, root: Path, split: str) -> bool:
        """Whether the folder of images and the listing exist."""
        listed = self.listing is None or (root / self.listing.format(split=split)).is_file()
        return listed and (root / self.images.format(split=split)).is_dir()


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Args:
        name: name on the command line, in protocols and in reports.
        title: name in messages.
        class_names: file of class names in `class_names/`.
        layout: layout of the files.
        roots: subfolders of the given folder in which the layout is looked for, in this order.
        has_background: whether label 0 is a background, which has no prompt.
        zero_is_unknown: whether raw masks have 0 (and 255) for unknown, and k for class k - 1.
        ignore_index: value that is ignored; None if there is none.
        rgb_weights: weights for coloured masks, see [`MaskDataset`].
        splits: names of splits in paths, by their usual names.
        subset: key of a subset of the class names.
        preparation: hint on how to make masks that the download lacks.
    """

    name: str
    title: str
    class_names: str
    layout: Layout
    roots: tuple[str, ...] = ("",)
    has_background: bool = False
    zero_is_unknown: bool = False
    ignore_index: int | None = IGNORE_INDEX
    rgb_weights: tuple[int, int, int] | None = None
    splits: dict[str, str] = field(default_factory=lambda: {"val": "val", "train": "train"})
    subset: str | None = None
    preparation: str | None = None

    @property
    def classes(self) -> list[str]:
        """Class names without the background."""
        content = read_class_names(self.class_names)
        if self.subset is None:
            return list(content["labels"])
        by_id = dict(zip(content["wnids"], content["labels"]))
        return [by_id[wnid] for wnid in content["subsets"][self.subset]]

    @property
    def labels(self) -> list[str]:
        """Name of each value; a background comes first."""
        return [BACKGROUND, *self.classes] if self.has_background else self.classes

    def open(self, path: str | Path, split: str = "val") -> MaskDataset:
        """Opens the benchmark.

        Args:
            path: the benchmark's folder, or a folder that contains it, as in `roots`.
            split: "val" or "train".

        Raises:
            ValueError: the split does not exist, or folders or files are missing.
        """
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}, expected one of {', '.join(self.splits)}.")
        where = self.splits[split]
        places = [Path(path) / root for root in self.roots]
        root = next((place for place in places if self.layout.is_at(place, where)), None)
        if root is None:
            wanted = [self.layout.images, *([self.layout.listing] if self.layout.listing else [])]
            raise ValueError(
                f"{path} does not contain {self.title}: expected {' and '.join(wanted).format(split=where)} in "
                f"{' or '.join(str(place) for place in places)}."
            )
        dataset = self.over(self.layout.of_split(root, where), f"{self.name} {split}")
        require_files(dataset, f" {self.preparation}" if self.preparation else "")
        return dataset

    def over(self, images: Iterable[LabelledImage], name: str, origin: str = "") -> MaskDataset:
        """A dataset of other images with this benchmark's labels and mask values; `origin` is their source."""
        labels, content = self.labels, read_class_names(self.class_names)
        other_names = {
            kind: {label: names for label, names in content.get(kind, {}).items() if label in labels}
            for kind in ("synonyms", "released")
        }
        table = dict.fromkeys((0, IGNORE_INDEX), IGNORE_INDEX)
        table |= {label + 1: label for label in range(len(labels))}
        return MaskDataset(
            name=name,
            labels=labels,
            images=list(images),
            background=0 if self.has_background else None,
            ignore_index=self.ignore_index,
            label_of_value=table if self.zero_is_unknown else None,
            rgb_weights=self.rgb_weights,
            origin=origin,
            **other_names,
        )


@cache
def read_class_names(file: str) -> dict[str, Any]:
    """Reads a file of `class_names/`, with `labels`, `synonyms` and `source`, and for ImageNet `wnids`."""
    return read_json(_CLASS_NAMES / f"{file}.json")


_COCO_SPLITS = {"val": "val2017", "train": "train2017"}


def _imagenet_s(classes: int) -> Benchmark:
    return Benchmark(
        f"imagenet_s{classes}",
        f"ImageNet-S-{classes}",
        "imagenet_s",
        Layout("{split}", "{split}-segmentation", image_suffix=".JPEG", nested=True),
        roots=(f"ImageNetS{classes}", f"ImageNet-S/ImageNetS{classes}", ""),
        has_background=True,
        ignore_index=1000,
        rgb_weights=(1, 256, 0),
        splits={"val": "validation"},
        subset=None if classes == 919 else str(classes),
    )


_VOC21 = Benchmark(
    "voc",
    "Pascal VOC 2012, 20 classes and background",
    "voc",
    Layout("JPEGImages", "SegmentationClass", listing="ImageSets/Segmentation/{split}.txt"),
    roots=("VOCdevkit/VOC2012", "VOC2012", ""),
    has_background=True,
)
_CONTEXT60 = Benchmark(
    "context",
    "Pascal Context, 59 classes and background",
    "context",
    Layout("JPEGImages", "SegmentationClassContext", listing="ImageSets/SegmentationContext/{split}.txt"),
    roots=("VOCdevkit/VOC2010", "VOC2010", ""),
    has_background=True,
    preparation="`pgseg prepare context DIR` makes them from trainval_merged.json.",
)

_WITHOUT_BACKGROUND: dict[str, Any] = {"has_background": False, "zero_is_unknown": True}

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        _VOC21,
        replace(_VOC21, name="voc20", title="Pascal VOC 2012 without background", **_WITHOUT_BACKGROUND),
        _CONTEXT60,
        replace(
            _CONTEXT60, name="context59", title="Pascal Context without background", **_WITHOUT_BACKGROUND
        ),
        Benchmark(
            "coco_object",
            "COCO-Object, 80 classes and background",
            "coco_object",
            Layout("images/{split}", "annotations/{split}", mask_suffix="_instanceTrainIds.png"),
            roots=("coco", "coco_stuff164k", ""),
            has_background=True,
            splits=_COCO_SPLITS,
            preparation="`pgseg prepare coco_object_from_stuff DIR` makes the released ones.",
        ),
        Benchmark(
            "coco_stuff",
            "COCO-Stuff 164k, 171 classes",
            "coco_stuff",
            Layout("images/{split}", "annotations/{split}", mask_suffix="_labelTrainIds.png"),
            roots=("coco_stuff164k", "coco", ""),
            splits=_COCO_SPLITS,
            preparation="`pgseg prepare coco_stuff DIR` makes them.",
        ),
        Benchmark(
            "ade20k",
            "ADE20K, 150 classes",
            "ade20k",
            Layout("images/{split}", "annotations/{split}"),
            roots=("ade/ADEChallengeData2016", "ADEChallengeData2016", ""),
            zero_is_unknown=True,
            splits={"val": "validation", "train": "training"},
        ),
        Benchmark(
            "cityscapes",
            "Cityscapes, 19 classes",
            "cityscapes",
            Layout(
                "leftImg8bit/{split}",
                "gtFine/{split}",
                image_suffix="_leftImg8bit.png",
                mask_suffix="_gtFine_labelTrainIds.png",
                nested=True,
            ),
            roots=("cityscapes", ""),
            preparation="`pgseg prepare cityscapes DIR` makes them.",
        ),
        *(_imagenet_s(classes) for classes in (50, 300, 919)),
        Benchmark(
            "lvis",
            "LVIS v1, 1,203 classes and background",
            "lvis",
            Layout("images", "annotations/lvis_{split}", listing="lvis_{split}.txt", flat_masks=True),
            roots=("lvis", "coco", ""),
            has_background=True,
            # The released configuration keeps mmsegmentation's default of 255, which is a class here.
            ignore_index=None,
            preparation="`pgseg prepare lvis DIR` makes them.",
        ),
    )
}
"""All benchmarks by name; `open_benchmark` also accepts "folder" for a [`MaskFolder`]."""


def open_benchmark(
    name: str,
    path: str | Path,
    split: str | None = None,
    background: str | None = None,
    mask_values: Mapping[str, str | None] | None = None,
) -> MaskDataset:
    """Opens a benchmark or a folder with masks.

    Args:
        name: one of `BENCHMARKS`, or "folder".
        path: path of its folder.
        split: split of a benchmark ("val" by default), or subfolder of a folder (by default the folder itself).
        background, mask_values: options of a folder, see [`MaskFolder`].

    Raises:
        ValueError: the benchmark is unknown, or files are missing.
    """
    if name != "folder":
        if name not in BENCHMARKS:
            raise ValueError(f"benchmark is {name!r}, expected one of {', '.join([*BENCHMARKS, 'folder'])}.")
        if background is not None:
            raise ValueError(f"background is {background!r}, but {name} defines its own; expected None.")
        return BENCHMARKS[name].open(path, split or "val")
    whole, folder = Path(path), Path(path, split or "")
    if whole.is_dir() and not folder.is_dir():
        there = ", ".join(sorted(each.name for each in whole.iterdir() if each.is_dir()))
        raise ValueError(f"{path} has no folder {split!r} for this split, expected one of {there}.")
    dataset = MaskFolder(folder, background, mask_values)
    dataset.name = f"{whole.resolve().name} {split or ''}".strip()
    return dataset
