"""CLIP's byte-pair tokenizer, built from the merges shipped with the package: nothing is downloaded."""

import gzip
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
DEFAULT_CONTEXT_LENGTH = 77
MERGES_FILE = Path(__file__).parent / "assets" / "merges.txt.gz"


@lru_cache(maxsize=1)
def load_merges() -> tuple[tuple[str, str], ...]:
    """The 48,894 merges of CLIP's vocabulary in rank order (source: `assets/README.md`)."""
    data = MERGES_FILE.read_bytes()
    lines = gzip.decompress(data).decode("utf-8").splitlines()
    return tuple((left, right) for left, right in (line.split(" ") for line in lines))


def build_vocabulary() -> dict[str, int]:
    """CLIP's 49,408 entries: 256 byte characters, the same as word ends, the merges, start and end of
    text."""
    byte_characters = sorted(ByteLevel.alphabet())
    entries = byte_characters + [character + "</w>" for character in byte_characters]
    entries += [left + right for left, right in load_merges()]
    entries += [START_TOKEN, END_TOKEN]
    return {entry: index for index, entry in enumerate(entries)}


def default_tokenizer(context_length: int = DEFAULT_CONTEXT_LENGTH) -> CLIPTokenizer:
    """A new CLIP tokenizer, the one that PGSeg and GroupViT checkpoints were trained with.

    Args:
        context_length: tokens that the text tower takes, start and end token included (`model_max_length`).

    Returns:
        A `transformers.CLIPTokenizer`; padding is the end token, truncation keeps the end token.

    Raises:
        ValueError: for a context too short for one token between start and end.
    """
    if context_length < 3:
        raise ValueError(f"context_length must be at least 3 (start, one token, end), got {context_length}")
    merges: Any = list(load_merges())
    return CLIPTokenizer(vocab=build_vocabulary(), merges=merges, model_max_length=context_length)
