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


def starts_of_texts(input_ids: Tensor, attention_mask: Tensor | None, config: Any) -> Tensor | None:
    """How many tokens of padding stand before each of N texts [N, T], by the attention mask or else by the start token,
    [N]; None where texts are padded on the right only, which the end token's first place takes for granted."""
    if attention_mask is not None:
        starts_N = attention_mask.bool().int().argmax(1)
    elif config.bos_token_id is None or config.eos_token_id == 2:
        # The start token of CLIP's first configurations is a wrong one too.
        return None
    else:
        starts_N = (input_ids == config.bos_token_id).int().argmax(1)
    is_data_known = not torch.compiler.is_compiling() and input_ids.device.type != "meta"
    return None if is_data_known and not starts_N.any() else starts_N


def rotated(values: Tensor, by_N: Tensor) -> Tensor:
    """The rows of [N, T, ...], each moved so many places to the left; what leaves there comes back on the right."""
    length = values.shape[1]
    places_NT = (torch.arange(length, device=values.device) + by_N[:, None]) % length
    places = places_NT.view(*places_NT.shape, *[1] * (values.ndim - 2)).expand_as(values)
    return values.gather(1, places)


def padded_on_the_right(
    input_ids: Tensor, attention_mask: Tensor | None, config: Any
) -> tuple[Tensor, Tensor | None]:
    """Texts [N, T] and their attention mask with all padding behind the text."""
    starts_N = starts_of_texts(input_ids, attention_mask, config)
    if starts_N is None:
        return input_ids, attention_mask
    return rotated(input_ids, starts_N), None if attention_mask is None else rotated(attention_mask, starts_N)


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
