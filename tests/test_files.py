import os

import pytest
from PIL import Image

from pgseg_hf.files import folder_written_whole, remove_unfinished, write_atomically, write_image, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json({"a": 1}, path)

    def fail(file):
        file.write(b"half")
        raise OSError("disk is full")

    with pytest.raises(ValueError, match="disk is full"):
        write_atomically(path, fail)
    assert os.listdir(tmp_path) == ["a.json"]
    assert '"a": 1' in path.read_text()


def test_what_killed_runs_left_is_removed(tmp_path):
    names = []
    path = write_atomically(tmp_path / ("a" * 250), lambda file: names.extend(os.listdir(tmp_path)))
    (name,) = names
    (tmp_path / "sub").mkdir()
    old, new, other = tmp_path / "sub" / name, tmp_path / name, tmp_path / ".hidden.part"
    for file in (old, new, other):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    remove_unfinished(tmp_path)
    assert not old.exists() and new.exists() and other.exists()
    assert path.stat().st_mode == other.stat().st_mode, "temporary files are for their owner only"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), folder_written_whole(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with folder_written_whole(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert os.listdir(tmp_path / "out") == ["whole"]
    with pytest.raises(ValueError, match="out already exists"), folder_written_whole(tmp_path / "out"):
        pass


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written"):
        write_json({}, tmp_path / "file" / "a.json")
    with pytest.raises(ValueError, match="cannot be written"):
        write_json({}, tmp_path)
    with pytest.raises(ValueError, match="cannot be written"), folder_written_whole(tmp_path / "file" / "b"):
        pass


@pytest.mark.parametrize("name", ["image", "image.txt", "image.pdfx"])
def test_endings_that_are_no_image(tmp_path, name):
    with pytest.raises(ValueError, match="ending"):
        write_image(Image.new("RGB", (2, 2)), tmp_path / name)
    assert os.listdir(tmp_path) == []
