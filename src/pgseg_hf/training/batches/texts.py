"""Chooses the texts of a record: captions, sentences made from tags, and prompts of tags and nouns."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ...data.records import Record, UnusableRecord
from ...prompts import SEGMENTATION_TEMPLATES, build_prompts, join_words, validate_templates

SENTENCE_TEMPLATES: tuple[str, ...] = (
    *SEGMENTATION_TEMPLATES,
    "a photo of {}.",
    "a picture of a {}.",
    "a picture with {}.",
    "{}.",
)
"""Templates for sentences made from tags. Tags such as "grass" or "boots" need no article, others do."""

PICTURE_WORDS = frozenset(
    ["background", "closeup", "image", "photo", "photograph", "picture", "shot", "snapshot", "view"]
)
"""Nouns in captions that refer to the image itself, not to its content."""


@dataclass
class TextOptions:
    """How the texts of a record are chosen.

    Args:
        templates: templates for sentences made from tags, drawn uniformly.
        label_templates: templates for the prompts of single tags and nouns. With one template, equal tags give equal
            texts; with several, each prompt uses a random one.
        max_tags: maximum number of tags in a sentence and among the labels. If images share texts, an omitted tag
            counts as absent, so do not set it below the number of tags per record.
        num_nouns: number of nouns from the caption that become labels too (the paper's multi-label loss).
        noun_model: name or folder of the spaCy pipeline that finds nouns, such as `en_core_web_sm`.
        caption_from_tags: probability that a record with both captions and tags gets a sentence made from tags. A
            record without captions always does.

    Raises:
        ValueError: if a field is invalid; the message names it.
    """

    templates: Sequence[str] = SENTENCE_TEMPLATES
    label_templates: Sequence[str] = SEGMENTATION_TEMPLATES
    max_tags: int = 8
    num_nouns: int = 0
    noun_model: str | None = None
    caption_from_tags: float = 0.0

    def __post_init__(self) -> None:
        validate_templates(self.templates)
        validate_templates(self.label_templates)
        for name, least in (("max_tags", 1), ("num_nouns", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}.")
        if self.num_nouns and not self.noun_model:
            raise ValueError(
                f"num_nouns is {self.num_nouns}, which needs noun_model, a spaCy pipeline such as 'en_core_web_sm'."
            )
        if not 0 <= self.caption_from_tags <= 1:
            raise ValueError(f"caption_from_tags is {self.caption_from_tags}, expected a probability.")


@dataclass
class Texts:
    """The texts that an image is compared with: a sentence, and prompts of single tags and nouns (may be empty)."""

    caption: str
    labels: list[str]


def choose_texts(record: Record, options: TextOptions, rng: np.random.Generator) -> Texts:
    """Chooses the texts of a record at random.

    The caption is one of the record's captions or, if it has none, a sentence made from its tags. For a sentence, the
    number of tags is drawn first (from one to all, at most `max_tags`), then the tags and their order. The labels are
    the record's tags (at most `max_tags`) and random nouns of the chosen caption.

    Raises:
        UnusableRecord: if the record has neither captions nor tags.
    """
    captions = [caption.strip() for caption in record.captions if caption.strip()]
    tags = clean_tags(record.tags)
    if not captions and not tags:
        raise UnusableRecord("no text", f"{record.name or 'a record'} has neither captions nor tags.")
    nouns: list[str] = []
    if captions and not (tags and rng.random() < options.caption_from_tags):
        caption = captions[rng.integers(len(captions))]
        if options.num_nouns and options.noun_model:
            nouns = _sample(find_nouns(caption, options.noun_model), options.num_nouns, rng)
    else:
        count = int(rng.integers(1, min(len(tags), options.max_tags) + 1))
        template = options.templates[int(rng.integers(len(options.templates)))]
        caption = build_prompts([join_words(_sample(tags, count, rng))], [template])[0][0]
    words = clean_tags([*_sample(tags, options.max_tags, rng), *nouns])
    prompts = build_prompts(words, options.label_templates) if words else []
    return Texts(caption, [of_word[rng.integers(len(of_word))] for of_word in prompts])


def clean_tags(tags: Iterable[str]) -> list[str]:
    """Normalizes whitespace and drops empty tags and tags that differ from an earlier one only in case."""
    cleaned: dict[str, str] = {}
    for tag in tags:
        spaced = " ".join(tag.split())
        if spaced:
            cleaned.setdefault(unicodedata.normalize("NFC", spaced).casefold(), spaced)
    return list(cleaned.values())


@lru_cache(maxsize=100_000)
def find_nouns(caption: str, model: str) -> tuple[str, ...]:
    """The distinct nouns of a caption, in order and in lower case.

    Consecutive nouns count as one ("fire truck"); nouns that refer to the image itself ("photo") are dropped. A caption
    takes about a millisecond, and its result is cached.

    Raises:
        ValueError: see `load_noun_model`.
    """
    nouns: list[str] = []
    run: list[str] = []
    for token in [*load_noun_model(model)(caption), None]:
        if token is not None and token.pos_ in ("NOUN", "PROPN") and token.is_alpha:
            run.append(token.text.lower())
            continue
        if not PICTURE_WORDS.issuperset(word.removesuffix("s") for word in run):
            nouns.append(" ".join(run))
        run = []
    return tuple(clean_tags(nouns))


@lru_cache(maxsize=4)
def load_noun_model(model: str) -> Any:
    """Loads a spaCy pipeline with only the components needed to find nouns.

    Raises:
        ValueError: if spaCy or the pipeline is not installed, or the pipeline does not tag parts of speech.
    """
    try:
        import spacy
    except ImportError as error:
        raise ValueError("finding nouns in captions requires spaCy: pip install spacy") from error
    try:
        pipeline = spacy.load(model, exclude=["parser", "ner", "lemmatizer"])
    except OSError as error:
        raise ValueError(
            f"spaCy pipeline {model!r} is not installed: run python -m spacy download {model}, or pass its folder."
        ) from error
    if not pipeline("a dog").has_annotation("POS"):
        raise ValueError(
            f"spaCy pipeline {model!r} does not tag parts of speech; choose one that does, such as en_core_web_sm."
        )
    return pipeline


def _sample(items: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """Up to `count` of the items, in random order."""
    return [items[index] for index in rng.permutation(len(items))[:count]]
