"""Builds the model, its processor and the stream of batches from the arguments."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import InitProcessGroupKwargs
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer
from transformers.utils import logging

from ..configuration_pgseg import PGSegConfig, PGSegTextConfig, PGSegVisionConfig
from ..data.augmentation import AugmentationOptions
from ..data.mask_labels import IGNORE_INDEX, find_mask_labels, read_mask_labels
from ..data.records import Record
from ..data.scenes import SceneSource
from ..data.sources import MapSource, Source, SourceSpec, StreamSource, open_source, records_of
from ..distributed import world_size
from ..efficientnet_lite import IMAGE_MEAN, IMAGE_STD, EfficientNetLiteConfig
from ..evaluation.metrics.confusion import MANY_UNKNOWN
from ..image_processing_pil_pgseg import PGSegImageProcessorPil
from ..images import load_label_map
from ..modeling_pgseg import PGSegModel
from ..poolings import refuse_other_losses
from ..processing_pgseg import PGSegProcessor
from ..prompts import build_prompts
from ..run_records import flat, hash_of
from ..text_files import read_json, read_yaml
from ..tokenization import default_tokenizer
from .arguments import DataArguments, ModelArguments, RunArguments
from .batches.collator import PGSegCollator
from .batches.feature_cache import CacheOptions, cache_features
from .batches.patch_names import CellNamer
from .batches.preparation import Preparation
from .batches.streams import StreamOptions, TrainingStream
from .batches.texts import TextOptions
from .continuing import hash_of_files

logger = logging.get_logger(__name__)

# Zero-dimensional parameters.
SCALARS = ("logit_scale", "logit_bias", "prototype_logit_scale")
PEEKED_RECORDS = 8
ALL_TAGS = 10_000
OVERRIDES = ("npr_variant", "contrastive_loss", "contrastive_pooling", "assignment_weight", "freeze_text")


def build_model(arguments: ModelArguments) -> PGSegModel:
    """The model to train, in float32: from a checkpoint, from GroupViT, or new.

    Raises:
        ValueError: if several starting points are given, or the configuration is invalid.
    """
    given = {name: getattr(arguments, name) for name in OVERRIDES if getattr(arguments, name) is not None}
    fields = _read_config(arguments.model_config) | given
    parts = arguments.backbone_name_or_path or arguments.text_name_or_path
    if parts and (arguments.model_name_or_path or arguments.groupvit_name_or_path):
        raise ValueError(
            "backbone_name_or_path and text_name_or_path are for a new model; do not set them together with "
            "model_name_or_path or groupvit_name_or_path."
        )
    if arguments.model_name_or_path and arguments.groupvit_name_or_path:
        raise ValueError("model_name_or_path and groupvit_name_or_path are mutually exclusive; set only one.")
    try:
        if arguments.model_name_or_path:
            model = PGSegModel.from_pretrained(arguments.model_name_or_path, dtype="float32", **fields)
        elif arguments.groupvit_name_or_path:
            model = PGSegModel.from_groupvit(arguments.groupvit_name_or_path, **fields)
        else:
            model = PGSegModel.from_parts(
                arguments.backbone_name_or_path, arguments.text_name_or_path, **fields
            )
    except StrictDataclassError as error:  # not a subclass of ValueError
        raise ValueError(str(error)) from error
    if model.config.contrastive_loss not in model.config.pooling.losses:
        if "contrastive_pooling" in fields:
            refuse_other_losses(model.config.contrastive_pooling, model.config.contrastive_loss)
        logger.warning(
            "%s was trained with %s pooling, which requires the %s loss; this run uses 'groups' pooling instead.",
            arguments.model_name_or_path,
            model.config.contrastive_pooling,
            " or ".join(model.config.pooling.losses),
        )
        model.config.contrastive_pooling = "groups"
    if model.config.npr_settings.guards_losses:
        model.config.guard_prototype_losses = True
    if arguments.attn_implementation:
        model.set_attn_implementation(arguments.attn_implementation)
    if arguments.freeze_token_embeddings:
        model.text_model.get_input_embeddings().requires_grad_(False)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if arguments.torch_compile:
        for tower in (model.vision_model, model.text_model):
            tower.compile(backend=arguments.torch_compile_backend)
    return model.train()


def _read_config(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        try:
            value = read_yaml(value)
        except ValueError as error:
            raise ValueError(f"model_config {value!r} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"model_config is {value!r}, expected a mapping of PGSegConfig fields.")
    known = {
        "model_config": PGSegConfig().to_dict() | {"npr_variant": None},
        "vision_config": PGSegVisionConfig().to_dict(),
        "text_config": PGSegTextConfig().to_dict(),
    }
    for name, fields in (("model_config", value), *((name, value.get(name)) for name in known)):
        unknown = sorted(set(fields or ()) - set(known[name]))
        if unknown:
            raise ValueError(f"{name} has unknown fields: {', '.join(unknown)}.")
    return dict(value)


def build_processor(arguments: ModelArguments, data: DataArguments, config: PGSegConfig) -> PGSegProcessor:
    """The checkpoint's processor, or a new one that matches the crops of training. By default the new one resizes
    images to a short side of twice the image size and uses windows of that size, as in the released evaluation."""
    if arguments.model_name_or_path and data.short_side is None:
        processor = PGSegProcessor.from_pretrained(arguments.model_name_or_path)
        if config.pooling.parts != "patches":
            processor.patch_weight = 0.0  # this pooling does not score patches
        return processor
    side = data.image_size or config.vision_config.image_size
    options: dict[str, Any] = {"patch_weight": data.patch_weight}
    options |= {"top_k": data.top_k} if data.top_k else {}
    options |= {"vocabulary": list(read_names(data.synonyms))} if data.synonyms else {}
    window = 2 * side if data.short_side is None else side
    short_side = data.short_side or window
    size = {"shortest_edge": short_side, "longest_edge": max(2048, short_side)}
    if arguments.text_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(arguments.text_name_or_path)
    else:
        tokenizer = default_tokenizer(config.text_config.max_position_embeddings)
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"text_config.vocab_size is {config.text_config.vocab_size}, but the tokenizer has {len(tokenizer)} tokens."
        )
    normalised = {}
    if isinstance(config.vision_config.backbone_config, EfficientNetLiteConfig):
        normalised = {"image_mean": list(IMAGE_MEAN), "image_std": list(IMAGE_STD)}
    return PGSegProcessor(
        PGSegImageProcessorPil(size=size, **normalised),
        tokenizer,
        window_size=None if data.whole_image else window,
        window_stride=max(window // 2, 1),
        window_features=data.cache_whole_images,
        **options,
    )


def build_stream(
    data: DataArguments,
    run: RunArguments,
    model: PGSegModel,
    processor: PGSegProcessor,
    rank: int = 0,
    world_size: int = 1,
) -> TrainingStream:
    """The infinite stream of this process's batches.

    Raises:
        ValueError: if there is no source, a source is empty or cannot be read, or options are invalid.
    """
    specs = data.source_specs()
    sources: list[Source] = [open_source(spec) for spec in specs]
    _refuse_small_sources(sources, specs, run.batch_size, world_size)
    config = model.config
    augmentation = _augmentation(data, config, processor.image_processor)
    mask_labels = _mask_labels(data, specs, sources) if data.crop_tags else None
    if mask_labels is not None:
        _tell_what_masks_leave_out(sources)
    # Images share texts only if the texts are tags. Some NPR variants need one text per image.
    shared = config.contrastive_loss != "info_nce" and not config.npr_settings.one_text_an_image
    shared = shared and (bool(data.synonyms) or not any(has_texts(source, "captions") for source in sources))
    has_labels = bool(data.num_nouns or mask_labels) or any(has_texts(source, "tags") for source in sources)
    texts = TextOptions(
        max_tags=ALL_TAGS if shared else data.max_labels, num_nouns=data.num_nouns, noun_model=data.noun_model
    )
    names = read_names(data.synonyms) if data.synonyms else {}
    collator = PGSegCollator(
        processor.tokenizer,
        config.text_config.max_position_embeddings,
        layout="shared" if shared else "paired",
        padding="longest" if shared else "max_length",
        num_labels=None if shared else data.max_labels * has_labels,
        synonyms=_prompts_of_synonyms(names),
        negatives=[prompt for (prompt,) in build_prompts(list(names))] if names else (),
    )
    on_cuda = model.device.type == "cuda"
    options = StreamOptions(run.batch_size, run.seed, data.num_workers, data.shuffle_block, on_cuda)
    weights = [spec.weight for spec in specs]
    prepare = Preparation(augmentation, texts, mask_labels, patch_stride=data.cache_patch_stride)
    _refuse_unused(data, shared and config.pooling.parts == "patches")
    if data.cache_features:
        namer = CellNamer.read(data.cell_names) if data.cell_names else None
        cache = CacheOptions(data.cache_features, data.cache_views, 0, namer, data.cache_whole_images)
        sources = list(cache_features(sources, prepare, model, cache))
    views = [data.cache_views, data.cache_whole_images, data.cache_patch_stride]
    depends_on = flat(asdict(augmentation) | asdict(texts)) | {
        "mask_labels": mask_labels,
        "synonyms": hash_of(names),
        **{name: getattr(collator, name) for name in ("layout", "padding", "num_labels")},
        "cached": views if data.cache_features else None,
        "cell_names": hash_of_files(Path(data.cell_names)) if data.cell_names else None,
    }
    return TrainingStream(sources, weights, prepare, collator, options, rank, world_size, depends_on)


def _refuse_unused(data: DataArguments, names_patches: bool) -> None:
    for name in ("cell_names", "cache_whole_images", "cache_patch_stride"):
        if getattr(data, name) != getattr(DataArguments, name) and not data.cache_features:
            raise ValueError(
                f"{name} is {getattr(data, name)!r}, which needs cache_features: set it to a folder."
            )
    if data.cell_names and not names_patches:
        raise ValueError(
            f"cell_names is {data.cell_names!r}, which needs contrastive_pooling 'patches', contrastive_loss 'sigmoid' "
            "or 'multi_positive' and, if the data has captions, synonyms."
        )


def _augmentation(data: DataArguments, config: PGSegConfig, images: Any) -> AugmentationOptions:
    names = ("min_scale", "max_scale", "horizontal_flip", "color_jitter", "grayscale", "blur", "erasing")
    return AugmentationOptions(
        image_size=data.image_size or config.vision_config.image_size,
        crop_sides=(data.crop_sides[0], data.crop_sides[-1]) if data.crop_sides else None,
        short_side=images.size["shortest_edge"],
        image_mean=tuple(images.image_mean),
        image_std=tuple(images.image_std),
        **{name: getattr(data, name) for name in names},
    )


def _refuse_small_sources(
    sources: Sequence[Source], specs: Sequence[SourceSpec], batch_size: int, world_size: int
) -> None:
    """Copies of an image in a batch would be negatives of each other."""
    total = sum(spec.weight for spec in specs)
    for source, spec in zip(sources, specs):
        share = spec.weight / total
        records = len(source) if isinstance(source, MapSource) else math.inf
        if records < math.floor(share * batch_size * world_size):
            most = math.floor(records / share / world_size)
            raise ValueError(
                f"{source.name} has {records} images, but a batch of {batch_size} x {world_size} takes "
                f"{share * batch_size * world_size:.0f} of them, and copies of an image would be negatives of each "
                f"other. Reduce --batch_size to at most {most}, or add images."
            )


def read_names(path: str) -> dict[str, list[str]]:
    """Reads names and their synonyms from a JSON file `{"names": {name: [synonyms]}}`.

    Raises:
        ValueError: if the file is missing or has another structure.
    """
    try:
        names = read_json(path)["names"]
        return {str(name): [str(other) for other in others] for name, others in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"synonyms is {path}, expected a JSON file with {{'names': {{name: [synonyms]}}}}: {error}"
        ) from error


def _prompts_of_synonyms(names: dict[str, list[str]]) -> dict[str, list[str]]:
    return {
        build_prompts([name])[0][0]: [prompt for (prompt,) in build_prompts(others)]
        for name, others in names.items()
        if others
    }


def _mask_labels(data: DataArguments, specs: Sequence[SourceSpec], sources: Sequence[Source]) -> list[str]:
    known = [source.labels for source in sources if isinstance(source, SceneSource)]
    if known and len(sources) == 1:
        return list(known[0])
    places = [Path(spec.path) for spec in specs]
    path = Path(data.mask_labels) if data.mask_labels else find_mask_labels(places)
    if path is None:
        raise ValueError(
            f"crop_tags needs a labels.json, but there is none in {', '.join(map(str, places))} or the parent folder; "
            "set mask_labels."
        )
    try:
        content = read_mask_labels(path, may_repeat=True)
    except ValueError as error:
        raise ValueError(f"cannot read the mask_labels that crop_tags needs: {error}") from error
    numbers = {str(value): label for value, label in enumerate(content["labels"])}
    for value, label in (content["mask_values"] or {}).items():
        if label is not None and numbers.get(str(value)) != label:
            raise ValueError(
                f"{path} has mask_values that map {value} to {label!r}, but crop_tags needs masks whose values are "
                "indices into the labels; convert the masks."
            )
    return ["" if value == content["background"] else label for value, label in enumerate(content["labels"])]


def _first_records(source: Source) -> Iterator[Record]:
    items = source.read_shard(0) if isinstance(source, StreamSource) else records_of(source)
    return (item for item in islice(items, PEEKED_RECORDS) if isinstance(item, Record))


def _tell_what_masks_leave_out(sources: Sequence[Source]) -> None:
    """Warns if many pixels in the masks of the first records have the value for "no label"."""
    for source in [source for source in sources if isinstance(source, MapSource)]:
        counts = np.zeros(2, dtype=np.int64)
        for mask in [record.mask for record in _first_records(source) if record.mask is not None]:
            with suppress(ValueError):  # training counts and reports broken masks
                values = load_label_map(mask)
                counts += (values == IGNORE_INDEX).sum(), values.size
        if counts[0] > MANY_UNKNOWN * counts[1]:
            logger.warning(
                f"{counts[0]:,} of {counts[1]:,} pixels ({counts[0] / counts[1]:.1%}) in the first masks of "
                f"{source.name} are {IGNORE_INDEX}, which crop_tags treats as unlabelled. If {IGNORE_INDEX} is a label "
                "in these masks, replace it by the label's index in labels.json."
            )


def has_texts(source: Source, kind: str) -> bool:
    """Whether any of the first records has `kind` ("captions" or "tags")."""
    return any(getattr(record, kind) for record in _first_records(source))


def process_group_settings(run: RunArguments) -> InitProcessGroupKwargs:
    """The timeout between processes, for Accelerate."""
    # Accelerate treats exactly 600 s as "not set", and gloo would then wait half an hour.
    return InitProcessGroupKwargs(timeout=timedelta(seconds=run.ddp_timeout, microseconds=1))


def sync_batchnorm(model: nn.Module) -> nn.Module:
    """Converts BatchNorm to SyncBatchNorm with several CUDA processes; otherwise returns the model unchanged."""
    convert: Callable = nn.SyncBatchNorm.convert_sync_batchnorm
    on_cuda = next(model.parameters()).is_cuda
    return convert(model) if on_cuda and world_size() > 1 else model


def without_scalars(model: PGSegModel) -> PGSegModel:
    """Reshapes scalar parameters to shape [1], because FSDP cannot shard scalars. [`full_weights`] reverses this."""
    for name, parameter in list(model.named_parameters(recurse=False)):
        if parameter.ndim == 0:
            setattr(model, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))
    return model


def full_weights(model: PGSegModel) -> dict[str, Tensor]:
    """The unsharded state dict with the shapes that `from_pretrained` expects. All processes must call it."""
    state = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        state[name] = value.reshape(()) if name in SCALARS else value
    return state
