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
else:
    __getattr__, __dir__, _names = lazy_names(__name__, __file__)
    __all__ = ["DEFAULT_CHECKPOINT", *_names]

register(sys.modules[__name__])
