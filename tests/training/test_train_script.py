"""The training script, as users run it: to the end, killed and continued, on two processes."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from tiny_models import make_photo

from pgseg_hf import load_segmenter
from pgseg_hf.training.arguments import parse_arguments
from pgseg_hf.training.reporting import read_log

SCRIPT = Path(__file__).parents[2] / "examples" / "train_pgseg.py"
TAGS = ["cat", "dog", "tree", "red car", "sky"]
TINY = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "depths": [1, 1, 1],
        "num_group_tokens": [6, 4, 0],
        "num_output_groups": [6, 4, 0],
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "projection_dim": 8,
    "projection_intermediate_dim": 24,
}
SETTINGS = {
    "cpu": True,
    "threads": 1,
    "batch_size": 4,
    "num_workers": 0,
    "learning_rate": 1e-3,
    "log_steps": 1,
    "shuffle_block": 5,
    "model_config": TINY,
}


def load_script():
    spec = importlib.util.spec_from_file_location("train_pgseg", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_settings(path, **settings):
    path.write_text(yaml.safe_dump(SETTINGS | settings))
    return str(path)


def run_here(tmp_path, *options, **settings):
    """Runs the script in this process; returns its results."""
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    try:
        arguments = parse_arguments([write_settings(tmp_path / "settings.yaml", **settings), *options])
        return load_script().Run(arguments).train()
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    rows = []
    for index in range(14):
        make_photo(48, 40, seed=index).save(folder / "images" / f"{index}.png")
        rows.append(
            {
                "file_name": f"images/{index}.png",
                "tags": [TAGS[index % 5], TAGS[(index + 2) % 5]],
                "caption": f"a {TAGS[index % 5]} beside a {TAGS[(index + 1) % 5]}",
            }
        )
    (folder / "images" / "3.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for index in range(5):
                number = 5 * shard + index
                picture = BytesIO()
                make_photo(44, 36, seed=100 + number).save(picture, "JPEG")
                files = {"jpg": picture.getvalue(), "txt": f"a {TAGS[number % 5]} number {number}".encode()}
                for ending, data in files.items():
                    info = tarfile.TarInfo(f"{number:04d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))
    return f"{folder}/part-{{0..2}}.tar"


def sources_of(kind, photo_folder, shards):
    folder, tars = {"path": str(photo_folder), "weight": 2}, {"path": shards}
    return {"folder": [folder], "tars": [tars], "mixed": [folder, tars]}[kind]


def test_a_run_ends_with_a_checkpoint_for_from_pretrained(tmp_path, photo_folder, caplog):
    output = tmp_path / "run"
    results = run_here(
        tmp_path, sources=[{"path": str(photo_folder)}], output_dir=str(output), max_steps=6, ema_decay=0.9
    )
    assert results["steps"] == 6
    assert results["records"]["broken image"] >= 1
    assert json.loads((output / "all_results.json").read_text()) == results
    lines = read_log(output / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["negatives"] == 3 for line in lines)
    segmenter = load_segmenter(str(output))
    assert segmenter(make_photo(), ["cat", "dog"]).label_map.shape == (90, 120)
    card = (output / "README.md").read_text()
    assert f"`{photo_folder.parent.name}/{photo_folder.name}` (weight 1)" in card
    assert str(tmp_path) not in card
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    with pytest.raises(ValueError, match="unknown options: learning"):
        run_here(tmp_path, learning=1)


@pytest.mark.parametrize(
    "changes", [{"num_epochs": 2.0, "max_steps": None}, {"chunk_size": 2, "max_steps": 3}]
)
def test_lengths_and_chunks(tmp_path, photo_folder, changes):
    settings = {"data": [str(photo_folder)], "output_dir": str(tmp_path / "run")} | changes
    results = run_here(tmp_path, **settings)
    assert results["steps"] == (7 if "num_epochs" in changes else 3)
    assert all(math.isfinite(line["total"]) for line in read_log(tmp_path / "run" / "log.jsonl"))


def test_a_chunk_of_the_whole_batch_trains_as_without(tmp_path, photo_folder):
    losses = []
    for name, chunk_size in (("plain", None), ("cached", 100)):
        folder = tmp_path / name
        run_here(
            tmp_path, data=[str(photo_folder)], output_dir=str(folder), max_steps=4, chunk_size=chunk_size
        )
        losses.append([line["total"] for line in read_log(folder / "log.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def start(settings, *options):
    command = [sys.executable, str(SCRIPT), settings, "--resume_from_checkpoint", "latest", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def kill_at(settings, log, step):
    """Starts a run and kills it, workers and all, once its log has the step."""
    process = start(settings)
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in read_log(log)):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, "the run takes too long"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tars", "mixed"])
def test_a_killed_run_goes_on_bit_for_bit_and_once_more(tmp_path, photo_folder, shards, kind):
    settings = {
        "sources": sources_of(kind, photo_folder, shards),
        "max_steps": 30,
        "checkpoint_steps": 4,
        "ema_decay": 0.9,
        "num_workers": 2,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_here(tmp_path, **settings, output_dir=str(whole))
    path = write_settings(tmp_path / "killed.yaml", **settings, output_dir=str(killed))
    for step in (7, 17):
        kill_at(path, killed / "log.jsonl", step)
    last = start(path)
    _, messages = last.communicate(timeout=120)
    assert last.returncode == 0, messages.decode()

    def curve(folder):
        varying = ("images_per_second",)
        lines = read_log(folder / "log.jsonl")
        return [{name: value for name, value in line.items() if name not in varying} for line in lines]

    assert curve(killed) == curve(whole)
    ours, theirs = (load_segmenter(str(folder)).model.state_dict() for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    records = [json.loads((folder / "all_results.json").read_text())["records"] for folder in (killed, whole)]
    assert records[0] == records[1]
