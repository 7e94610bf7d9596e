"""What is in an image, for those who give no words."""

from collections.abc import Sequence
from dataclasses import replace

from .segmentation import SAME_MEANING, EncodedImage, SegmentationOptions, Segmenter
from .values import share

MIN_AREA = 0.02


def suggest_labels(
    segmenter: Segmenter,
    image: EncodedImage,
    words: Sequence[str] | None = None,
    min_area: float = MIN_AREA,
    options: SegmentationOptions | None = None,
) -> list[str]:
    """The words of a vocabulary that are seen in an image, largest area first.

    All words compete for the pixels. A word that means nearly the same as one with a larger area is left out.

    Args:
        segmenter: whose model and processor decide.
        image: from `segmenter.encode`; segmenting it by the words found needs no second pass of the image encoder.
        words: the vocabulary; by default the checkpoint's own, `processor.vocabulary`.
        min_area: share of the pixels that a word must have to count, 0 to 1.
        options: `templates`, `top_k` and `patch_weight` are used.

    Returns:
        at least one word: the largest where none reaches `min_area`.

    Raises:
        ValueError: no words are given and the checkpoint has no vocabulary, or `min_area` is outside 0 to 1.
    """
    min_area = share(min_area, "min_area")
    words = list(words or segmenter.processor.vocabulary or ())
    if not words:
        raise ValueError("this checkpoint has no vocabulary of its own, expected words to look for.")
    options = replace(options or segmenter.options, background_threshold=None)
    embeds = segmenter.class_embeddings(words, options)
    scored = segmenter.score(image, embeds, options)
    label_map, _ = replace(scored, size=scored.resized).label_map()
    areas = label_map.flatten().bincount(minlength=len(words)) / label_map.numel()
    found: list[int] = []
    for index in areas.argsort(descending=True, stable=True).tolist():
        if found and areas[index] < max(min_area, 1 / label_map.numel()):
            break
        if not found or (embeds[found] @ embeds[index]).max() < SAME_MEANING:
            found.append(index)
    return [words[index] for index in found]
