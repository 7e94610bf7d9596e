"""PGSeg for Hugging Face Transformers: segmenting anything one can name, learned from image-text pairs alone."""

from transformers import AutoConfig, AutoModel

from .configuration_pgseg import PGSegConfig, PGSegTextConfig, PGSegVisionConfig
from .modeling_pgseg import (
    PGSegModel,
    PGSegOutput,
    PGSegPreTrainedModel,
    PGSegTextModel,
    PGSegVisionModel,
    PGSegVisionOutput,
)

__version__ = "0.1.0"

AutoConfig.register("pgseg", PGSegConfig)
AutoConfig.register("pgseg_text_model", PGSegTextConfig)
AutoConfig.register("pgseg_vision_model", PGSegVisionConfig)
AutoModel.register(PGSegConfig, PGSegModel)
AutoModel.register(PGSegTextConfig, PGSegTextModel)
AutoModel.register(PGSegVisionConfig, PGSegVisionModel)
