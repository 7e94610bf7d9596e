"""Where the browser's tests have to run, a missing browser fails them."""

import os
import subprocess
import sys

import pytest
from demo_server import REPOSITORY


@pytest.mark.parametrize(
    ("required", "outcome"), [("1", "RuntimeError: PGSEG_REQUIRE_BROWSER=1"), ("0", "skipped")]
)
def test_without_a_browser(required, outcome, tmp_path):
    environment = os.environ | {
        "PATH": str(tmp_path),
        "PGSEG_REQUIRE_BROWSER": required,
        "PGSEG_CHROMIUM": "",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/demo/test_browser.py"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert outcome in done.stdout
    assert done.returncode in ((2,) if required == "1" else (0, 5))  # 5: pytest's for nothing but skips
