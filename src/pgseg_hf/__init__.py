"""PGSeg for Hugging Face Transformers: segmenting anything one can name, learned from image-text pairs alone."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForTextEncoding, AutoProcessor

from .checkpoint import DEFAULT_CHECKPOINT, load_segmenter
from .configuration_pgseg import PGSegConfig, PGSegTextConfig, PGSegVisionConfig
from .image_processing_pgseg import PGSegImageProcessor
from .image_processing_pil_pgseg import PGSegImageProcessorPil
from .modeling_pgseg import (
    PGSegModel,
    PGSegOutput,
    PGSegPreTrainedModel,
    PGSegTextModel,
    PGSegTextModelWithProjection,
    PGSegVisionModel,
    PGSegVisionOutput,
)
from .pipeline import OpenVocabularySegmentationPipeline, register_pipeline
from .processing_pgseg import PGSegProcessor
from .segmentation import Segmentation, SegmentationOptions, Segmenter
from .tokenization import default_tokenizer

__version__ = "0.1.0"

AutoConfig.register("pgseg", PGSegConfig)
AutoConfig.register("pgseg_text_model", PGSegTextConfig)
AutoConfig.register("pgseg_vision_model", PGSegVisionConfig)
AutoModel.register(PGSegConfig, PGSegModel)
AutoModel.register(PGSegTextConfig, PGSegTextModel)
AutoModel.register(PGSegVisionConfig, PGSegVisionModel)
AutoModelForTextEncoding.register(PGSegConfig, PGSegTextModelWithProjection)
AutoImageProcessor.register(
    PGSegConfig, image_processor_classes={"pil": PGSegImageProcessorPil, "torchvision": PGSegImageProcessor}
)
AutoProcessor.register(PGSegConfig, PGSegProcessor)
register_pipeline()

# save_pretrained copies the code beside the weights, for trust_remote_code=True where this package is not installed.
PGSegConfig.register_for_auto_class()
for _model in (PGSegModel, PGSegVisionModel, PGSegTextModel):
    _model.register_for_auto_class("AutoModel")
PGSegTextModelWithProjection.register_for_auto_class("AutoModelForTextEncoding")
for _config in (PGSegTextConfig, PGSegVisionConfig):
    _config.register_for_auto_class()
PGSegProcessor.register_for_auto_class("AutoProcessor")
for _image_processor in (PGSegImageProcessor, PGSegImageProcessorPil):
    _image_processor.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "DEFAULT_CHECKPOINT",
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
