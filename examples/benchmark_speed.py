"""Measures speed and memory against transformers' GroupViT, the same architecture without prototypes.

    python examples/benchmark_speed.py --output speed --threads 2
    python examples/benchmark_speed.py --output speed --readme README.md examples/speed.md

With `--readme`, ten rows for common uses are inserted between the two markers in the first file, and all other rows
between those in the second.

All jobs of a row are timed in turn, so that both sides of a ratio run under the same conditions. Medians and quartiles
over the rounds are written to `results.json` and `results.md`, and curves, with matplotlib (the extra `plots`), to
`curves.png`. Peak memory is measured in a separate process. On CUDA (`--device cuda`) the encoder runs in bfloat16 and
training under autocast.
"""

import argparse
import copy
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from speed_jobs import (
    CHECKPOINTED,
    GROUPVIT,
    SCALES,
    VARIANTS,
    PhotoJobs,
    Scale,
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

from pgseg_hf import load_segmenter
from pgseg_hf.command_line import CommandParser
from pgseg_hf.files import write_json, write_text

CONTENDERS = (GROUPVIT, *VARIANTS)
MATMUL = "matmul"
PASSES = "encoder passes"
Row = dict[str, Any]


class Benchmark:
    """The sections of the benchmark; each method returns rows.

    Args:
        scale_name: `"full"` or `"quick"`.
        rounds: how often each job is timed; training steps are timed half as often.
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(self, scale_name: str, rounds: int, device: str):
        self.scale_name, self.rounds, self.device = scale_name, rounds, device
        self.scale: Scale = SCALES[scale_name]
        self.images, self.dtypes = self.scale.images, (torch.float32, torch.bfloat16)
        self.side, self.training_batches = self.scale.matmul, self.scale.training_batches
        if device == "cuda":
            batch = self.scale.cuda_batches[0]
            self.images, self.dtypes = tuple((size, batch) for size, _ in self.images), (torch.bfloat16,)
            self.side, self.training_batches = self.scale.cuda_matmul, self.scale.cuda_batches

    def _timed(
        self, section: str, title: str, jobs: dict[str, Job], rounds: int, reference: str | None = None
    ) -> tuple[dict[str, Row], dict[str, list[float]]]:
        """A row for each job, with the ratio of its time to a reference's, and the seconds of all rounds."""
        seconds = time_in_turn(jobs, max(rounds, 1), self.device, title)
        rows: dict[str, Row] = {}
        for name in jobs:
            rows[name] = {
                "section": section,
                "job": title,
                "contender": name,
                "seconds": spread(seconds[name]),
            }
            if reference in jobs:
                rows[name]["ratio"] = ratio(seconds, name, reference)
        return rows, seconds

    def _counted(
        self, section: str, title: str, jobs: dict[str, Job], rounds: int, dtype: torch.dtype, batch: int
    ) -> list[Row]:
        """Like `_timed` against GroupViT, with FLOPs and their share of the machine's matrix product rate."""
        flops = {name: count_flops(job) for name, job in jobs.items()}
        matmul, matmul_flops = matmul_job(dtype, self.device, self.side)
        rows, _ = self._timed(section, title, {**jobs, MATMUL: matmul}, rounds, GROUPVIT)
        machine = matmul_flops / rows.pop(MATMUL)["seconds"]["median"]
        for name, row in rows.items():
            row["gflop"] = flops[name] / 1e9
            row["gflop_per_second"] = row["gflop"] / row["seconds"]["median"]
            row["share"] = row["gflop_per_second"] * 1e9 / machine
            row["machine_gflop_per_second"] = machine / 1e9
            row["images_per_second"] = batch / row["seconds"]["median"]
        return list(rows.values())

    def _encoders(self, size: int, batch: int, dtype: torch.dtype) -> dict[str, Job]:
        models = {name: build_model(self.scale, name, size).to(self.device, dtype) for name in CONTENDERS}
        return {name: encoding_job(model, pixels(size, batch)) for name, model in models.items()}

    def encoder(self) -> list[Row]:
        """The image tower in evaluation mode, in float32 and bfloat16."""
        rows = []
        for dtype in self.dtypes:
            for size, batch in self.images:
                title = f"image encoder, {size} px, batch {batch}, {_name(dtype)}"
                jobs = self._encoders(size, batch, dtype)
                rows += self._counted("encoder", title, jobs, self.rounds, dtype, batch)
        return rows

    def training(self) -> list[Row]:
        """A training step of the whole model, and its peak memory."""
        dtype = self.dtypes[0]
        # Memory comes first: it is measured in other processes, which on CUDA share the device with this one.
        memory = {
            batch: {
                name: self._memory({"kind": "training", "contender": name, "batch": batch})
                for name in (*CONTENDERS, CHECKPOINTED)
            }
            for batch in self.training_batches
        }
        rows = []
        for batch, of_batch in memory.items():
            title = f"training step, batch {batch}, {_name(dtype)}"
            images = pixels(self.images[0][0], batch).to(self.device)
            fitting = [name for name, own in of_batch.items() if "peak" in own]
            jobs = {name: training_job(self.scale, name, images) for name in fitting}
            try:
                timed = self._counted("training", title, jobs, self.rounds // 2, dtype, batch)
            except torch.OutOfMemoryError:
                timed = []
            measured = {row["contender"] for row in timed}
            for name in of_batch:
                if name not in measured:
                    reason = "not beside the others" if name in fitting else "out of memory"
                    timed.append(
                        {"section": "training", "job": title, "contender": name, "not_timed": reason}
                    )
            rows += [row | _memory_of(row["contender"], of_batch) for row in timed]
        return rows

    def _memory(self, spec: dict[str, Any]) -> dict[str, Any]:
        shared = {"scale": self.scale_name, "device": self.device, "threads": torch.get_num_threads()}
        return in_own_process(__file__, {**shared, **spec})

    def compiled(self) -> list[Row]:
        """The image tower with torch.compile against GroupViT without, and the time of compilation."""
        if not can_compile(self.device):
            return []
        found = []
        size, batch = self.images[0]
        for dtype in self.dtypes:
            jobs: dict[str, Job] = {}
            compiling: dict[str, float] = {}
            for name in (GROUPVIT, "corrected"):
                model, images = build_model(self.scale, name).to(self.device, dtype), pixels(size, batch)
                jobs[name] = encoding_job(model, images)
                fast = f"{name}, compiled"
                jobs[fast] = encoding_job(model, images, compiled=True)
                with torch.compiler.config.patch(force_disable_caches=True):
                    compiling[fast] = time_once(jobs[fast], self.device)
            title = f"torch.compile, {size} px, batch {batch}, {_name(dtype)}"
            rows, _ = self._timed("compiled", title, jobs, self.rounds, GROUPVIT)
            for name, seconds in compiling.items():
                rows[name]["compile_seconds"] = seconds
            found += rows.values()
        return found

    def int8(self) -> list[Row]:
        """The image tower in int8, against GroupViT in float32 and in bfloat16."""
        if self.device == "cuda":
            return []
        found = []
        for size, batch in self.images:
            images, theirs = pixels(size, batch), build_model(self.scale, GROUPVIT, size)
            jobs = {
                "float32": encoding_job(theirs, images),
                "bfloat16": encoding_job(copy.deepcopy(theirs).to(torch.bfloat16), images),
                "int8": encoding_job(quantized(build_model(self.scale, "corrected")), images),
            }
            title = f"image encoder, {size} px, batch {batch}, int8"
            rows, seconds = self._timed("int8", title, jobs, self.rounds)
            for reference in ("float32", "bfloat16"):
                row = rows["int8"] | {"contender": "corrected", "of": reference}
                row["ratio"] = ratio(seconds, "int8", reference)
                row["images_per_second"] = batch / row["seconds"]["median"]
                found.append(row)
        return found

    def start(self) -> list[Row]:
        """Whole processes against the imports that they cannot avoid."""
        plain, ours, clip = (
            "import transformers",
            "import pgseg_hf, transformers",
            "import torch and transformers' CLIP",
        )
        photo, segmenter = str(Path(__file__).parent / "images" / "dog.jpg"), load_segmenter()
        with tempfile.TemporaryDirectory() as folder:

            def process(*arguments: str) -> Job:
                command = [sys.executable, *arguments]
                return lambda: subprocess.run(command, cwd=folder, check=True, capture_output=True)

            segment = ("-m", "pgseg_hf", "segment", photo, "--labels", "dog, grass, sky", "--overwrite")
            jobs = {
                plain: process("-c", plain),
                ours: process("-c", ours),
                "pgseg --help": process("-m", "pgseg_hf", "--help"),
                clip: process("-c", "import torch, transformers.models.clip.modeling_clip"),
                PASSES: lambda: list(segmenter.encode([photo])),
                "pgseg segment": process(*segment),
            }
            rows, seconds = self._timed("start", "process start, default checkpoint", jobs, self.rounds // 4)
        # The time beyond the encoder passes is compared with the import.
        pairs = zip(seconds["pgseg segment"], seconds[PASSES])
        seconds["pgseg segment"] = [all_of_it - encoding for all_of_it, encoding in pairs]
        for name, reference in ((ours, plain), ("pgseg --help", plain), ("pgseg segment", clip)):
            rows[name] |= {"ratio": ratio(seconds, name, reference), "of": reference}
        return list(rows.values())

    def photo(self) -> list[Row]:
        """Segmenting a photo against its encoder passes alone, and many labels against few."""
        photos = PhotoJobs(self.scale, self.device)
        few, many = (f"{count} labels" for count in self.scale.labels)
        counts = dict(zip((few, many), self.scale.labels))
        jobs = {name: photos.segmentation(count) for name, count in counts.items()}
        width, height = self.scale.photo
        title = f"a {width}x{height} photo, sliding window, float32"
        jobs = {PASSES: photos.encoder_passes, **jobs}
        rows, seconds = self._timed("photo", title, jobs, self.rounds)
        for name, reference in ((PASSES, PASSES), (few, PASSES), (many, few)):
            rows[name] |= {"ratio": ratio(seconds, name, reference), "of": reference}
        memory = {name: self._memory({"kind": "photo", "labels": counts[name]})["peak"] for name in counts}
        for name, peak in memory.items():
            rows[name] |= {"memory_MiB": {"peak": peak}, "memory_ratio": peak / memory[few]}
        # Peak memory of a large photo with very many labels.
        (width, height), count = self.scale.large_photo, self.scale.large_labels
        peak = self._memory({"kind": "photo", "labels": count, "size": [width, height]})["peak"]
        title = f"a {width}x{height} photo, sliding window, float32"
        large = {"section": "large photo", "job": title, "contender": f"{count} labels"}
        return [*rows.values(), large | {"not_timed": "", "memory_MiB": {"peak": peak}}]

    def prototypes(self) -> list[Row]:
        """Prototype estimation, matching and losses at a large batch, as a share of the training step."""
        unit = self.scale.cuda_batches[0] if self.device == "cuda" else self.scale.training_batches[-1]
        batch = self.scale.prototype_batch
        images = pixels(self.images[0][0], unit).to(self.device)
        jobs = {
            "step": training_job(self.scale, "corrected", images),
            "corrected": prototype_job(self.scale, self.device),
        }
        title = f"prototypes at batch {batch}"
        rows, _ = self._timed("prototypes", title, jobs, self.rounds // 4, "step")
        steps, row = batch / unit, rows["corrected"]
        row["ratio"] = {name: value / steps for name, value in row["ratio"].items()}
        return [row | {"of": f"{steps:g} training steps of {unit}"}]

    def curves(self) -> list[Row]:
        """Time by image size, batch size and number of labels, and memory by number of labels."""
        found: list[Row] = []
        side, rounds = self.images[0][0], self.rounds // 2
        curve = [("image size", size, size, 1) for size in self.scale.curve_sizes]
        curve += [("batch", batch, side, batch) for batch in self.scale.curve_batches]
        for name, value, size, batch in curve:
            jobs = self._encoders(size, batch, self.dtypes[0])
            rows, _ = self._timed("curves", name, jobs, rounds)
            found += [row | {"value": value} for row in rows.values()]
        photos = PhotoJobs(self.scale, self.device)
        by_labels = {str(count): photos.segmentation(count) for count in self.scale.curve_labels}
        rows, _ = self._timed("curves", "labels", by_labels, rounds)
        for count in self.scale.curve_labels:
            peak = self._memory({"kind": "photo", "labels": count})["peak"]
            changes = {"value": count, "contender": "corrected", "memory_MiB": {"peak": peak}}
            found.append(rows[str(count)] | changes)
        return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory_of(contender: str, memory: dict[str, dict[str, Any]]) -> Row:
    """Memory of a training step and its ratios to GroupViT's, for the whole process and for the step alone. Empty if it
    does not fit."""
    own, theirs = memory[contender], memory[GROUPVIT]
    row: Row = {"memory_MiB": own} if "peak" in own else {}
    if "peak" in own and "peak" in theirs:
        row["memory_ratio"] = own["peak"] / theirs["peak"]
        row["step_memory_ratio"] = (own["peak"] - own["before"]) / (theirs["peak"] - theirs["before"])
    return row


SECTIONS: dict[str, Callable[[Benchmark], list[Row]]] = {
    name: getattr(Benchmark, name)
    for name in ("start", "encoder", "int8", "photo", "prototypes", "training", "compiled", "curves")
}


def measure_one(spec: dict[str, Any]) -> dict[str, Any]:
    """The peak memory of one job in MiB; `{"out_of_memory": True}` if it does not fit."""
    torch.set_num_threads(spec["threads"])
    scale, device = SCALES[spec["scale"]], spec["device"]
    if spec["kind"] == "photo":
        photos = PhotoJobs(scale, device, spec.get("size"))
        return peak_memory(photos.segmentation(spec["labels"]), device)
    images = pixels(scale.images[0][0], spec["batch"])
    try:
        job = training_job(scale, spec["contender"], images.to(device))
        job()  # the first step sets up kernels and the optimizer's state
        return peak_memory(job, device)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


def describe_machine(device: str) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    cpu = names[0] if names else platform.processor() or platform.machine()
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
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--readme",
        type=Path,
        nargs=2,
        metavar=("README", "PAGE"),
        help="Markdown files with the markers of a table: for ten rows of common uses, and for the rest",
    )
    parser.add_argument("--quick", action="store_true", help="use tiny models; the figures are meaningless")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}, expected at least 1.")
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
            gc.collect()  # models of the section have reference cycles
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
