"""A missing browser fails the browser tests if they are required."""

import runpy
from pathlib import Path

import pytest


@pytest.mark.parametrize(("required", "outcome"), [("1", RuntimeError), ("0", pytest.skip.Exception)])
def test_without_a_browser(required, outcome, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PGSEG_REQUIRE_BROWSER", required)
    monkeypatch.setenv("PGSEG_CHROMIUM", "")
    with pytest.raises(outcome):
        runpy.run_path(str(Path(__file__).with_name("test_browser.py")))
