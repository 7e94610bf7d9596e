"""Sources: what they read and reject, and that broken data is reported and never fatal."""

import pickle
import re
import sys
import tempfile
from collections import Counter

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from data_files import (
    image_bytes,
    number_of,
    numbered,
    numbered_folder,
    numbered_shards,
    numbered_tables,
    open_path,
    records_of,
    write_folder,
)
from fsspec.implementations.memory import MemoryFileSystem

from pgseg_hf.data import sources as data
from pgseg_hf.data.records import Record, UnusableRecord
from pgseg_hf.data.sources import SourceSpec, check_source
from pgseg_hf.data.tables import open_hub


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of `datasets`, in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


# Descriptions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "has no path"),
        ({"path": "a", "kind": "zip"}, "kind is 'zip', expected one of auto, folder"),
        ({"path": "a", "weight": 0}, "weight of a is 0, expected a positive"),
        ({"path": "a", "weight": float("nan")}, "weight of a is nan"),
    ],
)
def test_descriptions_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        SourceSpec(**fields)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "some/thing/else"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(path):
    with pytest.raises(ValueError, match=f"{path} does not exist"):
        open_path(path)


# Folders


def test_columns_by_name(tmp_path):
    rows = [{"where": "0.png", "caption": "wrong", "words": "right", "kinds": "cat", "labels": "m.png"}]
    (tmp_path / "0.png").write_bytes(image_bytes(7))
    source = open_path(
        write_folder(tmp_path, rows),
        image_column="where",
        caption_column="words",
        tags_column="kinds",
        mask_column="labels",
    )
    record = source[0]
    assert number_of(record) == 7
    assert (record.captions, record.tags, record.mask) == (["right"], ["cat"], tmp_path / "m.png")


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (
            {"file_name": "a", "text": "b"},
            {"caption_column": "alt"},
            "'alt'; its columns are file_name, text",
        ),
        ({"file_name": "a", "alt": "b"}, {}, r"columns are file_name, alt\. .*tags_column"),
        ({"photo": "a", "text": "b"}, {}, r"columns are photo, text\. .*image_column"),
    ],
)
def test_missing_columns_are_refused_with_those_there_are(tmp_path, row, fields, message):
    with pytest.raises(ValueError, match=message):
        open_path(write_folder(tmp_path, [row]), **fields)


def test_a_mask_alone_is_enough_where_it_is_asked_for(tmp_path):
    rows = [{"file_name": "0.png", "mask": "0.png"}]
    with pytest.raises(ValueError, match="no captions or tags"):
        open_path(write_folder(tmp_path, rows))
    assert open_path(tmp_path, mask_column="mask")[0].mask == tmp_path / "0.png"


@pytest.mark.parametrize("column", ["file_name", "mask"])
@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "a\\..\\..\\secret.png"]
)
def test_file_names_must_stay_in_the_folder(tmp_path, name, column):
    (tmp_path / "secret.png").write_bytes(image_bytes(0))
    rows = [{"file_name": "0.png", "mask": "0.png", "caption": "x"} for _ in range(2)]
    rows[0][column] = name
    source = open_path(write_folder(tmp_path / "data", rows))
    with pytest.raises(UnusableRecord, match=re.escape(f"{name!r}")) as caught:
        source[0]
    assert caught.value.reason == "bad path"
    assert number_of(source[1]) == 1


def test_a_row_without_image_is_left_out(tmp_path):
    rows = [{"file_name": name, "caption": "x"} for name in ("0.png", None, "")]
    source = open_path(write_folder(tmp_path, rows))
    for index in (1, 2):
        with pytest.raises(UnusableRecord, match="its file_name is empty"):
            source[index]


@pytest.mark.parametrize(("path", "message"), [("{}", "has no metadata file"), ("{}/x", "is not a folder")])
def test_no_metadata(tmp_path, path, message):
    with pytest.raises(ValueError, match=message):
        open_path(path.format(tmp_path), kind="folder")


def test_the_check_names_what_it_saw(tmp_path):
    rows = [{"file_name": f"{n}.png", "caption": "x" if n % 2 else ""} for n in range(6)]
    path = write_folder(tmp_path, rows)
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of 6 .*\(3 x no text, 3 x broken image\)"):
        open_path(path)
    (tmp_path / "5.png").write_bytes(image_bytes(5))
    assert len(open_path(path)) == 6


def test_the_check_looks_all_over_a_table():
    class Half:
        name = "half"
        seen = []

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            self.seen.append(index)
            return Record(image_bytes(0) if index >= 500 else b"", ["x"])

    check_source(Half(), 10)
    assert 500 <= Half.seen[-1] < 700
    Half.__len__ = lambda self: 0
    with pytest.raises(ValueError, match="half has no records"):
        check_source(Half())


# Hub datasets


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_in_the_layout_of_the_hub(tmp_path, streaming):
    path = numbered_tables(tmp_path / "data", [3, 4])
    source = open_path(path, streaming=streaming)
    assert hasattr(source, "read_shard") == streaming
    assert records_of(source) == numbered(0, 7)
    copy = pickle.loads(pickle.dumps(source))
    assert records_of(copy) == numbered(0, 7)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_image_of_a_data_set_breaks_one_record_only(tmp_path, streaming):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    images = [{"bytes": content, "path": None} for content in (b"broken", image_bytes(1), b"")]
    rows = [{"image": image, "text": "x"} for image in (*images, None)]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    source = open_path(tmp_path / "data", streaming=streaming)
    broken, whole, *absent = list(source.read_shard(0) if streaming else data.records_of(source))
    assert broken.image == b"broken" and number_of(whole) == 1
    assert [item.reason for item in absent] == ["no image"] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_paths_and_of_class_labels(tmp_path, streaming):
    (tmp_path / "0.png").write_bytes(image_bytes(9))
    names = datasets.ClassLabel(names=["cat", "dog", "sky"])
    rows = {"image_path": [str(tmp_path / "0.png")] * 2, "label": [2, -1], "labels": [[0, 1], []]}
    features = datasets.Features(
        {"image_path": datasets.Value("string"), "label": names, "labels": datasets.List(names)}
    )
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    for column, expected in (("label", [["sky"], []]), ("labels", [["cat", "dog"], []])):
        source = open_path(tmp_path / "data", streaming=streaming, tags_column=column)
        records = list(source.read_shard(0)) if streaming else [source[0], source[1]]
        assert [record.tags for record in records] == expected
        assert number_of(records[0]) == 9


def test_saved_data_sets_are_read_in_place(tmp_path, cache):
    rows = [{"image": str(number), "text": "x"} for number in range(3)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, small=dataset.select([1])).save_to_disk(tmp_path / "two")
    for path, split, length in (("one", "train", 3), ("two", "train", 3), ("two", "small", 1)):
        assert len(open_hub(str(tmp_path / path), SourceSpec("x").columns, split=split)) == length
    with pytest.raises(ValueError, match="has no split 'test'; its splits are train, small"):
        open_path(tmp_path / "two", split="test")
    assert not cache.exists()


def test_data_sets_that_cannot_be_loaded(tmp_path):
    path = numbered_tables(tmp_path / "data", [1])
    with pytest.raises(ValueError, match=r"data cannot be loaded .*split.*test.*train"):
        open_path(path, split="test", streaming=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty cannot be loaded .*data files"):
        open_path(tmp_path / "empty")


def test_a_broken_file_of_a_streamed_data_set_is_told(tmp_path):
    path = numbered_tables(tmp_path, [3, 3, 3])
    file = tmp_path / "train-001.parquet"
    file.write_bytes(file.read_bytes()[:100] + bytes(100) + file.read_bytes()[200:])
    source = open_path(path, streaming=True)
    assert records_of(source) == [*numbered(0, 3), "broken shard", *numbered(6, 3)]


def test_images_of_a_streamed_repository_are_fetched(tmp_path, monkeypatch):
    class FakeHub(MemoryFileSystem):
        protocol = "hf"
        store = {}

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("hf://"))

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", FakeHub)
    fsspec.filesystem("hf").pipe("/datasets/one/0.png", image_bytes(3))
    rows = [
        {"image": {"bytes": None, "path": f"{protocol}://datasets/one/{name}.png"}, "text": "x"}
        for protocol, name in (("hf", 0), ("hf", 1), ("memory", 0))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    items = list(open_path(tmp_path, streaming=True).read_shard(0))
    assert number_of(items[0]) == 3
    assert items[1].reason == "broken image"
    assert items[2].image == "memory://datasets/one/0.png"  # other file systems are not read


# All kinds


def stream_of(kind, folder, sizes):
    if kind == "tar":
        return open_path(numbered_shards(folder, sizes))
    return open_path(numbered_tables(folder, sizes), streaming=True)


@pytest.mark.parametrize("kind", ["tar", "table"])
def test_reading_from_a_record_on(tmp_path, kind):
    source = stream_of(kind, tmp_path, [2, 5])
    for start in range(7):
        items = list(source.read_shard(1, start))
        assert [number_of(item) for item in items] == list(range(2 + start, 7))
        assert [item.name for item in items] == [item.name for item in source.read_shard(1)][start:]


@pytest.mark.parametrize("kind", ["tar", "table"])
def test_readers_of_a_shard_do_not_disturb_each_other(tmp_path, kind):
    source = stream_of(kind, tmp_path, [40])
    first, second = source.read_shard(0), source.read_shard(0)
    got = [number_of(next(first)), number_of(next(second)), number_of(next(second))]
    del first
    assert [*got, *map(number_of, second)] == [0, 0, 1, *range(2, 40)]


def test_nothing_is_written(tmp_path, monkeypatch):
    """Folders, shards and streamed tables leave no copy in the cache, in the temporary folder or beside the data."""
    paths = [
        (numbered_folder(tmp_path / "folder", 3), {}),
        (numbered_shards(tmp_path / "tars", [3]), {}),
        (numbered_tables(tmp_path / "tables", [3]), {"streaming": True}),
    ]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(temporary)

    def files():  # ignore empty files, because `datasets` leaves an empty lock file
        return {path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size}

    before = files()
    for path, fields in paths:
        assert records_of(open_path(path, **fields)) == numbered(0, 3)
    assert files() == before


def test_kinds_are_known_by_the_path(tmp_path):
    paths = {
        numbered_folder(tmp_path / "folder", 1): "TableSource",
        numbered_tables(tmp_path / "tables", [1]): "TableSource",
        numbered_shards(tmp_path / "tars", [1]): "TarSource",
        numbered_folder(tmp_path / "x.tar", 1): "TableSource",
        "synthetic": "SceneSource",
    }
    assert Counter(type(open_path(path)).__name__ for path in paths) == Counter(paths.values())
