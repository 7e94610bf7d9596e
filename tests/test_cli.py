import functools
import http.server
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import make_photo

from pgseg_hf.cli import build_parser, main
from pgseg_hf.images import load_label_map

IMAGES = Path(__file__).parent.parent / "examples" / "images"
WORDS = ["--labels", "cat,dog"]


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def segments_of(output: str) -> list[dict]:
    """The segments of the only image in the output of `--json`."""
    (found,) = json.loads(output)["images"]
    return found["segments"]


def test_an_image(tiny_folder, photo_file, tmp_path, capsys):
    overlay, mask = tmp_path / "overlay.png", tmp_path / "mask.png"
    places = ["--model", tiny_folder, "--output", overlay, "--mask", mask]
    assert run("segment", photo_file, "--labels", "cat, dog,grass", *places) == 0
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["label", "share", "score"] and str(overlay) in last
    shares = {label: float(share.rstrip("%")) for label, share, _ in map(str.split, rows)}
    assert set(shares) == {"cat", "dog", "grass"} and sum(shares.values()) == pytest.approx(100, abs=0.2)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert Image.open(overlay).width >= 120
    values = load_label_map(mask)
    assert values.shape == (90, 120) and values.max() <= 2
    assert 100 * (values == 0).mean() == pytest.approx(shares["cat"], abs=0.1)


def test_standard_input_as_a_program(tiny_folder, photo_file, tmp_path):
    command = [sys.executable, "-m", "pgseg_hf", "segment", "-", "--labels", "cat,猫", "--model", tiny_folder]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    data = Path(photo_file).read_bytes()
    done = subprocess.run(command, input=data, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "stdin-segmented.png").exists() and b"\\u732b" in done.stdout


def test_a_web_address(tiny_folder, photo_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert run("segment", f"{address}/photo.png?size=1", *WORDS, "--model", tiny_folder) == 0
        assert run("segment", f"{address}/absent.jpg", *WORDS, "--model", tiny_folder) == 2
        server.shutdown()
    assert Image.open("photo-segmented.png").width >= 120
    assert f"{address}/absent.jpg' cannot be fetched" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("photo.png", "one of the arguments --labels --vocabulary is required"),
        ("photo.png --labels cat --vocabulary everyday", "not allowed with argument"),
        ("photo.png --labels cat --min-area 0.1", "--min-area is 0.1, but there is no --vocabulary"),
        ("photo.png --vocabulary everyday --min-area 3", "--min-area is 3.0"),
        ("photo.png --vocabulary words.txt", "@words.txt"),
        ("photo.png --vocabulary @words.txt", "words.txt cannot be read"),
        ("photo.png --labels cat --synonyms first", "'first'"),
        ("photo.png --labels cat,dog --synonyms best", "--synonyms is best, but no label has synonyms"),
        ("photo.png --labels cat,,dog", "empty"),
        ("photo.png --labels cat,background --background-threshold .5", "'background'"),
        ("photo.png --labels 'cat:0.4, background'", "'background'"),
        ("photo.png --labels cat --background-threshold 7", "--background-threshold is 7.0"),
        ("photo.png --labels cat --batch-size 0", "--batch-size is 0"),
        ("photo.png --labels cat --output image.xyz", "image.xyz"),
        ("photo.png --labels cat --window 8 --stride 9", "--stride is 9"),
        ("photo.png --labels cat --whole --stride 9", "--stride is 9, but --whole"),
        ("photo.png --labels cat --patch-weight 2", "--patch-weight is 2.0"),
        (
            "photo.png --labels cat --template 'no hole'",
            "--template must have '{}' exactly once, got 'no hole'",
        ),
        ("photo.png --labels cat --max-pixels 0", "--max-pixels is 0"),
        ("photo.png --labels cat --short-side 0", "--short-side is 0"),
        ("photo.png --labels cat --smooth 3", "--smooth is 3, but the input is not a video"),
        ("photo.png --labels cat --every 3", "--every is 3, but the input is not a video"),
        ("photo.png --labels cat --workers 3", "--workers is 3, but there is only one image"),
        ("photo.png --labels cat --workers 0", "--workers is 0, but there is only one image"),
        ("photo.png --labels cat --format yolo --workers -1", "--workers is -1"),
        ("photo.png photo.png --labels cat --mask m.png", "--mask is m.png, but"),
        ("photo.png photo.png --labels cat --overwrite", "--overwrite is given, but a folder run resumes"),
        ("photo.png --labels cat --format png --overwrite", "--overwrite is given"),
        ("photo.png --labels cat --format csv --output o.png", "--output is o.png, expected a folder"),
        ("photo.png --labels cat --output x/../photo.png", "photo.png is the input image"),
        ("photo.png --labels cat --output old.png", "old.png already exists; use --overwrite"),
        ("photo.png --labels cat --output o.png --mask x/../o.png", "--output and --mask are both"),
        ("photo.png --labels cat --mask mask.gif", "mask.gif has a format that does not keep"),
        ("no*.png --labels cat", "'no*.png' matches no images"),
        ("photo.png absent.png --labels cat", "'absent.png' cannot be read as an image file"),
        ("broken.jpg --labels cat", "broken.jpg"),
        ("photo.png - --labels cat", "'-' is one of 2"),
        ("http://127.0.0.1/a.jpg photo.png --labels cat", "'http://127.0.0.1/a.jpg' is one of 2"),
        ("ftp://example.org/a.jpg --labels cat", "ftp"),
        ("empty --labels cat", "empty contains no images"),
    ],
    ids=lambda text: text if text.count("-") > 1 else "",
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    photo_file, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("old.png").write_bytes(b"of an earlier run")
    Path("broken.jpg").write_bytes(b"\xff\xd8 no image")
    before = sorted(os.listdir())
    try:
        code = run("segment", *shlex.split(arguments), "--model", "no/such/model")
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and message in capsys.readouterr().err
    assert sorted(os.listdir()) == before and Path("old.png").read_bytes() == b"of an earlier run"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model", "no/such/folder"], "no/such/folder is not a PGSeg checkpoint"),
        (["--patch-weight", "0.5"], "or --patch-weight 0"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "int8", "--device", "meta"], "meta"),
    ],
)
def test_what_the_model_tells(tiny_folder, photo_file, tmp_path, capsys, extra, message):
    output = ["--output", tmp_path / "o.png"]
    assert run("segment", photo_file, *WORDS, "--model", tiny_folder, *output, *extra) == 2
    assert message in capsys.readouterr().err and os.listdir(tmp_path) == ["photo.png"]


def test_a_stride_alone_needs_a_checkpoint_with_a_window(tiny_folder, photo_file, tmp_path, capsys):
    asked = [*WORDS, "--stride", "8", "--output", tmp_path / "out.png"]
    assert run("segment", photo_file, *asked) == 2  # with the shipped checkpoint
    assert "--stride is 8, but" in capsys.readouterr().err and not (tmp_path / "out.png").exists()
    assert run("segment", photo_file, *asked, "--model", tiny_folder) == 0


def test_results_that_are_there(tiny_folder, photo_file, tmp_path):
    output, mask = tmp_path / "o.png", tmp_path / "mask.png"
    output.write_bytes(b"of an earlier run")
    mask.mkdir()
    arguments = ["segment", photo_file, *WORDS, "--model", tiny_folder, "--output", output, "--overwrite"]
    assert run(*arguments, "--mask", mask) == 2
    assert output.read_bytes() == b"of an earlier run", "no overlay without its mask"
    assert run(*arguments) == 0 and Image.open(output).width >= 120


@pytest.mark.parametrize("option", ["--output", "--output-dir", "--output_dir", "--outp"])
def test_options_in_all_spellings(option):
    for arguments in (
        ["segment", "a.png", "--labels", "x", option, "here", "--batch_size=3"],
        ["evaluate", "--data", "x", "--benchmark", "voc", option, "here", "--batch-size", "3"],
    ):
        args = build_parser().parse_args(arguments)
        assert (args.output, args.batch_size) == (Path("here"), 3)


def test_values_keep_their_signs():
    args = build_parser().parse_args(["segment", "a_b.png", "--labels=a_b", "--template", "a_{}"])
    assert (args.images, args.labels, args.template) == (["a_b.png"], "a_b", ["a_{}"])


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        ("segment a.png --lables x", "--lables; did you mean --labels?"),
        ("evaluate --skip_brokn", "--skip_brokn; did you mean --skip-broken?"),
        ("prepare lvis . --spilt x", "--spilt; did you mean --split?"),
    ],
)
def test_a_wrong_option_names_the_nearest(arguments, nearest, capsys):
    with pytest.raises(SystemExit) as error:
        run(*arguments.split())
    errors = capsys.readouterr().err
    assert error.value.code == 2 and nearest in errors and errors.count("\n") == 1


HEADS = '{"vision_config": {"num_attention_heads": 3}, "text_config": {"num_attention_heads": 1}}'


def test_convert(tmp_path, capsys):
    def convert(state, name, config=HEADS):
        torch.save({"model": state, "epoch": 3}, tmp_path / "released.pth")
        (tmp_path / "fields.json").write_text(config)
        code = run(
            "convert", tmp_path / "released.pth", tmp_path / name, "--config", tmp_path / "fields.json"
        )
        return code, "".join(capsys.readouterr())

    state = load_file(Path(__file__).parent / "goldens" / "released_tiny_state_dict.safetensors")
    code, said = convert(state, "converted")
    assert code == 0 and "parameters" in said
    files = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"}
    assert files <= set(os.listdir(tmp_path / "converted"))
    for name, fields, message in (
        ("converted", {}, "converted already exists"),
        ("b", {"config": '{"colour": 1}'}, "colour"),
    ):
        code, said = convert(state, name, **fields)
        assert code == 2 and message in said
    code, said = convert(state | {"logit_scale": state["logit_scale"] * float("nan")}, "b")
    assert code == 2 and "NaN or infinite values in logit_scale" in said and not (tmp_path / "b").exists()


def test_colours_and_thresholds_of_labels(tmp_path, monkeypatch, capsys):
    """Also checks that background has no score."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    shutil.copy(IMAGES / "horses.jpg", "photos/a.jpg")
    words = "horse|pony:.7, sand:blue:1, sea"
    assert run("segment", "photos/a.jpg", "--labels", words, "--json", "--mask", "mask.png") == 0
    background, horse, sand, sea = segments_of(capsys.readouterr().out)
    assert background["label"] == "background" and background["pixels"] > 0 and background["score"] is None
    assert horse["score"] >= 0.7 and sand["pixels"] == 0 and sea["pixels"] > 0
    assert Image.open("mask.png").getpalette()[:9] == [0, 0, 0, 230, 159, 0, 0, 0, 255]

    arguments = ["segment", "photos", "--output", "out", "--json", "--labels"]
    assert run(*arguments, words, "--format", "coco-panoptic") == 0
    again = segments_of(capsys.readouterr().out)
    assert again[0]["score"] is None and again[1]["score"] == pytest.approx(horse["score"])
    mask = Path("out/masks/a.png")
    assert np.array_equal(load_label_map(mask), load_label_map("mask.png"))
    assert Image.open(mask).getpalette() == Image.open("mask.png").getpalette()
    categories = json.loads(Path("out/coco-panoptic/panoptic.json").read_text())["categories"]
    assert [category["color"] for category in categories][:2] == [[230, 159, 0], [0, 0, 255]]
    assert run(*arguments, words.replace("blue", "red")) == 2
    assert "colours.sand was '#0000ff' and is '#ff0000'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "option", "values"),
    [
        ("horse|zebra|tulip, sand", "--synonyms", ("average", "best")),
        ("horse, sand, sea", "--patch-weight", ("0", "1")),
        ("horse, sand, sea", "--template", ("a photo of a {}.", "no {}")),
        ("horse, sand, sea", "--short-side", ("64", "128")),
    ],
)
def test_options_reach_the_model(tmp_path, capsys, labels, option, values):
    """Uses the shipped checkpoint, because it scores patches."""
    photo = tmp_path / "a.png"
    Image.open(IMAGES / "horses.jpg").resize((160, 120)).save(photo)
    found = []
    for value in values:
        arguments = [
            "--labels",
            labels,
            "--json",
            option,
            value,
            "--overwrite",
            "--output",
            tmp_path / "o.png",
        ]
        assert run("segment", photo, *arguments) == 0
        found.append(segments_of(capsys.readouterr().out))
    assert found[0][0]["label"] == found[1][0]["label"] == "horse" and found[0] != found[1]


def test_a_vocabulary_names_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("segment", IMAGES / "horses.jpg", "--vocabulary", "everyday", "--json") == 0
    found = segments_of(capsys.readouterr().out)
    areas = [segment["area"] for segment in found]
    assert {"horse", "sand", "sea"} <= {segment["label"] for segment in found}
    assert areas == sorted(areas, reverse=True) and len(areas) < 10 and min(areas) > 0

    for name in ("horses.jpg", "pizza.jpg"):
        shutil.copy(IMAGES / name, name)
    Path("words.txt").write_text("pizza, horse\nsea, sand, computer\n")
    arguments = ["--vocabulary", "@words.txt", "--min-area", "0.1", "--json", "--format", "csv"]
    assert run("segment", "horses.jpg", "pizza.jpg", *arguments) == 0
    horses, pizza = (each["segments"] for each in json.loads(capsys.readouterr().out)["images"])
    assert {segment["label"]: segment["value"] for segment in horses} == {"horse": 1, "sea": 2, "sand": 3}
    assert (pizza[0]["label"], pizza[0]["value"]) == ("pizza", 0)
    assert len(Path("segmented/segments.csv").read_text().splitlines()) == 1 + 3 + len(pizza)


@pytest.mark.parametrize(
    "extra", [["--labels", "cat,cat"], ["--labels", "cat", "--window", "8", "--stride", "16"]]
)
def test_a_folder_with_bad_options_leaves_nothing_behind(tiny_folder, tmp_path, capsys, extra):
    (tmp_path / "photos").mkdir()
    make_photo().save(tmp_path / "photos" / "a.png")
    assert (
        run("segment", tmp_path / "photos", "--model", tiny_folder, "--output", tmp_path / "out", *extra) == 2
    )
    assert "error" in capsys.readouterr().err and not (tmp_path / "out").exists()
