"""Arguments of a training run, from the command line, a YAML file, or both."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from ..data.sources import SourceSpec
from ..poolings import POOLINGS
from ..text_files import read_yaml

POSITIVE = (
    *("batch_size", "chunk_size", "max_steps", "num_epochs", "learning_rate", "max_grad_norm", "ddp_timeout"),
    *("max_bad_steps", "log_steps", "checkpoint_steps", "keep_checkpoints", "eval_steps", "eval_limit"),
)
_STARTS = ("model_name_or_path", "groupvit_name_or_path")
_PARTS = ("backbone_name_or_path", "text_name_or_path")
# Options with the same meaning: one on the command line replaces the others in the file.
_INSTEAD_OF = {
    "data": ("sources",),
    "max_steps": ("num_epochs",),
    "num_epochs": ("max_steps",),
    **dict.fromkeys(_STARTS, (*_STARTS, *_PARTS)),
    **dict.fromkeys(_PARTS, _STARTS),
}


@dataclass
class ModelArguments:
    """The model to train. Without a checkpoint it starts from random weights."""

    _argument_group_name = "model"
    model_name_or_path: str | None = HfArg(
        default=None, help="PGSeg checkpoint to start from: a folder or a name on the Hub."
    )
    groupvit_name_or_path: str | None = HfArg(default=None, help="GroupViT checkpoint to start from.")
    backbone_name_or_path: str | None = HfArg(default=None, help="AutoBackbone checkpoint for a new model.")
    text_name_or_path: str | None = HfArg(
        default=None,
        help="Folder of a PGSegTextModelWithProjection or PGSegModel. A new model starts from its text tower, "
        "projection and tokenizer.",
    )
    freeze_text: bool | None = HfArg(default=None, help="Freeze the text tower and its projection.")
    model_config: str | None = HfArg(
        default=None, help="Fields of PGSegConfig: a mapping, or a JSON or YAML file."
    )
    npr_variant: str | None = HfArg(default=None, help="none, released or corrected.")
    contrastive_loss: str | None = HfArg(
        default=None,
        help="info_nce for distinct captions; multi_positive for tags and repeated captions, where equal texts are "
        "positives; sigmoid for tags, where each image-text pair is scored independently.",
    )
    contrastive_pooling: str | None = HfArg(default=None, help=f"One of {', '.join(POOLINGS)}.")
    assignment_weight: float | None = HfArg(default=None, help="Weight of the assignment loss.")
    freeze_token_embeddings: bool = HfArg(default=False, help="Freeze the token embeddings.")
    attn_implementation: str | None = HfArg(default=None, help="eager, sdpa, flash_attention_2, ...")
    gradient_checkpointing: bool = HfArg(default=False, help="Recompute activations to save memory.")
    torch_compile: bool = HfArg(default=False, help="Compile both towers with torch.compile.")
    torch_compile_backend: str = HfArg(default="inductor", help="Backend of torch.compile.")


@dataclass
class DataArguments:
    """The training data, and how images and texts are augmented."""

    _argument_group_name = "data"
    data: list[str] | None = HfArg(
        default=None, help="Folders, Hub datasets, tar shards or 'synthetic', in equal shares."
    )
    sources: list[str] | None = HfArg(default=None, help="YAML only, instead of data: fields of SourceSpec.")
    image_column: str | None = HfArg(default=None, help="Image column of all paths in data.")
    caption_column: str | None = HfArg(default=None, help="Caption column.")
    tags_column: str | None = HfArg(default=None, help="Tag column.")
    streaming: bool = HfArg(default=False, help="Stream Hub datasets.")
    crop_tags: bool = HfArg(default=False, help="Use the labels visible in a crop's mask as its tags.")
    mask_labels: str | None = HfArg(
        default=None, help="labels.json of the masks; by default the one next to the data."
    )
    synonyms: str | None = HfArg(
        default=None,
        help="JSON file with names and their synonyms. Each batch replaces some tags by a synonym. Captions are used "
        "only for images without tags. The names become the checkpoint's vocabulary.",
    )
    cache_features: str | None = HfArg(default=None, help="Folder to cache a frozen backbone's features in.")
    cell_names: str | None = HfArg(
        default=None,
        help="classifier.safetensors of prepare_everyday.py. The frozen backbone's own classifier then names the "
        "cells of each image, as additional targets for its patches. Needs cache_features.",
    )
    cache_whole_images: bool = HfArg(
        default=False,
        help="Run the backbone on whole images and crop views from the features. Segmentation then crops its windows "
        "from the features too.",
    )
    cache_views: int = HfArg(default=2, help="Random crops per image in the cache.")
    cache_patch_stride: int = HfArg(
        default=1,
        help="Train on every n-th row and column of a view's patches, starting at a random offset. A stride of 2 keeps "
        "a quarter of the patches; their features still come from the full view.",
    )
    image_size: int | None = HfArg(default=None, help="Side of the crops in pixels; the model's by default.")
    min_scale: float = HfArg(default=0.08, help="Smallest share of an image that a crop covers.")
    max_scale: float = HfArg(default=1.0, help="Largest share of an image that a crop covers.")
    crop_sides: list[float] | None = HfArg(
        default=None, help="Smallest and largest side of square crops, in pixels of the image at short_side."
    )
    short_side: int | None = HfArg(
        default=None, help="Short side of images in pixels, for segmentation and crop_sides."
    )
    whole_image: bool = HfArg(default=False, help="Segment whole images instead of sliding windows.")
    patch_weight: float = HfArg(default=0.0, help="Segmentation: weight of the patches' own scores.")
    top_k: int | None = HfArg(default=None, help="Segmentation: maximum number of labels per window.")
    horizontal_flip: float = HfArg(default=0.5, help="Probability of a horizontal flip.")
    color_jitter: float = HfArg(default=0.0, help="Strength of the colour jitter, from 0 to 1.")
    grayscale: float = HfArg(default=0.0, help="Probability of converting to grayscale.")
    blur: float = HfArg(default=0.0, help="Probability of a Gaussian blur.")
    erasing: float = HfArg(default=0.0, help="Probability of erasing a rectangle.")
    max_labels: int = HfArg(default=8, help="Maximum number of label texts per image beside its caption.")
    num_nouns: int = HfArg(default=0, help="Number of random nouns of a caption that become label texts.")
    noun_model: str | None = HfArg(default=None, help="spaCy pipeline that finds nouns.")
    num_workers: int = HfArg(default=2, help="DataLoader workers per training process.")
    shuffle_block: int = HfArg(default=1000, help="Records of a stream that are shuffled together.")

    def source_specs(self) -> list[SourceSpec]:
        """The sources, from `data` or `sources`.

        Raises:
            ValueError: if neither or both are set, or a source is not a mapping of known fields.
        """
        if bool(self.data) == bool(self.sources):
            raise ValueError("set either data (paths) or sources (in YAML), not both.")
        if self.data:
            names = ("image_column", "caption_column", "tags_column", "streaming")
            shared = {name: getattr(self, name) for name in names}
            return [SourceSpec(path=path, **shared) for path in self.data]
        known = {item.name for item in fields(SourceSpec)}
        specs: list[SourceSpec] = []
        for entry in self.sources or []:
            if not isinstance(entry, dict) or "path" not in entry or not set(entry) <= known:
                raise ValueError(
                    f"source {entry!r} must be a mapping with a path and fields from {', '.join(sorted(known))}."
                )
            weight = entry.get("weight", 1.0)
            try:
                specs.append(SourceSpec(**(entry | {"weight": float(weight)})))
            except (TypeError, ValueError) as error:
                raise ValueError(f"source {entry['path']}: {error}") from error
        return specs


@dataclass
class RunArguments:
    """How the model is trained, evaluated and saved."""

    _argument_group_name = "training, evaluation and results"
    output_dir: str | None = HfArg(default=None, help="Folder of checkpoints, log and model. Required.")
    overwrite_output_dir: bool = HfArg(default=False, help="Delete the checkpoints of an earlier run.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="'latest', or the folder of a checkpoint.")
    seed: int = HfArg(default=0, help="Seed of weights, data order and augmentation.")
    batch_size: int = HfArg(default=64, help="Images per batch and process.")
    chunk_size: int | None = HfArg(default=None, help="Gradient caching: images in memory at a time.")
    max_steps: int | None = HfArg(default=None, help="Number of optimizer steps; or set num_epochs.")
    num_epochs: float | None = HfArg(default=None, help="Passes over the data, if its length is known.")
    learning_rate: float = HfArg(default=1e-4, help="Peak learning rate.")
    warmup_learning_rate: float | None = HfArg(default=None, help="Initial rate; peak / 100 by default.")
    backbone_learning_rate_factor: float = HfArg(default=0.1, help="Rate factor of an unfrozen backbone.")
    min_learning_rate: float | None = HfArg(default=None, help="Final rate; peak / 10 by default.")
    warmup_ratio: float = HfArg(default=1 / 3, help="Share of the steps used for warm-up.")
    weight_decay: float = HfArg(default=0.05, help="Weight decay of weights with two or more dimensions.")
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = HfArg(default=5.0, help="Maximum gradient norm, for clipping.")
    mixed_precision: str | None = HfArg(default=None, help="no, fp16 or bf16; Accelerate's by default.")
    cpu: bool = HfArg(default=False, help="Train on the CPU even if there is an accelerator.")
    threads: int | None = HfArg(default=None, help="Number of CPU threads of torch.")
    sync_batchnorm: bool = HfArg(default=True, help="BatchNorm statistics over all processes; CUDA only.")
    ddp_timeout: float = HfArg(default=1800, help="Seconds that a process waits for the others.")
    ema_decay: float | None = HfArg(default=None, help="Decay of averaged weights (EMA), such as 0.999.")
    max_bad_steps: int = HfArg(default=50, help="Non-finite steps in a row that end the run.")
    log_steps: int = HfArg(default=10, help="Steps between two lines of the log.")
    report_to: str = HfArg(default="none", help="Trackers: none, all, tensorboard, wandb, or a list.")
    project_name: str = HfArg(default="pgseg", help="Project name for the trackers.")
    checkpoint_steps: int | None = HfArg(default=None, help="Steps between checkpoints, plus one at the end.")
    keep_checkpoints: int | None = HfArg(default=2, help="Number of checkpoints to keep.")
    eval_steps: int | None = HfArg(default=None, help="Steps between evaluations, plus one at the end.")
    eval_masks: str | None = HfArg(default=None, help="Folder of images with masks, for mIoU.")
    eval_tags: str | None = HfArg(default=None, help="Folder of images with one tag each, for accuracy.")
    eval_limit: int | None = HfArg(default=None, help="Images per evaluation, except the last one.")
    eval_background: str | None = HfArg(
        default=None, help="Label of the background, if labels.json does not define it."
    )
    eval_background_threshold: float | None = HfArg(
        default=None, help="Pixels where no label reaches this score are background."
    )
    num_drawings: int = HfArg(default=4, help="Images whose groups are drawn at each evaluation.")
    push_to_hub: bool = HfArg(default=False, help="Upload the final model to the Hub.")
    hub_model_id: str | None = HfArg(default=None, help="Name on the Hub; output_dir's by default.")

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("output_dir is missing; pass --output_dir or add it to the YAML file.")
        if (self.max_steps is None) == (self.num_epochs is None):
            raise ValueError(
                f"max_steps is {self.max_steps} and num_epochs is {self.num_epochs}; set exactly one of them."
            )
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}, expected a positive number.")
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}, expected 2 or more for the contrastive loss.")
        if self.num_drawings < 0:
            raise ValueError(f"num_drawings is {self.num_drawings}, expected 0 or more.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}, expected at least 0 and below 1.")


Arguments = tuple[ModelArguments, DataArguments, RunArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parses `[FILE.yaml] [--option value ...]`; options override the file.

    Raises:
        ValueError: if the file cannot be read, or an option is unknown or invalid.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser: Any = HfArgumentParser(
        (ModelArguments, DataArguments, RunArguments),
        usage="%(prog)s [FILE.yaml] [--option value ...]",
        allow_abbrev=False,
    )
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        values = _read_yaml(Path(arguments.pop(0)), parser)
        for argument in filter(lambda argument: argument.startswith("--"), arguments):
            for name in _INSTEAD_OF.get(_option(argument), ()):
                values.pop(name, None)
        parser.set_defaults(**values)
    if unknown := parser.parse_known_args(arguments)[1]:
        raise ValueError(
            f"unknown options: {_with_nearest(unknown, parser)}; see --help for the available options."
        )
    return parser.parse_args_into_dataclasses(args=arguments)


def _option(argument: str) -> str:
    return argument.partition("=")[0].removeprefix("--").replace("-", "_")


def _with_nearest(names: Iterable[str], parser: HfArgumentParser) -> str:
    """Unknown option names, each with the most similar option."""
    known = {action.dest for action in parser._actions}
    shown = []
    for name in names:
        near = get_close_matches(_option(name), known, n=1)
        shown.append(f"{name} (did you mean {near[0]}?)" if near else name)
    return ", ".join(shown)


def _read_yaml(path: Path, parser: HfArgumentParser) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} contains a {type(values).__name__}, expected a mapping of options.")
    known = {action.dest: action for action in parser._actions}
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise ValueError(
            f"{path} has unknown options: {_with_nearest(unknown, parser)}; see --help for the available options."
        )
    return {name: _for_parser(name, value, known[name]) for name, value in values.items()}


def _for_parser(name: str, value: Any, option: Any) -> Any:
    """Converts a YAML value to a default of the parser. Numbers become text, which the parser converts to the type of
    the option: YAML reads 1e-4 as text, 1 as an integer and `no` as false."""
    if name == "mixed_precision" and value is False:
        return "no"
    if name == "report_to" and isinstance(value, list):
        return ",".join(map(str, value))
    if option.nargs in ("+", "*") and value is not None and not isinstance(value, list):
        value = [value]
    return str(value) if isinstance(value, int | float) else value
