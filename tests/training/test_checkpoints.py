"""Checkpoints: exact resumption, kills at every operation of saving, keeping the newest, and two processes."""

import itertools
import json
import os
import pickle
import shutil
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from training_runs import Training

from pgseg_hf.training import checkpoints
from pgseg_hf.training.checkpoints import (
    find_latest,
    load_checkpoint,
    prepare_output_dir,
    resolve_resume,
)


@pytest.fixture(autouse=True)
def warnings_reach_caplog():
    checkpoints.logging.enable_propagation()
    yield
    checkpoints.logging.disable_propagation()


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_resumed_run_goes_on_bit_for_bit_and_once_more(tmp_path):
    whole = Training()
    expected = [whole.step() for _ in range(6)]
    found, path = [], None
    for part in range(3):
        run = Training(seed=part)
        assert prepare_output_dir(run.accelerator, tmp_path, "latest" if part else None) == path
        if path is not None:
            progress, position = run.load(path)
            assert progress == {"step": 2 * part, "world_size": 1, "best_mean_iou": 0.25}
            assert position == {"batch": 2 * part, "rank": 0}
        found += [run.step(), run.step()]
        path = run.save(tmp_path, 2 * part + 2, extra={"best_mean_iou": 0.25})
    assert path == tmp_path / "checkpoint-00000006"
    assert found == expected
    assert_same(run.state(), whole.state())
    for group, other in zip(run.optimizer.param_groups, whole.optimizer.param_groups, strict=True):
        for parameter, twin in zip(group["params"], other["params"], strict=True):
            assert_same(run.optimizer.state[parameter], whole.optimizer.state[twin])


def test_the_newest_are_kept(tmp_path):
    run = Training()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-00000000").mkdir()
    left = tmp_path / ".partial-checkpoint-00000009"
    left.mkdir()
    (left / "left by a kill").write_bytes(b"half")
    assert "left by a kill" not in names(run.save(tmp_path, 9))
    for step in (10, 99_999_999, 100_000_000):
        path = run.save(tmp_path, step, keep=2)
    foreign = ["checkpoint-00000000", "checkpoint-best"]
    assert names(tmp_path) == sorted([*foreign, "checkpoint-100000000", "checkpoint-99999999"])
    assert find_latest(tmp_path).name == "checkpoint-100000000"
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    run.step()
    assert run.save(tmp_path, 100_000_000) == path, "an existing checkpoint is not overwritten"
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    with pytest.raises(ValueError, match="keep is 0"):
        run.save(tmp_path, 11, keep=0)


# Damage


@pytest.mark.parametrize(
    "name", ["model.safetensors", "random_states_0.pkl", "ema.safetensors", "progress.json"]
)
def test_a_damaged_latest_checkpoint_gives_way_to_the_one_before(tmp_path, name, caplog):
    run = Training()
    first, last = (run.save(tmp_path, step) for step in (1, 2))
    content = bytearray((last / name).read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    if name == "progress.json":
        content = content[:20]
    (last / name).write_bytes(content)
    assert prepare_output_dir(run.accelerator, tmp_path, "latest") == first
    assert "checkpoint-00000002 is damaged" in caplog.text
    assert "checkpoint-00000001 is now the latest" in caplog.text
    assert names(tmp_path) == [first.name, f"damaged-{last.name}"]
    assert run.save(tmp_path, 2) == last


def test_where_no_checkpoint_is_whole_nothing_is_renamed(tmp_path):
    run = Training()
    path = run.save(tmp_path, 1)
    (path / "optimizer.bin").unlink()
    for argument in ("latest", str(path)):
        with pytest.raises(ValueError, match=r"checkpoint-00000001 is damaged: .*optimizer.bin"):
            prepare_output_dir(run.accelerator, tmp_path, argument)
    assert names(tmp_path) == [path.name]


# Which runs may resume


def test_latest_of_nothing_starts_anew(tmp_path, caplog):
    assert resolve_resume(tmp_path / "absent", "latest") is None
    assert "absent has no checkpoint" in caplog.text
    assert resolve_resume(tmp_path / "absent", None) is None
    assert find_latest(tmp_path / "absent") is None


def test_checkpoints_are_never_overwritten_by_accident(tmp_path):
    run = Training()
    first, last = (run.save(tmp_path / "run", step) for step in (1, 2))
    other = run.save(tmp_path / "other", 7)
    with pytest.raises(ValueError, match="checkpoint-00000002; pass --resume_from"):
        prepare_output_dir(run.accelerator, tmp_path / "run")
    for path in (first, other):
        with pytest.raises(ValueError, match=r"contains checkpoint-00000002.* mixed"):
            resolve_resume(tmp_path / "run", str(path))
    for folder in ("run", "other", "run/checkpoint-00000009"):
        with pytest.raises(ValueError, match="is not a training checkpoint"):
            resolve_resume(tmp_path / "run", str(tmp_path / folder))
    for argument in ("latest", str(last)):
        assert resolve_resume(tmp_path / "run", argument) == last
    assert resolve_resume(tmp_path / "new", str(other)) == other
    assert names(tmp_path / "run") == [first.name, last.name]


def test_overwriting_deletes_checkpoints_and_nothing_else(tmp_path):
    run = Training()
    run.save(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"resuming from latest and overwriting .* exclusive"):
        prepare_output_dir(run.accelerator, tmp_path, "latest", overwrite=True)
    assert prepare_output_dir(run.accelerator, tmp_path, overwrite=True) is None
    assert names(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", b"half"),
        ("optimizer.bin", b""),
        ("scheduler.bin", b"half"),
        ("random_states_0.pkl", None),
        ("random_states_0.pkl", b"half"),
        ("ema.safetensors", None),
        ("position-0.json", None),
        ("position-0.json", b"[1]"),
        ("progress.json", b"{"),
    ],
)
def test_broken_checkpoints_are_refused(tmp_path, name, damage):
    run = Training()
    run.step()
    path = run.save(tmp_path, 1)
    if damage is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(damage)
    with pytest.raises(ValueError, match="checkpoint-00000001"):
        run.load(path)


def test_random_states_that_accelerate_cannot_set_are_noticed(tmp_path):
    run = Training()
    path = run.save(tmp_path, 1)
    states = checkpoints.load_weights_only(path / "random_states_0.pkl")
    torch.save({**states, "random_state": (0, (), None)}, path / "random_states_0.pkl")
    run.step()
    with pytest.raises(ValueError, match=r"random states in random_states_0.pkl could not be restored"):
        run.load(path)


def test_checkpoints_of_other_settings_are_refused(tmp_path):
    run = Training()
    path = run.save(tmp_path / "averaged", 1, extra={"depends_on": {"looks": 1, "loss": "info_nce"}})
    run.step()
    state = run.state()
    with pytest.raises(ValueError, match="loss was 'info_nce' and is 'sigmoid'"):
        load_checkpoint(run.accelerator, path, run.average, {"looks": 1, "loss": "sigmoid"})
    assert_same(run.state(), state)
    load_checkpoint(run.accelerator, path, run.average, {"looks": 1, "loss": "info_nce"})
    with pytest.raises(ValueError, match="has averaged weights"):
        Training(averaged=False).load(path)
    plain = Training(averaged=False).save(tmp_path / "plain", 1)
    with pytest.raises(ValueError, match="lacks averaged weights"):
        Training().load(plain)
    content = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps({**content, "world_size": 8}))
    with pytest.raises(ValueError, match=r"written by 8 processes, .*this run has 1"):
        Training().load(path)


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"]
)
def test_nothing_in_a_checkpoint_executes(tmp_path, name):
    run = Training()
    path = run.save(tmp_path / "run", 1)
    target = tmp_path / "executed"
    torch.save(Payload(target), path / name)
    with pytest.raises(ValueError, match="cannot be loaded"):
        run.load(path)
    assert not target.exists()
    pickle.loads(pickle.dumps(Payload(target)))
    assert target.exists(), "plain pickle runs the payload"


# Kills


class Killed(BaseException):
    pass


OPERATIONS = (
    *((os, name) for name in ("replace", "mkdir", "fsync", "unlink", "rmdir")),
    *((checkpoints, "write_json"), (checkpoints, "save_model"), (torch, "save"), (Accelerator, "save_state")),
)


def killed_at(monkeypatch, number, after):
    """Kills the process before or after operation `number` of saving; returns the operations that began."""
    begun = []

    def wrap(owner, name):
        original = getattr(owner, name)

        def operation(*args, **kwargs):
            begun.append(name)
            is_last = len(begun) == number
            if is_last and not after:
                raise Killed
            result = original(*args, **kwargs)
            if is_last or len(begun) > number:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, operation)

    for owner, name in OPERATIONS:
        wrap(owner, name)
    return begun


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_operation_leaves_a_usable_checkpoint(tmp_path, after):
    run = Training()
    run.step()
    run.save(tmp_path / "start", 1)
    saved = {1: run.state()}
    run.step()
    saved[2] = run.state()
    seen = set()
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            begun = killed_at(monkeypatch, number, after)
            try:
                run.save(folder, 2, keep=1)
            except Killed:
                seen.add(begun[number - 1])
        if len(begun) < number:
            break
        latest = find_latest(folder)
        resumed = Training(seed=5)
        assert prepare_output_dir(resumed.accelerator, folder, "latest") == latest
        step = resumed.load(latest)[0]["step"]
        assert_same(resumed.state(), saved[step])
        assert all(name.startswith("checkpoint-") for name in names(folder))
        resumed.save(folder, 3, keep=1)
        assert names(folder) == ["checkpoint-00000003"]
    assert seen == {name for _, name in OPERATIONS}
    assert number > 15


def test_everything_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    run, flushed, at_rename = Training(), [], []
    flush, replace = checkpoints._flush, os.replace

    def renaming(source, target):
        if os.path.isdir(source):
            at_rename.extend(flushed)
        replace(source, target)

    monkeypatch.setattr(checkpoints, "_flush", lambda path: (flush(path), flushed.append(path.name)))
    monkeypatch.setattr(os, "replace", renaming)
    path = run.save(tmp_path, 1)
    assert sorted(at_rename) == sorted([*names(path), f".partial-{path.name}"])
    assert flushed[-1] == tmp_path.name


# Two processes


def slowly(name):
    """Slows down a step of saving, so that a process that fails to wait would overtake it."""
    original = getattr(checkpoints, name)
    setattr(checkpoints, name, lambda *args: (time.sleep(0.1), original(*args))[1])


def one_of_two_processes(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    output = f"{folder}/run"
    run = Training(seed=rank)
    assert run.accelerator.num_processes == 2
    for name in ("_remove_leftovers", "_remove") if rank == 0 else ("write_json",):
        slowly(name)
    prepare_output_dir(run.accelerator, output)
    listings = []
    for step in (1, 2, 3):
        run.step()
        path = run.save(output, step, keep=2)
        listings.append(sorted(os.listdir(output)))
        run.accelerator.wait_for_everyone()
    expected, state = [run.step() for _ in range(3)], run.state()

    resumed = Training(seed=10 + rank)
    latest = prepare_output_dir(resumed.accelerator, output, "latest")
    progress, position = resumed.load(latest)
    found = [resumed.step() for _ in range(3)]
    result = {"paths": (str(path), str(latest)), "progress": progress, "position": position}
    result["listings"] = listings
    result |= {"expected": expected, "found": found, "states": (state, resumed.state())}
    torch.save(result, f"{folder}/{rank}.pt")
    resumed.accelerator.wait_for_everyone()
    assert prepare_output_dir(resumed.accelerator, output, overwrite=True) is None
    assert os.listdir(output) == []
    run.accelerator.free_memory()
    resumed.accelerator.free_memory()
    del run, resumed  # DDP must not hold the last reference to the group, see `Run.drop_wrapped_model`
    dist.destroy_process_group()


def test_two_processes_resume_exactly(tmp_path):
    mp.spawn(one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for rank, result in enumerate(results):
        assert result["listings"] == [
            [f"checkpoint-{step:08d}" for step in steps] for steps in ((1,), (1, 2), (2, 3))
        ]
        assert result["paths"][0] == result["paths"][1] == str(tmp_path / "run" / "checkpoint-00000003")
        assert result["progress"] == {"step": 3, "world_size": 2}
        assert result["position"] == {"batch": 3, "rank": rank}
        assert result["found"] == result["expected"]
        assert_same(*result["states"])
    assert results[0]["expected"] != results[1]["expected"], "each process has its own randomness"
