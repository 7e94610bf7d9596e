"""Class labels and templates: what is accepted, what is refused and how prompts are made."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgseg_hf.prompts import (
    IMAGENET_TEMPLATES,
    SEGMENTATION_TEMPLATES,
    build_prompts,
    join_words,
    validate_labels,
    validate_templates,
)


def test_templates_of_the_released_results():
    assert SEGMENTATION_TEMPLATES == ("a photo of a {}.",)
    assert len(IMAGENET_TEMPLATES) == 7
    assert IMAGENET_TEMPLATES[0] == "itap of a {}."
    assert IMAGENET_TEMPLATES[-1] == "a photo of the small {}."
    validate_templates(IMAGENET_TEMPLATES)


def test_labels_are_stripped_and_keep_their_order_and_case():
    assert validate_labels([" Dog", "traffic light\n", "cat"]) == ["Dog", "traffic light", "cat"]
    assert validate_labels(("cat",)) == ["cat"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no labels"),
        ((), "no labels"),
        ("cat, dog", r"\['cat', 'dog'\]"),
        (None, "NoneType"),
        ({"cat", "dog"}, "set"),
        (iter(["cat"]), "list of strings"),
        (["cat", ""], r"labels\[1\] is empty"),
        (["cat", " \t"], r"labels\[1\] is empty"),
        (["cat", "caf\udce9"], r"'caf\\udce9' has '\\udce9', which is no character"),
        (["cat", 3], r"labels\[1\].*int: 3"),
        ([b"cat"], r"labels\[0\].*bytes"),
        ([["cat"]], r"labels\[0\].*list"),
        (["cat", "dog", "cat"], r"labels\[2\] 'cat' repeats labels\[0\] 'cat'"),
        (["cat", "Cat "], r"labels\[1\] 'Cat ' repeats"),
        (["straße", "STRASSE"], "repeats"),
        (["traffic light", "traffic  light"], "repeats"),
        (["caf\u00e9", "cafe\u0301"], "repeats"),
    ],
)
def test_bad_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        validate_labels(labels)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], "no templates"),
        ("a photo of a {}.", "list of strings"),
        (None, "NoneType"),
        (["a photo of a cat."], "exactly once"),
        (["{} and {}"], "exactly once"),
        (["a photo of a {}.", 5], r"templates\[1\].*int"),
        (["a photo of a {label}."], "exactly once"),
        (["{} \ud800"], "which is no character"),
    ],
)
def test_bad_templates_are_named(templates, message):
    with pytest.raises(ValueError, match=message):
        validate_templates(templates)


def test_prompts_are_labels_by_templates():
    assert build_prompts(["cat", "dog"]) == [["a photo of a cat."], ["a photo of a dog."]]
    assert build_prompts(["cat", "dog"], ["a {}", "the {}!"]) == [
        ["a cat", "the cat!"],
        ["a dog", "the dog!"],
    ]


def test_other_braces_are_plain_characters():
    assert build_prompts(["cat"], ["a {} {here} {0}"]) == [["a cat {here} {0}"]]
    assert build_prompts(["{}", "{0}", "a{b}c", "}{"], ["<{}>"]) == [
        ["<{}>"],
        ["<{0}>"],
        ["<a{b}c>"],
        ["<}{>"],
    ]


@given(
    st.lists(st.text(min_size=1).filter(lambda text: text.strip()), min_size=1, max_size=5),
    st.lists(st.tuples(st.text(alphabet="ab .!"), st.text(alphabet="ab .!")), min_size=1, max_size=4),
)
def test_any_label_stands_in_its_template(labels, affixes):
    try:
        stripped = validate_labels(labels)
    except ValueError as error:
        assert "repeats" in str(error)
        return
    prompts = build_prompts(labels, [before + "{}" + after for before, after in affixes])
    assert prompts == [[before + label + after for before, after in affixes] for label in stripped]


def test_join_words():
    assert [join_words("abcd"[:count]) for count in (1, 2, 3, 4)] == [
        "a",
        "a and b",
        "a, b and c",
        "a, b, c and d",
    ]
