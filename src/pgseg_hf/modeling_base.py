"""Initialisation, loading and choice of attention for all PGSeg models."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .backbone import PGSegBackboneFeatures, backbones_set_aside
from .configuration_pgseg import PGSegConfig
from .layers import PGSegAssignAttention, PGSegAttention, PGSegMLP, PGSegStage, PGSegVisionEmbeddings
from .npr import PGSegStagePrototypes, init_prototypes
from .npr_released import ReleasedNPR  # noqa: F401 (registers the variant)
from .projection import PGSegProjection
from .quantization import METHOD  # noqa: F401 (registers the method with transformers)
from .weights import what_is_wrong_with

if TYPE_CHECKING:
    # Never executed. Imported files are saved beside the weights, where `custom_pipelines` needs this class.
    from .pipeline import OpenVocabularySegmentationPipeline  # noqa: F401

logger = logging.get_logger(__name__)


class PGSegPreTrainedModel(PreTrainedModel):
    """Base class of PGSeg models: weight initialisation and loading of pretrained checkpoints."""

    config: PGSegConfig
    base_model_prefix = "pgseg"
    input_modalities: tuple[str, ...] = ("image", "text")
    _no_split_modules = [
        "PGSegVisionEmbeddings",
        "PGSegBackboneEmbeddings",
        "PGSegLayer",
        "PGSegStage",
        "CLIPTextEmbeddings",
        "CLIPEncoderLayer",
    ]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Weights that the checkpoint lacked and that have not been trained since.
    random_weights: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Loads a checkpoint like [`~transformers.PreTrainedModel.from_pretrained`].

        Missing weights are initialised randomly, with a warning; pipelines reject such models until `train()`.

        Raises:
            OSError: if a folder cannot be read, with the likely reason, such as a truncated download.
        """
        try:
            model, report = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except Exception as error:
            name = pretrained_model_name_or_path
            reason = what_is_wrong_with(name, needed="config.json") if name else None
            if reason is None:
                raise
            raise OSError(reason) from error
        model.random_weights = tuple(sorted(report["missing_keys"]))
        return (model, report) if output_loading_info else model

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.random_weights = ()
        return super().train(mode)

    def set_attn_implementation(self, attn_implementation: Any, allow_all_kernels: bool = False) -> None:
        """Sets the attention implementation; a backbone that does not support it keeps its current one."""
        with backbones_set_aside(self) as backbones:
            before = [backbone.config._attn_implementation for backbone in backbones]
            super().set_attn_implementation(attn_implementation, allow_all_kernels)
        for backbone, known in zip(backbones, before):
            # The call above set this on the backbone's configuration without checking support.
            asked = backbone.config._attn_implementation
            backbone.config._attn_implementation = known
            try:
                backbone.set_attn_implementation(asked, allow_all_kernels)
            except (ValueError, ImportError) as error:
                logger.warning(f"{type(backbone).__name__} keeps attention {known}: {error}")

    def enable_input_require_grads(self) -> None:
        """Excludes backbones, whose embeddings may return more than one tensor."""
        with backbones_set_aside(self):
            super().enable_input_require_grads()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For custom code, transformers skips modules without tensors of their own, such as an MLP, in case
        # `_init_weights` overwrites loaded weights. `transformers.initialization` does not overwrite them.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range * self.config.initializer_factor
        if isinstance(module, PGSegVisionEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, PGSegStage) and module.group_token is not None:
            if module.group_projector is None:
                init.trunc_normal_(module.group_token, std=std)
            else:
                init.zeros_(module.group_token)
        elif isinstance(module, (PGSegMLP, PGSegAttention, PGSegAssignAttention)):
            for child in module.children():
                if isinstance(child, nn.Linear):
                    init.trunc_normal_(child.weight, std=std)
        elif isinstance(module, PGSegProjection):
            linears: list[Any] = [module[0], module[3]]
            for linear in linears:
                bound = linear.in_features**-0.5
                init.uniform_(linear.weight, -bound, bound)
                init.uniform_(linear.bias, -bound, bound)
        elif isinstance(module, PGSegBackboneFeatures):
            init.trunc_normal_(module.projection.weight, std=std)
        elif isinstance(module, PGSegStagePrototypes):
            init_prototypes(module.prototypes)


def name_unused(kwargs: dict[str, Any]) -> None:
    """Warns about arguments that are not used, such as misspelt ones.

    Raises:
        ValueError: for GroupViT's `output_segmentation`, because callers would miss its output.
    """
    if kwargs.get("output_segmentation"):
        raise ValueError(
            "output_segmentation is an argument of GroupViT; PGSeg always returns segment_logits and grouping. Leave "
            "it out and get label maps from processor.post_process_semantic_segmentation(outputs, target_sizes)."
        )
    unused = sorted(name for name, value in kwargs.items() if value is not None and value is not False)
    if unused and not torch.compiler.is_compiling():
        logger.warning_once(f"arguments not used: {', '.join(unused)}; see the arguments of forward.")


__all__ = ["PGSegPreTrainedModel"]
