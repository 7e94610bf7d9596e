"""Work that the text tower can skip for a batch of token ids, and which tokens are words.

Shapes: N texts, T tokens. `config` is that of the text tower.
"""

from typing import Any

import torch
from torch import Tensor


def different_texts(
    input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The distinct texts [U, T] among N texts, their attention mask, and the index [N] of each text among them. Returns
    all texts and None if all are distinct, or if shapes must not depend on the texts (compilation, meta device)."""
    if torch.compiler.is_compiling() or input_ids.device.type == "meta":
        return input_ids, attention_mask, None
    given = attention_mask is not None
    keys_N2T = torch.cat([input_ids, attention_mask.to(input_ids.dtype)], 1) if given else input_ids
    # Not every device supports this, and the number of distinct texts is needed on the CPU anyway.
    different_U2T, rows_N = (
        part.to(input_ids.device) for part in keys_N2T.cpu().unique(dim=0, return_inverse=True)
    )
    if len(different_U2T) == len(input_ids):
        return input_ids, attention_mask, None
    length = input_ids.shape[1]
    mask_UT = different_U2T[:, length:].to(attention_mask.dtype) if given else None
    return different_U2T[:, :length], mask_UT, rows_N


def starts_of_texts(input_ids: Tensor, attention_mask: Tensor | None, config: Any) -> Tensor | None:
    """Number of padding tokens before each of N texts [N, T], by the attention mask or else the start token, [N]. None
    if all texts are padded on the right, as pooling at the first end token assumes."""
    if attention_mask is not None:
        starts_N = attention_mask.bool().int().argmax(1)
    elif config.bos_token_id is None or config.eos_token_id == 2:
        # The start token in CLIP's first configurations is wrong too.
        return None
    else:
        starts_N = (input_ids == config.bos_token_id).int().argmax(1)
    is_data_known = not torch.compiler.is_compiling() and input_ids.device.type != "meta"
    return None if is_data_known and not starts_N.any() else starts_N


def rotated(values: Tensor, by_N: Tensor) -> Tensor:
    """Rotates each row of [N, T, ...] to the left by its number of places `by_N`."""
    length = values.shape[1]
    places_NT = (torch.arange(length, device=values.device) + by_N[:, None]) % length
    places = places_NT.view(*places_NT.shape, *[1] * (values.ndim - 2)).expand_as(values)
    return values.gather(1, places)


def padded_on_the_right(
    input_ids: Tensor, attention_mask: Tensor | None, config: Any
) -> tuple[Tensor, Tensor | None]:
    """Moves the padding of texts [N, T] and their attention mask to the right."""
    starts_N = starts_of_texts(input_ids, attention_mask, config)
    if starts_N is None:
        return input_ids, attention_mask
    return rotated(input_ids, starts_N), None if attention_mask is None else rotated(attention_mask, starts_N)


def up_to_ends(input_ids: Tensor, attention_mask: Tensor | None, config: Any) -> tuple[Tensor, Tensor | None]:
    """Cuts texts [N, T] and their attention mask after the end of the longest one, because the transformer is causal
    and pools at the ends. Returns them whole if a text has no end."""
    # With an end token of 2, as in its first configurations, CLIP pools at the largest id.
    if torch.compiler.is_compiling() or input_ids.device.type == "meta" or config.eos_token_id == 2:
        return input_ids, attention_mask
    is_end = input_ids == config.eos_token_id
    length = int(torch.where(is_end.any(1), is_end.int().argmax(1) + 1, input_ids.shape[1]).max())
    return input_ids[:, :length], None if attention_mask is None else attention_mask[:, :length]


def find_words(input_ids: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Masks [N, T] of tokens of words (between start and first end token) and of all from the first end token on."""
    has_ended = (input_ids == config.eos_token_id).cumsum(1) > 0
    return ~has_ended & input_ids.ne(config.bos_token_id), has_ended
