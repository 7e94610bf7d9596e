"""What the text tower can leave out of a batch of token ids, and which of them are words.

Shapes: N texts, T tokens. `config` is that of the text tower.
"""

from typing import Any

import torch
from torch import Tensor


def different_texts(
    input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The different ones of N texts [U, T], their attention mask, and which of them each text is, [N]; all texts and
    None where all differ, and where the shapes of a graph must not depend on the texts."""
    if torch.compiler.is_compiling() or input_ids.device.type == "meta":
        return input_ids, attention_mask, None
    given = attention_mask is not None
    keys_N2T = torch.cat([input_ids, attention_mask.to(input_ids.dtype)], 1) if given else input_ids
    # Not every device can do this, and the number of different texts has to come to the CPU anyway.
    different_U2T, rows_N = (
        part.to(input_ids.device) for part in keys_N2T.cpu().unique(dim=0, return_inverse=True)
    )
    if len(different_U2T) == len(input_ids):
        return input_ids, attention_mask, None
    length = input_ids.shape[1]
    mask_UT = different_U2T[:, length:].to(attention_mask.dtype) if given else None
    return different_U2T[:, :length], mask_UT, rows_N


def up_to_ends(input_ids: Tensor, attention_mask: Tensor | None, config: Any) -> tuple[Tensor, Tensor | None]:
    """Texts [N, T] and their attention mask up to where the longest one ends, as the transformer is causal and pools at
    the ends; all of them where one has no end."""
    # CLIP pools at the largest id where the end is 2, as in its first configurations.
    if torch.compiler.is_compiling() or input_ids.device.type == "meta" or config.eos_token_id == 2:
        return input_ids, attention_mask
    is_end = input_ids == config.eos_token_id
    length = int(torch.where(is_end.any(1), is_end.int().argmax(1) + 1, input_ids.shape[1]).max())
    return input_ids[:, :length], None if attention_mask is None else attention_mask[:, :length]


def find_words(input_ids: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """True for the tokens of words, after the start token and before the first end token, and True from there on;
    both [N, T]."""
    has_ended = (input_ids == config.eos_token_id).cumsum(1) > 0
    return ~has_ended & input_ids.ne(config.bos_token_id), has_ended
