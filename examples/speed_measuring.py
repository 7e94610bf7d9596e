"""Measurements for `benchmark_speed.py`: times of interleaved jobs, their FLOPs and their peak memory."""

import contextlib
import ctypes
import json
import math
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula
from tqdm.auto import tqdm

Job = Callable[[], Any]


def time_in_turn(jobs: dict[str, Job], rounds: int, device: str, title: str) -> dict[str, list[float]]:
    """Seconds of each run of each job. Every round runs every job once, and each round starts with the next job. Two
    warm-up rounds are not counted."""
    names = list(jobs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in tqdm(range(-2, rounds), desc=title, unit="round", leave=False):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            taken = time_once(jobs[name], device)
            if index >= 0:
                seconds[name].append(taken)
    return seconds


def time_once(job: Job, device: str) -> float:
    """Seconds of one run."""
    if device != "cuda":
        start = time.perf_counter()
        job()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    job()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1000


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median(values), "low": low, "high": high}


def ratio(seconds: dict[str, list[float]], job: str, reference: str) -> dict[str, float]:
    """Spread over the rounds of the ratio of one job's time to another's."""
    return spread([ours / theirs for ours, theirs in zip(seconds[job], seconds[reference])])


def can_compile(device: str) -> bool:
    """Whether torch.compile works here. Tries it on a small function, which also does its one-time setup."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    except RuntimeError as error:
        print(f"torch.compile is skipped because it fails on this machine: {error}", file=sys.stderr)
        return False
    return True


def matmul_job(dtype: torch.dtype, device: str, side: int) -> tuple[Job, int]:
    """A product of two square matrices, large enough to reach the machine's peak rate, and its FLOPs."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return (lambda: left @ right), 2 * side**3


def _linear_flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    rows = math.prod(x_shape[:-1])
    return 2 * rows * weight_shape[0] * weight_shape[1]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (3 * width + 2 * value[3])


def count_flops(job: Job) -> int:
    """FLOPs of the job's matrix products, on the same code path as the timing."""
    counter = FlopCounterMode(display=False)
    with counter:
        job()
    return counter.get_total_flops()


def register_cpu_kernels() -> None:
    """Registers CPU kernels that torch's FLOP counter does not know."""
    aten, onednn = torch.ops.aten, torch.ops.mkldnn
    for library, name, formula in (
        (onednn, "_linear_pointwise", _linear_flops),
        (aten, "_scaled_dot_product_flash_attention_for_cpu", _attention_flops),
        (aten, "_scaled_dot_product_flash_attention_for_cpu_backward", _attention_backward_flops),
    ):
        operator = getattr(library, name, None)  # builds without oneDNN lack its operators
        if operator is not None and operator not in flop_registry:
            register_flop_formula(operator)(formula)


def in_own_process(script: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Runs `script --one SPEC` in a separate process and reads the JSON object on its last line."""
    command = [sys.executable, script, "--one", json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the process for {spec} exited with {done.returncode}; see its message above.")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(job: Job, device: str) -> dict[str, float]:
    """Memory in MiB of the process before the job and at its peak; on CUDA, memory of the device."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        torch.cuda.synchronize()
        return {"before": before / 2**20, "peak": torch.cuda.max_memory_allocated() / 2**20}
    with contextlib.suppress(OSError, AttributeError):
        # glibc keeps freed memory, which would count as used before the job.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        # Resets the peak on Linux; elsewhere the peak is that since the start of the process.
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    job()
    return {"before": before, "peak": _status("VmHWM")}


def _status(name: str) -> float:
    # A process inherits `ru_maxrss` from its parent, so /proc is preferred.
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    kibibytes = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes / 1024
