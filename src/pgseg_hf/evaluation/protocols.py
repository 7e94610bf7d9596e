"""How pictures are segmented for a figure: sizes, windows, thresholds, templates. A figure without its protocol says
little: the same GroupViT weights have 18.7 or 22.4 mIoU on Pascal Context.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..processing_pgseg import PGSegProcessor
from ..prompts import SEGMENTATION_TEMPLATES, validate_templates
from ..scoring import TOP_K
from ..segmentation import SegmentationOptions
from ..text_files import read_yaml
from .benchmarks.catalogue import BENCHMARKS
from .benchmarks.mask_dataset import MaskDataset
from .evaluator import SynonymRule
from .metrics.refinement import PixelAdaptiveRefinement

REFINEMENTS = ("none", "pamr")


@dataclass(frozen=True)
class Protocol:
    """How a benchmark's pictures are segmented.

    Args:
        name: in reports.
        source: where its numbers come from.
        shortest_edge: pixels that a picture's short side is resized to; None for what the checkpoint was saved with.
        longest_edge: pixels that the long side may have; only with `shortest_edge`.
        window: side of the sliding window in pixels; None for the whole picture, "auto" as the checkpoint says.
        stride: from one window to the next; "auto" as the checkpoint says.
        templates: that labels are put into.
        background_threshold: for every benchmark with a background that `background_thresholds` does not name; None
            for none.
        background_thresholds: by benchmark.
        synonyms: "none", "average" or "merge", see [`MaskOptions`].
        top_k: labels that one window may show; "auto" as the checkpoint says.
        patch_weight: of the patches' scores in a pixel's; "auto" as the checkpoint says.
        refinement: "none" or "pamr".
        class_names: "plain" ("fire engine"), or "released" ("fire_engine"): the strings that the released code puts
            into its prompts, which differ for LVIS and ImageNet-S.
    """

    name: str
    source: str = ""
    shortest_edge: int | None = 448
    longest_edge: int | None = 2048
    window: int | str | None = 448
    stride: int | str = 224
    templates: tuple[str, ...] = SEGMENTATION_TEMPLATES
    background_threshold: float | None = None
    background_thresholds: dict[str, float] = field(default_factory=dict)
    synonyms: SynonymRule = "none"
    top_k: int | str = TOP_K
    patch_weight: float | str = 0.0
    refinement: str = "none"
    class_names: str = "plain"

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(validate_templates(self.templates)))
        if self.refinement not in REFINEMENTS:
            raise ValueError(f"refinement is {self.refinement!r}, expected one of {', '.join(REFINEMENTS)}.")
        if self.class_names not in ("plain", "released"):
            raise ValueError(f"class_names is {self.class_names!r}, expected plain or released.")
        if self.synonyms not in ("none", "average", "merge"):
            raise ValueError(f"synonyms is {self.synonyms!r}, expected none, average or merge.")
        for threshold in (self.background_threshold, *self.background_thresholds.values()):
            if threshold is not None and not 0 <= threshold <= 1:
                raise ValueError(f"a background threshold is {threshold}, expected a number from 0 to 1.")
        # Sizes and windows that make no sense are told now, and not when the first picture is segmented.
        self.segmentation(self.background_threshold)

    def threshold(self, benchmark: str, dataset: MaskDataset) -> float | None:
        """The background threshold for a benchmark; None where it has no background, or this protocol no threshold.

        Raises:
            ValueError: a benchmark of the field needs a threshold that this protocol does not have.
        """
        if dataset.background is None:
            return None
        found = self.background_thresholds.get(benchmark, self.background_threshold)
        if found is None and benchmark != "folder":
            raise ValueError(
                f"protocol {self.name} has no background threshold for {benchmark}; give one, or another protocol."
            )
        return found

    def segmentation(self, background_threshold: float | None, batch_size: int = 8) -> SegmentationOptions:
        """The protocol as options of a [`Segmenter`]."""
        return SegmentationOptions(
            window_size=self.window,  # type: ignore[arg-type]
            window_stride=self.stride,  # type: ignore[arg-type]
            background_threshold=background_threshold,
            templates=self.templates,
            batch_size=batch_size,
            top_k=self.top_k,  # type: ignore[arg-type]
            patch_weight=self.patch_weight,  # type: ignore[arg-type]
            shortest_edge=self.shortest_edge,
            longest_edge=self.longest_edge if self.shortest_edge is not None else None,
        )

    def resolved(self, processor: PGSegProcessor) -> "Protocol":
        """With the processor's numbers where this protocol leaves them to the checkpoint."""
        changes: dict[str, Any] = {}
        size = processor.image_processor.size
        if self.shortest_edge is None and size.get("shortest_edge"):
            changes |= {"shortest_edge": size["shortest_edge"], "longest_edge": size.get("longest_edge")}
        if self.window == "auto":
            changes["window"] = processor.window_size
        if self.stride == "auto":
            changes["stride"] = processor.window_stride
        if self.top_k == "auto":
            changes["top_k"] = processor.top_k
        if self.patch_weight == "auto":
            changes["patch_weight"] = processor.patch_weight
        return replace(self, **changes)

    def make_refinement(self) -> PixelAdaptiveRefinement | None:
        """What `refinement` names."""
        return PixelAdaptiveRefinement() if self.refinement == "pamr" else None

    def to_dict(self) -> dict[str, Any]:
        """For reports; `Protocol(**...)` makes it again."""
        return {**asdict(self), "templates": list(self.templates)}


_RELEASED = Protocol(
    "pgseg",
    "PGSeg's released segmentation/configs (of ImageNet-S there is one, for 919 classes); they have no benchmark "
    "without a background, where no threshold is needed",
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
            background_threshold=0.5,
            background_thresholds={},
        ),
        Protocol(
            "checkpoint",
            "the sizes and windows that the checkpoint was saved with; a background is a label with its name as prompt "
            "unless a threshold is given",
            shortest_edge=None,
            window="auto",
            stride="auto",
            top_k="auto",
            patch_weight="auto",
        ),
    )
}


def load_protocol(name_or_path: str) -> Protocol:
    """One of `PROTOCOLS`, or a YAML file with fields of [`Protocol`]; `base` there names the protocol whose values
    hold for what is not said, "pgseg" by default. `background_thresholds` there are added to those of the base, but a
    `background_threshold` for all takes their place.

    Raises:
        ValueError: no such protocol or file, unknown fields, or values that make no sense.
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
            raise ValueError("it holds no fields")
        base = content.pop("base", "pgseg")
        if base not in list(PROTOCOLS):
            raise ValueError(f"base is {base!r}, expected one of {', '.join(PROTOCOLS)}")
        known = {each.name for each in fields(Protocol)}
        if unknown := sorted(set(content) - known):
            raise ValueError(
                f"unknown fields {', '.join(unknown)}, expected some of {', '.join(sorted(known))}"
            )
        of_base = {} if "background_threshold" in content else PROTOCOLS[base].background_thresholds
        thresholds = {**of_base, **content.pop("background_thresholds", {})}
        if strange := sorted(set(thresholds) - {*BENCHMARKS, "folder"}):
            raise ValueError(f"background_thresholds are for {', '.join(strange)}, which are no benchmarks")
        named = {"name": path.stem, "source": path.name, "background_thresholds": thresholds}
        made = replace(PROTOCOLS[base], **{**named, **content})
        if made.name in PROTOCOLS and made != PROTOCOLS[made.name]:
            raise ValueError(f"name is {made.name!r}, which is that of another protocol; choose another")
        return made
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no protocol: {error}") from error
