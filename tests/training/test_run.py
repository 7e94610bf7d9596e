"""Training runs in this process: results, evaluation, rejected settings, and resumption."""

import json
import os
import shutil
import socket
import sys

import pytest
import torch
import train_pgseg
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from safetensors.torch import load_file
from tiny_models import TINY_FIELDS, make_photo
from training_runs import SCRIPT, TAGS, a_run, run_here, totals, write_settings

from pgseg_hf import load_segmenter
from pgseg_hf.evaluation import MaskFolder, evaluate_masks
from pgseg_hf.training import run as run_module
from pgseg_hf.training.arguments import ModelArguments, parse_arguments
from pgseg_hf.training.building import build_model, build_processor, build_stream, process_group_settings
from pgseg_hf.training.optimization import learning_rate_factor
from pgseg_hf.training.reporting import read_log

RESUME = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def plain(photo_folder, tmp_path_factory):
    """The output folder of a run of seven steps without checkpoints."""
    folder = tmp_path_factory.mktemp("plain")
    run_here(folder, data=[str(photo_folder)], output_dir=str(folder / "run"), max_steps=7)
    return folder / "run"


@pytest.fixture(scope="module")
def measured(photo_folder, mask_folder, tmp_path_factory):
    """Folder and results of the same run with averaged weights, checkpoints, evaluations and a tracker."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "tagged").mkdir()
    rows = []
    for index in range(4):
        make_photo(40, 40, seed=index).save(folder / "tagged" / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "tags": [TAGS[index % 2]]}))
    (folder / "tagged" / "metadata.jsonl").write_text("\n".join(rows))
    settings = {"data": [str(photo_folder)], "output_dir": str(folder / "run"), "max_steps": 7}
    settings |= {"ema_decay": 0.9, "checkpoint_steps": 3, "report_to": "tensorboard"}
    settings |= {"eval_masks": str(mask_folder), "eval_tags": str(folder / "tagged")}
    settings |= {"eval_steps": 3, "eval_limit": 3, "num_drawings": 2}
    return folder / "run", run_here(folder, **settings)


def test_a_run_ends_with_a_checkpoint_for_from_pretrained(measured, photo_folder):
    output, results = measured
    assert results["steps"] == 7
    assert results["records"]["broken image"] >= 1
    assert json.loads((output / "all_results.json").read_text()) == results
    lines = [line for line in read_log(output / "log.jsonl") if "total" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert all(line["negatives"] == 3 for line in lines)
    segmenter = load_segmenter(str(output))
    assert segmenter(make_photo(), ["cat", "dog"]).label_map.shape == (90, 120)
    card = (output / "README.md").read_text()
    assert f"`{photo_folder.parent.name}/{photo_folder.name}` (weight 1)" in card
    assert str(output.parent) not in card
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    checkpoints = sorted(path.name for path in output.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-00000006", "checkpoint-00000007"]
    ema = load_file(output / checkpoints[1] / "ema.safetensors")
    saved = load_file(output / "model.safetensors")
    assert torch.equal(saved["logit_scale"], ema["module.logit_scale"])
    own = load_file(output / checkpoints[1] / "model.safetensors")
    assert not torch.equal(saved["logit_scale"], own["logit_scale"])


def test_evaluation_keeps_the_best_weights_draws_and_changes_nothing(measured, plain, mask_folder):
    output, results = measured
    lines = {line["step"]: line for line in read_log(output / "log.jsonl") if "eval_mean_iou" in line}
    assert list(lines) == [3, 6, 7]
    best = max(line["eval_mean_iou"] for line in lines.values())
    assert results["best_mean_iou"] == best == lines[results["best_step"]]["eval_mean_iou"]
    assert results["eval_top1"] in (0, 0.25, 0.5, 0.75, 1)
    assert load_segmenter(str(output / "best")).model.config.vision_config.hidden_size == 16
    again = evaluate_masks(load_segmenter(str(output)), MaskFolder(mask_folder)).to_dict()
    assert again["mean_iou"] == pytest.approx(results["eval_mean_iou"])
    assert len(list((output / "drawings").glob("step-*.jpg"))) == 6
    assert totals(output) == totals(plain)


def test_trackers(measured):
    pytest.importorskip("tensorboard")
    events = list((measured[0] / "pgseg").glob("**/events.out.*"))
    content = b"".join(path.read_bytes() for path in events)
    assert all(name in content for name in (b"contrastive", b"learning_rate", b"eval_mean_iou", b"PNG"))


def test_a_chunk_of_the_whole_batch_trains_as_without_and_epochs_become_steps(tmp_path, plain, photo_folder):
    settings = {"data": [str(photo_folder)], "output_dir": str(tmp_path / "run"), "chunk_size": 100}
    assert run_here(tmp_path, num_epochs=2.0, **settings)["steps"] == 7
    assert totals(tmp_path / "run") == pytest.approx(totals(plain), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"torch_compile": True, "torch_compile_backend": "aot_eager"}, {"gradient_checkpointing": True}],
)
def test_compiled_towers_and_recomputed_stages_train_as_plain_ones(tmp_path, plain, photo_folder, settings):
    settings |= {"data": [str(photo_folder)], "output_dir": str(tmp_path / "run"), "max_steps": 7}
    run_here(tmp_path, **settings)
    assert totals(tmp_path / "run") == pytest.approx(totals(plain), rel=1e-4)


def test_a_diverged_run_ends_with_a_message(tmp_path, photo_folder):
    settings = {"data": [str(photo_folder)], "output_dir": str(tmp_path / "run"), "max_steps": 50}
    with a_run(tmp_path, max_bad_steps=3, **settings) as run:
        before = {name: value.clone() for name, value in run.plain_model.named_parameters()}
        run.plain_model.logit_scale.register_hook(lambda gradient: gradient * float("nan"))
        with pytest.raises(ValueError, match=r"3 steps in a row, .*step 2"):
            run.train()
        assert all(torch.equal(value, before[name]) for name, value in run.plain_model.named_parameters())


@pytest.mark.parametrize("settings", [{}, {"npr_variant": "none", "ema_decay": 0.9}, {"chunk_size": 2}])
def test_a_bad_step_changes_nothing_and_training_goes_on(tmp_path, photo_folder, monkeypatch, settings):
    common = {"data": [str(photo_folder)], "output_dir": str(tmp_path / "run"), "max_steps": 3}
    with a_run(tmp_path, **common, **settings) as run:
        step, seen = run.train_step, []

        def state():
            return {name: value.clone() for name, value in run.plain_model.state_dict().items()}

        def once_infinite(batch):
            before = state()
            if run.step == 1:
                batch["pixel_values"] = batch["pixel_values"] * 1e30
            result = step(batch)
            seen.append(all(torch.equal(value, before[name]) for name, value in state().items()))
            return result

        monkeypatch.setattr(run, "train_step", once_infinite)
        results = run.train()
    assert seen == [False, True, False]
    assert (results["bad_steps"], results["bad_parts"]["total"]) == (1, 1)
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / "model.safetensors").values())


def test_images_of_one_tag_train(tmp_path, photo_folder):
    folder = tmp_path / "one"
    shutil.copytree(photo_folder, folder)
    rows = [json.dumps({"file_name": f"images/{number}.png", "tags": ["cat"]}) for number in range(14)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    settings = {"data": [str(folder)], "output_dir": str(tmp_path / "run"), "contrastive_loss": "sigmoid"}
    assert run_here(tmp_path, max_steps=2, **settings)["bad_steps"] == 0
    assert all(line["negatives"] == 0 for line in read_log(tmp_path / "run" / "log.jsonl"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision fp16"),
        ({"report_to": "clearml"}, "report_to .*clearml"),
        ({"eval_masks": "absent"}, "absent"),
        ({"model_config": {"projection_dimm": 3}}, "model_config .*projection_dimm"),
        ({"model_config": {"vision_config": {"deepth": [1]}}}, "vision_config .*deepth"),
        ({"learning": 1}, "unknown options: learning"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"warmup_learning_rate": 1.0}, r"start at 1\.0"),
        ({"batch_size": 256}, "has 14 images, .*a batch of 256 x 1 takes 256 .* --batch_size to at most 14"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(tmp_path, plain, photo_folder, settings, message):
    before = {path: path.stat().st_mtime_ns for path in plain.rglob("*")}
    settings = {"data": [str(photo_folder)], "output_dir": str(plain), "max_steps": 1} | settings
    with pytest.raises(ValueError, match=message):
        run_here(tmp_path, "--overwrite_output_dir", **settings)
    assert {path: path.stat().st_mtime_ns for path in plain.rglob("*")} == before


def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    table = tmp_path / "x.parquet"
    table.write_bytes(b"PAR1")
    options = ["--data", str(table), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--cpu"]
    monkeypatch.setattr(sys, "argv", ["train_pgseg.py", *options])
    tiny = ModelArguments(model_config=TINY_FIELDS)
    monkeypatch.setattr(run_module, "build_model", lambda _: build_model(tiny))
    assert train_pgseg.main() == 2
    error = capsys.readouterr().err
    assert f"train_pgseg.py: error: {table} is a file" in error and "Traceback" not in error


def test_an_output_folder_is_not_mixed_with_another_run(tmp_path, plain, measured, photo_folder):
    with_checkpoints = tmp_path / "run"
    shutil.copytree(measured[0], with_checkpoints)
    settings = {"data": [str(photo_folder)], "max_steps": 1}
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest"):
        run_here(tmp_path, **settings, output_dir=str(with_checkpoints))
    with pytest.raises(ValueError, match=r"all_results\.json of another run"):
        run_here(tmp_path, **settings, output_dir=str(plain))
    with pytest.raises(ValueError, match="without checkpoints"):
        run_here(tmp_path, *RESUME, **settings, output_dir=str(plain))
    overwritten = run_here(tmp_path, "--overwrite_output_dir", **settings, output_dir=str(with_checkpoints))
    assert overwritten["steps"] == 1
    assert not list(with_checkpoints.glob("checkpoint-*")) and not (with_checkpoints / "best").exists()


def test_going_on_with_moved_data_and_other_settings_but_no_other_run(
    tmp_path, measured, photo_folder, capsys
):
    output, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(measured[0], output)
    shutil.copytree(photo_folder, moved)
    settings = {"output_dir": str(output), "ema_decay": 0.9, "checkpoint_steps": 3, "max_steps": 9}
    other = {"learning_rate": 5e-4, "weight_decay": 0.3, "warmup_ratio": 0.0}
    for wrong, message in (
        ({"contrastive_loss": "multi_positive"}, "contrastive_loss was 'info_nce' and is 'multi_positive'"),
        ({"min_scale": 0.5}, r"min_scale was 0\.08 and is 0\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            run_here(tmp_path, *RESUME, **settings, **wrong, data=[str(photo_folder)])
    assert run_here(tmp_path, *RESUME, **settings, **other, data=[str(moved)])["steps"] == 9
    said = capsys.readouterr().out
    assert "learning_rate was 0.001 and is 0.0005." in said and "weight_decay was 0.05 and is 0.3" in said
    assert "steps of the run was 7 and is 9" in said
    assert "The best metric so far is discarded" in said  # this run evaluates nothing
    rates = [line["learning_rate"] for line in read_log(output / "log.jsonl") if "total" in line]
    expected = 5e-4 * learning_rate_factor(8, 0, 9, peak=5e-4, start=5e-6, floor=5e-5)
    assert rates[7] == pytest.approx(expected)
    state = torch.load(output / "checkpoint-00000009" / "optimizer.bin", weights_only=True)
    assert state["param_groups"][0]["weight_decay"] == 0.3
    text = (moved / "metadata.jsonl").read_text()
    (moved / "metadata.jsonl").write_text(text.replace("a cat beside", "no cat beside"))
    with pytest.raises(ValueError, match="contents of the sources was"):
        run_here(tmp_path, *RESUME, **settings | {"max_steps": 10}, data=[str(moved)])


# Several processes, from the point of view of one


def test_several_processes_that_accelerate_does_not_start_are_no_single_one(
    tmp_path, photo_folder, monkeypatch
):
    options = ["--cpu", "--num_processes", "2", str(SCRIPT)]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    with pytest.raises(ValueError, match="torchrun --nproc_per_node"):
        run_here(tmp_path, data=[str(photo_folder)], output_dir=str(tmp_path / "run"), max_steps=1)


def test_processes_read_different_records(photo_folder, tmp_path):
    settings = {"data": [str(photo_folder)], "output_dir": str(tmp_path), "max_steps": 1}
    chosen, data, run = parse_arguments([write_settings(tmp_path / "settings.yaml", **settings)])
    model = build_model(chosen)
    processor = build_processor(chosen, data, model.config)
    one, other = (next(iter(build_stream(data, run, model, processor, rank, 2))) for rank in (0, 1))
    assert not any(torch.equal(a, b) for a in one["pixel_values"] for b in other["pixel_values"])


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


def test_the_timeout_reaches_accelerate(tmp_path):
    """Accelerate treats 600 s as "not set"."""
    path = write_settings(tmp_path / "settings.yaml", output_dir="run", max_steps=1, ddp_timeout=600)
    settings = process_group_settings(parse_arguments([path])[2])
    assert settings.to_kwargs()["timeout"].total_seconds() == pytest.approx(600, abs=1e-3)
