"""Measures training on this machine: does the loader keep up with the model, and what does gradient caching save?

    python examples/benchmark_training.py speed examples/configs/small_cpu.yaml --data photos
    python examples/benchmark_training.py memory

`speed` takes the options of `train_pgseg.py` and times the loader and the model separately, in turn. `memory` compares
the peak memory and throughput of a training step of the full-size model at a plain batch of 32 and at larger batches in
chunks of 32, each in its own process.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch

from pgseg_hf import PGSegConfig, PGSegModel, default_tokenizer
from pgseg_hf.training.arguments import parse_arguments
from pgseg_hf.training.gradient_cache import GradientCache

ROUNDS = 5
BATCHES = 4
CHUNK = 32


def speed(options: list[str]) -> None:
    from pgseg_hf.training.run import Run

    with tempfile.TemporaryDirectory() as folder:
        run = Run(parse_arguments([*options, "--output_dir", folder]))
        size, loader, model = run.options.batch_size, [], []
        ready = 2 * run.arguments[1].num_workers  # batches that workers prefetch
        for _ in range(ROUNDS + 1):
            batches = iter(run.stream)
            loaded = [next(batches) for _ in range(BATCHES + ready)]
            start = time.perf_counter()
            for _ in range(3 * BATCHES):
                next(batches)
            loader.append(3 * BATCHES * size / (time.perf_counter() - start))
            batches.close()
            start = time.perf_counter()
            for batch in loaded[:BATCHES]:
                run.train_step(batch)
            model.append(BATCHES * size / (time.perf_counter() - start))
    head = f"| {ROUNDS} rounds of {BATCHES} batches of {size} | images/s, median | smallest | largest |"
    print(f"{head}\n|---|---|---|---|")
    for name, rates in (("loader alone", loader[1:]), ("model alone", model[1:])):
        print(f"| {name} | {median(rates):.0f} | {min(rates):.0f} | {max(rates):.0f} |")
    print(f"\nloader / model: {median(loader[1:]) / median(model[1:]):.2f}")


def memory() -> None:
    rows = []
    for batch in (CHUNK, 256, 1024):
        command = [sys.executable, __file__, "one-step", str(batch)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(
        "| batch | chunks | negatives | peak memory | of the plain 32 | images/s |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        batch, peak, rate = row["batch"], row["peak_MiB"], row["images_per_second"]
        chunks = f"{batch // CHUNK} of {CHUNK}" if batch > CHUNK else "none"
        ratio = peak / rows[0]["peak_MiB"]
        print(f"| {batch} | {chunks} | {batch - 1} | {peak:.0f} MiB | {ratio:.2f} | {rate:.1f} |")


def one_step(batch: int) -> None:
    """Runs a training step of the full-size model after a warm-up step and prints its figures as JSON."""
    torch.manual_seed(0)
    model = PGSegModel(PGSegConfig.paper()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    prompts = [f"a photo of thing number {index}" for index in range(batch)]
    texts = default_tokenizer()(prompts, padding="max_length", return_tensors="pt")
    inputs = {**texts, "pixel_values": torch.randn(batch, 3, 224, 224)}
    for _ in range(2 if batch <= 256 else 1):
        start = time.perf_counter()
        if batch > CHUNK:
            GradientCache(model, CHUNK).backward(inputs)
        else:
            model(**inputs, return_loss=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"batch": batch, "peak_MiB": peak, "images_per_second": batch / seconds}))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["speed", *options]:
            speed(options)
        case ["memory"]:
            memory()
        case ["one-step", batch]:
            one_step(int(batch))
        case _:
            sys.exit(__doc__)
