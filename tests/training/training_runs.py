"""Small training runs: their settings, in this process or in processes of their own."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from tiny_models import TINY_FIELDS

from pgseg_hf.training.arguments import parse_arguments
from pgseg_hf.training.reporting import read_log
from pgseg_hf.training.run import Run

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


@contextlib.contextmanager
def a_run(folder, *options, **settings):
    """A run of this process, not yet started; its settings are written into the folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    try:
        yield Run(parse_arguments([write_settings(folder / "settings.yaml", **settings), *options]))
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


def run_here(folder, *options, **settings):
    """Runs to the end in this process; returns the results."""
    with a_run(folder, *options, **settings) as run:
        return run.train()


def totals(folder):
    """The loss of each step."""
    return [line["total"] for line in read_log(folder / "log.jsonl") if "total" in line]


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
