"""Tables and curves from the records of `ablate_npr.py`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pgseg_hf.files import write_atomically

REFERENCE = "corrected"
FIGURES = ("mean_iou", "foreground_iou", "background_iou", "pixel_accuracy", "oracle_mean_iou")
GROUP_FIGURES = ("groups_used", "purity", "redundancy")
RETRIEVAL = ("recall@1", "recall@5")
COMPARED = ("mean_iou", "oracle_mean_iou", "recall@1")


def spread_of(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for a single value) and count of the values that are not None."""
    known = [value for value in values if value is not None]
    return {
        "mean": mean(known) if known else None,
        "spread": stdev(known) if len(known) > 1 else None,
        "count": len(known),
    }


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarises each variant: its seeds, and for each metric ("test/mean_iou", ...) the mean and spread over seeds of
    its values and of the differences to its reference with the same seed (`ours` for `ours-...`)."""
    by_run: dict[tuple[str, int], dict[str, float | None]] = {}
    for record in records:
        figures = [(split, *item) for split, each in record["figures"].items() for item in each.items()]
        by_run[record["variant"], record["seed"]] = {
            f"{split}/{name}": value for split, name, value in figures
        }
    rows: dict[str, Any] = {}
    for variant in dict.fromkeys(variant for variant, _ in by_run):
        seeds = [seed for name, seed in by_run if name == variant]
        reference = "ours" if variant.startswith("ours-") else REFERENCE
        row: dict[str, Any] = {"seeds": seeds, "reference": reference, "figures": {}, "differences": {}}
        for name in by_run[variant, seeds[0]]:
            values = [by_run[variant, seed][name] for seed in seeds]
            others = [by_run.get((reference, seed), {}).get(name) for seed in seeds]
            gaps = [
                own - other for own, other in zip(values, others) if own is not None and other is not None
            ]
            row["figures"][name], row["differences"][name] = spread_of(values), spread_of(gaps)
        rows[variant] = row
    return rows


def table(rows: dict[str, Any]) -> str:
    """Formats the summary as Markdown tables, first for the test scenes."""
    difference = f"Test scenes: difference to `{REFERENCE}` (of `ours-...` to `ours`) of the same seed"
    parts = (
        ("Test scenes: mean ± standard deviation over seeds", "test", FIGURES),
        (difference, "test", COMPARED),
        ("Test scenes: groups, and retrieval of full captions", "test", (*GROUP_FIGURES, *RETRIEVAL)),
        (
            "Novel scenes, of combinations that are never in training",
            "novel",
            (*FIGURES[:3], "oracle_mean_iou", *RETRIEVAL),
        ),
    )
    texts = []
    for title, split, names in parts:
        heads = [name.replace("_", " ").replace("mean iou", "mIoU") for name in names]
        lines = [["variant", "seeds", *heads], ["---"] * (2 + len(heads))]
        for variant, row in rows.items():
            if title != difference or variant != REFERENCE:
                values = row["differences" if title == difference else "figures"]
                cells = [_cell(values[f"{split}/{name}"], signed=title == difference) for name in names]
                lines.append([variant, str(values[f"{split}/{names[0]}"]["count"]), *cells])
        texts.append(f"**{title}**\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines))
    return "\n".join(texts)


def _cell(value: dict[str, Any], signed: bool) -> str:
    if value["mean"] is None:
        return "-"
    text = f"{value['mean']:{'+' if signed else ''}.3f}"
    return text if value["spread"] is None else f"{text} ± {value['spread']:.3f}"


CURVES = {"contrastive": "contrastive loss", "eval_mean_iou": "mIoU", "eval_oracle_mean_iou": "oracle mIoU"}


def draw_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws means over the seeds, at steps for which all seeds have a value.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("curves need matplotlib; run pip install 'pgseg-hf[plots]'.") from error
    trained = list(dict.fromkeys(record["variant"] for record in records if record["log"]))
    if not trained:
        return
    figure = Figure(figsize=(5 * len(CURVES), 4.5), layout="constrained")
    axes = figure.subplots(1, len(CURVES))
    colors = matplotlib.colormaps["tab20"]
    for number, variant in enumerate(trained):
        logs = [record["log"] for record in records if record["variant"] == variant]
        for axis, name in zip(axes, CURVES):
            points = [
                {line["step"]: line[name] for line in log if line.get(name) is not None} for log in logs
            ]
            steps = [step for step in points[0] if all(step in each for each in points)]
            means = [mean(each[step] for each in points) for step in steps]
            axis.plot(steps, means, color=colors(number % 20), label=variant)
    for axis, title in zip(axes, CURVES.values()):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
