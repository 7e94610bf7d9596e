"""The training script, as users run it: to the end, killed and continued, on two processes."""

import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from PIL import Image
from safetensors.torch import load_file
from tiny_models import TINY_FIELDS, make_photo

from pgseg_hf import load_segmenter
from pgseg_hf.evaluation import MaskFolder, evaluate_masks
from pgseg_hf.training import run as run_module
from pgseg_hf.training.arguments import ModelArguments, parse_arguments
from pgseg_hf.training.building import build_model, build_processor, build_stream, process_group_settings
from pgseg_hf.training.reporting import read_log

SCRIPT = Path(__file__).parents[2] / "examples" / "train_pgseg.py"
# Seconds that a run may take on a machine busy with other tests.
PATIENCE = 400
TAGS = ["cat", "dog", "tree", "red car", "sky"]
SETTINGS = {
    "cpu": True,
    "threads": 1,
    "batch_size": 4,
    "num_workers": 0,
    "learning_rate": 1e-3,
    "log_steps": 1,
    "shuffle_block": 5,
    "model_config": TINY_FIELDS,
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


def test_a_run_ends_with_a_checkpoint_for_from_pretrained(tmp_path, photo_folder):
    output = tmp_path / "run"
    results = run_here(
        tmp_path,
        sources=[{"path": str(photo_folder)}],
        output_dir=str(output),
        max_steps=6,
        ema_decay=0.9,
        checkpoint_steps=6,
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
    ema = load_file(output / "checkpoint-00000006" / "ema.safetensors")
    saved = load_file(output / "model.safetensors")
    assert torch.equal(saved["logit_scale"], ema["module.logit_scale"])
    own = load_file(output / "checkpoint-00000006" / "model.safetensors")
    assert not torch.equal(saved["logit_scale"], own["logit_scale"])
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


@pytest.fixture(scope="module")
def mask_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for index in range(5):
        make_photo(48, 40, seed=50 + index).save(folder / "images" / f"{index}.png")
        mask = np.zeros((40, 48), np.uint8)
        mask[:, 10 * index :] = 1 + index % 4
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    (folder / "labels.json").write_text(json.dumps({"labels": TAGS}))
    return folder


def test_evaluation_keeps_the_best_weights_and_draws(tmp_path, photo_folder, mask_folder, capsys):
    output = tmp_path / "run"
    tagged = tmp_path / "tagged"
    tagged.mkdir()
    for index in range(4):
        make_photo(40, 40, seed=index).save(tagged / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "tags": [TAGS[index % 2]]} for index in range(4)]
    (tagged / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = run_here(
        tmp_path,
        data=[str(photo_folder)],
        output_dir=str(output),
        max_steps=6,
        eval_steps=2,
        eval_limit=3,
        eval_masks=str(mask_folder),
        eval_tags=str(tagged),
        num_pictures=2,
    )
    lines = read_log(output / "log.jsonl")
    measured = {line["step"]: line for line in lines if "eval_mean_iou" in line}
    assert list(measured) == [2, 4, 6]
    best = max(line["eval_mean_iou"] for line in measured.values())
    assert results["best_mean_iou"] == best == measured[results["best_step"]]["eval_mean_iou"]
    assert results["eval_top1"] in (0, 0.25, 0.5, 0.75, 1)
    assert load_segmenter(str(output / "best")).model.config.vision_config.hidden_size == 16
    again = evaluate_masks(load_segmenter(str(output)), MaskFolder(mask_folder)).to_dict()
    assert again["mean_iou"] == pytest.approx(results["eval_mean_iou"])
    assert len(list((output / "pictures").glob("step-*.jpg"))) == 6
    assert "the loader" in capsys.readouterr().out
    # Measuring changes nothing in the run.
    run_here(tmp_path, data=[str(photo_folder)], output_dir=str(tmp_path / "blind"), max_steps=6)
    blind = [line["total"] for line in read_log(tmp_path / "blind" / "log.jsonl")]
    assert [line["total"] for line in lines if "total" in line] == blind


def test_trackers(tmp_path, photo_folder, mask_folder):
    pytest.importorskip("tensorboard")
    settings = {"eval_masks": str(mask_folder), "num_pictures": 1, "report_to": "tensorboard"}
    run_here(tmp_path, data=[str(photo_folder)], output_dir=str(tmp_path / "run"), max_steps=2, **settings)
    events = list((tmp_path / "run" / "pgseg").glob("**/events.out.*"))
    content = b"".join(path.read_bytes() for path in events)
    assert all(name in content for name in (b"contrastive", b"learning_rate", b"eval_mean_iou", b"PNG"))


def test_a_diverged_run_ends_with_a_message(tmp_path, photo_folder, monkeypatch):
    script = load_script()
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"data": [str(photo_folder)], "output_dir": str(tmp_path / "run"), "max_steps": 50}
    path = write_settings(tmp_path / "settings.yaml", max_bad_steps=3, **settings)
    run = script.Run(parse_arguments([path]))
    before = {name: value.clone() for name, value in run.plain_model.named_parameters()}
    run.plain_model.logit_scale.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match="3 steps in a row, until step 2, had no finite gradient"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in run.plain_model.named_parameters())
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("settings", [{}, {"npr_variant": "none"}, {"chunk_size": 2}, {"ema_decay": 0.9}])
def test_a_bad_step_changes_nothing_and_training_goes_on(tmp_path, photo_folder, monkeypatch, settings):
    script = load_script()
    AcceleratorState._reset_state(reset_partial_state=True)
    common = {"data": [str(photo_folder)], "output_dir": str(tmp_path / "run"), "max_steps": 5}
    path = write_settings(tmp_path / "settings.yaml", **common, **settings)
    run = script.Run(parse_arguments([path]))
    step, seen = run.train_step, []

    def state():
        return {name: value.clone() for name, value in run.plain_model.state_dict().items()}

    def once_infinite(batch):
        before = state()
        if run.step == 2:
            batch["pixel_values"] = batch["pixel_values"] * 1e30
        result = step(batch)
        seen.append(all(torch.equal(value, before[name]) for name, value in state().items()))
        return result

    monkeypatch.setattr(run, "train_step", once_infinite)
    results = run.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert seen == [False, False, True, False, False]
    assert results["bad_steps"] == 1
    assert results["bad_parts"]["total"] == 1
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / "model.safetensors").values())


def test_pictures_of_one_tag_train(tmp_path, photo_folder):
    rows = [json.loads(line) for line in (photo_folder / "metadata.jsonl").read_text().splitlines()]
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "images").symlink_to(photo_folder / "images")
    one = "".join(json.dumps({"file_name": row["file_name"], "tags": ["cat"]}) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(one)
    results = run_here(
        tmp_path,
        data=[str(folder)],
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        contrastive_loss="sigmoid",
    )
    assert results["bad_steps"] == 0
    assert all(line["negatives"] == 0 for line in read_log(tmp_path / "run" / "log.jsonl"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision fp16 needs a GPU"),
        ({"report_to": "clearml"}, "report_to names clearml"),
        ({"eval_masks": "absent"}, "absent"),
        ({"model_config": {"projection_dimm": 3}}, "model_config has unknown fields: projection_dimm"),
        ({"model_config": {"vision_config": {"deepth": [1]}}}, "vision_config has unknown fields: deepth"),
        ({"chunk_size": 0}, "chunk_size is 0, expected a positive number"),
        ({"warmup_learning_rate": 1.0}, "learning rates start at 1.0"),
        (
            {"batch_size": 256},
            r"has 14 images, and a batch of 256 x 1 takes 256 .* Give --batch_size 14 at most",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_written(tmp_path, photo_folder, settings, message):
    output = tmp_path / "run"
    run_here(tmp_path, data=[str(photo_folder)], output_dir=str(output), max_steps=1)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    settings = {"data": [str(photo_folder)], "output_dir": str(output), "max_steps": 1} | settings
    with pytest.raises(ValueError, match=message):
        run_here(tmp_path, "--overwrite_output_dir", **settings)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_mistake_is_one_line(tmp_path, photo_folder, monkeypatch, capsys):
    table = tmp_path / "x.parquet"
    table.write_bytes(b"PAR1")
    options = ["--data", str(table), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--cpu"]
    script = load_script()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", ["train_pgseg.py", *options])
    monkeypatch.setattr(
        run_module, "build_model", lambda _: build_model(ModelArguments(model_config=TINY_FIELDS))
    )
    assert script.main() == 2
    error = capsys.readouterr().err
    assert f"train_pgseg.py: error: {table} is a file; expected a folder with metadata.jsonl" in error
    assert "Traceback" not in error
    AcceleratorState._reset_state(reset_partial_state=True)


def test_several_processes_that_accelerate_does_not_start_are_no_single_one(
    tmp_path, photo_folder, monkeypatch
):
    options = ["--cpu", "--num_processes", "2", str(SCRIPT)]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    with pytest.raises(
        ValueError, match=r"several processes and starts one on CPUs.*torchrun --nproc_per_node"
    ):
        run_here(tmp_path, data=[str(photo_folder)], output_dir=str(tmp_path / "run"), max_steps=1)


def test_processes_read_different_records(photo_folder, tmp_path):
    settings = {"data": [str(photo_folder)], "output_dir": str(tmp_path), "max_steps": 1}
    arguments = parse_arguments([write_settings(tmp_path / "settings.yaml", **settings)])
    model = build_model(arguments[0])
    processor = build_processor(arguments[0], arguments[1], model.config)
    batches = [
        next(iter(build_stream(arguments[1], arguments[2], model, processor, rank, 2)))["pixel_values"]
        for rank in (0, 1)
    ]
    assert not any(torch.equal(one, other) for one in batches[0] for other in batches[1])


def test_an_output_folder_is_not_mixed_with_another_run(tmp_path, photo_folder):
    settings = {
        "data": [str(photo_folder)],
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "checkpoint_steps": 1,
    }
    run_here(tmp_path, **settings)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-00000001",
        "checkpoint-00000002",
    ]
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest"):
        run_here(tmp_path, **settings)
    assert run_here(tmp_path, "--overwrite_output_dir", **settings)["steps"] == 2
    plain = settings | {"output_dir": str(tmp_path / "other"), "checkpoint_steps": None}
    run_here(tmp_path, **plain)
    with pytest.raises(ValueError, match=r"holds another run's all_results\.json"):
        run_here(tmp_path, **plain)
    with pytest.raises(ValueError, match="holds a run that has ended, without checkpoints"):
        run_here(tmp_path, "--resume_from_checkpoint", "latest", **plain)


def test_going_on_with_other_settings_says_so_and_follows_them(tmp_path, photo_folder, capsys):
    settings = {"data": [str(photo_folder)], "output_dir": str(tmp_path / "run"), "checkpoint_steps": 2}
    run_here(tmp_path, **settings, max_steps=2)
    other = {"max_steps": 4, "learning_rate": 5e-4, "weight_decay": 0.3, "warmup_ratio": 0.0}
    resume = ("--resume_from_checkpoint", "latest")
    run_here(tmp_path, *resume, **settings, **other)
    said = capsys.readouterr().out
    assert "From here on another setting: learning_rate was 0.001 and is 0.0005." in said
    assert "weight_decay was 0.05 and is 0.3" in said and "steps of the run was 2 and is 4" in said
    rates = [line["learning_rate"] for line in read_log(tmp_path / "run" / "log.jsonl")]
    assert rates[2] == pytest.approx(5e-5 + 4.5e-4 * (1 + math.cos(math.pi)) / 2)
    lines = torch.load(tmp_path / "run" / "checkpoint-00000004" / "optimizer.bin", weights_only=True)
    assert lines["param_groups"][0]["weight_decay"] == 0.3
    with pytest.raises(
        ValueError, match=r"contrastive_loss was info_nce and is multi_positive. Change this back"
    ):
        run_here(tmp_path, *resume, **settings, max_steps=6, contrastive_loss="multi_positive")
    with pytest.raises(ValueError, match=r"min_scale was 0.08 and is 0.5; it would make others"):
        run_here(tmp_path, *resume, **settings, max_steps=6, min_scale=0.5)


def test_a_run_goes_on_with_moved_data_and_not_with_others(tmp_path, photo_folder):
    first, moved, other = (tmp_path / name for name in ("first", "moved", "other"))
    shutil.copytree(photo_folder, first)
    shutil.copytree(photo_folder, other)
    settings = {"output_dir": str(tmp_path / "run"), "checkpoint_steps": 1}
    run_here(tmp_path, **settings, data=[str(first)], max_steps=1)
    first.rename(moved)
    resume = ("--resume_from_checkpoint", "latest")
    assert run_here(tmp_path, *resume, **settings, data=[str(moved)], max_steps=2)["steps"] == 2
    text = (other / "metadata.jsonl").read_text()
    (other / "metadata.jsonl").write_text(text.replace("a cat beside", "no cat beside"))
    with pytest.raises(ValueError, match=r"contents of the sources was .* and is"):
        run_here(tmp_path, *resume, **settings, data=[str(other)], max_steps=3)


@pytest.mark.slow
def test_compiled_towers_and_recomputed_stages_train_as_plain_ones(tmp_path, photo_folder):
    losses = {}
    for name, settings in {
        "plain": {},
        "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        "recomputed": {"gradient_checkpointing": True},
    }.items():
        folder = tmp_path / name
        run_here(tmp_path, data=[str(photo_folder)], output_dir=str(folder), max_steps=3, **settings)
        losses[name] = [line["total"] for line in read_log(folder / "log.jsonl")]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["recomputed"] == pytest.approx(losses["plain"], rel=1e-4)


class Launched:
    """A run in processes of its own, whose output goes into a file. Once the block ends, none of them is left."""

    def __init__(self, settings, processes=1, script=SCRIPT):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        command = [*launcher, str(script), settings, "--resume_from_checkpoint", "latest"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        self.output = Path(settings).with_suffix(".txt")
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def family(self):
        """What descends from the launcher, as workers lead sessions of their own, then itself; none after its end."""
        if self.process.poll() is not None:
            return []  # another process may have its number by now
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            return [*launcher.children(recursive=True), launcher]
        return []

    def kill(self):
        family = self.family()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait(PATIENCE)
        _, left = psutil.wait_procs(family, timeout=PATIENCE)
        assert not left

    def fail(self, reason):
        """Ends the test with what the run wrote and where its threads stand, which an abort makes them write."""
        family = self.family()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGABRT)
        psutil.wait_procs(family, timeout=5)
        pytest.fail(f"{reason}:\n{self.output.read_text(errors='replace')[-8000:]}")

    def end(self):
        """Waits until the run is over; returns the exit status."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.fail(f"the run is not over after {PATIENCE} s")

    def finish(self):
        if status := self.end():
            self.fail(f"the run ended with status {status}")

    def reach(self, log, step):
        """Waits until the run's log has the step."""
        deadline = time.monotonic() + PATIENCE
        while not any(line["step"] >= step for line in read_log(log)):
            if self.process.poll() is not None:
                self.fail("the run ended by itself")
            if time.monotonic() > deadline:
                self.fail(f"the run is not at step {step} after {PATIENCE} s")
            time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tars", "mixed"])
def test_a_killed_run_goes_on_bit_for_bit_and_once_more(tmp_path, photo_folder, shards, kind):
    settings = {
        "sources": sources_of(kind, photo_folder, shards),
        "max_steps": 30,
        "checkpoint_steps": 4,
        "log_steps": 3,
        "ema_decay": 0.9,
        "num_workers": 2,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_here(tmp_path, **settings, output_dir=str(whole))
    path = write_settings(tmp_path / "killed.yaml", **settings, output_dir=str(killed))
    for step in (7, 17):
        with Launched(path) as run:
            run.reach(killed / "log.jsonl", step)
            run.kill()
    with Launched(path) as run:
        run.finish()

    assert curve(killed) == curve(whole)
    assert_same_result(killed, whole)


def curve(folder):
    lines = read_log(folder / "log.jsonl")
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def assert_same_result(folder, other):
    ours, theirs = (load_segmenter(str(each)).model.state_dict() for each in (folder, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    records = [json.loads((each / "all_results.json").read_text())["records"] for each in (folder, other)]
    assert records[0] == records[1]


@pytest.mark.slow
@pytest.mark.parametrize(("chunk_size", "victims"), [(None, "all"), (2, "one")])
def test_two_processes_contrast_all_pictures_and_go_on_after_a_kill(
    tmp_path, photo_folder, shards, chunk_size, victims
):
    settings = {
        "sources": sources_of("mixed", photo_folder, shards),
        "max_steps": 14,
        "checkpoint_steps": 4,
        "chunk_size": chunk_size,
    }
    folders = [tmp_path / name for name in ("whole", "killed")]
    paths = [
        write_settings(tmp_path / f"{folder.name}.yaml", **settings, output_dir=str(folder))
        for folder in folders
    ]
    with Launched(paths[1], processes=2) as run:
        run.reach(folders[1] / "log.jsonl", 6)
        if victims == "one":
            run.family()[0].kill()
            assert run.end() != 0
        run.kill()
    for path in paths:
        with Launched(path, processes=2) as run:
            run.finish()
    whole = curve(folders[0])
    assert all(line["negatives"] == 7 for line in whole)
    assert curve(folders[1]) == whole
    assert_same_result(*folders)
    results = json.loads((folders[0] / "all_results.json").read_text())
    assert (results["num_processes"], results["global_batch_size"]) == (2, 8)
    assert results["records"]["read"] >= 14 * 8


# The script, with a check that torch.distributed was the last to hold the process group: its threads are gone.
CHECKED = """
import runpy
import psutil
import torch.distributed as dist

destroy = dist.destroy_process_group


def destroy_and_count(group=None):
    threads = psutil.Process().num_threads()
    destroy(group)
    assert psutil.Process().num_threads() < threads, "the process group is still held"
    print("the group is gone", flush=True)


dist.destroy_process_group = destroy_and_count
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_no_process_waits_at_the_end_for_its_groups_threads(tmp_path, photo_folder):
    script = tmp_path / "checked.py"
    script.write_text(CHECKED.format(script=str(SCRIPT)))
    settings = {"data": [str(photo_folder)], "output_dir": str(tmp_path / "run"), "max_steps": 1}
    with Launched(write_settings(tmp_path / "settings.yaml", **settings), processes=2, script=script) as run:
        run.finish()
        assert run.output.read_text().count("the group is gone") == 2


def test_a_process_whose_peer_never_comes_ends_with_an_error(tmp_path, photo_folder, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in (world | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, str(value))
    settings = {"data": [str(photo_folder)], "output_dir": str(tmp_path / "run"), "max_steps": 1}
    with pytest.raises(torch.distributed.DistStoreError, match="1/2 clients joined"):
        run_here(tmp_path, ddp_timeout=1, **settings)


@pytest.mark.parametrize("seconds", [0.5, 600, 1800])
def test_the_timeout_reaches_accelerate(tmp_path, seconds):
    path = write_settings(
        tmp_path / "settings.yaml", output_dir=str(tmp_path), max_steps=1, ddp_timeout=seconds
    )
    settings = process_group_settings(parse_arguments([path])[2])
    assert settings.to_kwargs()["timeout"].total_seconds() == pytest.approx(seconds, abs=1e-3)
