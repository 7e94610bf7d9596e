import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import make_photo
from transformers import pipeline

from pgseg_hf import PGSegModel, Segmenter
from pgseg_hf.cli import build_parser, main
from pgseg_hf.files import write_image
from pgseg_hf.images import load_label_map
from pgseg_hf.visualization import indexed_png


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
        "cat,猫",
        "--model",
        tiny_folder,
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "photo-segmented.png").exists() and "\\u732b" in result.stdout


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--labels", "cat,,dog"], "empty"),
        (["--labels", "cat, cat"], "cat"),
        (["--labels", "cat", "--model", "no/such/folder"], "no PGSeg checkpoint"),
        (["--labels", "cat", "--background-threshold", "7"], "7.0"),
        (["--labels", "cat,background", "--background-threshold", ".5"], "labels have 'background', and"),
        (["--labels", "cat", "--batch-size", "0"], "--batch-size is 0"),
        (["--labels", "cat", "--output", "picture.xyz"], "ending"),
        (["--labels", "cat", "--window", "8", "--stride", "9"], "--stride is 9"),
        (
            ["--labels", "cat", "--whole", "--stride", "9"],
            "--stride is 9, but with --whole there is no window",
        ),
        (["--labels", "cat", "--patch-weight", "2"], "--patch-weight is 2.0"),
        (["--labels", "cat", "--patch-weight", "0.5"], "or --patch-weight 0"),
        (
            ["--labels", "cat", "--template", "no hole"],
            "--template must hold '{}' exactly once, got 'no hole'",
        ),
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


def test_a_web_address_is_a_picture_as_everywhere(tiny_folder, photo_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        arguments = ["--labels", "cat,dog", "--model", tiny_folder, "--mask"]
        assert run("segment", f"{address}/photo.png?size=1", *arguments, "web.png") == 0
        assert run("segment", photo_file, *arguments, "file.png", "--output", "o.png") == 0
        assert Path("web.png").read_bytes() == Path("file.png").read_bytes()
        assert Path("photo-segmented.png").read_bytes() == Path("o.png").read_bytes()
        assert run("segment", f"{address}/absent.jpg", *arguments, "m.png") == 2
        server.shutdown()
    assert run("segment", "ftp://example.org/a.jpg", *arguments, "m.png") == 2
    errors = capsys.readouterr().err
    segment = pipeline("open-vocabulary-segmentation", model=tiny_folder)
    for source in (f"{address}/absent.jpg", "ftp://example.org/a.jpg"):
        for segmenter in (segment, Segmenter(segment.model, segment.processor)):
            with pytest.raises(ValueError) as error:
                segmenter(source, ["cat", "dog"])
            assert str(error.value).partition(": ")[0] in errors


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
    left = output / "masks" / "sub" / ".pgseg-x1.part"
    left.write_bytes(b"half a mask")
    os.utime(left, (0, 0))
    assert run(*arguments) == 0
    assert "1 pictures segmented, 3 done before, 0 broken" in capsys.readouterr().out
    assert (output / "masks" / "a.png.png").stat().st_mtime_ns == stamp
    assert not left.exists(), "what a killed run left behind"
    assert json.loads((output / "segmentation.json").read_text())["labels"] == ["cat", "dog"]

    assert run(*arguments[:3], "cat,horse", *arguments[4:]) == 2
    assert "labels = ['cat', 'dog'] there and ['cat', 'horse'] now" in capsys.readouterr().err


def test_a_folder_is_continued_with_the_same_contents_only(tiny_folder, tmp_path, capsys):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for number in range(2):
        make_photo(seed=number).save(photos / f"{number}.png")
    elsewhere = Path(shutil.copytree(tiny_folder, tmp_path / "elsewhere"))

    def again(model):
        code = run("segment", photos, "--labels", "cat,dog", "--model", model, "--output", output)
        return code, capsys.readouterr()

    assert again(tiny_folder)[0] == 0
    assert "0 pictures segmented, 2 done before" in again(elsewhere)[1].out, "a path is no content"
    # Nor is it one that only transformers saved it.
    PGSegModel.from_pretrained(elsewhere).save_pretrained(elsewhere)
    assert "auto_map" in json.loads((elsewhere / "config.json").read_text())
    assert "0 pictures segmented, 2 done before" in again(elsewhere)[1].out
    # The same weights in the older format are the same; the folder holds no safetensors then.
    torch.save(load_file(elsewhere / "model.safetensors"), elsewhere / "pytorch_model.bin")
    (elsewhere / "model.safetensors").unlink()
    assert "0 pictures segmented, 2 done before" in again(elsewhere)[1].out

    stamp = (output / "masks" / "1.png").stat().st_mtime_ns
    picture = photos / "0.png"
    times = picture.stat()
    make_photo(seed=5).save(picture)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    out = again(tiny_folder)[1].out
    assert "1 pictures segmented, 1 done before, 0 broken, 1 had changed since they were done" in out
    assert (output / "masks" / "1.png").stat().st_mtime_ns == stamp
    (output / "overlays" / "1.png").unlink()
    assert "1 pictures segmented, 1 done before" in again(tiny_folder)[1].out

    picture.write_bytes(b"no picture")
    code, captured = again(tiny_folder)
    assert code == 1 and "0 pictures segmented, 1 done before, 1 broken, in" in captured.out
    assert "its mask is of what was there before" in captured.err
    make_photo(seed=5).save(picture)

    weights = torch.load(elsewhere / "pytorch_model.bin")
    weights["logit_scale"] += 1e-3
    torch.save(weights, elsewhere / "pytorch_model.bin")
    code, captured = again(elsewhere)
    assert code == 2 and re.search("weights = '[0-9a-f]{16}' there and '[0-9a-f]{16}' now", captured.err)
    processor = json.loads((elsewhere / "processor_config.json").read_text())
    shutil.copy(Path(tiny_folder) / "model.safetensors", elsewhere)
    (elsewhere / "processor_config.json").write_text(json.dumps({**processor, "top_k": 1}))
    code, captured = again(elsewhere)
    assert code == 2 and f"processor top_k = {processor['top_k']} there and 1 now" in captured.err
    (output / "segmentation.json").unlink()
    assert "2 pictures segmented, 0 done before" in again(elsewhere)[1].out, "masks of nobody knows what"


def test_pictures_of_nearly_one_name_have_masks_of_their_own(tiny_folder, tmp_path, capsys):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    names = ["a.jpg", "a.png", "a.jpg.png", "a.jpg.png.webp", "b.jpg", "C.png", "c.bmp"]
    for number, name in enumerate(names):
        make_photo(30 + number, 20, seed=number).save(photos / name)
    assert run("segment", photos, "--labels", "cat,dog", "--model", tiny_folder, "--output", output) == 0
    assert "7 pictures segmented" in capsys.readouterr().out
    sizes = {path.name: Image.open(path).width for path in (output / "masks").iterdir()}
    assert sizes == {
        "a.jpg.png": 30,
        "a.png.png": 31,
        "a.jpg.png.png": 32,
        "a.jpg.png.webp.png": 33,
        "b.png": 34,
        "C.png.png": 35,
        "c.bmp.png": 36,
    }


def test_results_above_the_pictures(tiny_folder, tmp_path, capsys):
    photos = tmp_path / "album" / "photos"
    photos.mkdir(parents=True)
    make_photo().save(photos / "a.png")
    arguments = ["segment", photos, "--labels", "cat,dog", "--model", tiny_folder, "--output"]
    assert run(*arguments, tmp_path / "album") == 0
    assert (tmp_path / "album" / "masks" / "a.png").is_file()
    (tmp_path / "album" / "masks" / "more").mkdir()
    make_photo().save(tmp_path / "album" / "masks" / "more" / "b.png")
    capsys.readouterr()
    arguments[1] = tmp_path / "album" / "masks" / "more"
    assert run(*arguments, tmp_path / "album") == 2
    assert "would lie among the pictures of" in capsys.readouterr().err


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
    for name in ("mask.xyz", "mask.gif", "mask.webp", "mask.avif", "mask.jpg", "mask.bmp"):
        assert run(*arguments, "--mask", tmp_path / name) == 2
        assert f"{name} would not keep the numbers of a mask's labels" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["photo.png"]
    assert run(*arguments[:-1], photo_file) == 2
    assert "picture itself" in capsys.readouterr().err
    assert run(*arguments, "--mask", tmp_path / "x" / ".." / "o.png") == 2
    assert "--output and --mask are both" in capsys.readouterr().err
    (tmp_path / "o.png").write_bytes(b"of an earlier run")
    assert run(*arguments, "--model", "no/such/model") == 2
    assert "o.png exists already; --overwrite replaces it" in capsys.readouterr().err
    (tmp_path / "mask.png").mkdir()
    assert run(*arguments, "--mask", tmp_path / "mask.png", "--overwrite") == 2
    assert (tmp_path / "o.png").read_bytes() == b"of an earlier run"
    assert run(*arguments, "--overwrite") == 0
    assert Image.open(tmp_path / "o.png").width >= 120


@pytest.mark.parametrize("name", ["m.png", "m.tif"])
@pytest.mark.parametrize("num_labels", [3, 300])
def test_masks_keep_their_numbers(tmp_path, name, num_labels):
    label_map = np.arange(num_labels)[::-1].reshape(3, -1)
    path = write_image(indexed_png(label_map, num_labels), tmp_path / name)
    assert load_label_map(path).tolist() == label_map.tolist()


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
        (["segment", "a.png", "--lables", "x"], "--lables; did you mean --labels?"),
        (["evaluate", "--benchmrk", "voc"], "--benchmrk; did you mean --benchmark?"),
        (["evaluate", "--skip_brokn"], "--skip_brokn; did you mean --skip-broken?"),
        (["prepare", "lvis", ".", "--spilt", "x"], "--spilt; did you mean --split?"),
    ],
)
def test_a_wrong_option_names_the_nearest(arguments, nearest, capsys):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    errors = capsys.readouterr().err
    assert error.value.code == 2 and f"there is no option {nearest}" in errors and errors.count("\n") == 1


def test_a_stride_alone_needs_a_checkpoint_with_a_window(tiny_folder, photo_file, tmp_path, capsys):
    asked = ["--labels", "cat, dog", "--stride", "8", "--output", tmp_path / "out.png"]
    assert run("segment", photo_file, *asked) == 2  # with the checkpoint that ships
    assert "--stride is 8, but" in capsys.readouterr().err and not (tmp_path / "out.png").exists()
    assert run("segment", photo_file, *asked, "--model", tiny_folder) == 0


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
    state["logit_scale"] = state["logit_scale"] * float("nan")
    torch.save({"model": state}, tmp_path / "diverged.pth")
    assert (
        run("convert", tmp_path / "diverged.pth", tmp_path / "b", "--config", tmp_path / "overrides.json")
        == 2
    )
    assert "NaN or infinite values in logit_scale" in capsys.readouterr().err
    (tmp_path / "overrides.json").write_text('{"colour": 1}')
    assert (
        run("convert", tmp_path / "released.pth", tmp_path / "b", "--config", tmp_path / "overrides.json")
        == 2
    )
    assert "colour" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_segmenting_needs_no_extra(tmp_path):
    extras = "accelerate datasets evaluate pyarrow pandas gradio matplotlib spacy onnx onnxruntime peft pycocotools"
    extras += " cv2 av"
    photo = make_photo()
    photo.save(tmp_path / "photo.png")
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({extras.split()}))\n"
        "from pgseg_hf.cli import main\nmain(['segment', 'photo.png', '--labels', 'cat, dog'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "photo-segmented.png").is_file()


@pytest.mark.parametrize(
    ("labels", "content", "message"),
    [
        ("labels.txt", "cat\ndog\n", "'labels.txt', the name of a file; expected @labels.txt"),
        ("@absent.txt", None, "absent.txt cannot be read: No such file"),
        ("@labels.json", '{"cat": 1}', 'labels.json cannot be read, expected ["cat", "dog"]'),
        ("@labels.json", "[1]", "labels[0] must be a string"),
        ("@labels.json", '{"labels": ["cat"], "synonyms": {"dog": ["hound"]}}', "synonyms are for 'dog'"),
        ("@labels.json", "cat, dog", "labels.json is no JSON"),
        ("@labels.txt", "cat\ndog\n\nCat\n", "labels.txt: labels[2] 'Cat' repeats labels[0]"),
        ("@labels.txt", "", "labels.txt: no labels"),
        ("cat; dog", None, "labels has 'cat; dog'; labels are separated by commas, 'cat, dog'"),
        ("@labels.txt", "cat;dog", "labels are separated by commas, 'cat,dog'"),
        ("cat|kitten|, dog", None, "of labels and synonyms together, labels[2] is empty"),
        ("cat|dog, dog|hound", None, "labels[2] 'dog' repeats labels[1]"),
        ("wall|background, cat, background", None, "'background' repeats"),
        ("cat:redd", None, "what follows ':' in the label 'cat:redd' is 'redd', expected a threshold"),
        ("@labels.txt", "cat:7\ndog", "labels.txt: the threshold of the label 'cat:7' is '7'"),
        ("@labels.json", '{"labels": ["cat"], "colours": {"dog": "red"}}', "colours are for 'dog'"),
        (
            "@labels.json",
            '{"labels": ["cat"], "thresholds": {"cat": 7}}',
            "labels.json: the threshold of the",
        ),
        (
            "@labels.json",
            '{"labels": ["cat"], "colors": {"cat": "red"}}',
            "it has 'colors', expected labels, syn",
        ),
        (
            "@labels.json",
            '{"labels": ["cat"], "synonyms": {"cat": "kitten"}}',
            "synonyms have 'kitten', expected a",
        ),
        ("cat:0.4, background", None, "labels have 'background', and a threshold makes a background"),
    ],
)
def test_wrong_labels_are_told_before_a_model_is_loaded(
    photo_file, tmp_path, capsys, monkeypatch, labels, content, message
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(labels.removeprefix("@")).write_text(content)
    before = sorted(os.listdir(tmp_path))
    assert run("segment", photo_file, "--labels", labels, "--model", "no/such/model") == 2
    assert message in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --labels --vocabulary is required"),
        (["--labels", "cat", "--vocabulary", "everyday"], "not allowed with argument"),
        (["--labels", "cat", "--min-area", "0.1"], "--min-area is 0.1, but there is no --vocabulary"),
        (["--vocabulary", "everyday", "--min-area", "3"], "--min-area is 3.0, expected"),
        (["--vocabulary", "words.txt"], "expected @words.txt"),
        (["--vocabulary", "@words.txt"], "words.txt cannot be read"),
        (["--labels", "cat", "--synonyms", "first"], "invalid choice: 'first'"),
    ],
)
def test_wrong_words_are_told_before_a_model_is_loaded(photo_file, capsys, arguments, message):
    with suppress(SystemExit):
        assert run("segment", photo_file, *arguments, "--model", "no/such/model") == 2
    assert message in capsys.readouterr().err


PHOTOS = Path(__file__).parent.parent / "examples" / "images"


def test_colours_and_thresholds_of_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("labels.json").write_text(
        '{"labels": ["horse", "sand", "sea"], "synonyms": {"horse": ["pony"]}, "colours": {"sand": "#00F"}, '
        '"thresholds": {"horse": 0.7, "sand": 1}}'
    )
    words = "horse|pony:.7, sand:blue:1, sea"
    for labels, name in ((words, "line"), ("@labels.json", "file")):
        arguments = [
            PHOTOS / "horses.jpg",
            "--labels",
            labels,
            "--json",
            "--mask",
            f"{name}.png",
            "--overwrite",
        ]
        command = [sys.executable, "-m", "pgseg_hf", "segment", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (found,) = json.loads(done.stdout)["images"]
        background, horse, sand, sea = found["segments"]
        assert background["label"] == "background" and background["pixels"] > 0
        assert horse["score"] >= 0.7 and sand["pixels"] == 0 and sea["pixels"] > 0
        assert Image.open(f"{name}.png").getpalette()[:9] == [0, 0, 0, 230, 159, 0, 0, 0, 255]
    assert Path("line.png").read_bytes() == Path("file.png").read_bytes()

    Path("photos").mkdir()
    shutil.copy(PHOTOS / "horses.jpg", "photos/a.jpg")
    arguments = ["segment", "photos", "--output", "out", "--labels"]
    assert run(*arguments, words, "--format", "coco-panoptic") == 0
    mask = Path("out/masks/a.png")
    assert np.array_equal(load_label_map(mask), load_label_map("line.png"))
    assert Image.open(mask).getpalette() == Image.open("line.png").getpalette()
    categories = json.loads(Path("out/coco-panoptic/panoptic.json").read_text())["categories"]
    assert [category["color"] for category in categories][:2] == [[230, 159, 0], [0, 0, 255]]
    assert run(*arguments, words.replace("blue", "red")) == 2
    assert "options colours sand = '#0000ff' there and '#ff0000' now" in capsys.readouterr().err


def test_the_best_of_synonyms(tiny_folder, photo_file, tmp_path, capsys):
    found = {}
    for rule in ("average", "best"):
        arguments = ["--labels", "cat|zebra|tulip, dog", "--model", tiny_folder, "--synonyms", rule, "--json"]
        assert run("segment", photo_file, *arguments, "--output", tmp_path / f"{rule}.png") == 0
        found[rule] = json.loads(capsys.readouterr().out)["images"][0]["segments"]
    assert [segment["label"] for segment in found["best"]] == ["cat", "dog"]
    assert found["best"] != found["average"]


def test_the_weight_of_patches(tmp_path, capsys):
    """By the checkpoint that ships, which names patches."""
    found = []
    for weight in ("0", "1"):
        arguments = ["--labels", "horse, sand, sea", "--patch-weight", weight, "--json"]
        assert run("segment", PHOTOS / "horses.jpg", *arguments, "--output", tmp_path / f"{weight}.png") == 0
        found.append(json.loads(capsys.readouterr().out)["images"][0]["segments"])
    assert found[0] != found[1]


def test_a_vocabulary_names_what_is_there(tmp_path):
    """By the checkpoint that ships, on photographs."""
    command = [sys.executable, "-m", "pgseg_hf", "segment"]
    words = ["--vocabulary", "everyday", "--json"]
    done = subprocess.run(
        [*command, PHOTOS / "horses.jpg", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["images"]
    areas = [segment["area"] for segment in found["segments"]]
    assert {"horse", "sand", "sea"} <= {segment["label"] for segment in found["segments"]}
    assert areas == sorted(areas, reverse=True) and len(areas) < 10 and min(areas) > 0

    for name in ("horses.jpg", "pizza.jpg"):
        shutil.copy(PHOTOS / name, tmp_path)
    (tmp_path / "words.txt").write_text("pizza, horse\nsea, sand, computer\n")
    arguments = ["horses.jpg", "pizza.jpg", "--vocabulary", "@words.txt", "--min-area", "0.1", "--json"]
    arguments += ["--format", "csv", "--format", "coco-panoptic"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    horses, pizza = json.loads(done.stdout)["images"]
    assert {segment["label"]: segment["value"] for segment in horses["segments"]} == {
        "horse": 1,
        "sea": 2,
        "sand": 3,
    }
    assert pizza["segments"][0]["label"] == "pizza" and pizza["segments"][0]["value"] == 0
    assert len((tmp_path / "segmented" / "segments.csv").read_text().splitlines()) == 1 + 3 + len(
        pizza["segments"]
    )
    panoptic = json.loads((tmp_path / "segmented" / "coco-panoptic" / "panoptic.json").read_text())
    assert [category["name"] for category in panoptic["categories"]] == [
        "pizza",
        "horse",
        "sea",
        "sand",
        "computer",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "cat|kitten, dog\n\ngrass\n"),
        ("labels.txt", "\ufeffcat | kitten,\r\ndog,\r\ngrass"),
        ("labels.json", '["cat|kitten", "dog", "grass"]'),
        ("labels.json", '{"labels": ["cat", "dog", "grass"], "synonyms": {"cat": ["kitten"]}}'),
    ],
)
def test_labels_of_a_file(tiny_folder, photo_file, tmp_path, capsys, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content, encoding="utf-8")
    shared = ["--model", tiny_folder, "--overwrite", "--output", "o.png", "--mask"]
    assert run("segment", photo_file, "--labels", f"@{name}", *shared, "file.png") == 0
    assert run("segment", photo_file, "--labels", "cat|kitten,dog,grass", *shared, "line.png") == 0
    assert Path("file.png").read_bytes() == Path("line.png").read_bytes()
    words = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert words == {"label", "cat", "dog", "grass", "photo.png:"}, "a label is called by its first word"
