"""The package as published on an index and in a Space."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built offline with the installed build backend."""
    pytest.importorskip("hatchling", reason="needs pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=600)
    (path,) = folder.glob("*.whl")
    return path


def environment(wheel: Path, folder: Path, extra: str = "") -> Path:
    """A virtual environment with the wheel and only those installed packages that it needs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=600)
    (site,) = folder.glob("lib/python*/site-packages")
    named = f"pgseg-hf[{extra}]" if extra else "pgseg-hf"
    for distribution in needed(wheel_requirements(wheel, extra)):
        for top in {
            file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")
        }:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "bin" / "python"),
        "install",
        "-q",
        "--no-index",
    ]
    subprocess.run([*pip, "--find-links", wheel.parent, named], check=True, timeout=600)
    return folder / "bin"


def wheel_requirements(wheel: Path, extra: str) -> list[str]:
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        text = files.read(name).decode()
    return [
        line.removeprefix("Requires-Dist: ")
        for line in text.split("\n\n")[0].split("\n")
        if line.startswith("Requires-Dist: ") and ("extra ==" not in line or f"extra == '{extra}'" in line)
    ]


def needed(requirements: list[str]) -> list[metadata.Distribution]:
    """The installed distributions of requirements, including indirect ones."""
    from packaging.requirements import Requirement

    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(text.partition(";")[0]) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.name in found:
            continue
        try:
            found[requirement.name] = distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        for text in distribution.requires or ():
            other = Requirement(text)
            extras = requirement.extras or {""}
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(other)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "demo"])
def test_the_wheel_installs_and_segments(wheel, extra, tmp_path):
    programs = environment(wheel, tmp_path / "venv", extra)
    photo = REPOSITORY / "examples" / "images" / "horses.jpg"
    command = [
        programs / "pgseg",
        "segment",
        photo,
        "--labels",
        "horse, sea",
        "--output",
        tmp_path / "out.png",
    ]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "horse" in done.stdout and (tmp_path / "out.png").exists()
    code = f"import pgseg_hf; assert {str(tmp_path)!r} in pgseg_hf.__file__; import gradio"
    imported = subprocess.run(
        [programs / "python", "-c", code], env=clean, cwd=tmp_path, capture_output=True, text=True
    )
    assert (imported.returncode == 0) == (extra == "demo"), imported.stderr


@pytest.mark.slow
def test_the_index_page_has_no_link_into_nowhere(wheel):
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        text = files.read(name).decode()
    assert (
        "Description-Content-Type: text/markdown" in text and "Project-URL: Paper, https://arxiv.org" in text
    )
    assert "# pgseg_hf" in text
    assert [
        path for path in re.findall(r"\]\(([^)]+)\)", text) if not path.startswith(("https://", "#"))
    ] == []


def test_links_lead_into_the_repository_once_it_has_an_address():
    pytest.importorskip("hatchling", reason="needs pip install hatchling")
    for_index = load(REPOSITORY / "src" / "hatch_build.py").for_index
    text = "![a dog](images/dog.png) [card](model_card.md) [paper](https://arxiv.org) [below](#use)"
    assert for_index(text, None) == " card [paper](https://arxiv.org) [below](#use)"
    assert for_index(text, "https://host/pgseg") == (
        "![a dog](https://host/pgseg/raw/HEAD/images/dog.png) [card](https://host/pgseg/blob/HEAD/model_card.md) "
        "[paper](https://arxiv.org) [below](#use)"
    )


def test_a_space_carries_the_package_and_asks_for_the_rest(tmp_path):
    # The content of the wheel does not matter here.
    wheel = tmp_path / "pgseg_hf-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("pgseg_hf/__init__.py", "")
        files.writestr(
            "pgseg_hf-1.dist-info/METADATA",
            "Requires-Dist: torch>=2.7\nRequires-Dist: gradio<7,>=6.0; extra == 'demo'\n"
            "Requires-Dist: spacy>=3.8; extra == 'nouns'\n\n# Title\n",
        )
    command = [sys.executable, REPOSITORY / "examples" / "make_space.py", wheel, tmp_path / "space"]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    space = tmp_path / "space"
    assert (space / "requirements.txt").read_text() == "torch>=2.7\ngradio<7,>=6.0\n"
    assert (space / "app.py").is_file() and (space / "pgseg_hf" / "__init__.py").is_file()
    assert not list(space.rglob("__pycache__"))


def test_the_front_matter_of_the_space():
    yaml = pytest.importorskip("yaml", reason="needs pip install pgseg-hf[train]")
    text = (REPOSITORY / "demo" / "README.md").read_text(encoding="utf-8")
    fields = yaml.safe_load(text.split("---\n")[1])
    assert fields["models"] and fields["tags"] and fields["license"] == "apache-2.0"
    assert len(fields["short_description"]) <= 60  # the Hub's limit
    assert (REPOSITORY / "demo" / fields["app_file"]).is_file()


def test_the_notebook_is_the_script():
    make = load(REPOSITORY / "examples" / "make_notebook.py")
    written = make.TOUR.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert written == make.notebook(make.TOUR.read_text(encoding="utf-8")), (
        "run python examples/make_notebook.py"
    )


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    pytest.importorskip("ipykernel", reason="needs pip install ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="needs pip install nbclient")
    nbformat = pytest.importorskip("nbformat", reason="needs pip install nbformat")
    pytest.importorskip("accelerate", reason="needs pip install pgseg-hf[train]")
    text = (REPOSITORY / "examples" / "tour.ipynb").read_text(encoding="utf-8")
    text = text.replace("default=40", "default=1").replace(
        'Path(\\"tour\\")', f"Path({json.dumps(str(tmp_path))})".replace('"', '\\"')
    )
    notebook = nbformat.reads(text, as_version=4)
    place = {"metadata": {"path": str(REPOSITORY / "examples")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=place).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 4
    assert (tmp_path / "checkpoint" / "config.json").is_file() and (tmp_path / "masks.png").is_file()


@pytest.mark.parametrize(
    "page",
    [
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("examples/*.md"),
        *REPOSITORY.glob("demo/**/README.md"),
        *REPOSITORY.glob("src/**/README.md"),  # but not dist/, which `make space` fills
    ],
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_links_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = page if not path else page.parent / path
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page}: {target}"
