"""`pgseg evaluate` and `pgseg prepare` on the command line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import image_bytes
from mask_folders import make_folder
from PIL import Image
from safetensors.torch import load_file

from pgseg_hf import DEFAULT_CHECKPOINT, __version__, evaluation
from pgseg_hf.cli import main
from pgseg_hf.evaluation import baselines, command, running
from pgseg_hf.evaluation.arguments import parse_thresholds
from pgseg_hf.evaluation.benchmarks.catalogue import read_class_names
from pgseg_hf.evaluation.reports import cell, to_markdown

SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate_pgseg.py"
LABELS = {"labels": ["sky", "road", "tree"], "background": 0}


def masks_of(count=3):
    rng = np.random.default_rng(0)
    return [
        np.kron(rng.integers(0, 3, (2, 2)), np.ones((20 + number, 24), int)).astype(int)
        for number in range(count)
    ]


@pytest.fixture
def data(tmp_path):
    return make_folder(tmp_path / "data", masks_of(), LABELS)


@pytest.fixture
def evaluate(tiny_folder, tiny_segmenter, data, tmp_path, monkeypatch):
    """Runs the command on the small folder; returns the exit code and the written results."""
    load = command.load_segmenter

    def load_others(checkpoint, device, dtype):
        is_ready = (checkpoint, dtype) == (tiny_folder, torch.float32)
        return tiny_segmenter if is_ready else load(checkpoint, device=device, dtype=dtype)

    monkeypatch.setattr(command, "load_segmenter", load_others)

    def run(*extra, checkpoint=tiny_folder, benchmark="folder", path=data, output="out"):
        folder = tmp_path / output
        code = main(
            [
                *("evaluate", checkpoint, "--benchmark", benchmark, "--data", str(path)),
                *("--device", "cpu", "--output", str(folder), *map(str, extra)),
            ]
        )
        path = folder / "results.json"
        return code, json.loads(path.read_text(), parse_constant=pytest.fail) if path.is_file() else None

    return run


def test_results_with_all_that_they_depend_on(evaluate, tiny_folder, tmp_path, capsys):
    code, content = evaluate()
    assert code == 0
    settings = content["settings"]
    assert settings["weights_sha256"] == running.checkpoint_hash(tiny_folder)
    assert settings["protocol"]["name"] == "checkpoint"
    sizes = {"shortest_edge": 64, "longest_edge": 256, "window": 64, "stride": 32}
    assert sizes.items() <= settings["protocol"].items()
    assert settings["pgseg_hf"] == __version__ and {"torch", "transformers", "python"} <= set(settings)
    assert settings["seconds"] > 0 and settings["processes"] == 1 and settings["dtype"] == "float32"
    assert settings["background_threshold"] is None and settings["device"].startswith("cpu")
    assert set(content["iou"]) == set(LABELS["labels"]) and content["images"] == 3
    model = content["rows"]["model"]
    assert set(model) == {"mean_iou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou"}
    present = [value for value in content["iou"].values() if value is not None]
    assert model["mean_iou"] == pytest.approx(np.mean(present))
    assert content["mean_iou_absent_as_zero"] == pytest.approx(sum(present) / 3)
    markdown = (tmp_path / "out" / "results.md").read_text()
    for text in (f"{model['mean_iou']:.4f}", settings["weights_sha256"], "protocol", "| sky |", __version__):
        assert text in markdown
    out = capsys.readouterr().out
    assert f"{model['mean_iou']:.4f}" in out and f"3 images in {settings['seconds']} s" in out

    # The same command resumes; a different one is refused.
    stamp = (tmp_path / "out" / "parts" / "000000.npz").stat().st_mtime_ns
    code, again = evaluate()
    assert code == 0 and again["rows"] == content["rows"]
    assert (content["reused"], again["reused"]) == (0, 3)
    assert "3 images, 3 of them from an earlier run, in" in capsys.readouterr().out
    assert evaluate("--overwrite")[1]["reused"] == 3, "results of the same settings are kept"
    assert (tmp_path / "out" / "parts" / "000000.npz").stat().st_mtime_ns == stamp
    code, _ = evaluate("--background_threshold", 0.5)
    assert code == 2 and "; background_threshold was None and is 0.5. Choose" in capsys.readouterr().err
    code, other = evaluate("--background_threshold", 0.5, "--overwrite")
    assert code == 0 and other["settings"]["background_threshold"] == 0.5
    assert other["settings"]["protocol"]["name"] == "checkpoint, changed"


def test_nothing_is_reused_that_has_changed(evaluate, data, tmp_path, tiny_folder, capsys):
    checkpoint = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(checkpoint / "model.safetensors")
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert evaluate("--synonyms", "merge", checkpoint=str(checkpoint))[0] == 0
    # A copy of the data in another folder counts as the same.
    elsewhere = shutil.copytree(data, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    code, again = evaluate("--synonyms", "merge", checkpoint=tiny_folder, path=elsewhere)
    assert code == 0 and again["reused"] == 3

    def is_refused(file, change, name, checkpoint=tiny_folder):
        before = file.read_bytes()
        change(file)
        capsys.readouterr()
        assert evaluate("--synonyms", "merge", checkpoint=str(checkpoint))[0] == 2
        assert re.search(f"{name} was .* and is .*", capsys.readouterr().err), file
        file.write_bytes(before)

    other = {**tensors, "logit_scale": tensors["logit_scale"] + 1e-3}
    labels = json.dumps({**LABELS, "synonyms": {"road": ["street"]}})
    black, red = Image.new("L", (48, 40)), Image.new("RGB", (48, 40), "red")
    mean = r'("image_mean": \[\s*)[\d.]+', r"\g<1>0.4"
    is_refused(data / "masks" / "000.png", black.save, "images")
    is_refused(data / "images" / "001.jpg", red.save, "images")
    is_refused(data / "labels.json", lambda file: file.write_text(labels), "images")
    is_refused(checkpoint / "pytorch_model.bin", lambda file: torch.save(other, file), "weights", checkpoint)
    is_refused(
        checkpoint / "processor_config.json",
        lambda file: file.write_text(re.sub(*mean, file.read_text())),
        "processor.image_processor.image_mean",
        checkpoint,
    )


def test_thresholds_in_one_pass(evaluate):
    _, content = evaluate("--background_threshold", 0.3, "--thresholds", "0.1:0.5:0.2")
    assert list(content["thresholds"]) == ["0.1", "0.3", "0.5"]
    assert content["thresholds"]["0.3"]["mean_iou"] == content["rows"]["model"]["mean_iou"]
    best = max(each["mean_iou"] for each in content["thresholds"].values())
    assert content["thresholds"][str(content["best_threshold"])]["mean_iou"] == best


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.1:0.9:0.1", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)),
        ("0.1:0.5:0.2", (0.1, 0.3, 0.5)),
        ("0.5:0.5:1", (0.5,)),
        ("0.2,0.7", (0.2, 0.7)),
        ("0.25", (0.25,)),
    ],
)
def test_thresholds_as_text(text, expected):
    assert parse_thresholds(text) == expected


@pytest.mark.parametrize("text", ["a", "0.1:0.5", "0.5:0.1:0.1", "0.1:0.5:0", "0.1:0.2:0.1:1", ""])
def test_thresholds_that_make_no_sense(text):
    with pytest.raises(ValueError, match="expected FROM:TO:STEP"):
        parse_thresholds(text)


def test_analysis_and_baselines(evaluate, tmp_path, data, monkeypatch):
    monkeypatch.setattr(baselines, "_CROPS", 60)
    train = tmp_path / "train"
    train.mkdir()
    (train / "a.png").write_bytes(image_bytes(0))
    (train / "metadata.jsonl").write_text('{"file_name": "a.png", "tags": ["tree"]}\n')
    code, content = evaluate("--analysis", "--baselines", "--train", train)
    assert code == 0
    truth = np.concatenate([mask.ravel() for mask in masks_of()])
    shares = np.bincount(truth, minlength=3) / len(truth)
    rows, best = content["rows"], LABELS["labels"][shares.argmax()]
    assert list(rows)[:2] == ["model", "oracle: its groups, named by the masks"]
    assert rows["sky everywhere"]["pixel_accuracy"] == pytest.approx(shares[0])
    if best != "sky":
        best_row = rows[f"{best} everywhere, the best single label"]
        assert best_row["pixel_accuracy"] == pytest.approx(shares.max())
    prior = rows["position prior of the training tags"]
    assert prior["pixel_accuracy"] == pytest.approx(shares[2])
    oracle = "oracle: groups of the untrained model, named by the masks"
    assert rows[oracle]["pixel_accuracy"] >= rows["untrained model"]["pixel_accuracy"]
    assert 0 < content["groups"]["purity"] <= 1 and content["groups"]["windows"] >= 3
    assert rows["oracle: its groups, named by the masks"]["pixel_accuracy"] >= shares.max()
    # The seed changes the untrained model, but not the groups of the checkpoint.
    _, other = evaluate("--analysis", "--baselines", "--seed", 1)
    name = "untrained model"
    assert other["rows"][name] != rows[name] and other["rows"]["model"] == rows["model"]
    assert other["groups"] == content["groups"]
    assert "position prior of the training tags" not in other["rows"]


def test_a_part_of_the_images_in_another_type(evaluate):
    code, content = evaluate("--limit", 2, "--dtype", "bfloat16", "--refinement", "pamr", "--batch_size=3")
    assert code == 0 and content["images"] == 2
    assert content["settings"]["dtype"] == "bfloat16"
    assert content["settings"]["protocol"]["refinement"] == "pamr"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--background", "moon"], "background is 'moon'"),
        (["--background-threshold", "2"], "background_threshold is 2.0"),
        (["--thresholds", "high"], "thresholds are 'high'"),
        (["--thresholds", "0.5:3:1", "--background-threshold", "0.5"], "a threshold is 1.5"),
        (["--limit", "0"], "count is 0"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--readers", "0"], "readers is 0"),
        (["--templates", "full"], "--templates has no effect on folder"),
        (["--train", "."], "add --baselines"),
        (["--baselines", "--train", "./nowhere"], "nowhere does not exist"),
        (["--baselines", "--train", ".", "--crop-sides", "9", "3"], "crop_sides is (9.0, 3.0)"),
    ],
)
def test_clear_errors(evaluate, tmp_path, capsys, extra, message):
    code, content = evaluate(*extra)
    captured = capsys.readouterr()
    assert code == 2 and message in captured.err and content is None
    assert not list(tmp_path.glob("out/parts/*")), "errors are raised before images are evaluated"


def test_data_that_are_not_there(evaluate, tmp_path, capsys, monkeypatch):
    """Missing data are reported before a model is loaded."""
    monkeypatch.setattr(command, "load_segmenter", lambda *_, **__: pytest.fail("a model is loaded"))
    for extra, asked, message in (
        ([], {"path": tmp_path / "nowhere"}, "nowhere is not a folder"),
        ([], {"benchmark": "voc"}, "does not contain Pascal VOC"),
        (["--split", "minival"], {"benchmark": "voc"}, "has no split 'minival'"),
        (["--split", "test"], {}, "has no folder 'test'"),
        (["--protocol", "no_such"], {}, "protocol is 'no_such', expected one of pgseg"),
        ([], {"path": f"hub:{tmp_path}"}, "hub:NAME has no labels"),
    ):
        assert evaluate(*extra, **asked)[0] == 2
        assert message in capsys.readouterr().err


def test_broken_images(evaluate, data, tmp_path, capsys):
    path = data / "images" / "001.jpg"
    path.write_bytes(path.read_bytes()[:200])
    assert evaluate()[0] == 2
    assert "001.jpg" in capsys.readouterr().err
    code, content = evaluate("--skip_broken", "--baselines")
    assert code == 1 and list(content["broken"]) == ["images/001"] and content["images"] == 2
    assert "broken: images/001: " in capsys.readouterr().err
    assert "001.jpg" in (tmp_path / "out" / "results.md").read_text()
    # Baselines are evaluated on the same images.
    counted = np.concatenate([mask.ravel() for number, mask in enumerate(masks_of()) if number != 1])
    assert content["rows"]["sky everywhere"]["pixel_accuracy"] == pytest.approx((counted == 0).mean())
    (data / "masks" / "002.png").write_bytes(b"no mask")
    code, content = evaluate("--skip_broken", "--baselines", "--overwrite")
    assert code == 1 and set(content["broken"]) == {"images/001", "images/002"}


def test_splits_of_a_folder(evaluate, data, tmp_path):
    for name in ("val", "test"):
        shutil.copytree(data, tmp_path / "own" / name)
        (tmp_path / "own" / name / "labels.json").rename(tmp_path / "own" / "labels.json")
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(tmp_path / "own" / "test" / "masks" / "000.png")
    _, whole = evaluate(path=tmp_path / "own" / "test", output="whole")
    code, split = evaluate("--split", "test", path=tmp_path / "own", output="split")
    assert code == 0 and split["rows"] == whole["rows"]
    assert split["settings"]["data"] == "own test, 3 images, 3 labels"


def test_masks_of_0_and_255(evaluate, tmp_path, capsys):
    masks = [np.where(mask == 1, 255, 0) for mask in masks_of()]
    folder = make_folder(tmp_path / "binary", masks, {"labels": ["background", "sky"]})
    code, content = evaluate(path=folder, output="wrong")
    warning = "--mask-values 0=background,255=sky"
    assert code == 0 and content["ignored_share"] > 0.1 and warning in content["warnings"][-1]
    assert warning in capsys.readouterr().out and warning in (tmp_path / "wrong" / "results.md").read_text()
    code, content = evaluate("--mask-values", "0=background,255=sky", path=folder, output="right")
    assert code == 0 and (content["ignored_share"], content["warnings"]) == (0, [])
    assert content["settings"]["mask_values"] == "0=background,255=sky"
    assert evaluate("--mask-values", "0=sky", benchmark="voc")[0] == 2
    assert "--mask-values is '0=sky'" in capsys.readouterr().err


def test_labels_with_signs_stay_in_their_cells():
    assert cell("a\nb\r\n | c\\") == "a b \\| c\\\\"
    names = ["a | b", "<img src=x onerror=alert(1)>", "c\\|d", "e `f` **g**"]
    content = {"title": "t", "rows": {"m|n": {"mean_iou": None}}, "settings": {"data": "x\ny|z"}}
    content |= {"iou": dict(zip(names, [0.25, None, 0.5, 0])), "broken": {"p|q": "line\nline"}}
    markdown = to_markdown(content)
    assert "| m\\|n | - |" in markdown and "| data | x y\\|z |" in markdown
    assert "| p\\|q | line line |" in markdown and "<" not in markdown
    lines = markdown.splitlines()
    start = lines.index("## IoU of each label") + 2
    rows = lines[start : lines.index("", start)]
    assert len(rows) == 2 + len(names) and rows[2].endswith("| 0.5000 |") and rows[-1].endswith("| - |")
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3 for row in rows), rows


def test_imagenet(evaluate, tmp_path, capsys, monkeypatch):
    content = read_class_names("imagenet")
    few = {**content, "labels": content["labels"][:8], "wnids": content["wnids"][:8]}
    monkeypatch.setattr("pgseg_hf.evaluation.classification.read_class_names", lambda name: few)
    for number in range(6):
        folder = tmp_path / "imagenet" / "val" / few["wnids"][number]
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(image_bytes(number))
    code, found = evaluate("--templates", "simple", benchmark="imagenet", path=tmp_path / "imagenet")
    assert code == 0 and (found["images"], found["reused"]) == (6, 0)
    again = evaluate("--templates", "simple", benchmark="imagenet", path=tmp_path / "imagenet")[1]
    assert again["rows"] == found["rows"] and again["reused"] == 6
    (tmp_path / "imagenet" / "val" / few["wnids"][0] / "a.png").write_bytes(image_bytes(9))
    assert evaluate("--templates", "simple", benchmark="imagenet", path=tmp_path / "imagenet")[0] == 2
    assert "another run: images was " in capsys.readouterr().err
    assert 0 <= found["rows"]["model"]["top1"] <= found["rows"]["model"]["top5"] <= 1
    assert found["settings"]["templates"] == "simple, 1" and "8 classes" in found["settings"]["data"]
    (tmp_path / "imagenet" / "val" / few["wnids"][2] / "a.png").write_bytes(b"broken")
    assert evaluate(benchmark="imagenet", path=tmp_path / "imagenet", output="broken")[0] == 2
    assert "a.png" in capsys.readouterr().err
    code, found = evaluate("--skip_broken", benchmark="imagenet", path=tmp_path / "imagenet", output="broken")
    assert code == 1 and found["images"] == 5 and found["settings"]["templates"] == "subset, 7"
    assert few["wnids"][2] in capsys.readouterr().err


def test_imagenet_refuses_what_is_for_masks(evaluate, capsys):
    for extra in (["--limit", "5"], ["--analysis"], ["--visualize", "2"], ["--protocol", "pgseg"]):
        code, content = evaluate(*extra, benchmark="imagenet")
        assert code == 2 and content is None
        assert f"{extra[0]} has no effect on imagenet" in capsys.readouterr().err


def test_prepare(tmp_path, capsys):
    folder = tmp_path / "gtFine" / "val" / "lindau"
    folder.mkdir(parents=True)
    Image.fromarray(np.array([[7, 8, 0]], np.uint8)).save(folder / "lindau_000000_000019_gtFine_labelIds.png")
    assert main(["prepare", "cityscapes", str(tmp_path)]) == 0
    made = Image.open(folder / "lindau_000000_000019_gtFine_labelTrainIds.png")
    assert np.asarray(made).tolist() == [[0, 1, 255]]
    assert "1 masks written, 0 already there" in capsys.readouterr().out
    assert main(["prepare", "cityscapes", str(tmp_path), "--split", "val"]) == 0
    assert "0 masks written, 1 already there" in capsys.readouterr().out
    assert main(["prepare", "cityscapes", str(tmp_path), "--split", "train"]) == 2
    assert "error" in capsys.readouterr().err
    assert main(["prepare", "context", str(tmp_path), "--split", "val"]) == 2
    assert "context has no --split" in capsys.readouterr().err


def test_without_the_optional_dependencies(evaluate, capsys, monkeypatch):
    monkeypatch.delattr(evaluation, "command", raising=False)
    monkeypatch.delitem(sys.modules, "pgseg_hf.evaluation.command", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert evaluate()[0] == 2
    error = capsys.readouterr().err
    assert "accelerate is not installed" in error and "pip install 'pgseg-hf[train]'" in error


@pytest.mark.slow
def test_the_script_on_two_processes(evaluate, tmp_path):
    """With the bundled model, whose maps have several labels."""
    folder = make_folder(tmp_path / "more", masks_of(5), LABELS)
    extra = ["--background_threshold", "0.05", "--analysis", "--baselines", "--save_predictions"]
    _, alone = evaluate(*extra, path=folder, output="alone", checkpoint=DEFAULT_CHECKPOINT)
    assert sum(value > 0 for value in alone["iou"].values()) > 1, "the test needs several labels"

    wrapper = tmp_path / "small_chunks.py"
    wrapper.write_text(
        "import runpy, sys\nfrom pgseg_hf.evaluation import running\nrunning.CHUNK = 2\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    asked = ["--benchmark", "folder", "--data", str(folder), *extra, "--output", str(tmp_path / "two")]
    result = subprocess.run(
        [*launcher, str(wrapper), str(SCRIPT), *asked, "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    together = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (together["settings"]["processes"], alone["settings"]["processes"]) == (2, 1)
    for name in ("rows", "iou", "images", "mean_iou_absent_as_zero"):
        assert together[name] == alone[name]
    assert together["groups"] == pytest.approx(alone["groups"])
    assert result.stdout.count("5 images in") == 1, "only one process reports"
    assert len(list((tmp_path / "two" / "predictions").rglob("*.png"))) == 5
    assert len(list((tmp_path / "two" / "parts").iterdir())) == 3
