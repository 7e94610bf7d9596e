"""Parsing of texts, and metadata files as written by people and programs."""

import json

import datasets
import numpy as np
import pytest
from data_files import image_bytes, number_of, open_path, records_of, write_folder

from pgseg_hf.data import metadata
from pgseg_hf.data.columns import captions_of, tags_of
from pgseg_hf.data.records import UnusableRecord


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a cat", ["a cat"]),
        ("  a\n cat ", ["a cat"]),
        (["a cat", "", None, 3, "a dog"], ["a cat", "a dog"]),
        ("", []),
        (None, []),
        (float("nan"), []),
        (np.array(["a cat", "a dog"]), ["a cat", "a dog"]),
        (np.str_("a cat"), ["a cat"]),
        (datasets.Dataset.from_dict({"text": ["a cat", "a dog"]})["text"], ["a cat", "a dog"]),
    ],
)
def test_captions_are_a_string_or_a_list(value, expected):
    assert captions_of(value) == expected


@pytest.mark.parametrize(
    ("written", "tags"),
    [
        ("['cat', 'tree']", ["cat", "tree"]),
        ('["cat", "a; b"]', ["cat", "a; b"]),
        ("cat, tree; sky|cat", ["cat", "tree", "sky"]),
        ("[cat, tree", ["[cat", "tree"]),
        ("['cat' 'red\n tree']", ["cat", "red tree"]),
        ("['cat', None, nan, \"it's\"]", ["cat", "it's"]),
        ('["\\ud83d\\ude00", null, 3]', ["\U0001f600"]),
        (" [] ", []),
        (["cat", "dog, wet", "cat"], ["cat", "dog, wet"]),
        (None, []),
    ],
)
def test_tags_in_one_cell(written, tags):
    assert tags_of(written) == tags


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_folders_with_metadata_of_any_kind(tmp_path, kind):
    tags = "sky, road; car" if kind == "csv" else ["sky", "road", "car"]
    rows = [
        {"file_name": "a/0001", "caption": "one\ntwo", "tags": tags, "mask_file_name": "m/1.png"},
        {"file_name": "b.png", "caption": "", "tags": tags, "mask_file_name": None},
    ]
    source = open_path(write_folder(tmp_path, rows, kind))
    first, second = source[0], source[1]
    assert len(source) == 2
    assert first.captions == ["one two"]
    assert first.tags == second.tags == ["sky", "road", "car"]
    assert second.captions == []
    assert first.mask == tmp_path / "m/1.png"
    assert second.mask is None
    assert [number_of(first), number_of(second)] == [0, 1]
    assert first.name == f"{tmp_path}[0]"


def test_digits_in_csv_stay_text(tmp_path):
    rows = [{"file_name": "0001", "caption": "2020-01-01", "tags": "7"}]
    record = open_path(write_folder(tmp_path, rows, "csv"))[0]
    assert record.image == tmp_path / "0001"
    assert (record.captions, record.tags) == (["2020-01-01"], ["7"])


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("jsonl", "", "cannot be read: .*empty"),
        ("jsonl", '{"file_name": "a"', "cannot be read: Expecting ',' delimiter"),
        ("jsonl", "\n[1, 2]", "cannot be read: .*int, expected an object"),
        ("jsonl", "[" * 100_000, "cannot be read: .*nested"),
        ("csv", "file_name,caption,caption\na,b,c\n", "has 2 columns 'caption', expected one"),
        ("csv", "file_name,caption\n", "has no records"),
        ("csv", "file_name,caption\na,b,c\n", "cannot be read: CSV parse error"),
        ("parquet", "PAR1", "cannot be read"),
    ],
)
def test_broken_metadata(tmp_path, kind, content, message):
    (tmp_path / f"metadata.{kind}").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_path(tmp_path)


def test_a_row_longer_than_the_usual_block_of_csv(tmp_path):
    source = open_path(write_folder(tmp_path, [{"file_name": "0.png", "caption": "word\n" * 500_000}], "csv"))
    assert source[0].captions == [" ".join(["word"] * 500_000)]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_are_read_in_blocks(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(metadata, "_BLOCK_BYTES", 300)
    rows = [{"file_name": f"{n}.png", "caption": 'one, "two",\n' * n} for n in range(9)]
    source = open_path(write_folder(tmp_path, [{"file_name": "0.png", "caption": "x"}, *rows], kind))
    expected = [[" ".join(['one, "two",'] * n)] for n in range(1, 9)]
    assert [source[n + 1].captions for n in range(9)] == [[], *expected]


ROWS = [
    {"file_name": "0.png", "caption": "ein Café, am See", "tags": "café; see"},
    {"file_name": "1.png", "caption": "zwei", "tags": "see"},
]


def pandas_index(separator):
    """The table with the index column that `DataFrame.to_csv` writes first; its name contains commas."""
    lines = [["x, y, z, width, height", *ROWS[0]], *([str(n), *row.values()] for n, row in enumerate(ROWS))]
    return "\n".join(separator.join(f'"{value}"' for value in line) for line in lines)


@pytest.mark.parametrize(
    ("encoding", "ends"), [("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\r"), ("utf-16-le", "\n")]
)
@pytest.mark.parametrize("kind", ["jsonl", "json list", "comma", "semicolon", "tab"])
def test_metadata_of_editors_spreadsheets_and_pandas(tmp_path, encoding, ends, kind):
    if kind == "jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
    elif kind == "json list":
        text = json.dumps(ROWS, indent=1, ensure_ascii=False)
    else:
        separator = {"comma": ",", "semicolon": ";", "tab": "\t"}[kind]
        text = pandas_index(separator) + "\n" + 3 * f"{3 * separator}\n"
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(number))
    name = "metadata.jsonl" if kind.startswith("json") else "metadata.csv"
    (tmp_path / name).write_bytes(text.replace("\n", ends).encode(encoding))
    source = open_path(tmp_path)
    assert records_of(source) == [(0, "ein Café, am See"), (1, "zwei")]
    assert [source[n].tags for n in range(2)] == [["café", "see"], ["see"]]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_in_another_encoding_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes("file_name,caption\na.png,Café\n".encode("cp1252"))
    with pytest.raises(ValueError, match=rf"{name} .*line 2 has b'\\xe9.*UTF-8"):
        open_path(tmp_path)


def test_columns_that_nobody_uses_may_hold_anything_and_captions_any_of_their_types(tmp_path):
    rows = [
        {"file_name": "0.png", "caption": "one", "score": 1},
        {"file_name": "1.png", "caption": ["two", "more"], "score": "high"},
        {"caption": None, "tags": ["sky"], "file_name": "2.png", "score": {"a": [1]}},
        {"file_name": "3.png", "caption": 4, "more": float("nan")},
    ]
    assert records_of(open_path(write_folder(tmp_path, rows))) == [(0, "one"), (1, "two", "more"), (2,), (3,)]


def test_broken_rows_are_told_one_by_one(tmp_path):
    lone, lines = "\\ud83d", ["\u2028", "\u0085", "\x0c", "\x1c"]
    texts = [
        '"caption": "x"',
        f'"caption": "half {lone}"',
        '"caption": "x", "tags": "' + "[" * 100_000 + '"',
        *(f'"caption": "a{line}b"' for line in lines),
        '"caption": "x"} and more',
    ]
    for number in range(len(texts)):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(number))
    rows = [f'{{"file_name": "{n}.png", {text}}}\n' for n, text in enumerate(texts)]
    content = rows[0] + "\n" + "".join(rows[1:]) + "[1]\n" + '{"file_name": 7, "caption": "x"}\n'
    (tmp_path / "metadata.jsonl").write_text(content.replace("\x0c", "\\f").replace("\x1c", "\\u001c"))
    source = open_path(tmp_path)
    assert records_of(source) == [
        *((0, "x"), "broken text", "broken text"),
        *((number, "a b") for number in range(3, 7)),
        *("broken row", "broken row", "bad path"),
    ]
    with pytest.raises(UnusableRecord, match=r"line 9 of .*metadata.jsonl cannot be read: Extra data"):
        source[7]
    with pytest.raises(UnusableRecord, match=r"'half \\ud83d' has '\\ud83d'"):
        source[1]
