"""Class labels and the prompt templates that they are put into."""

import unicodedata
from collections.abc import Sequence

from .text_files import check_characters
from .values import is_list

SEGMENTATION_TEMPLATES: tuple[str, ...] = ("a photo of a {}.",)
"""The one template of the released segmentation results."""

IMAGENET_TEMPLATES: tuple[str, ...] = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""CLIP's seven-template subset, used for ImageNet zero-shot classification."""

PLACEHOLDER = "{}"


def validate_labels(labels: Sequence[str]) -> list[str]:
    """Check class labels given by a user and strip white space around them.

    Args:
        labels: a list, tuple, array or column of words or phrases, at least one.

    Returns:
        The labels in the order given, stripped.

    Raises:
        ValueError: for anything but a list of strings (a bare string too), for no labels, an empty
            label, or labels that differ only in case or white space, which the tokenizer cannot tell apart.
    """
    if isinstance(labels, str):
        parts = [part.strip() for part in labels.split(",")]
        raise ValueError(
            f"labels must be a list of strings, got the string {labels!r}: write labels={parts!r}. "
            "Only the command line splits at commas."
        )
    if not is_list(labels):
        raise ValueError(f"labels must be a list of strings, got {type(labels).__name__}: {labels!r}")
    labels = list(labels)
    if not labels:
        raise ValueError("no labels: give at least one word or phrase, for example labels=['cat', 'grass']")

    stripped: list[str] = []
    first_seen: dict[str, int] = {}
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise ValueError(f"labels[{index}] must be a string, got {type(label).__name__}: {label!r}")
        stripped.append(check_characters(str(label).strip()))
        if not stripped[-1]:
            raise ValueError(f"labels[{index}] is empty ({label!r}): every label needs a word")
        same_to_tokenizer = unicodedata.normalize("NFC", " ".join(label.split())).casefold()
        if same_to_tokenizer in first_seen:
            other = first_seen[same_to_tokenizer]
            raise ValueError(
                f"labels[{index}] {label!r} repeats labels[{other}] {labels[other]!r} "
                "(case and white space do not count): give each label once"
            )
        first_seen[same_to_tokenizer] = index
    return stripped


def validate_templates(templates: Sequence[str]) -> list[str]:
    """Check prompt templates: a list of strings, at least one, that each hold `{}` exactly once.

    Returns:
        The templates as a list.

    Raises:
        ValueError: for anything else, naming the template.
    """
    if not is_list(templates):
        raise ValueError(
            f"templates must be a list of strings such as {list(SEGMENTATION_TEMPLATES)}, "
            f"got {type(templates).__name__}: {templates!r}"
        )
    templates = list(templates)
    if not templates:
        raise ValueError(f"no templates: give at least one, for example {list(SEGMENTATION_TEMPLATES)}")
    for index, template in enumerate(templates):
        if not isinstance(template, str):
            raise ValueError(
                f"templates[{index}] must be a string, got {type(template).__name__}: {template!r}"
            )
        check_characters(template)
        if template.count(PLACEHOLDER) != 1:
            raise ValueError(f"templates[{index}] must hold {PLACEHOLDER!r} exactly once, got {template!r}")
    return [str(template) for template in templates]


def build_prompts(
    labels: Sequence[str], templates: Sequence[str] = SEGMENTATION_TEMPLATES
) -> list[list[str]]:
    """Put every label into every template.

    Args:
        labels: N class labels; they may hold braces.
        templates: T templates, each with one `{}`.

    Returns:
        N lists of T prompts.

    Raises:
        ValueError: see `validate_labels` and `validate_templates`.
    """
    labels, templates = validate_labels(labels), validate_templates(templates)
    return [[template.replace(PLACEHOLDER, label) for template in templates] for label in labels]


def join_words(words: Sequence[str]) -> str:
    """`hat`, `hat and skirt`, `hat, skirt and boots`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
