"""PGSeg for Hugging Face Transformers: segmenting anything one can name, learned from image-text pairs alone.

Importing the package imports neither torch nor transformers: its names are imported when they are first asked for, and
the Auto classes and pipelines know PGSeg all the same.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .lazy import lazy_names
from .registration import register

__version__ = "0.1.0"

DEFAULT_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "pgseg-small-everyday")
"""The checkpoint that ships with the package, a `from_pretrained` name like any other."""

if TYPE_CHECKING:
    from .checkpoint import load_segmenter
    from .configuration_pgseg import PGSegConfig, PGSegTextConfig, PGSegVisionConfig
    from .efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteConfig
    from .image_processing_pgseg import PGSegImageProcessor
    from .image_processing_pil_pgseg import PGSegImageProcessorPil
    from .modeling_base import PGSegPreTrainedModel
    from .modeling_pgseg import PGSegModel, PGSegOutput
    from .modeling_text import PGSegTextModel, PGSegTextModelWithProjection
    from .modeling_vision import PGSegVisionModel, PGSegVisionOutput
    from .options import SegmentationOptions
    from .pipeline import OpenVocabularySegmentationPipeline
    from .processing_pgseg import PGSegProcessor
    from .segmentation import Segmentation, Segmenter
    from .tokenization import default_tokenizer
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "checkpoint": ["load_segmenter"],
            "configuration_pgseg": ["PGSegConfig", "PGSegTextConfig", "PGSegVisionConfig"],
            "efficientnet_lite": ["EfficientNetLiteBackbone", "EfficientNetLiteConfig"],
            "image_processing_pgseg": ["PGSegImageProcessor"],
            "image_processing_pil_pgseg": ["PGSegImageProcessorPil"],
            "modeling_base": ["PGSegPreTrainedModel"],
            "modeling_pgseg": ["PGSegModel", "PGSegOutput"],
            "modeling_text": ["PGSegTextModel", "PGSegTextModelWithProjection"],
            "modeling_vision": ["PGSegVisionModel", "PGSegVisionOutput"],
            "options": ["SegmentationOptions"],
            "pipeline": ["OpenVocabularySegmentationPipeline"],
            "processing_pgseg": ["PGSegProcessor"],
            "segmentation": ["Segmentation", "Segmenter"],
            "tokenization": ["default_tokenizer"],
        },
    )

register(sys.modules[__name__])

__all__ = [
    "DEFAULT_CHECKPOINT",
    "EfficientNetLiteBackbone",
    "EfficientNetLiteConfig",
    "OpenVocabularySegmentationPipeline",
    "PGSegConfig",
    "PGSegImageProcessor",
    "PGSegImageProcessorPil",
    "PGSegModel",
    "PGSegOutput",
    "PGSegPreTrainedModel",
    "PGSegProcessor",
    "PGSegTextConfig",
    "PGSegTextModel",
    "PGSegTextModelWithProjection",
    "PGSegVisionConfig",
    "PGSegVisionModel",
    "PGSegVisionOutput",
    "Segmentation",
    "SegmentationOptions",
    "Segmenter",
    "default_tokenizer",
    "load_segmenter",
]
