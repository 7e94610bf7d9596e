"""Reports of an evaluation in JSON and Markdown."""

from pathlib import Path
from typing import Any

from ..files import write_json, write_text


def write_report(content: dict[str, Any], folder: Path) -> str:
    """Writes `results.json` and `results.md` to a folder and returns the Markdown."""
    markdown = to_markdown(content)
    write_text(markdown, folder / "results.md")
    write_json(content, folder / "results.json")
    return markdown


def to_markdown(content: dict[str, Any]) -> str:
    """Tables of the main metrics, the IoU of each label and the settings.

    Args:
        content: content of `results.json`: `title`, `rows` (metrics by name), `settings`, and optionally `warnings`,
            `thresholds`, `groups`, `iou` and `broken`.
    """
    parts = [f"# {content['title']}", _figures(content["rows"], "")]
    if content.get("warnings"):
        parts += ["## Warnings", "\n".join(f"- {cell(warning)}" for warning in content["warnings"])]
    if content.get("thresholds"):
        parts += ["## Background thresholds, in the same pass", _figures(content["thresholds"], "threshold")]
    if content.get("groups"):
        figures = [(_words(name), _number(value)) for name, value in content["groups"].items()]
        parts += ["## Groups", _table(("", ""), figures)]
    if content.get("iou"):
        rows = sorted(content["iou"].items(), key=lambda pair: -(pair[1] if pair[1] is not None else -1))
        rows = [(cell(name), _number(value)) for name, value in rows]
        parts += ["## IoU of each label", _table(("label", "IoU"), rows)]
    if content.get("broken"):
        broken = [(cell(name), cell(reason)) for name, reason in content["broken"].items()]
        parts += ["## Broken images, left out", _table(("image", "reason"), broken)]
    settings = [(_words(name), cell(_setting(value))) for name, value in content["settings"].items()]
    parts += ["## How it was measured", _table(("", ""), settings)]
    return "\n\n".join(parts) + "\n"


def _figures(rows: dict[str, dict[str, float | None]], head: str) -> str:
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    lines = [[cell(row), *(_number(figures.get(name)) for name in names)] for row, figures in rows.items()]
    return _table((head, *map(_words, names)), lines)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items() if each not in (None, "", {}))
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value))
    return str(value)


def cell(text: Any) -> str:
    """Escapes text for a cell of a Markdown table."""
    escaped = str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(escaped.split())
