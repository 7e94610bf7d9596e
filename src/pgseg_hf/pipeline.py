"""`pipeline("open-vocabulary-segmentation")`: segments images by labels."""

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from PIL import Image
from transformers import Pipeline
from transformers.utils import logging

from .configuration_pgseg import PGSegConfig
from .images import load_image
from .label_maps import Segmentation
from .options import SegmentationOptions
from .segmentation import Segmenter
from .weights import refuse_bad_weights

logger = logging.get_logger(__name__)


class OpenVocabularySegmentationPipeline(Pipeline):
    """Segments images by labels given in words.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> import pgseg_hf

    >>> segment = pipeline("open-vocabulary-segmentation", model=pgseg_hf.DEFAULT_CHECKPOINT)
    >>> segment("photo.jpg", labels=["hair", "trousers", "shoes"], background_threshold=0.3)
    [{'label': 'trousers', 'score': ..., 'mask': <PIL.Image.Image mode=L>}, ...]
    ```

    Args:
        args, kwargs: as for every pipeline, with a whole processor and not its parts. Labels and fields of
            [`SegmentationOptions`] given here are the defaults of all calls.

    Raises:
        ValueError: the model is not a PGSeg model or has NaN weights, the processor is missing, or options are invalid.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = ("processor", "tokenizer", "image_processor", "feature_extractor")
        given = [name for name in names if kwargs.get(name) is not None]
        if given != ["processor"]:
            raise ValueError(
                f"the pipeline needs a processor and no parts of one, got {', '.join(given) or 'none'}; expected "
                "processor=PGSegProcessor(image_processor, tokenizer)."
            )
        super().__init__(*args, **_with_own_names(kwargs))
        model_type = self.model.config.model_type
        if model_type != PGSegConfig.model_type:
            raise ValueError(
                f"the pipeline needs a whole PGSeg model, got {type(self.model).__name__} of model_type {model_type!r}."
            )

        refuse_bad_weights(self.model, self.model.config._name_or_path or type(self.model).__name__)
        self._segmenter = Segmenter(self.model, self.processor)

    def __call__(self, images: Any, labels: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Segments one image or several.

        Args:
            images (`str`, `bytes`, `PIL.Image.Image` or `np.ndarray`): a path, URL, bytes, PIL image or array, or a
                list, generator or dataset of these.
            labels (`Sequence[str]`, *optional*): names of what may be in the images. `candidate_labels`, as in
                zero-shot pipelines, means the same.
            kwargs: fields of [`SegmentationOptions`]; `batch_size` is the number of windows per pass. Others keep the
                pipeline's defaults.

        Returns:
            For each image, a list of {label, score, mask}, largest area first. `mask` is a PIL image of mode "L" and
            the image's size, 255 inside the label. With a background threshold one label is "background", with score
            None.

        Raises:
            ValueError: labels are missing, or labels, options or images are invalid.
        """
        kwargs = _with_own_names(kwargs if labels is None else kwargs | {"labels": labels})
        if kwargs.get("labels", self._forward_params.get("labels")) is None:
            raise ValueError(
                'labels are missing: call the pipeline as segment(image, labels=["cat", "dog"]).'
            )
        if isinstance(images, (list, tuple)) and not images:
            return []
        return super().__call__(images, **kwargs)

    def _sanitize_parameters(
        self, labels: Sequence[str] | None = None, **kwargs: Any
    ) -> tuple[dict, dict, dict]:
        names = {field.name for field in fields(SegmentationOptions)}
        if "window_batch_size" in kwargs:
            kwargs["batch_size"] = kwargs.pop("window_batch_size")
        unknown = sorted(set(kwargs) - names)
        if unknown:
            raise ValueError(
                f"unknown argument {', '.join(unknown)}; expected labels or one of {', '.join(sorted(names))}."
            )
        forward: dict[str, Any] = {}
        if labels is not None:
            forward["labels"] = labels
        if kwargs:
            # The base class calls this in its constructor, before `_forward_params` exists.
            options = getattr(self, "_forward_params", {}).get("options", {}) | kwargs
            SegmentationOptions(**options)
            forward["options"] = options
        return {}, forward, {}

    def preprocess(self, image: Any) -> dict[str, Image.Image]:
        return {"image": load_image(image)}

    def _forward(
        self, inputs: dict[str, Image.Image], labels: Sequence[str], options: dict[str, Any] | None = None
    ) -> Any:
        found = self._segmenter(inputs["image"], labels, SegmentationOptions(**(options or {})))
        return {"segmentation": found}

    def postprocess(self, outputs: dict[str, Segmentation]) -> list[dict[str, Any]]:
        segmentation = outputs["segmentation"]
        return [
            {
                "label": segment.label,
                "score": segment.score,
                "mask": Image.fromarray(segmentation.mask(segment).astype("uint8") * 255),
            }
            for segment in segmentation.segments()
        ]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the model and the processor, but not the pipeline's default labels and options."""
        if self._forward_params:
            logger.warning(
                f"{self._forward_params} are not saved; pass them again when you load the pipeline."
            )
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _with_own_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Renames `candidate_labels` to `labels`, and `batch_size` because the base class uses it for images.

    Raises:
        ValueError: both `labels` and `candidate_labels` are given.
    """
    kwargs = dict(kwargs)
    candidates = kwargs.pop("candidate_labels", None)
    if candidates is not None:
        if kwargs.get("labels") is not None:
            raise ValueError(
                f"labels are {kwargs['labels']!r} and candidate_labels {candidates!r}, expected one of the two."
            )
        kwargs["labels"] = candidates
    if (batch_size := kwargs.pop("batch_size", None)) is not None:
        kwargs["window_batch_size"] = batch_size
    return kwargs
