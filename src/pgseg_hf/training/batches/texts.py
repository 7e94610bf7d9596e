"""Which texts a record is trained with: captions, sentences made of tags, and prompts of tags and nouns."""

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
"""What sentences of tags are put into; tags such as "grass" or "boots" need no article, others do."""

PICTURE_WORDS = frozenset(
    ["background", "closeup", "image", "photo", "photograph", "picture", "shot", "snapshot", "view"]
)
"""Nouns of captions that name the image, not what it shows."""


@dataclass
class TextOptions:
    """How texts are chosen.

    Args:
        templates: for sentences of tags, each used as often as the others.
        label_templates: for the prompts of single tags and nouns. With one, equal tags are equal texts; with several,
            each prompt takes one at random.
        max_tags: largest number of tags in a sentence and among the labels. Where texts are shared between images, a
            tag that is left out counts as absent, so give as many as records have.
        num_nouns: so many nouns of the caption become labels too (the paper's multi-label loss).
        noun_model: name or folder of the spaCy pipeline that finds them, for instance `en_core_web_sm`.
        caption_from_tags: how often a record with captions and tags gets a sentence of tags all the same; a record
            without captions always does.

    Raises:
        ValueError: naming the field that makes no sense.
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
    """What an image is compared with: one sentence, and prompts of single tags and nouns (may be none)."""

    caption: str
    labels: list[str]


def choose_texts(record: Record, options: TextOptions, rng: np.random.Generator) -> Texts:
    """Random texts of a record.

    Its text is one of its captions or, where it has none, a sentence of its tags: their number is drawn first, from one
    to all of them (`max_tags` at most), then which and in which order. Its labels are its tags (`max_tags` of them
    where it has more) and random nouns of the chosen caption.

    Raises:
        UnusableRecord: it has neither captions nor tags.
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
    """Tags without needless white space; empty ones and those that differ from an earlier one in case only left out."""
    cleaned: dict[str, str] = {}
    for tag in tags:
        spaced = " ".join(tag.split())
        if spaced:
            cleaned.setdefault(unicodedata.normalize("NFC", spaced).casefold(), spaced)
    return list(cleaned.values())


@lru_cache(maxsize=100_000)
def find_nouns(caption: str, model: str) -> tuple[str, ...]:
    """The nouns of a caption in lower case, in order, each once.

    Nouns that follow each other count as one ("fire truck"); those that name the image itself ("photo") do not count.
    A caption takes about a millisecond and is remembered.

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
    """A spaCy pipeline that tells nouns, without the steps that are not needed for it.

    Raises:
        ValueError: spaCy or the pipeline is not installed, or the pipeline does not tell parts of speech.
    """
    try:
        import spacy
    except ImportError as error:
        raise ValueError("finding nouns in captions needs spaCy: pip install spacy.") from error
    try:
        pipeline = spacy.load(model, exclude=["parser", "ner", "lemmatizer"])
    except OSError as error:
        raise ValueError(
            f"{model!r} is no installed spaCy pipeline: python -m spacy download {model}, or give a folder with one."
        ) from error
    if not pipeline("a dog").has_annotation("POS"):
        raise ValueError(
            f"the spaCy pipeline {model!r} does not tell parts of speech; choose one that does, such as en_core_web_sm."
        )
    return pipeline


def _sample(items: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` of the items in random order, all of them where there are fewer."""
    return [items[index] for index in rng.permutation(len(items))[:count]]
