"""Tar shards: their names, what is read from them, and that damage is reported and never fatal."""

import itertools
import json
import os
import pickle
import tarfile
from pathlib import Path

import fsspec
import pytest
from data_files import (
    image_bytes,
    number_of,
    numbered,
    numbered_files,
    numbered_shards,
    open_path,
    records_of,
    tar_bytes,
)
from hypothesis import given
from hypothesis import strategies as st

from pgseg_hf.data import tars
from pgseg_hf.data.records import Record, UnusableRecord
from pgseg_hf.data.sources import SourceSpec
from pgseg_hf.data.tars import TarSource, expand_braces, find_shards

# Names of shards

WORDS = st.text("ab/.-", max_size=3)
# Groups in braces, each with its expansion.
LISTS = st.lists(WORDS, min_size=2, max_size=3, unique=True).map(
    lambda words: (f"{{{','.join(words)}}}", words)
)
RANGES = st.tuples(st.integers(100, 120), st.integers(0, 12)).map(
    lambda range_: (
        f"{{{range_[0]:05d}..{sum(range_)}}}",
        [f"{number:05d}" for number in range(range_[0], sum(range_) + 1)],
    )
)


@given(st.lists(st.one_of(WORDS.map(lambda word: (word, [word])), RANGES, LISTS), max_size=3))
def test_braces_are_the_product_of_their_groups(groups):
    names = ["".join(parts) for parts in itertools.product(*(values for _, values in groups))]
    assert expand_braces("".join(text for text, _ in groups)) == list(dict.fromkeys(names))


def test_braces_within_braces():
    assert sorted(expand_braces("{a,b{1..2}}.tar")) == ["a.tar", "b1.tar", "b2.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a{1}.tar", r"has \{1\}, expected a range"),
        ("a{}.tar", r"has \{\}, expected a range"),
        ("a{5..3}.tar", "counts from 5 to 3"),
        ("a{0..99999999999}.tar", "counts from 0 to 99999999999"),
    ],
)
def test_braces_that_mean_nothing(pattern, message):
    with pytest.raises(ValueError, match=message):
        expand_braces(pattern)


def test_patterns_of_local_shards(tmp_path):
    for name in ("a-00.tar", "a-01.tar", "a-02.tar", "b c.tar"):
        (tmp_path / name).write_bytes(b"")
    for pattern, expected in {
        f"{tmp_path}/a-{{00..01}}.tar": ["a-00.tar", "a-01.tar"],
        f"{tmp_path}/a-0[12].tar": ["a-01.tar", "a-02.tar"],
        f"{tmp_path}/b?c.tar": ["b c.tar"],
        f"{tmp_path}/a-01.tar::{tmp_path}/a-*.tar": ["a-01.tar", "a-00.tar", "a-02.tar"],
        f" {tmp_path}/a-02.tar\n {tmp_path}/a-00.tar ": ["a-02.tar", "a-00.tar"],
    }.items():
        assert [Path(file.path).name for file in find_shards(pattern)] == expected
    for pattern in (f"{tmp_path}/a-{{02..03}}.tar", f"{tmp_path}/c*.tar", "nosuch://a.tar"):
        with pytest.raises(ValueError, match=r"tar file not found|cannot be opened"):
            find_shards(pattern)


def test_addresses_are_not_asked_for_before_they_are_read():
    address = "https://nowhere.invalid/{0..1}.tar?token=a"
    assert [file.path for file in find_shards(address)] == [
        f"https://nowhere.invalid/{n}.tar?token=a" for n in (0, 1)
    ]


# Tar shards


def test_records_of_shards(tmp_path):
    source = open_path(numbered_shards(tmp_path, [3, 2]))
    assert source.num_shards == 2
    assert records_of(source) == numbered(0, 5)
    assert next(source.read_shard(1)).name == f"{tmp_path}/001.tar/000003"
    assert records_of(pickle.loads(pickle.dumps(source))) == numbered(0, 5)


def test_shards_of_a_remote_file_system():
    files = fsspec.filesystem("memory")
    for shard in range(3):
        files.pipe(f"/remote-shards/{shard}.tar", tar_bytes(numbered_files(2 * shard, 2)))
    assert records_of(open_path("memory://remote-shards/*.tar")) == numbered(0, 6)
    source = open_path("memory://remote-shards/{0..3}.tar")
    assert records_of(source) == [*numbered(0, 6), "broken shard"]
    files.rm("/remote-shards", recursive=True)


def only_record(files, **columns):
    fsspec.filesystem("memory").pipe("/one.tar", tar_bytes(files))
    source = TarSource("memory://one.tar", SourceSpec("x", **columns).columns)
    (item,) = source.read_shard(0)
    return item


def test_what_endings_mean():
    text = {"caption": "from json", "text": "other", "tags": ["cat", "dog"], "TEXT": "loud"}
    files = {
        "dir.x/a.mask.png": b"mask",
        "dir.x/a.seg.png": b"seg",
        "dir.x/a.jpg": image_bytes(1),
        "dir.x/a.PNG": image_bytes(2),
        "dir.x/a.txt": "größer\n".encode(),
        "dir.x/a.json": json.dumps(text).encode(),
        "dir.x/.a.jpg": b"hidden",
    }
    record = only_record(files)
    assert (number_of(record), record.mask) == (1, b"mask")
    assert (record.captions, record.tags) == (["größer"], ["cat", "dog"])
    del files["dir.x/a.txt"]
    assert only_record(files).captions == ["from json"]
    record = only_record(
        files, image_column="png", mask_column="seg.png", caption_column="TEXT", tags_column="text"
    )
    assert (number_of(record), record.mask) == (2, b"seg")
    assert (record.captions, record.tags) == (["loud"], ["other"])


@pytest.mark.parametrize(
    ("files", "reason", "message"),
    [
        ({"a.txt": b"x"}, "no image", "one.tar/a has no readable image, only txt"),
        ({"a.png": b"x"}, "no text", "no caption or tags, only png"),
        ({"a.png": b"x", "a.json": b'{"alt": "x"}'}, "no text", "png, json with the keys alt"),
        ({"a.png": b"x", "a.txt": b" \n"}, "no text", "no caption"),
        ({"a.png": b"x", "a.txt": b"caf\xe9"}, "broken text", "its .txt"),
        ({"a.png": b"x", "a.json": b"{"}, "broken text", "Expecting property name"),
        ({"a.png": b"x", "a.json": b"[1]"}, "broken text", "list, expected an object"),
        ({"a.png": b"x", "a.json": b"[" * 100_000}, "broken text", ""),
        ({"b/.png": b"x"}, "empty shard", "has no records"),
    ],
)
def test_records_that_are_left_out(files, reason, message):
    item = only_record(files)
    assert isinstance(item, UnusableRecord)
    assert item.reason == reason
    assert message in str(item)


def test_bad_records_do_not_stop_a_shard_and_equal_names_in_a_row_are_two(tmp_path):
    files = numbered_files(0, 5)
    files["000001.json"] = b"{"
    del files["000003.png"]
    (tmp_path / "0.tar").write_bytes(tar_bytes(dict(sorted(files.items()))))
    good = numbered(0, 5)
    expected = [good[0], "broken text", good[2], "no image", good[4]]
    assert records_of(open_path(f"{tmp_path}/0.tar")) == expected
    content = tar_bytes(numbered_files(0, 1))
    end = content.rindex(b"text 0") + 512
    (tmp_path / "0.tar").write_bytes(content[:end] + content)
    assert records_of(open_path(f"{tmp_path}/0.tar")) == numbered(0, 1) * 2


def test_too_large_files_and_other_kinds_are_not_read(monkeypatch):
    monkeypatch.setattr(tars, "MAX_FILE_BYTES", 1000)
    files = {"a.jpg": bytes(1001), "a.png": image_bytes(4), "a.txt": b"x"}
    assert only_record(files).reason == "no image"
    assert number_of(only_record(files, image_column="png")) == 4

    class Trap:
        def __reduce__(self):
            return os.mkdir, ("trap",)

    extract, read = tarfile.TarFile.extractfile, []
    monkeypatch.setattr(
        tarfile.TarFile, "extractfile", lambda *args: read.append(args[1].name) or extract(*args)
    )
    files = {
        "a.png": image_bytes(4),
        "a.txt": b"x",
        "a.pkl": pickle.dumps(Trap()),
        "a.npy": pickle.dumps(Trap()),
    }
    assert number_of(only_record(files)) == 4
    assert not Path("trap").exists()
    assert read == ["a.png", "a.txt"]


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_compressed_shards(tmp_path, compression):
    content = tar_bytes(numbered_files(0, 4), f"w:{compression}")
    (tmp_path / "0.tar").write_bytes(content)
    assert records_of(open_path(f"{tmp_path}/0.tar")) == numbered(0, 4)
    (tmp_path / "0.tar").write_bytes(content[: len(content) // 2])
    assert records_of(TarSource(f"{tmp_path}/0.tar"))[-1] == "broken shard"


SHARD = tar_bytes(numbered_files(0, 4))
CONTENT_END = SHARD.rindex(b"text 3") + 512


@given(st.integers(0, CONTENT_END + 512))
def test_a_truncated_shard_gives_what_is_whole_and_says_so(length):
    fsspec.filesystem("memory").pipe("/cut.tar", SHARD[:length])
    *good, last = records_of(TarSource("memory://cut.tar"))
    if length >= CONTENT_END + 512:  # including the block that marks the end
        assert [*good, last] == numbered(0, 4)
    else:
        assert last == "broken shard"
        assert good == numbered(0, len(good))
        # A record takes four blocks and needs the header of the next record.
        assert len(good) >= length // (CONTENT_END // 4) - 1


@given(st.integers(0, CONTENT_END // 512 - 1), st.binary(min_size=1, max_size=512))
def test_no_damage_is_fatal(block, damage):
    start = 512 * block
    fsspec.filesystem("memory").pipe("/hit.tar", SHARD[:start] + damage + SHARD[start + len(damage) :])
    items = list(TarSource("memory://hit.tar").read_shard(0))
    assert all(isinstance(item, (Record, UnusableRecord)) for item in items)


def test_a_broken_header_is_not_the_end():
    headers = [start for start in range(0, CONTENT_END, 512) if SHARD[start + 257 : start + 262] == b"ustar"]
    for header in headers[1:]:
        content = SHARD[:header] + bytes([255]) * 100 + SHARD[header + 100 :]
        fsspec.filesystem("memory").pipe("/hit.tar", content)
        item = list(TarSource("memory://hit.tar").read_shard(0))[-1]
        assert item.reason == "broken shard"
        assert "bad checksum at byte" in str(item)
