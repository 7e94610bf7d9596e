"""Visitors' files do not stay."""

import os
import time

import pytest

pytest.importorskip("gradio", reason="needs pip install pgseg-hf[demo]")

from app import _keep_clean


def test_old_files_of_visitors_go_and_examples_stay(tmp_path):
    (tmp_path / "example.jpg").write_bytes(b"ours")
    _keep_clean(tmp_path, keep_seconds=5)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_bytes(b"theirs")
    long_ago = time.time() - 60
    for path in (tmp_path / "old" / "photo.jpg", tmp_path / "example.jpg"):
        os.utime(path, (long_ago, long_ago))
    until = time.monotonic() + 30
    while (tmp_path / "old" / "photo.jpg").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert sorted(path.name for path in tmp_path.rglob("*.jpg")) == ["example.jpg", "photo.jpg"]
    assert (tmp_path / "new" / "photo.jpg").exists() and not (tmp_path / "old" / "photo.jpg").exists()
