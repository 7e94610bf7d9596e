import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import make_photo

from pgseg_hf.cli import main


def run(*arguments: str) -> int:
    return main([str(argument) for argument in arguments])


def test_segment_a_picture(tiny_folder, photo_file, tmp_path, capsys):
    overlay, mask = tmp_path / "overlay.png", tmp_path / "mask.png"
    code = run(
        "segment",
        photo_file,
        "--labels",
        "cat, dog,grass",
        "--model",
        tiny_folder,
        "--output",
        overlay,
        "--mask",
        mask,
    )
    assert code == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == ["label", "share", "score"]
    assert {line.split()[0] for line in lines[1:4]} == {"cat", "dog", "grass"}
    shares = [float(line.split()[1].rstrip("%")) for line in lines[1:4]]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)
    assert str(overlay) in lines[-1]
    assert Image.open(overlay).width >= 120
    values = np.asarray(Image.open(mask))
    assert values.shape == (90, 120) and values.max() <= 2
    assert 100 * (values == 0).mean() == pytest.approx(
        float(next(line for line in lines if line.startswith("cat")).split()[1].rstrip("%")), abs=0.1
    )


def test_segment_as_a_program(tiny_folder, photo_file, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pgseg_hf",
        "segment",
        photo_file,
        "--labels",
        "cat,dog",
        "--model",
        tiny_folder,
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "photo-segmented.png").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--labels", "cat,,dog"], "empty"),
        (["--labels", "cat, cat"], "cat"),
        (["--labels", "cat", "--model", "no/such/folder"], "no PGSeg checkpoint"),
        (["--labels", "cat", "--background-threshold", "7"], "7.0"),
        (["--labels", "cat", "--batch-size", "0"], "batch_size is 0"),
        (["--labels", "cat", "--output", "picture.xyz"], "ending"),
        (["--labels", "cat", "--window", "8", "--stride", "9"], "stride is 9"),
        (["--labels", "cat", "--template", "no hole"], "no hole"),
    ],
)
def test_clear_errors(tiny_folder, photo_file, tmp_path, capsys, monkeypatch, extra, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    arguments = ["segment", photo_file, *([] if "--model" in extra else ["--model", tiny_folder]), *extra]
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert "error" in captured.err and message in captured.err
    assert sorted(os.listdir(tmp_path)) == before


def test_missing_and_broken_pictures(tiny_folder, tmp_path, capsys):
    assert run("segment", tmp_path / "absent.jpg", "--labels", "cat", "--model", tiny_folder) == 2
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    assert run("segment", tmp_path / "broken.jpg", "--labels", "cat", "--model", tiny_folder) == 2
    errors = capsys.readouterr().err
    assert "absent.jpg" in errors and "broken.jpg" in errors


def test_a_folder_is_continued_and_broken_pictures_are_reported(tiny_folder, tmp_path, capsys):
    photos, output = tmp_path / "photos", tmp_path / "out"
    (photos / "sub").mkdir(parents=True)
    make_photo(seed=0).save(photos / "a.png")
    make_photo(seed=1).save(photos / "a.jpg")
    make_photo(seed=2).save(photos / "sub" / "b.webp")
    (photos / "c.png").write_bytes(b"")
    (photos / "notes.txt").write_text("no picture")
    arguments = ["segment", photos, "--labels", "cat,dog", "--model", tiny_folder, "--output", output]
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert "c.png" in captured.err and "3 pictures segmented, 0 done before, 1 broken" in captured.out
    masks = sorted(str(path.relative_to(output)) for path in (output / "masks").rglob("*.png"))
    assert masks == ["masks/a.jpg.png", "masks/a.png.png", "masks/sub/b.png"]

    make_photo(seed=3).save(photos / "c.png")
    stamp = (output / "masks" / "a.png.png").stat().st_mtime_ns
    assert run(*arguments) == 0
    assert "1 pictures segmented, 3 done before, 0 broken" in capsys.readouterr().out
    assert (output / "masks" / "a.png.png").stat().st_mtime_ns == stamp
    assert json.loads((output / "segmentation.json").read_text())["labels"] == ["cat", "dog"]

    assert run(*arguments[:3], "cat,horse", *arguments[4:]) == 2
    assert "labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra", [["--labels", "cat,cat"], ["--labels", "cat", "--window", "8", "--stride", "16"]]
)
def test_a_folder_with_bad_options_leaves_nothing_behind(tiny_folder, tmp_path, capsys, extra):
    photos = tmp_path / "photos"
    photos.mkdir()
    make_photo().save(photos / "a.png")
    assert run("segment", photos, "--model", tiny_folder, "--output", tmp_path / "out", *extra) == 2
    assert "error" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_results_inside_the_folder_are_not_segmented(tiny_folder, tmp_path, capsys):
    make_photo().save(tmp_path / "a.png")
    arguments = [
        "segment",
        tmp_path,
        "--labels",
        "cat,dog",
        "--model",
        tiny_folder,
        "--output",
        tmp_path / "out",
    ]
    assert run(*arguments) == 0 and run(*arguments) == 0
    assert "0 pictures segmented, 1 done before" in capsys.readouterr().out
    assert run(*arguments[:-1], tmp_path) == 2


def test_a_mask_that_cannot_be_written_leaves_no_overlay(tiny_folder, photo_file, tmp_path, capsys):
    arguments = [
        "segment",
        photo_file,
        "--labels",
        "cat",
        "--model",
        tiny_folder,
        "--output",
        tmp_path / "o.png",
    ]
    assert run(*arguments, "--mask", tmp_path / "mask.xyz") == 2
    assert os.listdir(tmp_path) == ["photo.png"]
    assert run(*arguments[:-1], photo_file) == 2
    assert "picture itself" in capsys.readouterr().err


def test_no_such_device(tiny_folder, photo_file, capsys):
    assert run("segment", photo_file, "--labels", "cat", "--model", tiny_folder, "--device", "abacus") == 2
    assert "abacus" in capsys.readouterr().err


def test_convert(tmp_path, capsys):
    state = load_file(Path(__file__).parent / "goldens" / "released_tiny_state_dict.safetensors")
    torch.save({"model": state, "epoch": 3}, tmp_path / "released.pth")
    (tmp_path / "overrides.json").write_text(
        json.dumps({"vision_config": {"num_attention_heads": 3}, "text_config": {"num_attention_heads": 1}})
    )
    output = tmp_path / "converted"
    code = run("convert", tmp_path / "released.pth", output, "--config", tmp_path / "overrides.json")
    assert code == 0
    assert {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "README.md",
    } <= set(os.listdir(output))
    assert "parameters" in capsys.readouterr().out
    assert run("convert", tmp_path / "released.pth", output) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "overrides.json").write_text('{"colour": 1}')
    assert (
        run("convert", tmp_path / "released.pth", tmp_path / "b", "--config", tmp_path / "overrides.json")
        == 2
    )
    assert "colour" in capsys.readouterr().err and not (tmp_path / "b").exists()
