"""PGSeg's text tower: CLIP's, with and without the projection to the joint space.

Shapes: N texts, P prompts of a label, T text tokens, D joint width.
"""

from typing import Any

from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .configuration_pgseg import PGSegConfig, PGSegTextConfig
from .modeling_base import PGSegPreTrainedModel
from .projection import PGSegProjection
from .token_ids import rotated, starts_of_texts


class PGSegTextModel(CLIPTextModel):
    """The text tower: CLIP's text transformer with PGSeg's configuration."""

    _auto_class = "AutoModel"
    config: PGSegTextConfig
    base_model_prefix = "text_model"
    _keys_to_ignore_on_load_unexpected = [
        r"^vision_model",
        r"projection",
        r"logit_scale$",
        r"text_prototypes$",
    ]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # As in `PGSegPreTrainedModel`.
        super()._initialize_weights(module)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes texts [N, T] as CLIP does, padded on either side. Without `position_ids` each text is encoded as if
        padded on the right; attentions are returned in that order too."""
        kwargs["return_dict"] = True
        starts_N = None
        if input_ids is not None and position_ids is None:
            starts_N = starts_of_texts(input_ids, attention_mask, self.config)
        if starts_N is None:
            return super().forward(input_ids, attention_mask, position_ids, **kwargs)
        mask = None if attention_mask is None else rotated(attention_mask, starts_N)
        outputs = super().forward(rotated(input_ids, starts_N), mask, **kwargs)
        outputs.last_hidden_state = rotated(outputs.last_hidden_state, -starts_N)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(rotated(hidden, -starts_N) for hidden in outputs.hidden_states)
        return outputs


def refuse_bad_texts(input_ids: Tensor | None, for_losses: bool = False) -> None:
    if input_ids is None or input_ids.ndim not in ((2,) if for_losses else (2, 3)):
        shape = None if input_ids is None else list(input_ids.shape)
        others = ", one prompt per text for the losses" if for_losses else " or [labels, prompts, length]"
        raise ValueError(f"input_ids has shape {shape}, expected token ids [texts, length]{others}.")


def mean_over_prompts(embeds: Tensor, input_ids: Tensor) -> Tensor:
    """Averages embeddings [N * P, D] of token ids [N, P, T] to [N, D]; those of [N, T] stay as they are."""
    return embeds.unflatten(0, input_ids.shape[:2]).mean(1) if input_ids.ndim == 3 else embeds


class EmbedsTokens:
    """Mixin for models whose input embeddings are those of their text tower."""

    text_model: PGSegTextModel

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)


class PGSegTextModelWithProjection(EmbedsTokens, PGSegPreTrainedModel):
    """The text tower with its projection to the joint space. Also loads checkpoints of [`PGSegModel`]."""

    _auto_class = "AutoModelForTextEncoding"
    input_modalities = ("text",)
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [r"^vis(ion|ual)_", r"logit_(scale|bias)$", r"text_prototypes$"]

    def __init__(self, config: PGSegConfig):
        super().__init__(config)
        text_config = config.text_config
        self.text_model = PGSegTextModel._from_config(text_config)
        self.text_projection = PGSegProjection(
            text_config.hidden_size, config.projection_intermediate_dim, config.projection_dim
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns embeddings [N, D] of texts, projected and not normalised, like `PGSegModel.get_text_features`.

        Args:
            input_ids: [N, T], or [N, P, T] for P prompts of each of N labels, whose embeddings are averaged.
            attention_mask: same shape.
        """
        refuse_bad_texts(input_ids)
        mask = None if attention_mask is None else attention_mask.flatten(0, -2)
        outputs = self.text_model(input_ids.flatten(0, -2), attention_mask=mask, return_dict=True)
        return mean_over_prompts(self.text_projection(outputs.pooler_output), input_ids)


__all__ = ["PGSegTextModel", "PGSegTextModelWithProjection"]
