"""Tables and plots of `benchmark_speed.py`."""

import sys
from pathlib import Path
from typing import Any

from pgseg_hf.files import write_atomically, write_text

BEGIN, END = "<!-- benchmark_speed.py: begin -->", "<!-- benchmark_speed.py: end -->"


def goals(row: dict[str, Any], on_cuda: bool = False) -> dict[str, float]:
    """The goals of a row by metric: upper bounds, but lower bounds for shares. Most rows have none."""
    job, is_float32, large = row["job"], "bfloat16" not in row["job"], "448 px" in row["job"]
    match row["section"], row["contender"]:
        case "encoder" | "training" as section, contender if on_cuda:
            named = contender == "corrected" and "batch 256," in job
            return {"ratio": 0.7 if section == "encoder" else 0.75} if named else {}
        case "encoder", "corrected":
            return (
                {"ratio": 0.92, "share": 0.9}
                if is_float32
                else {"ratio": 1.03 if large else 1.0, "share": 0.75}
            )
        case "encoder", "released":
            return (
                {"ratio": 1.10 if large else 1.12, "share": 0.9}
                if is_float32
                else {"ratio": 1.05, "share": 0.75}
            )
        case "training", "corrected" if is_float32:
            return {"ratio": 1.05, "memory_ratio": 0.75}
        case "training", "released" if is_float32:
            return {"ratio": 1.12}
        case "int8", _:
            return {"ratio": 0.5 if row["of"] == "float32" else 0.9}
        case "photo", contender if contender != "encoder passes":
            return {"ratio": 1.1} if row["of"] == "encoder passes" else {"ratio": 1.1, "memory_ratio": 1.1}
        case "large photo", _:
            return {"peak": 1536}  # MiB
        case "prototypes", _:
            return {"ratio": 0.03}
        case "start", "pgseg --help":
            return {"seconds": 1.0}
        case "start", "import pgseg_hf, transformers":
            return {"ratio": 1.3}
        case "start", "pgseg segment":
            return {"ratio": 1.5}
    return {}


def _figure(row: dict[str, Any], name: str, bounds: dict[str, float]) -> str:
    """Formats a metric with its quartiles and, if it has a goal, the goal and whether it holds."""
    if name not in row:
        return ""
    value, spread, digits = row[name], "", 3 if row["section"] == "prototypes" else 2
    if isinstance(value, dict):
        spread, value = f" ({value['low']:.{digits}f} to {value['high']:.{digits}f})", value["median"]
    return f"{value:.{digits}f}{spread}{_verdict(value, name, bounds)}"


def _verdict(value: float, name: str, bounds: dict[str, float], factor: int = 1) -> str:
    if name not in bounds:
        return ""
    sign, holds = (">=", value >= bounds[name]) if name == "share" else ("<=", value <= bounds[name])
    return f", goal {sign} {factor * bounds[name]:g}: {'holds' if holds else '**missed**'}"


def _short(value: float) -> str:
    """Rounds to an integer above 100, and to three digits below."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _memory(row: dict[str, Any], bounds: dict[str, float]) -> tuple[str, str]:
    """Formats peak memory and its ratio, each also for the memory that the job itself adds."""
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
    """Whether a row is one of the common uses (ten at most) in the README."""
    section, contender = row["section"], row["contender"]
    if section == "start":
        return contender in ("pgseg --help", "pgseg segment")
    if section == "photo":
        return row["of"] == "encoder passes" and contender != "encoder passes"
    return section == "large photo" or (section in ("encoder", "training") and contender == "corrected")


def markdown(results: dict[str, Any]) -> str:
    """Formats rows as a Markdown table; `results` is the content of `results.json`, perhaps with fewer rows."""
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
        time = row.get("not_timed", "")
        if "seconds" in row:
            median = row["seconds"]["median"]
            time = _short(1000 * median) + _verdict(median, "seconds", bounds, factor=1000)
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
        ValueError: the file does not have each marker exactly once and in order.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} needs the lines {BEGIN!r} and {END!r}, once and in this order.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(f"{before}{BEGIN}\n{table}{END}{after}", path)


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws one panel per curve. Without matplotlib it only prints a message."""
    points = [row for row in rows if row["section"] == "curves"]
    if not points:
        return
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        print(f"{path} needs matplotlib and is skipped; run pip install 'pgseg-hf[plots]'.", file=sys.stderr)
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
            axes.set_ylim(bottom=0)  # the curve is nearly flat, and the rest is noise
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
