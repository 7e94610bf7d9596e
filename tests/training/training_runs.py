"""Helpers for small training runs, in this process or in subprocesses."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from tiny_models import TINY_FIELDS
from torch import nn

from pgseg_hf.training.arguments import parse_arguments
from pgseg_hf.training.checkpoints import load_checkpoint, save_checkpoint
from pgseg_hf.training.optimization import ExponentialMovingAverage, build_optimizer, cosine_schedule
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


def write_settings(path, **settings):
    path.write_text(yaml.safe_dump(SETTINGS | settings))
    return str(path)


@contextlib.contextmanager
def a_run(folder, *options, **settings):
    """A run in this process that is not started yet; its settings are written to the folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    try:
        yield Run(parse_arguments([write_settings(folder / "settings.yaml", **settings), *options]))
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


def run_here(folder, *options, **settings):
    """Trains to the end in this process; returns the results."""
    with a_run(folder, *options, **settings) as run:
        return run.train()


def totals(folder):
    """The loss of each step."""
    return [line["total"] for line in read_log(folder / "log.jsonl") if "total" in line]


class Training:
    """A tiny run whose steps use all three random generators and whose model has buffers."""

    def __init__(self, seed=0, averaged=True):
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(seed)
        self.accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.average = ExponentialMovingAverage(model, decay=0.8) if averaged else None
        optimizer = build_optimizer(model, learning_rate=0.1)
        schedule = cosine_schedule(optimizer, 2, 20)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)

    def step(self):
        inputs = torch.randn(4, 3) + random.random() + torch.from_numpy(np.random.rand(4, 3)).float()
        loss = self.model(inputs).square().mean()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.accelerator.unwrap_model(self.model))
        return loss.item(), self.schedule.get_last_lr()

    def save(self, folder, step, **kwargs):
        position = {"batch": step, "rank": self.accelerator.process_index}
        return save_checkpoint(self.accelerator, folder, step, position, ema=self.average, **kwargs)

    def load(self, path):
        return load_checkpoint(self.accelerator, path, self.average)

    def state(self):
        parts = {"model": self.model.state_dict()}
        if self.average is not None:
            parts["average"] = self.average.state_dict()
        return {
            f"{part}.{name}": value.clone() for part, state in parts.items() for name, value in state.items()
        }


class Launched:
    """A run in subprocesses that writes its output to a file. All processes are killed at the end of the block."""

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
        """The launcher's descendants (workers have their own sessions), then the launcher; empty after its end."""
        if self.process.poll() is not None:
            return []  # its process ID may have been reused
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
        """Fails the test with the run's output, including the stack traces that an abort makes it write."""
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
                self.fail("the run ended early")
            if time.monotonic() > deadline:
                self.fail(f"the run is not at step {step} after {PATIENCE} s")
            time.sleep(0.01)
