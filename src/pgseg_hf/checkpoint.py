"""The checkpoint that ships with the package, and loading a model with its processor."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .modeling_pgseg import PGSegModel
from .processing_pgseg import PGSegProcessor
from .segmentation import SegmentationOptions, Segmenter
from .weights import refuse_bad_weights

# A `from_pretrained` name like any other: a folder inside the installed package.
DEFAULT_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "pgseg-small-everyday")

# What transformers raises on folders that are no checkpoint, or a broken one.
_LOADING_ERRORS = (
    *(OSError, KeyError, TypeError, AttributeError, RuntimeError, ValueError),
    *(SafetensorError, StrictDataclassError),
)


def load_segmenter(
    name_or_path: str = DEFAULT_CHECKPOINT,
    options: SegmentationOptions | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Segmenter:
    """A [`Segmenter`] with the model and processor of a folder or Hub name.

    Raises:
        ValueError: there is no such checkpoint, or it is none of PGSeg.
    """
    if Path(name_or_path).is_absolute() and not Path(name_or_path).is_dir():
        raise ValueError(
            f"{name_or_path} is no folder; expected one made by save_pretrained or `pgseg convert`."
        )
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from error
    try:
        model, report = PGSegModel.from_pretrained(
            name_or_path, dtype=dtype, output_loading_info=True, **kwargs
        )
        processor = PGSegProcessor.from_pretrained(name_or_path)
        size = processor.image_processor.size
    except _LOADING_ERRORS as error:
        raise ValueError(
            f"{name_or_path} is no PGSeg checkpoint: {error} Expected a folder made by save_pretrained or "
            "`pgseg convert`, or a name on the Hub."
        ) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ValueError(
            f"{name_or_path} is no whole PGSeg checkpoint, these tensors are missing: {missing}."
        )
    text, tokenizer = model.config.text_config, processor.tokenizer
    # 2 stands for the largest token, as in CLIP's first configurations. A vocabulary may have more rows than tokens.
    has_end = text.eos_token_id in (2, tokenizer.eos_token_id)
    if size is None or not has_end or len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"{name_or_path} has a tokenizer of {len(tokenizer)} tokens, the end token is {tokenizer.eos_token_id}, "
            f"for a model of {text.vocab_size} and {text.eos_token_id}; files of the processor are missing or "
            "another's, or model.resize_token_embeddings was not called for new tokens."
        )
    refuse_bad_weights(model, name_or_path)
    return Segmenter(model.to(device), processor, options)
