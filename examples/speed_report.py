"""Tables and plots of `benchmark_speed.py`."""

import io
import sys
from pathlib import Path
from typing import Any

from pgseg_hf.files import write_atomically, write_text

BEGIN, END = "<!-- benchmark_speed.py: begin -->", "<!-- benchmark_speed.py: end -->"

GOALS: dict[tuple[str, str, str], dict[str, float]] = {
    ("encoder", "float32", "corrected"): {"ratio": 0.92, "share": 0.9},
    ("encoder", "float32", "released"): {"ratio": 1.12, "share": 0.9},
    ("encoder", "bfloat16", "corrected"): {"ratio": 1.0, "share": 0.75},
    ("encoder", "bfloat16", "released"): {"ratio": 1.05, "share": 0.75},
    ("training", "float32", "corrected"): {"ratio": 1.05, "memory_ratio": 0.75},
    ("training", "float32", "released"): {"ratio": 1.12},
}
"""Upper bounds of ratios and lower bounds of shares, by section, number format and contender."""
LARGE_IMAGE_GOALS = {("float32", "released"): 1.10, ("bfloat16", "corrected"): 1.03}
CUDA_GOALS = {("encoder", "corrected"): 0.7, ("training", "corrected"): 0.75}
INT8_GOALS = {"float32": 0.5, "bfloat16": 0.9}  # of GroupViT's time
MANY_LABELS_GOAL, PHOTO_GOAL, PROTOTYPES_GOAL = 1.1, 1.1, 0.03
LARGE_PHOTO_GOAL = 1536  # MiB
START_GOALS = {
    "import pgseg_hf, transformers": {"ratio": 1.3},
    "pgseg segment": {"ratio": 1.5},
    "pgseg --help": {"seconds": 1.0},
}


def goals(row: dict[str, Any], on_cuda: bool = False) -> dict[str, float]:
    """The bounds that a row is to keep, by the name of its figure; none for most rows."""
    section, contender = row["section"], row["contender"]
    if section == "prototypes":
        return {"ratio": PROTOTYPES_GOAL}
    if section == "int8":
        return {"ratio": INT8_GOALS[row["of"]]}
    if section == "large photo":
        return {"peak": LARGE_PHOTO_GOAL}
    if section == "start":
        return dict(START_GOALS.get(contender, {}))
    if section == "photo":
        if row["of"] == "encoder passes":
            return {} if contender == "encoder passes" else {"ratio": PHOTO_GOAL}
        return {"ratio": MANY_LABELS_GOAL, "memory_ratio": MANY_LABELS_GOAL}
    if on_cuda and section in ("encoder", "training"):
        named = (section, contender) in CUDA_GOALS and "batch 256," in row["job"]
        return {"ratio": CUDA_GOALS[section, contender]} if named else {}
    kind = "bfloat16" if "bfloat16" in row["job"] else "float32"
    bounds = dict(GOALS.get((section, kind, contender), {}))
    if "448 px" in row["job"] and (kind, contender) in LARGE_IMAGE_GOALS:
        bounds["ratio"] = LARGE_IMAGE_GOALS[kind, contender]
    return bounds


def _figure(row: dict[str, Any], name: str, bounds: dict[str, float]) -> str:
    """A figure with its quartiles and, where it has a goal, the goal and whether it holds."""
    if name not in row:
        return ""
    value = row[name]["median"] if isinstance(row[name], dict) else row[name]
    digits = 3 if row["section"] == "prototypes" else 2
    text = f"{value:.{digits}f}"
    if isinstance(row[name], dict):
        text += f" ({row[name]['low']:.{digits}f} to {row[name]['high']:.{digits}f})"
    return text + _verdict(value, name, bounds)


def _verdict(value: float, name: str, bounds: dict[str, float]) -> str:
    if name not in bounds:
        return ""
    holds = value >= bounds[name] if name == "share" else value <= bounds[name]
    sign = ">=" if name == "share" else "<="
    return f", goal {sign} {bounds[name]:g}: {'holds' if holds else '**missed**'}"


def _short(value: float) -> str:
    """Whole above 100, three digits below."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _memory(row: dict[str, Any], bounds: dict[str, float]) -> tuple[str, str]:
    """Peak memory and its ratio, each with the part that the job itself adds to what was held before it."""
    if "memory_MiB" not in row:
        return "", ""
    memory, ratio = row["memory_MiB"], _figure(row, "memory_ratio", bounds)
    if "step_memory_ratio" not in row:
        return f"{memory['peak']:.0f}{_verdict(memory['peak'], 'peak', bounds)}", ratio
    own = memory["peak"] - memory["before"]
    return (
        f"{memory['peak']:.0f} (step's own: {own:.0f})",
        f"{ratio} (step's own: {row['step_memory_ratio']:.2f})",
    )


def is_headline(row: dict[str, Any]) -> bool:
    """Whether a row is one of the ten at most that the README has: what users run."""
    section, contender = row["section"], row["contender"]
    if section == "start":
        return contender in ("pgseg --help", "pgseg segment")
    if section == "photo":
        return row["of"] == "encoder passes" and contender != "encoder passes"
    return section == "large photo" or (section in ("encoder", "training") and contender == "corrected")


def markdown(results: dict[str, Any]) -> str:
    """The rows as a Markdown table; `results` are those of `results.json`, or some of their rows."""
    machine = results["machine"]
    on_cuda = "NVIDIA" in machine["device"]
    lines = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, transformers "
        f"{machine['transformers']}; medians (quartiles) over interleaved rounds.",
        "",
        "| job | | ms | images/s | of GroupViT's time | GFLOP | share of the matmul rate | peak memory, MiB | of "
        "GroupViT's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if row["section"] == "curves":
            continue
        bounds = goals(row, on_cuda)
        ratio = _figure(row, "ratio", bounds) + (f" (of {row['of']})" if "of" in row else "")
        if "compile_seconds" in row:
            ratio += f" (compiled in {row['compile_seconds']:.0f} s)"
        rate = _short(row["images_per_second"]) if "images_per_second" in row else ""
        peak, memory_ratio = _memory(row, bounds)
        gflop = f"{row['gflop']:.1f}" if "gflop" in row else ""
        time = _short(1000 * row["seconds"]["median"]) if "seconds" in row else row["not_timed"]
        if "seconds" in bounds:
            holds = row["seconds"]["median"] <= bounds["seconds"]
            time += f", goal <= {1000 * bounds['seconds']:g}: {'holds' if holds else '**missed**'}"
        cells = [row["job"], row["contender"], time, rate, ratio, gflop]
        cells += [_figure(row, "share", bounds), peak, memory_ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + _curve_tables(results["rows"])


def _curve_tables(rows: list[dict[str, Any]]) -> str:
    text = ""
    points = [row for row in rows if row["section"] == "curves"]
    for curve in dict.fromkeys(row["job"] for row in points):
        of_curve = [row for row in points if row["job"] == curve]
        heads = [f"{name}, ms" for name in dict.fromkeys(row["contender"] for row in of_curve)]
        heads += ["peak memory, MiB"] if "memory_MiB" in of_curve[0] else []
        text += f"\n| {curve} | {' | '.join(heads)} |\n"
        text += "|---" * (len(heads) + 1) + "|\n"
        for value in dict.fromkeys(row["value"] for row in of_curve):
            at_value = [row for row in of_curve if row["value"] == value]
            cells = [_short(1000 * row["seconds"]["median"]) for row in at_value]
            cells += [f"{row['memory_MiB']['peak']:.0f}" for row in at_value if "memory_MiB" in row]
            text += f"| {value} | {' | '.join(cells)} |\n"
    return text


def insert_table(table: str, path: Path) -> None:
    """Puts the table between the two markers of a Markdown file.

    Raises:
        ValueError: the file does not have each marker once, in their order.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} needs the lines {BEGIN!r} and {END!r}, once and in this order.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(f"{before}{BEGIN}\n{table}{END}{after}", path)


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each curve; nothing without curves or, with a message, without matplotlib."""
    points = [row for row in rows if row["section"] == "curves"]
    if not points:
        return
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        print(f"{path} is not drawn: it needs matplotlib, pip install 'pgseg-hf[plots]'.", file=sys.stderr)
        return
    curves = list(dict.fromkeys(row["job"] for row in points))
    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves):
        of_curve = [row for row in points if row["job"] == curve]
        for contender in dict.fromkeys(row["contender"] for row in of_curve):
            own = [row for row in of_curve if row["contender"] == contender]
            values, times = [row["value"] for row in own], [1000 * row["seconds"]["median"] for row in own]
            axes.plot(values, times, marker="o", label=contender)
        axes.set(xlabel=curve, ylabel="ms", xscale="log")
        if "memory_MiB" in of_curve[0]:
            axes.plot(values, [row["memory_MiB"]["peak"] for row in own], "s--", label="peak memory, MiB")
            axes.set(ylabel="ms, MiB")
            axes.set_ylim(bottom=0)  # nearly flat: what is left is noise
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    write_atomically(path, lambda target: target.write(file.getvalue()))
