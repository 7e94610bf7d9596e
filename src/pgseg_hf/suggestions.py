"""What is in an image, for those who give no words."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import SegmentationOptions
from .text_files import read_text
from .values import share

if TYPE_CHECKING:  # words are looked at before torch is imported
    from .segmentation import EncodedImage, Segmenter

MIN_AREA = 0.02
_EVERYDAY_FILE = Path(__file__).parent / "assets" / "everyday_words.txt"


def everyday_words() -> list[str]:
    """The vocabulary that ships: 256 names of things and surroundings."""
    return read_text(_EVERYDAY_FILE).splitlines()


def suggest_labels(
    segmenter: "Segmenter",
    image: "EncodedImage",
    words: Sequence[str] | None = None,
    min_area: float = MIN_AREA,
    options: SegmentationOptions | None = None,
) -> list[str]:
    """The words of a vocabulary that are seen in an image, largest area first, see [`Segmenter.largest`].

    Args:
        segmenter: whose model and processor decide.
        image: from `segmenter.encode`; segmenting it by the words found needs no second pass of the image encoder.
        words: the vocabulary; by default the checkpoint's own, `processor.vocabulary`, or else `everyday_words`.
        min_area: share of the pixels that a word must have to count, 0 to 1.
        options: `templates`, `top_k` and `patch_weight` are used.

    Returns:
        at least one word: the largest where none reaches `min_area`.

    Raises:
        ValueError: `min_area` is outside 0 to 1.
    """
    min_area = share(min_area, "min_area")
    words = list(words or segmenter.processor.vocabulary or everyday_words())
    embeds = segmenter.class_embeddings(words, options)
    return [words[index] for index in segmenter.largest(image, embeds, min_area, options)]
