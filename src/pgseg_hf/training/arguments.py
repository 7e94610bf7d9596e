"""Arguments of a training run, from the command line, from a YAML file, or from both."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from ..data.sources import SourceSpec
from ..text_files import read_yaml

POSITIVE = (
    *("batch_size", "chunk_size", "max_steps", "num_epochs", "learning_rate", "max_grad_norm", "ddp_timeout"),
    *("max_bad_steps", "log_steps", "checkpoint_steps", "keep_checkpoints", "eval_steps", "eval_limit"),
)
_STARTS = ("model_name_or_path", "groupvit_name_or_path")
_PARTS = ("backbone_name_or_path", "text_name_or_path")
# Options that stand for each other: one on the command line replaces the others in the file.
_INSTEAD_OF = {
    "data": ("sources",),
    "max_steps": ("num_epochs",),
    "num_epochs": ("max_steps",),
    **dict.fromkeys(_STARTS, (*_STARTS, *_PARTS)),
    **dict.fromkeys(_PARTS, _STARTS),
}


@dataclass
class ModelArguments:
    """What is trained. Without a checkpoint the model starts from random weights."""

    _argument_group_name = "model"
    model_name_or_path: str | None = HfArg(
        default=None, help="PGSeg checkpoint to start from: folder or Hub name."
    )
    groupvit_name_or_path: str | None = HfArg(default=None, help="transformers' GroupViT to start from.")
    backbone_name_or_path: str | None = HfArg(default=None, help="Backbone of AutoBackbone for a new model.")
    text_name_or_path: str | None = HfArg(
        default=None,
        help="Folder of a PGSegTextModelWithProjection or PGSegModel: a new model starts from its text tower, joint "
        "space and tokenizer.",
    )
    freeze_text: bool | None = HfArg(default=None, help="Keep the text tower and its projection as they are.")
    model_config: str | None = HfArg(
        default=None, help="Fields of PGSegConfig: a mapping, or a JSON or YAML file."
    )
    npr_variant: str | None = HfArg(default=None, help="none, released or corrected.")
    contrastive_loss: str | None = HfArg(
        default=None,
        help="info_nce: captions that differ. multi_positive: tags and captions that repeat, equal texts are "
        "positives. sigmoid: tags, every pair on its own.",
    )
    contrastive_pooling: str | None = HfArg(default=None, help="mean, groups, mixture or patches.")
    assignment_weight: float | None = HfArg(default=None, help="Weight of the assignment term.")
    freeze_token_embeddings: bool = HfArg(default=False, help="Keep the token embeddings as they are.")
    attn_implementation: str | None = HfArg(default=None, help="eager, sdpa, flash_attention_2, ...")
    gradient_checkpointing: bool = HfArg(default=False, help="Trade time for memory in the towers.")
    torch_compile: bool = HfArg(default=False, help="Compile both towers.")
    torch_compile_backend: str = HfArg(default="inductor", help="Backend of torch.compile.")


@dataclass
class DataArguments:
    """What it is trained on, and how images and texts are varied."""

    _argument_group_name = "data"
    data: list[str] | None = HfArg(
        default=None, help="Folders, Hub data sets, tar shards or 'synthetic', in equal shares."
    )
    sources: list[str] | None = HfArg(default=None, help="In YAML, instead of data: fields of SourceSpec.")
    image_column: str | None = HfArg(default=None, help="Column of the images, for all of data.")
    caption_column: str | None = HfArg(default=None, help="Column of the captions.")
    tags_column: str | None = HfArg(default=None, help="Column of the tags.")
    streaming: bool = HfArg(default=False, help="Stream data sets of the Hub.")
    crop_tags: bool = HfArg(default=False, help="A crop's tags are the labels that its mask shows.")
    mask_labels: str | None = HfArg(
        default=None, help="labels.json of the masks; by default beside the data."
    )
    synonyms: str | None = HfArg(
        default=None,
        help="JSON file with names and their synonyms; a batch calls each tag by one of them, captions are read for "
        "images without tags only. The names become the checkpoint's vocabulary.",
    )
    cache_features: str | None = HfArg(default=None, help="Folder that keeps a frozen backbone's features.")
    cell_names: str | None = HfArg(
        default=None,
        help="classifier.safetensors of prepare_everyday.py: what the frozen backbone's own classifier calls the "
        "cells of an image teaches its patches too. Needs cache_features.",
    )
    cache_whole_images: bool = HfArg(
        default=False,
        help="The backbone sees whole images, of whose features the views are crops; segmentation then cuts its "
        "windows from features too.",
    )
    cache_views: int = HfArg(default=2, help="Random crops of each image in the cache.")
    cache_patch_stride: int = HfArg(
        default=1,
        help="Train on every n-th row and column of a view's patches, from a random place: with 2 a quarter of the "
        "patches, each with the features of the whole view.",
    )
    image_size: int | None = HfArg(default=None, help="Side of the crops in pixels; the model's own.")
    min_scale: float = HfArg(default=0.08, help="Smallest share of an image that a crop covers.")
    max_scale: float = HfArg(default=1.0, help="Largest share of an image that a crop covers.")
    crop_sides: list[float] | None = HfArg(
        default=None, help="Sides of square crops from - to, in pixels at short_side."
    )
    short_side: int | None = HfArg(
        default=None, help="Short side of images in segmentation and for crop_sides."
    )
    whole_image: bool = HfArg(default=False, help="Segment images as a whole instead of in windows.")
    patch_weight: float = HfArg(default=0.0, help="In segmentation, share of the patches' own scores.")
    top_k: int | None = HfArg(default=None, help="In segmentation, labels that one window may show.")
    horizontal_flip: float = HfArg(default=0.5, help="Probability of mirroring.")
    color_jitter: float = HfArg(default=0.0, help="Strength of changes of colour, 0 to 1.")
    grayscale: float = HfArg(default=0.0, help="Probability of taking away all colour.")
    blur: float = HfArg(default=0.0, help="Probability of a blur.")
    erasing: float = HfArg(default=0.0, help="Probability of erasing a rectangle.")
    max_labels: int = HfArg(default=8, help="Label texts of an image beside its caption, if there are any.")
    num_nouns: int = HfArg(default=0, help="Random nouns of a caption that become label texts.")
    noun_model: str | None = HfArg(default=None, help="spaCy pipeline that finds nouns.")
    num_workers: int = HfArg(default=2, help="Processes that load data, for each training process.")
    shuffle_block: int = HfArg(default=1000, help="Records of a stream that are shuffled together.")

    def source_specs(self) -> list[SourceSpec]:
        """The sources, from `data` or `sources`.

        Raises:
            ValueError: neither or both are given, or a source is no mapping of known fields.
        """
        if bool(self.data) == bool(self.sources):
            raise ValueError("give either data (paths) or sources (in YAML), and not both.")
        if self.data:
            names = ("image_column", "caption_column", "tags_column", "streaming")
            shared = {name: getattr(self, name) for name in names}
            return [SourceSpec(path=path, **shared) for path in self.data]
        known = {item.name for item in fields(SourceSpec)}
        specs: list[SourceSpec] = []
        for entry in self.sources or []:
            if not isinstance(entry, dict) or "path" not in entry or not set(entry) <= known:
                raise ValueError(
                    f"source {entry!r} is no mapping with a path and fields of {', '.join(sorted(known))}."
                )
            weight = entry.get("weight", 1.0)
            try:
                specs.append(SourceSpec(**(entry | {"weight": float(weight)})))
            except (TypeError, ValueError) as error:
                raise ValueError(f"source {entry['path']}: {error}") from error
        return specs


@dataclass
class RunArguments:
    """How it is trained, measured and saved."""

    _argument_group_name = "training, evaluation and results"
    output_dir: str | None = HfArg(default=None, help="Folder of checkpoints, log and result. Needed.")
    overwrite_output_dir: bool = HfArg(default=False, help="Delete an earlier run's checkpoints.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="latest, or a checkpoint's folder.")
    seed: int = HfArg(default=0, help="Seed of weights, data order and augmentation.")
    batch_size: int = HfArg(default=64, help="Images of each process in a batch.")
    chunk_size: int | None = HfArg(default=None, help="Gradient caching: images in memory at a time.")
    max_steps: int | None = HfArg(default=None, help="Optimizer steps; or give num_epochs.")
    num_epochs: float | None = HfArg(default=None, help="Passes over data of known length.")
    learning_rate: float = HfArg(default=1e-4, help="Peak of the learning rate.")
    warmup_learning_rate: float | None = HfArg(default=None, help="Its start; 1/100 of the peak.")
    backbone_learning_rate_factor: float = HfArg(default=0.1, help="Of an unfrozen backbone.")
    min_learning_rate: float | None = HfArg(default=None, help="Its end; 1/10 of the peak.")
    warmup_ratio: float = HfArg(default=1 / 3, help="Share of the steps until the peak.")
    weight_decay: float = HfArg(default=0.05, help="Of weights with two dimensions or more.")
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = HfArg(default=5.0, help="Gradients are scaled down to this norm.")
    mixed_precision: str | None = HfArg(default=None, help="no, fp16 or bf16; Accelerate's setting.")
    cpu: bool = HfArg(default=False, help="Train on the CPU where there is an accelerator.")
    threads: int | None = HfArg(default=None, help="Threads of torch on the CPU.")
    sync_batchnorm: bool = HfArg(default=True, help="Statistics over all processes; on CUDA only.")
    ddp_timeout: float = HfArg(default=1800, help="Seconds that a process waits for the others.")
    ema_decay: float | None = HfArg(default=None, help="Average the weights, for instance 0.999.")
    max_bad_steps: int = HfArg(default=50, help="Steps in a row without a finite gradient that end the run.")
    log_steps: int = HfArg(default=10, help="Steps between lines of the log.")
    report_to: str = HfArg(default="none", help="Trackers: none, all, tensorboard, wandb, or a list.")
    project_name: str = HfArg(default="pgseg", help="Project of the trackers.")
    checkpoint_steps: int | None = HfArg(default=None, help="Steps between checkpoints; also at the end.")
    keep_checkpoints: int | None = HfArg(default=2, help="Checkpoints that are kept.")
    eval_steps: int | None = HfArg(default=None, help="Steps between evaluations; also at the end.")
    eval_masks: str | None = HfArg(default=None, help="Folder of images with masks, for mIoU.")
    eval_tags: str | None = HfArg(default=None, help="Folder with one tag an image, for accuracy.")
    eval_limit: int | None = HfArg(default=None, help="Images of each evaluation before the last one.")
    eval_background: str | None = HfArg(
        default=None, help="Label that means background, if labels.json does not say."
    )
    eval_background_threshold: float | None = HfArg(
        default=None, help="Background: no label scores this much."
    )
    num_pictures: int = HfArg(default=4, help="Images whose grouping is drawn at each evaluation.")
    push_to_hub: bool = HfArg(default=False, help="Upload the result.")
    hub_model_id: str | None = HfArg(default=None, help="Name on the Hub; by default output_dir's.")

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("output_dir is missing; give --output_dir or a line in the YAML file.")
        if (self.max_steps is None) == (self.num_epochs is None):
            raise ValueError(
                f"max_steps is {self.max_steps} and num_epochs is {self.num_epochs}; give one of them."
            )
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}, expected a positive number.")
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}, expected 2 or more: images are told apart.")
        if self.num_pictures < 0:
            raise ValueError(f"num_pictures is {self.num_pictures}, expected 0 or more.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}, expected a share from 0 to below 1.")


Arguments = tuple[ModelArguments, DataArguments, RunArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Reads `[FILE.yaml] [--option value ...]`; options override the file.

    Raises:
        ValueError: the file cannot be read or has keys that are no option.
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
        raise ValueError(f"unknown: {_with_nearest(unknown, parser)}; see --help for the options there are.")
    return parser.parse_args_into_dataclasses(args=arguments)


def _option(argument: str) -> str:
    return argument.partition("=")[0].removeprefix("--").replace("-", "_")


def _with_nearest(names: Iterable[str], parser: HfArgumentParser) -> str:
    """Names that are no options, each with the option that looks most like it."""
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
        raise ValueError(f"{path} holds {type(values).__name__}, expected a mapping of options.")
    known = {action.dest: action for action in parser._actions}
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise ValueError(
            f"{path} has unknown options: {_with_nearest(unknown, parser)}; see --help for those there are."
        )
    return {name: _for_parser(name, value, known[name]) for name, value in values.items()}


def _for_parser(name: str, value: Any, option: Any) -> Any:
    """A value of YAML as a default of the parser: as text it gets its option's type, as YAML takes 1e-4 for text, 1 for
    no float and `no` for false."""
    if name == "mixed_precision" and value is False:
        return "no"
    if name == "report_to" and isinstance(value, list):
        return ",".join(map(str, value))
    if option.nargs in ("+", "*") and value is not None and not isinstance(value, list):
        value = [value]
    return str(value) if isinstance(value, int | float) else value
