"""Generates `tour.ipynb` from `tour.py`, whose cells start with `# %%`.

python examples/make_notebook.py
"""

import ast
import json
from pathlib import Path

TOUR = Path(__file__).parent / "tour.py"


def notebook(script: str) -> str:
    """Converts a script with cells to a notebook (nbformat 4 JSON); the docstring becomes the first cell."""
    cells = [("markdown", ast.get_docstring(ast.parse(script)) or "")]
    for part in script.split("\n# %%")[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            cells.append(("markdown", "\n".join(line[2:] for line in body.strip().split("\n"))))
        else:
            cells.append(("code", body.strip()))
    found = []
    for number, (kind, source) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source.splitlines(True)}
        found.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": found, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TOUR.with_suffix(".ipynb").write_text(notebook(TOUR.read_text(encoding="utf-8")), encoding="utf-8")
