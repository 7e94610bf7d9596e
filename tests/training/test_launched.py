"""The training script as a subprocess: killed and resumed, and with two processes."""

import json

import pytest
import torch
from training_runs import SCRIPT, Launched, run_here, write_settings

from pgseg_hf import load_segmenter
from pgseg_hf.training.reporting import read_log

pytestmark = pytest.mark.slow


def curve(folder):
    lines = read_log(folder / "log.jsonl")
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def assert_same_run(folder, other):
    assert curve(folder) == curve(other)
    ours, theirs = (load_segmenter(str(each)).model.state_dict() for each in (folder, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    records = [json.loads((each / "all_results.json").read_text())["records"] for each in (folder, other)]
    assert records[0] == records[1]


def test_a_killed_run_goes_on_bit_for_bit_and_once_more(tmp_path, mixed_sources):
    settings = {"sources": mixed_sources, "max_steps": 20, "checkpoint_steps": 4, "log_steps": 3}
    settings |= {"ema_decay": 0.9, "num_workers": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_here(tmp_path, **settings, output_dir=str(whole))
    path = write_settings(tmp_path / "killed.yaml", **settings, output_dir=str(killed))
    for step in (6, 12):
        with Launched(path) as run:
            run.reach(killed / "log.jsonl", step)
            run.kill()
    with Launched(path) as run:
        run.finish()
    assert_same_run(killed, whole)


def test_two_processes_contrast_all_images_and_go_on_after_one_is_killed(tmp_path, mixed_sources):
    settings = {"sources": mixed_sources, "max_steps": 10, "checkpoint_steps": 4}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    paths = [
        write_settings(tmp_path / f"{folder.name}.yaml", **settings, output_dir=str(folder))
        for folder in (whole, killed)
    ]
    with Launched(paths[1], processes=2) as run:
        run.reach(killed / "log.jsonl", 6)
        run.family()[0].kill()
        assert run.end() != 0
    for path in paths:
        with Launched(path, processes=2) as run:
            run.finish()
    assert all(line["negatives"] == 7 for line in curve(whole))
    assert_same_run(killed, whole)
    results = json.loads((whole / "all_results.json").read_text())
    assert (results["num_processes"], results["global_batch_size"]) == (2, 8)
    assert results["records"]["read"] >= 10 * 8


# The script with a check that torch.distributed held the last reference to the process group: its threads end.
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


def test_no_process_waits_at_the_end_for_its_groups_threads(tmp_path, photo_folder):
    script = tmp_path / "checked.py"
    script.write_text(CHECKED.format(script=str(SCRIPT)))
    settings = {"data": [str(photo_folder)], "output_dir": str(tmp_path / "run"), "max_steps": 1}
    path = write_settings(tmp_path / "settings.yaml", **settings, chunk_size=2)
    with Launched(path, processes=2, script=script) as run:
        run.finish()
        assert run.output.read_text().count("the group is gone") == 2
    assert [line["negatives"] for line in curve(tmp_path / "run")] == [7]
