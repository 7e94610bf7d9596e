"""Measure speed and memory against transformers' GroupViT, which is the same architecture without prototypes.

    python examples/benchmark_speed.py --output speed --threads 2
    python examples/benchmark_speed.py --output speed --readme README.md examples/speed.md

With `--readme` ten rows of what users run go between the two markers of the first file, all others between those of the
second.

All jobs of a row are timed in turn, so that a ratio's two sides see the same machine; medians and quartiles over the
rounds go to `results.json` and `results.md`, and the curves, with matplotlib (the extra `plots`), to `curves.png`. Peak
memory is that of a process of its own. On CUDA (`--device cuda`) the encoder runs in bfloat16, training by autocast.
"""

import argparse
import copy
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from speed_jobs import (
    GROUPVIT,
    SCALES,
    VARIANTS,
    PhotoJobs,
    Scale,
    StartJobs,
    build_model,
    encoding_job,
    pixels,
    prototype_job,
    quantized,
    training_job,
)
from speed_measuring import (
    Job,
    can_compile,
    count_flops,
    in_own_process,
    matmul_job,
    peak_memory,
    ratio,
    register_cpu_kernels,
    spread,
    time_in_turn,
    time_once,
)
from speed_report import draw_curves, insert_table, is_headline, markdown

from pgseg_hf.command_line import CommandParser
from pgseg_hf.files import write_json, write_text

CONTENDERS = (GROUPVIT, *VARIANTS)
CHECKPOINTED = "corrected, gradient checkpointing"
MATMUL = "matmul"
PLAIN = "import transformers"
Row = dict[str, Any]


class Benchmark:
    """The sections of the benchmark; each returns rows.

    Args:
        scale_name: `"full"` or `"quick"`.
        rounds: how often each job is timed; training steps half as often.
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(self, scale_name: str, rounds: int, device: str):
        self.scale_name, self.rounds, self.device = scale_name, rounds, device
        self.scale: Scale = SCALES[scale_name]

    def encoder(self) -> list[Row]:
        """The image tower in evaluation, in float32 and bfloat16."""
        rows = []
        if self.device == "cuda":
            batch = self.scale.cuda_batches[0]
            sizes = tuple((size, batch) for size, _ in self.scale.images)
            return [row for size, batch in sizes for row in self._encoder_rows(size, batch, torch.bfloat16)]
        for dtype in (torch.float32, torch.bfloat16):
            for size, batch in self.scale.images:
                rows += self._encoder_rows(size, batch, dtype)
        return rows

    def _encoder_rows(self, size: int, batch: int, dtype: torch.dtype) -> list[Row]:
        jobs = {
            name: encoding_job(
                build_model(self.scale, name, size).to(self.device, dtype), pixels(size, batch)
            )
            for name in CONTENDERS
        }
        job = f"image encoder, {size} px, batch {batch}, {str(dtype).removeprefix('torch.')}"
        rows = self._rows("encoder", job, jobs, self.rounds, dtype)
        for row in rows:
            row["images_per_second"] = batch / row["seconds"]["median"]
        return rows

    def _rows(
        self, section: str, title: str, jobs: dict[str, Job], rounds: int, dtype: torch.dtype
    ) -> list[Row]:
        """One row for each job, with its operations and its share of the machine's rate of matrix products."""
        flops = {name: count_flops(job) for name, job in jobs.items()}
        side = self.scale.cuda_matmul if self.device == "cuda" else self.scale.matmul
        matmul, matmul_flops = matmul_job(dtype, self.device, side)
        seconds = time_in_turn({**jobs, MATMUL: matmul}, rounds, self.device, title)
        machine = matmul_flops / spread(seconds[MATMUL])["median"]
        rows = []
        for name in jobs:
            row: Row = {"section": section, "job": title, "contender": name, "seconds": spread(seconds[name])}
            if GROUPVIT in jobs:
                row["ratio"] = ratio(seconds, name, GROUPVIT)
            row["gflop"] = flops[name] / 1e9
            row["gflop_per_second"] = row["gflop"] / row["seconds"]["median"]
            row["share"] = row["gflop_per_second"] * 1e9 / machine
            row["machine_gflop_per_second"] = machine / 1e9
            rows.append(row)
        return rows

    def training(self) -> list[Row]:
        """A training step of the whole model, and its peak memory."""
        cuda = self.device == "cuda"
        dtype = torch.bfloat16 if cuda else torch.float32
        batches = self.scale.cuda_batches if cuda else self.scale.training_batches
        # All of the memory first: it is measured in other processes, which on CUDA share the device with this one.
        memory = {
            batch: {
                name: self._memory({"kind": "training", "contender": name, "batch": batch})
                for name in (*CONTENDERS, CHECKPOINTED)
            }
            for batch in batches
        }
        rows = []
        for batch in batches:
            title = f"training step, batch {batch}, {str(dtype).removeprefix('torch.')}"
            images = pixels(self._image_size(), batch).to(self.device)
            jobs = {
                name: build_training_job(self.scale, name, images)
                for name, of_name in memory[batch].items()
                if "peak" in of_name
            }
            try:
                of_batch = self._rows("training", title, jobs, max(self.rounds // 2, 1), dtype)
            except torch.OutOfMemoryError:
                of_batch = []
            for row in of_batch:
                row["images_per_second"] = batch / row["seconds"]["median"]
            measured = {row["contender"] for row in of_batch}
            for name in memory[batch]:
                if name not in measured:
                    reason = "not beside the others" if name in jobs else "out of memory"
                    of_batch.append(
                        {"section": "training", "job": title, "contender": name, "not_timed": reason}
                    )
            for row in of_batch:
                row |= _memory_of(row["contender"], memory[batch])
            rows += of_batch
        return rows

    def _image_size(self) -> int:
        return self.scale.images[0][0]

    def _memory(self, spec: dict[str, Any]) -> dict[str, Any]:
        shared = {"scale": self.scale_name, "device": self.device, "threads": torch.get_num_threads()}
        return in_own_process(__file__, {**shared, **spec})

    def compiled(self) -> list[Row]:
        """The image tower by torch.compile, against GroupViT without, and how long compiling takes."""
        if not can_compile(self.device):
            return []
        rows = []
        size, batch = self.scale.images[0]
        batch = self.scale.cuda_batches[0] if self.device == "cuda" else batch
        for dtype in (torch.bfloat16,) if self.device == "cuda" else (torch.float32, torch.bfloat16):
            jobs: dict[str, Job] = {}
            compiling: dict[str, float] = {}
            for name in (GROUPVIT, "corrected"):
                model, images = build_model(self.scale, name).to(self.device, dtype), pixels(size, batch)
                jobs[name] = encoding_job(model, images)
                fast = f"{name}, compiled"
                jobs[fast] = encoding_job(model, images, compiled=True)
                with torch.compiler.config.patch(force_disable_caches=True):
                    compiling[fast] = time_once(jobs[fast], self.device)
            title = f"torch.compile, {size} px, batch {batch}, {str(dtype).removeprefix('torch.')}"
            seconds = time_in_turn(jobs, self.rounds, self.device, title)
            for name in jobs:
                row: Row = {"section": "compiled", "job": title, "contender": name}
                row["seconds"], row["ratio"] = spread(seconds[name]), ratio(seconds, name, GROUPVIT)
                if name in compiling:
                    row["compile_seconds"] = compiling[name]
                rows.append(row)
        return rows

    def int8(self) -> list[Row]:
        """The image tower in int8, against GroupViT in float32 and in bfloat16."""
        if self.device == "cuda":
            return []
        rows = []
        for size, batch in self.scale.images:
            images, theirs = pixels(size, batch), build_model(self.scale, GROUPVIT, size)
            jobs = {
                "float32": encoding_job(theirs, images),
                "bfloat16": encoding_job(copy.deepcopy(theirs).to(torch.bfloat16), images),
                "int8": encoding_job(quantized(build_model(self.scale, "corrected")), images),
            }
            title = f"image encoder, {size} px, batch {batch}, int8"
            seconds = time_in_turn(jobs, self.rounds, self.device, title)
            for reference in ("float32", "bfloat16"):
                row: Row = {"section": "int8", "job": title, "contender": "corrected", "of": reference}
                row["seconds"], row["ratio"] = spread(seconds["int8"]), ratio(seconds, "int8", reference)
                row["images_per_second"] = batch / row["seconds"]["median"]
                rows.append(row)
        return rows

    def start(self) -> list[Row]:
        """Processes from their start to their end, against the import of what they cannot do without."""
        clip, passes = "import torch and transformers' CLIP", "encoder passes"
        with tempfile.TemporaryDirectory() as folder:
            starts = StartJobs(folder)
            jobs = {
                PLAIN: starts.process("-c", "import transformers"),
                "import pgseg_hf, transformers": starts.process("-c", "import pgseg_hf, transformers"),
                "pgseg --help": starts.process("-m", "pgseg_hf", "--help"),
                clip: starts.process("-c", "import torch, transformers.models.clip.modeling_clip"),
                passes: starts.encoder_passes,
                "pgseg segment": starts.segment,
            }
            title = "process start, default checkpoint"
            seconds = time_in_turn(jobs, max(self.rounds // 4, 1), "cpu", title)
        # All that is above the encoder passes, against the import.
        own = [all_of_it - encoding for all_of_it, encoding in zip(seconds["pgseg segment"], seconds[passes])]
        references = {"import pgseg_hf, transformers": PLAIN, "pgseg --help": PLAIN, "pgseg segment": clip}
        rows = []
        for name in jobs:
            row: Row = {"section": "start", "job": title, "contender": name, "seconds": spread(seconds[name])}
            if name in references:
                of_job = seconds | {"pgseg segment": own}
                row["ratio"], row["of"] = ratio(of_job, name, references[name]), references[name]
            rows.append(row)
        return rows

    def photo(self) -> list[Row]:
        """A photo end to end against its encoder passes alone, and many labels against few."""
        photos = PhotoJobs(self.scale, self.device)
        few, many = self.scale.labels
        names = {f"{few} labels": few, f"{many} labels": many}
        jobs = {
            "encoder passes": photos.encoder_passes,
            **{name: photos.segmentation(count) for name, count in names.items()},
        }
        width, height = self.scale.photo
        title = f"a {width}x{height} photo, sliding window, float32"
        seconds = time_in_turn(jobs, self.rounds, self.device, title)
        memory = {
            name: self._memory({"kind": "photo", "labels": count})["peak"] for name, count in names.items()
        }
        rows = []
        for name, reference in zip(jobs, ("encoder passes", "encoder passes", f"{few} labels")):
            row: Row = {"section": "photo", "job": title, "contender": name, "seconds": spread(seconds[name])}
            row["ratio"], row["of"] = ratio(seconds, name, reference), reference
            if name in memory:
                row["memory_MiB"] = {"peak": memory[name]}
                row["memory_ratio"] = memory[name] / memory[f"{few} labels"]
            rows.append(row)
        return [*rows, self._large_photo()]

    def _large_photo(self) -> Row:
        """The memory that a large photo takes with very many labels."""
        (width, height), count = self.scale.large_photo, self.scale.large_labels
        memory = self._memory({"kind": "photo", "labels": count, "size": [width, height]})
        title = f"a {width}x{height} photo, sliding window, float32"
        row: Row = {"section": "large photo", "job": title, "contender": f"{count} labels"}
        return row | {"not_timed": "", "memory_MiB": {"peak": memory["peak"]}}

    def prototypes(self) -> list[Row]:
        """Estimation, matching and losses at a large batch, as a share of the training step."""
        unit = self.scale.cuda_batches[0] if self.device == "cuda" else self.scale.training_batches[-1]
        batch = self.scale.prototype_batch
        model = build_model(self.scale, "corrected").to(self.device)
        autocast = torch.bfloat16 if self.device == "cuda" else None
        jobs = {
            "step": training_job(model, pixels(self._image_size(), unit), autocast),
            "prototypes": prototype_job(self.scale, self.device),
        }
        title = f"prototypes at batch {batch}"
        seconds = time_in_turn(jobs, max(self.rounds // 4, 1), self.device, title)
        steps = batch / unit
        share = {name: value / steps for name, value in ratio(seconds, "prototypes", "step").items()}
        return [
            {
                "section": "prototypes",
                "job": title,
                "contender": "corrected",
                "seconds": spread(seconds["prototypes"]),
                "ratio": share,
                "of": f"{steps:g} training steps of {unit}",
            }
        ]

    def curves(self) -> list[Row]:
        """How time grows with image size, batch and number of labels, and memory with the labels."""
        rows, rounds = [], max(self.rounds // 2, 1)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        first_size, curve = self._image_size(), []
        curve += [("image size", size, size, 1) for size in self.scale.curve_sizes]
        curve += [("batch", batch, first_size, batch) for batch in self.scale.curve_batches]
        for name, value, size, batch in curve:
            jobs = {
                contender: encoding_job(
                    build_model(self.scale, contender, size).to(self.device, dtype), pixels(size, batch)
                )
                for contender in CONTENDERS
            }
            seconds = time_in_turn(jobs, rounds, self.device, f"{name} {value}")
            rows += [_point(name, value, contender, seconds) for contender in CONTENDERS]
        photos = PhotoJobs(self.scale, self.device)
        by_labels = {f"{count} labels": photos.segmentation(count) for count in self.scale.curve_labels}
        seconds = time_in_turn(by_labels, rounds, self.device, "labels")
        for count, name in zip(self.scale.curve_labels, by_labels):
            row = _point("labels", count, "corrected", {"corrected": seconds[name]})
            row["memory_MiB"] = {"peak": self._memory({"kind": "photo", "labels": count})["peak"]}
            rows.append(row)
        return rows


def _memory_of(contender: str, memory: dict[str, dict[str, Any]]) -> Row:
    """A training step's memory, and its ratios to GroupViT's: of all that the process holds, and of what the step adds
    to what was held before it; nothing where it does not fit."""
    own, theirs = memory[contender], memory[GROUPVIT]
    row: Row = {"memory_MiB": own} if "peak" in own else {}
    if "peak" in own and "peak" in theirs:
        row["memory_ratio"] = own["peak"] / theirs["peak"]
        row["step_memory_ratio"] = (own["peak"] - own["before"]) / (theirs["peak"] - theirs["before"])
    return row


def build_training_job(scale: Scale, contender: str, images: torch.Tensor) -> Job:
    """The training step of a contender on the images' device; on CUDA by autocast."""
    checkpointing = contender == CHECKPOINTED
    model = build_model(scale, "corrected" if checkpointing else contender).to(images.device)
    return training_job(model, images, torch.bfloat16 if images.is_cuda else None, checkpointing)


def _point(curve: str, value: int, contender: str, seconds: dict[str, list[float]]) -> Row:
    row: Row = {"section": "curves", "job": curve, "value": value, "contender": contender}
    row["seconds"] = spread(seconds[contender])
    return row


SECTIONS: dict[str, Callable[[Benchmark], list[Row]]] = {
    name: getattr(Benchmark, name)
    for name in ("start", "encoder", "int8", "photo", "prototypes", "training", "compiled", "curves")
}


def measure_one(spec: dict[str, Any]) -> dict[str, Any]:
    """The peak memory of one job, in MiB; `{"out_of_memory": True}` where it does not fit."""
    torch.set_num_threads(spec["threads"])
    scale, device = SCALES[spec["scale"]], spec["device"]
    if spec["kind"] == "photo":
        photos = PhotoJobs(scale, device, spec.get("size"))
        return peak_memory(photos.segmentation(spec["labels"]), device)
    images = pixels(scale.images[0][0], spec["batch"])
    try:
        job = build_training_job(scale, spec["contender"], images.to(device))
        job()  # what comes with the first step: kernels, the optimizer's state
        return peak_memory(job, device)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


def describe_machine(device: str) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("speed"), help="folder for the results")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own choice by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--readme",
        type=Path,
        nargs=2,
        metavar=("README", "PAGE"),
        help="Markdown files with the markers of a table: for ten rows of what users run, and for the rest",
    )
    parser.add_argument("--quick", action="store_true", help="tiny models: the figures mean nothing")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected at least 1.")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads}, expected at least 1.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no CUDA device here; expected cpu.")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.one:
        print(json.dumps(measure_one(options.one)))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.monotonic()
    register_cpu_kernels()
    benchmark = Benchmark("quick" if options.quick else "full", options.rounds, options.device)
    rows: list[Row] = []
    results: dict[str, Any] = {"machine": describe_machine(options.device), "rows": rows}
    for name in options.sections:
        print(f"{name} ...", file=sys.stderr)
        rows += SECTIONS[name](benchmark)
        if options.device == "cuda":
            gc.collect()  # models of the section refer to themselves
            torch.cuda.empty_cache()
        write_json(results, options.output / "results.json")
    table = markdown(results)
    write_text(table, options.output / "results.md")
    draw_curves(rows, options.output / "curves.png")
    for path, is_readme in zip(options.readme or (), (True, False)):
        some = [row for row in rows if is_headline(row) == is_readme]
        insert_table(markdown(results | {"rows": some}), path)
    print(table)
    minutes = (time.monotonic() - start) / 60
    print(
        f"{len(rows)} rows in {minutes:.1f} minutes, in results.json and results.md of {options.output}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
