"""PGSeg for Hugging Face Transformers: open-vocabulary segmentation learned from image-text pairs.

Importing the package imports neither torch nor transformers: its names are imported on first access, and the Auto
classes and pipelines support PGSeg without importing it first.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .lazy import lazy_names
from .registration import register

__version__ = "0.1.0"

DEFAULT_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "pgseg-small-everyday")
"""The checkpoint included in the package, a name for `from_pretrained`."""

if TYPE_CHECKING:  # the names of the table below, for mypy and editors
    from .checkpoint import load_segmenter as load_segmenter
    from .configuration_pgseg import PGSegConfig as PGSegConfig
    from .configuration_pgseg import PGSegTextConfig as PGSegTextConfig
    from .configuration_pgseg import PGSegVisionConfig as PGSegVisionConfig
    from .efficientnet_lite import EfficientNetLiteBackbone as EfficientNetLiteBackbone
    from .efficientnet_lite import EfficientNetLiteConfig as EfficientNetLiteConfig
    from .image_processing_pgseg import PGSegImageProcessor as PGSegImageProcessor
    from .image_processing_pil_pgseg import PGSegImageProcessorPil as PGSegImageProcessorPil
    from .label_maps import Segmentation as Segmentation
    from .modeling_base import PGSegPreTrainedModel as PGSegPreTrainedModel
    from .modeling_pgseg import PGSegModel as PGSegModel
    from .modeling_pgseg import PGSegOutput as PGSegOutput
    from .modeling_text import PGSegTextModel as PGSegTextModel
    from .modeling_text import PGSegTextModelWithProjection as PGSegTextModelWithProjection
    from .modeling_vision import PGSegVisionModel as PGSegVisionModel
    from .modeling_vision import PGSegVisionOutput as PGSegVisionOutput
    from .options import SegmentationOptions as SegmentationOptions
    from .pipeline import OpenVocabularySegmentationPipeline as OpenVocabularySegmentationPipeline
    from .processing_pgseg import PGSegProcessor as PGSegProcessor
    from .segmentation import Segmenter as Segmenter
    from .tokenization import default_tokenizer as default_tokenizer

_NAMES = {
    "checkpoint": ["load_segmenter"],
    "configuration_pgseg": ["PGSegConfig", "PGSegTextConfig", "PGSegVisionConfig"],
    "efficientnet_lite": ["EfficientNetLiteBackbone", "EfficientNetLiteConfig"],
    "image_processing_pgseg": ["PGSegImageProcessor"],
    "image_processing_pil_pgseg": ["PGSegImageProcessorPil"],
    "label_maps": ["Segmentation"],
    "modeling_base": ["PGSegPreTrainedModel"],
    "modeling_pgseg": ["PGSegModel", "PGSegOutput"],
    "modeling_text": ["PGSegTextModel", "PGSegTextModelWithProjection"],
    "modeling_vision": ["PGSegVisionModel", "PGSegVisionOutput"],
    "options": ["SegmentationOptions"],
    "pipeline": ["OpenVocabularySegmentationPipeline"],
    "processing_pgseg": ["PGSegProcessor"],
    "segmentation": ["Segmenter"],
    "tokenization": ["default_tokenizer"],
}
if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _NAMES)
__all__ = ["DEFAULT_CHECKPOINT", *(name for names in _NAMES.values() for name in names)]

register(sys.modules[__name__])
