"""Class labels and the prompt templates that they are put into."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .text_files import check_characters, read_json, read_text, split_lines
from .values import hex_colour, is_list, share

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
SYNONYM = "|"
SETTING = ":"
# What labels.json of a folder of masks may say beside, see `evaluation.mask_dataset`.
_OF_MASKS = ("ignore_index", "background", "mask_values")


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


def split_synonyms(labels: Sequence[str]) -> list[list[str]]:
    """The words of each label: `"car|automobile"` is a label with two, and is called by the first.

    Raises:
        ValueError: see `validate_labels`; also where a word is empty or stands for two labels.
    """
    words = [[word.strip() for word in label.split(SYNONYM)] for label in validate_labels(labels)]
    flat = [word for each in words for word in each]
    if len(flat) > len(words):
        try:
            validate_labels(flat)
        except ValueError as error:
            raise ValueError(f"of labels and synonyms together, {error}") from error
    return words


@dataclass(frozen=True)
class LabelList:
    """Labels as a user wrote them.

    Args:
        words: of each label, `"car|automobile"`, as [`Segmenter`] takes them.
        names: what each is called, its first word.
        colours: `"#rrggbb"` by name, of labels that were given one.
        thresholds: by name, 0 to 1, of labels that were given one.
    """

    words: list[str]
    names: list[str]
    colours: dict[str, str]
    thresholds: dict[str, float]


def parse_labels(labels: Sequence[str]) -> LabelList:
    """The labels of a list, each with its synonyms and then, after colons, a colour and a threshold if it has them:
    `"car|automobile:red:0.4"`, `"road:#808080"`, `"tree:0.3"`.

    Raises:
        ValueError: something after a colon that is neither, or see `split_synonyms`.
    """
    parts = [[part.strip() for part in label.split(SETTING)] for label in validate_labels(labels)]
    words = split_synonyms([of_label[0] for of_label in parts])
    found = LabelList([SYNONYM.join(each) for each in words], [each[0] for each in words], {}, {})
    for label, name, (_, *settings) in zip(labels, found.names, parts):
        for setting in settings:
            is_number = re.fullmatch(r"[-+.\d]+", setting)
            if name in (found.thresholds if is_number else found.colours):
                raise ValueError(f"the label {label!r} has two thresholds or colours, expected one of each.")
            if is_number:
                found.thresholds[name] = _threshold(setting, label)
            else:
                place = f"what follows {SETTING!r} in the label {label!r}"
                found.colours[name] = hex_colour(setting, place, "a threshold from 0 to 1 or ")
    return found


def _threshold(text: str, label: str) -> float:
    name = f"the threshold of the label {label!r}"
    try:
        return share(float(text), name)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, expected a number from 0 to 1.") from None


def read_labels(text: str) -> LabelList:
    """The labels that a command was given: words separated by commas, or `@` and a file of them, which is text with
    words separated by commas or lines, or JSON, `["cat", ...]` or `{"labels": ["cat", ...], "synonyms": {"cat":
    ["kitten", ...]}, "colours": {"cat": "#ff0000"}, "thresholds": {"cat": 0.4}}`. Each is as [`parse_labels`] takes it.

    Raises:
        ValueError: the file cannot be read, a file without `@`, `;` instead of commas, or see `parse_labels`.
    """
    path = Path(text.strip().removeprefix("@"))
    is_json = path.suffix.lower() == ".json"
    if not text.strip().startswith("@"):
        if is_json or path.suffix.lower() in (".txt", ".csv"):
            raise ValueError(
                f"labels are {text!r}, the name of a file; expected @{path} for the labels in it."
            )
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
        raise ValueError(
            f"{source} has {text!r}; labels are separated by commas, {text.replace(';', ',')!r}."
        )
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
            raise ValueError(f"it has {other[0]!r}, expected labels, {', '.join(names)}")
        for name, table in tables.items():
            if unknown := sorted(set(table) - set(labels)):
                raise ValueError(f"{name} are for {unknown[0]!r}, which is none of the labels")
        if wrong := [words for words in tables["synonyms"].values() if not is_list(words)]:
            raise ValueError(f"synonyms have {wrong[0]!r}, expected a list of words")
        parts = [[SYNONYM.join([label, *tables["synonyms"].get(label, ())])] for label in labels]
        for label, part in zip(labels, parts):
            part += [str(tables[name][label]) for name in ("colours", "thresholds") if label in tables[name]]
        return [SETTING.join(part) for part in parts]
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f'{path} cannot be read, expected ["cat", "dog"] or {{"labels": ["cat", "dog"]}}: {error}'
        ) from error


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
