"""The tour of the examples on the command line, with fewer steps."""

import subprocess
import sys

import pytest
from demo_server import REPOSITORY
from PIL import Image

from pgseg_hf import load_segmenter

pytest.importorskip("accelerate", reason="needs pip install pgseg-hf[train]")


@pytest.mark.slow
def test_the_tour_leaves_images_and_a_checkpoint(tmp_path):
    command = [sys.executable, REPOSITORY / "examples" / "tour.py", "--output_dir", tmp_path, "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {"masks", "contours", "background", "groups", "affinities", "prototypes"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    for path in tmp_path.glob("*.png"):
        assert len(Image.open(path).convert("RGB").getcolors(10**7)) > 5
    assert "before: mean IoU 0." in done.stdout and "after: mean IoU 0." in done.stdout
    assert load_segmenter(str(tmp_path / "checkpoint")).model.config.npr_variant == "corrected"
