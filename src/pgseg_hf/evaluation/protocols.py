"""Evaluation protocols: sizes, windows, thresholds and templates. Results are only comparable within a protocol: the
same GroupViT weights reach 18.7 or 22.4 mIoU on Pascal Context."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from ..processing_pgseg import PGSegProcessor
from ..prompts import SEGMENTATION_TEMPLATES, validate_templates
from ..scoring import TOP_K
from ..segmentation import SegmentationOptions
from ..text_files import read_yaml
from ..values import share
from .benchmarks.catalogue import BENCHMARKS
from .benchmarks.mask_dataset import MaskDataset
from .evaluator import SynonymRule

_LONGEST_EDGE = 2048
_CHOICES = {
    "synonyms": get_args(SynonymRule),
    "refinement": ("none", "pamr"),
    "class_names": ("plain", "released"),
}
# The options of the segmentation that a protocol sets, by their names in reports and files.
_OPTIONS = {
    **{name: name for name in ("shortest_edge", "longest_edge")},
    **{"window": "window_size", "stride": "window_stride"},
    **{name: name for name in ("templates", "background_threshold", "top_k", "patch_weight")},
}


@dataclass(frozen=True)
class Protocol:
    """How the images of a benchmark are segmented.

    Args:
        name: name in reports.
        source: source of the values.
        segmentation: sizes, windows, templates and the background threshold of benchmarks that are not in
            `background_thresholds`.
        background_thresholds: background threshold by benchmark.
        synonyms: "none", "average" or "merge", see [`MaskOptions`].
        refinement: "none" or "pamr".
        class_names: "plain" ("fire engine") or "released" ("fire_engine"), the strings in the prompts of the released
            code, which differ for LVIS and ImageNet-S.
    """

    name: str
    source: str = ""
    segmentation: SegmentationOptions = SegmentationOptions(templates=SEGMENTATION_TEMPLATES)  # noqa: RUF009
    background_thresholds: Mapping[str, float] = field(default_factory=dict)
    synonyms: SynonymRule = "none"
    refinement: str = "none"
    class_names: str = "plain"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}.")
        for benchmark, threshold in self.background_thresholds.items():
            share(threshold, f"background_thresholds[{benchmark!r}]")

    def threshold(self, benchmark: str, dataset: MaskDataset) -> float | None:
        """The background threshold for a benchmark; None if it has no background, or for a folder without threshold.

        Raises:
            ValueError: the benchmark has a background, but the protocol has no threshold for it.
        """
        if dataset.background is None:
            return None
        found = self.background_thresholds.get(benchmark, self.segmentation.background_threshold)
        if found is None and benchmark != "folder":
            raise ValueError(
                f"protocol {self.name} has no background threshold for {benchmark}; set one or choose another protocol."
            )
        return found

    def resolved(self, processor: PGSegProcessor) -> "Protocol":
        """The protocol with options that it leaves to the checkpoint filled in from the processor."""
        names = ("window_size", "window_stride", "top_k", "patch_weight")
        auto = [name for name in names if getattr(self.segmentation, name) == "auto"]
        changes: dict[str, Any] = {name: getattr(processor, name) for name in auto}
        size = processor.image_processor.size
        if self.segmentation.shortest_edge is None and size.get("shortest_edge"):
            changes |= {edge: size.get(edge) for edge in ("shortest_edge", "longest_edge")}
        return replace(self, segmentation=replace(self.segmentation, **changes))

    def to_dict(self) -> dict[str, Any]:
        """The protocol for reports, in the form that [`load_protocol`] reads from YAML."""
        options = {name: getattr(self.segmentation, option) for name, option in _OPTIONS.items()}
        more = {name: getattr(self, name) for name in ("background_thresholds", *_CHOICES)}
        return {"name": self.name, "source": self.source, **options, **more}

    def changed(self, fields: Mapping[str, Any]) -> "Protocol":
        """A copy with changed fields, which are named as in `to_dict`.

        Raises:
            ValueError: a value is invalid.
        """
        options = {_OPTIONS[name]: value for name, value in fields.items() if name in _OPTIONS}
        if "templates" in options:
            options["templates"] = tuple(validate_templates(options["templates"]))
        if "shortest_edge" in options:
            longest = self.segmentation.longest_edge or _LONGEST_EDGE
            options["longest_edge"] = options["shortest_edge"] and options.get("longest_edge", longest)
        others = {name: value for name, value in fields.items() if name not in _OPTIONS}
        return replace(self, segmentation=replace(self.segmentation, **options), **others)


_RELEASED = Protocol(
    "pgseg",
    "PGSeg's released segmentation/configs (of ImageNet-S there is one, for 919 classes); they have no benchmark "
    "without a background, where no threshold is needed",
    SegmentationOptions(
        window_size=448,
        window_stride=224,
        templates=SEGMENTATION_TEMPLATES,
        top_k=TOP_K,
        patch_weight=0.0,
        shortest_edge=448,
        longest_edge=_LONGEST_EDGE,
    ),
    class_names="released",
    background_thresholds={
        "voc": 0.95,
        "context": 0.36,
        "coco_object": 0.85,
        "imagenet_s50": 0.11,
        "imagenet_s300": 0.11,
        "imagenet_s919": 0.11,
        "lvis": 0.35,
    },
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        _RELEASED,
        replace(
            _RELEASED,
            name="groupvit",
            source="GroupViT's released segmentation/configs",
            background_thresholds={"voc": 0.95, "context": 0.35, "coco_object": 0.95},
        ),
        replace(
            _RELEASED,
            name="unified",
            source="TCL (Cha et al., CVPR 2023): the same sizes and windows, one threshold for all benchmarks, no "
            "refinement; the threshold is that of its configs/default.yml",
            segmentation=replace(_RELEASED.segmentation, background_threshold=0.5),
            background_thresholds={},
        ),
        Protocol(
            "checkpoint",
            "the sizes and windows that the checkpoint was saved with; a background is a label with its name as prompt "
            "unless a threshold is given",
        ),
    )
}


def load_protocol(name_or_path: str) -> Protocol:
    """Loads one of `PROTOCOLS`, or a YAML file with fields of [`Protocol`]. The file's `base` names the protocol of
    missing fields, "pgseg" by default. Its `background_thresholds` are added to those of the base, but a
    `background_threshold` replaces them all.

    Raises:
        ValueError: there is no such protocol or file, or a field is unknown or invalid.
    """
    if name_or_path in PROTOCOLS:
        return PROTOCOLS[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"protocol is {name_or_path!r}, expected one of {', '.join(PROTOCOLS)} or a YAML file."
        )
    try:
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise ValueError("it contains no fields")
        base = content.pop("base", "pgseg")
        if base not in list(PROTOCOLS):
            raise ValueError(f"base is {base!r}, expected one of {', '.join(PROTOCOLS)}")
        known = set(PROTOCOLS[base].to_dict())
        if unknown := sorted(set(content) - known):
            raise ValueError(
                f"unknown fields {', '.join(unknown)}, expected some of {', '.join(sorted(known))}"
            )
        of_base = {} if "background_threshold" in content else PROTOCOLS[base].background_thresholds
        thresholds = {**of_base, **content.pop("background_thresholds", {})}
        if strange := sorted(set(thresholds) - {*BENCHMARKS, "folder"}):
            raise ValueError(f"background_thresholds has unknown benchmarks: {', '.join(strange)}")
        named = {"name": path.stem, "source": path.name, "background_thresholds": thresholds}
        made = PROTOCOLS[base].changed({**named, **content})
        if made.name in PROTOCOLS and made != PROTOCOLS[made.name]:
            raise ValueError(f"name is {made.name!r}, which belongs to another protocol; choose another name")
        return made
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a valid protocol: {error}") from error
