"""CLIP's byte-pair tokenizer, built from the merges that ship with the package; nothing is downloaded."""

import gzip
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import BatchEncoding, CLIPTokenizer
from transformers.utils import logging

logger = logging.get_logger(__name__)

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


def build_vocabulary(merges: Sequence[tuple[str, str]] | None = None) -> dict[str, int]:
    """256 byte characters, the same as word ends, the merges, start and end token. CLIP's merges, the default, give
    49,408 entries."""
    byte_characters = sorted(ByteLevel.alphabet())
    entries = byte_characters + [character + "</w>" for character in byte_characters]
    entries += [left + right for left, right in (load_merges() if merges is None else merges)]
    entries += [START_TOKEN, END_TOKEN]
    return {entry: index for index, entry in enumerate(entries)}


def merges_for_words(words: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Selects the CLIP merges that the given words need, for a smaller tokenizer.

    A word whose merges are all kept has the same tokens as in CLIP, because unused merges have no effect.

    Args:
        words: lower-case words without white space, most important first.
        count: maximum number of merges. Words whose merges do not fit are skipped.

    Returns:
        The merges in rank order.
    """
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1 merge")
    ranks = {merge: rank for rank, merge in enumerate(load_merges())}
    to_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    kept: set[int] = set()
    for word in words:
        parts = list(to_bytes.pre_tokenize_str(word)[0][0])
        parts[-1] += "</w>"
        used = set()
        while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
            left, right = min(pairs, key=ranks.__getitem__)
            used.add(ranks[left, right])
            parts = _merged(parts, left, right)
        if len(kept | used) <= count:
            kept |= used
    return [load_merges()[rank] for rank in sorted(kept)]


def _merged(parts: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == (left, right):
            merged[-1] = left + right
        else:
            merged.append(part)
    return merged


def cut_texts(encoded: BatchEncoding, texts: Sequence[str]) -> list[str]:
    """The texts that a tokenizer truncated, because they have more tokens than the text tower accepts."""
    encodings = getattr(encoded, "encodings", None) or ()
    return [text for text, encoding in zip(texts, encodings) if encoding.overflowing]


def warn_of_cut_texts(encoded: BatchEncoding, texts: Sequence[str], limit: int) -> int:
    """Warns once if texts are truncated; returns their number."""
    cut = cut_texts(encoded, texts)
    if cut:
        logger.warning_once(
            f"texts of more than {limit} tokens are truncated, and the rest of them is ignored; shorten them."
        )
        logger.info(f"truncated texts: {cut}")
    return len(cut)


def check_distinct_labels(
    encoded: BatchEncoding, labels: Sequence[str], prompts: Sequence[Sequence[str]], limit: int
) -> None:
    """Warns about labels that are truncated.

    Args:
        encoded: the prompts of all labels, in the order of the labels.
        labels: N names.
        prompts: prompts of each label.
        limit: maximum number of tokens, for messages.

    Raises:
        ValueError: if two labels have the same tokens.
    """
    flat = [prompt for of_label in prompts for prompt in of_label]
    rows = iter(encoded["input_ids"])
    cut = set(cut_texts(encoded, flat))
    first: dict[tuple[tuple[int, ...], ...], str] = {}
    for label, of_label in zip(labels, prompts):
        other = first.setdefault(tuple(tuple(next(rows)) for _ in of_label), label)
        if other != label:
            why = f", which uses only {limit} tokens of their prompts" if cut.intersection(of_label) else ""
            raise ValueError(
                f"{other!r} and {label!r} are the same for the model{why}: shorten or change one of them."
            )
    shortened = [label for label, of_label in zip(labels, prompts) if cut.intersection(of_label)]
    if shortened:
        logger.warning_once(
            f"{len(shortened)} of {len(labels)} labels are truncated, because their prompts have more than {limit} "
            f"tokens; the first is {shortened[0]!r}."
        )


def default_tokenizer(
    context_length: int = DEFAULT_CONTEXT_LENGTH,
    merges: Sequence[tuple[str, str]] | int | None = None,
) -> CLIPTokenizer:
    """Creates a CLIP tokenizer, by default the one that PGSeg and GroupViT checkpoints were trained with.

    Args:
        context_length: maximum number of tokens, including the start and end token (`model_max_length`).
        merges: for a smaller vocabulary, the number of CLIP's merges to use (the most frequent come first), or the
            merges themselves, see `merges_for_words`. The vocabulary has 514 further entries.

    Returns:
        A `transformers.CLIPTokenizer` that pads with the end token and keeps it when truncating.

    Raises:
        ValueError: if the context is shorter than 3 tokens or CLIP does not have that many merges.
    """
    if context_length < 3:
        raise ValueError(f"context_length must be at least 3 (start, one token, end), got {context_length}")
    if isinstance(merges, int):
        if not 0 < merges <= len(load_merges()):
            raise ValueError(
                f"merges is {merges}, expected 1 to {len(load_merges())}, the number of CLIP's merges"
            )
        merges = load_merges()[:merges]
    chosen: Any = list(load_merges() if merges is None else merges)
    return CLIPTokenizer(vocab=build_vocabulary(chosen), merges=chosen, model_max_length=context_length)
