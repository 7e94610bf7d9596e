"""Class labels and templates: accepted and rejected values, and the resulting prompts."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgseg_hf.prompts import (
    IMAGENET_TEMPLATES,
    SEGMENTATION_TEMPLATES,
    build_prompts,
    join_words,
    parse_labels,
    read_labels,
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


def test_a_label_has_synonyms_a_colour_and_a_threshold():
    found = parse_labels(["car | automobile : RED : 0.4", "road:#888", "tree:.25", "night sky"])
    assert found.words == ["car|automobile", "road", "tree", "night sky"]
    assert found.names == ["car", "road", "tree", "night sky"]
    assert found.colours == {"car": "#ff0000", "road": "#888888"}
    assert found.thresholds == {"car": 0.4, "tree": 0.25}
    assert parse_labels(["a:0:hsl(120,100%,50%)"]).colours == {"a": "#00ff00"}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            "car:reddish",
            "':' in the label 'car:reddish' is 'reddish', expected a threshold from 0",
        ),
        ("car:", "in the label 'car:' is ''"),
        ("car:#ff00", "'#ff00'"),
        ("car:#ff000080", "'#ff000080'"),
        ("car:rgb(300,0,0)", "'rgb"),
        ("car:1.5", "the threshold of the label 'car:1.5' is '1.5', expected a number from 0 to 1"),
        ("car:-0.1", "is '-0.1'"),
        ("car:1.2.3", "is '1.2.3'"),
        ("car:nan", "is 'nan'"),
        ("car:red:blue", "has two thresholds or colours"),
        ("car:.1:.2", "has two thresholds or colours"),
        (":red", "is empty"),
        ("car:red|automobile", "'red|automobile'"),
    ],
)
def test_what_follows_a_label_is_named_where_it_is_wrong(label, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_labels(["dog", label])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "cat|kitten, dog\n\ngrass\n"),
        ("labels.txt", "\ufeffcat | kitten,\r\ndog,\r\ngrass"),
        ("labels.json", '["cat|kitten", "dog", "grass"]'),
        ("labels.json", '{"labels": ["cat", "dog", "grass"], "synonyms": {"cat": ["kitten"]}}'),
    ],
)
def test_labels_of_a_file(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_labels(f"@{tmp_path / name}") == read_labels("cat|kitten,dog,grass")


def test_colours_and_thresholds_of_a_file(tmp_path):
    (tmp_path / "labels.json").write_text(
        '{"labels": ["horse", "sand"], "synonyms": {"horse": ["pony"]}, "colours": {"sand": "#00F"}, '
        '"thresholds": {"horse": 0.7, "sand": 1}}'
    )
    assert read_labels(f"@{tmp_path / 'labels.json'}") == read_labels("horse|pony:.7, sand:blue:1")


@pytest.mark.parametrize(
    ("labels", "content", "message"),
    [
        ("labels.txt", "cat", "'labels.txt'; use @labels.txt"),
        ("@absent.txt", None, "absent.txt cannot be read"),
        ("@labels.json", '{"cat": 1}', "labels.json cannot be read"),
        ("@labels.json", "[1]", "labels[0]"),
        ("@labels.json", '{"labels": ["cat"], "synonyms": {"dog": ["hound"]}}', "synonyms has 'dog'"),
        ("@labels.json", '{"labels": ["cat"], "colours": {"dog": "red"}}', "colours has 'dog'"),
        (
            "@labels.json",
            '{"labels": ["cat"], "thresholds": {"cat": 7}}',
            "labels.json: the threshold",
        ),
        ("@labels.json", '{"labels": ["cat"], "colors": {"cat": "red"}}', "'colors'"),
        ("@labels.json", '{"labels": ["cat"], "synonyms": {"cat": "kitten"}}', "'kitten'"),
        ("@labels.json", "cat, dog", "labels.json is no JSON"),
        ("@labels.txt", "cat\ndog\n\nCat\n", "labels.txt: labels[2] 'Cat' repeats labels[0]"),
        ("@labels.txt", "", "labels.txt: no labels"),
        ("@labels.txt", "cat;dog", "'cat,dog'"),
        ("@labels.txt", "cat:7\ndog", "labels.txt: the threshold of the label 'cat:7' is '7'"),
        ("cat; dog", None, "'cat; dog'"),
        ("cat|kitten|, dog", None, "labels[2] is empty"),
        ("cat|dog, dog|hound", None, "labels[2] 'dog' repeats labels[1]"),
        ("wall|background, cat, background", None, "'background' repeats"),
    ],
)
def test_what_is_wrong_with_labels_is_named(tmp_path, monkeypatch, labels, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(labels.removeprefix("@")).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_labels(labels)


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
