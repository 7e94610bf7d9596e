"""Class labels, and the prompt templates they are put into."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .text_files import check_characters, read_json, read_text, split_lines
from .values import hex_colour, is_list, share

SEGMENTATION_TEMPLATES: tuple[str, ...] = ("a photo of a {}.",)
"""The template of the released segmentation results."""

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
SYNONYM = "|"
SETTING = ":"
# Further keys that labels.json of a folder of masks may have, see `evaluation.mask_dataset`.
_OF_MASKS = ("ignore_index", "background", "mask_values")


def validate_labels(labels: Sequence[str]) -> list[str]:
    """Checks class labels and strips surrounding white space.

    Args:
        labels: a list, tuple, array or column with at least one word or phrase.

    Returns:
        The stripped labels in their order.

    Raises:
        ValueError: if `labels` is not a list of strings, there are no labels, a label is empty, or labels differ only
            in case or white space, which the tokenizer ignores.
    """
    if isinstance(labels, str):
        parts = [part.strip() for part in labels.split(",")]
        raise ValueError(
            f"labels must be a list of strings, got the string {labels!r}: use labels={parts!r}. "
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
            raise ValueError(f"labels[{index}] is empty ({label!r}): every label must have a word")
        same_to_tokenizer = unicodedata.normalize("NFC", " ".join(label.split())).casefold()
        if same_to_tokenizer in first_seen:
            other = first_seen[same_to_tokenizer]
            raise ValueError(
                f"labels[{index}] {label!r} repeats labels[{other}] {labels[other]!r} "
                "(case and white space are ignored): give each label once"
            )
        first_seen[same_to_tokenizer] = index
    return stripped


def split_synonyms(labels: Sequence[str]) -> list[list[str]]:
    """The words of each label: `"car|automobile"` is one label with two words, named by the first.

    Raises:
        ValueError: see `validate_labels`; also if a word is empty or used by two labels.
    """
    words = [[word.strip() for word in label.split(SYNONYM)] for label in validate_labels(labels)]
    flat = [word for each in words for word in each]
    if len(flat) > len(words):
        try:
            validate_labels(flat)
        except ValueError as error:
            raise ValueError(f"labels and synonyms together: {error}") from error
    return words


@dataclass(frozen=True)
class LabelList:
    """Labels as a user wrote them.

    Args:
        words: words of each label in the form that [`Segmenter`] accepts, `"car|automobile"`.
        names: name of each label, its first word.
        colours: `"#rrggbb"` by name, for labels with a colour.
        thresholds: 0 to 1 by name, for labels with a threshold.
    """

    words: list[str]
    names: list[str]
    colours: dict[str, str]
    thresholds: dict[str, float]


def parse_labels(labels: Sequence[str]) -> LabelList:
    """Parses labels with synonyms and, after colons, an optional colour and threshold: `"car|automobile:red:0.4"`,
    `"road:#808080"`, `"tree:0.3"`.

    Raises:
        ValueError: if the text after a colon is neither a colour nor a threshold; see also `split_synonyms`.
    """
    parts = [[part.strip() for part in label.split(SETTING)] for label in validate_labels(labels)]
    words = split_synonyms([of_label[0] for of_label in parts])
    found = LabelList([SYNONYM.join(each) for each in words], [each[0] for each in words], {}, {})
    for label, name, (_, *settings) in zip(labels, found.names, parts):
        for setting in settings:
            is_number = re.fullmatch(r"[-+.\d]+", setting)
            if name in (found.thresholds if is_number else found.colours):
                raise ValueError(
                    f"the label {label!r} has two thresholds or colours, expected at most one of each."
                )
            if is_number:
                found.thresholds[name] = _threshold(setting, label)
            else:
                place = f"the text after {SETTING!r} in the label {label!r}"
                found.colours[name] = hex_colour(setting, place, "a threshold from 0 to 1 or ")
    return found


def _threshold(text: str, label: str) -> float:
    name = f"the threshold of the label {label!r}"
    try:
        return share(float(text), name)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, expected a number from 0 to 1.") from None


def read_labels(text: str) -> LabelList:
    """Labels given to a command: words separated by commas, or `@` and the name of a file. The file is text with labels
    separated by commas or lines, or JSON: `["cat", ...]` or `{"labels": ["cat", ...], "synonyms":
    {"cat": ["kitten", ...]}, "colours": {"cat": "#ff0000"}, "thresholds": {"cat": 0.4}}`. Each label has the form of
    [`parse_labels`].

    Raises:
        ValueError: if the file cannot be read, `@` is missing, or labels are separated by `;`; see also `parse_labels`.
    """
    path = Path(text.strip().removeprefix("@"))
    is_json = path.suffix.lower() == ".json"
    if not text.strip().startswith("@"):
        if is_json or path.suffix.lower() in (".txt", ".csv"):
            raise ValueError(f"labels is the file name {text!r}; use @{path} to read labels from it.")
        labels = _split_labels(text, "labels")
    elif is_json:
        labels = _labels_of_json(path)
    else:
        lines = [line for line in split_lines(read_text(path)) if line.strip()]
        labels = [label for line in lines for label in _split_labels(line.rstrip(" ,"), str(path))]
    try:
        return parse_labels(labels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if text.strip().startswith("@") else str(error)) from error


def _split_labels(text: str, source: str) -> list[str]:
    if ";" in text:
        raise ValueError(f"{source} has {text!r}; separate labels by commas: {text.replace(';', ',')!r}.")
    return [label.strip() for label in text.split(",")]


def _labels_of_json(path: Path) -> list[str]:
    content = read_json(path)
    labels: Any = content.get("labels") if isinstance(content, dict) else content
    names = ("synonyms", "colours", "thresholds")
    tables = {name: content.get(name, {}) if isinstance(content, dict) else {} for name in names}
    try:
        labels = validate_labels(labels)
        if other := sorted(
            set(content if isinstance(content, dict) else ()) - {"labels", *names, *_OF_MASKS}
        ):
            raise ValueError(f"it has the key {other[0]!r}, expected labels, {', '.join(names)}")
        for name, table in tables.items():
            if unknown := sorted(set(table) - set(labels)):
                raise ValueError(f"{name} has {unknown[0]!r}, which is not one of the labels")
        if wrong := [words for words in tables["synonyms"].values() if not is_list(words)]:
            raise ValueError(f"synonyms has {wrong[0]!r}, expected a list of words")
        parts = [[SYNONYM.join([label, *tables["synonyms"].get(label, ())])] for label in labels]
        for label, part in zip(labels, parts):
            part += [str(tables[name][label]) for name in ("colours", "thresholds") if label in tables[name]]
        return [SETTING.join(part) for part in parts]
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f'{path} cannot be read, expected ["cat", "dog"] or {{"labels": ["cat", "dog"]}}: {error}'
        ) from error


def validate_templates(templates: Sequence[str]) -> list[str]:
    """Checks prompt templates: a list of at least one string, each with `{}` exactly once. Returns them as a list.

    Raises:
        ValueError: if there are no templates or one is invalid.
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
            raise ValueError(f"templates[{index}] must have {PLACEHOLDER!r} exactly once, got {template!r}")
    return [str(template) for template in templates]


def build_prompts(
    labels: Sequence[str], templates: Sequence[str] = SEGMENTATION_TEMPLATES
) -> list[list[str]]:
    """Puts every label into every template.

    Args:
        labels: N class labels; they may contain braces.
        templates: T templates, each with one `{}`.

    Returns:
        N lists of T prompts.

    Raises:
        ValueError: see `validate_labels` and `validate_templates`.
    """
    labels, templates = validate_labels(labels), validate_templates(templates)
    return [[template.replace(PLACEHOLDER, label) for template in templates] for label in labels]


def join_words(words: Sequence[str]) -> str:
    """Joins words to a phrase: `hat`, `hat and skirt`, `hat, skirt and boots`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
