"""`pipeline("open-vocabulary-segmentation")`: images and words to a list of masks."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from PIL import Image
from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .images import load_image
from .segmentation import Segmentation, SegmentationOptions, Segmenter

TASK = "open-vocabulary-segmentation"


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
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, images: Any, labels: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Segments one image or several.

        Args:
            images: path, URL, bytes, PIL image or array, or a list, generator or data set of these.
            labels: names of what may be in the images.
            kwargs: fields of [`SegmentationOptions`]; `batch_size` is that of the windows of an image.

        Returns:
            for each image a list of {label, score, mask}, largest area first; `mask` is a PIL image of mode "L" of the
            image's size, 255 where the label is. With a background threshold one of the labels is "background".

        Raises:
            ValueError: no labels, or labels, options or images that make no sense.
        """
        if labels is None and "labels" not in self._forward_params:
            raise ValueError('labels are missing: call it as segment(image, labels=["cat", "dog"]).')
        if isinstance(images, (list, tuple)) and not images:
            return []
        window_batch = kwargs.pop("batch_size", None)
        if window_batch is not None:
            kwargs["window_batch_size"] = window_batch
        given = {} if labels is None else {"labels": labels}
        return super().__call__(images, **given, **kwargs)

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
            forward["options"] = SegmentationOptions(**kwargs)
        return {}, forward, {}

    def preprocess(self, image: Any) -> dict[str, Image.Image]:
        return {"image": load_image(image)}

    def _forward(
        self,
        inputs: dict[str, Image.Image],
        labels: Sequence[str],
        options: SegmentationOptions | None = None,
    ) -> Any:
        return {"segmentation": Segmenter(self.model, self.processor, options)(inputs["image"], labels)}

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


def register_pipeline() -> None:
    """Makes the task known to `transformers.pipeline`."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=OpenVocabularySegmentationPipeline, pt_model=AutoModel, type="multimodal"
        )
