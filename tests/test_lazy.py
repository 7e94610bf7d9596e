"""What is imported when: counted in processes of their own, in modules and not in seconds."""

import ast
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_photo
from transformers.pipelines import PIPELINE_REGISTRY

import pgseg_hf
from pgseg_hf import configuration_pgseg, evaluation
from pgseg_hf.evaluation import arguments
from pgseg_hf.evaluation.benchmarks import catalogue

HEAVY = ("torch", "transformers", "scipy")


def modules_after(code: str, cwd=None) -> set[str]:
    """The names in `sys.modules` of a new process at the end of a code."""
    code = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))\n" + code
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert "Traceback" not in done.stderr, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def command(*arguments: str) -> str:
    return f"from pgseg_hf.cli import main\nmain({list(arguments)!r})"


def test_the_package_imports_neither_torch_nor_transformers():
    assert not modules_after("import pgseg_hf, pgseg_hf.evaluation").intersection(HEAVY)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("segment", "train", "convert", "evaluate", "prepare")),
        ["segment", "a.jpg", "--lables", "cat"],
        ["segment", "a.jpg", "--labels", "cat,cat"],
        ["segment", "a.jpg", "--labels", "cat", "--background-threshold", "7"],
        ["segment", "absent.jpg", "--labels", "cat"],
        ["segment", ".", "--labels", "cat", "--model", "/no/such/folder"],
        ["convert", "absent.pth", "out"],
        ["train", "absent", "--output", "out"],
        ["train", ".", "--output", "out", "--labels-from", "absent.csv"],
        ["evaluate", "--benchmark", "voc", "--data", "absent"],
        ["evaluate", "--benchmark", "folder", "--data", ".", "--templates", "full"],
        ["prepare", "lvis", "absent"],
    ],
    ids=" ".join,
)
def test_help_and_errors_do_not_wait_for_torch(arguments):
    assert not modules_after(command(*arguments)).intersection(HEAVY)


def test_a_broken_picture_does_not_wait_for_torch(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    assert "torch" not in modules_after(command("segment", "broken.jpg", "--labels", "cat"), tmp_path)


def test_segmenting_imports_little_beside_transformers(tiny_folder, tmp_path):
    make_photo().save(tmp_path / "photo.png")
    arguments = ["segment", "photo.png", "--labels", "cat,dog", "--model", str(tiny_folder)]
    used = modules_after(command(*arguments), tmp_path)
    assert (tmp_path / "photo-segmented.png").is_file()
    extras = {"datasets", "evaluate", "gradio", "matplotlib", "pandas", "pyarrow", "spacy", "onnx"}
    assert not used & {*extras, "transformers.trainer"}
    apart = {name for name in used if name.startswith(("pgseg_hf.training", "pgseg_hf.evaluation."))}
    assert apart == {
        "pgseg_hf.evaluation.arguments",
        "pgseg_hf.training",
        "pgseg_hf.training.fine_tuning",
        "pgseg_hf.training.fine_tuning.options",
    }
    own_needs = modules_after("import torch, transformers.models.clip.modeling_clip, PIL.Image, tokenizers")
    others = {name for name in used - own_needs if not name.startswith("pgseg_hf")}
    assert len(others) < 150, sorted(others)


ROUTES = {
    "AutoConfig.from_pretrained(folder)": "PGSegConfig",
    "AutoModel.from_pretrained(folder)": "PGSegModel",
    "AutoModel.from_config(AutoConfig.for_model('pgseg_vision_model'))": "PGSegVisionModel",
    "AutoModelForTextEncoding.from_pretrained(folder)": "PGSegTextModelWithProjection",
    "AutoProcessor.from_pretrained(folder)": "PGSegProcessor",
    "AutoImageProcessor.from_pretrained(folder, backend='pil')": "PGSegImageProcessorPil",
    "AutoTokenizer.from_pretrained(folder)": "CLIPTokenizer",
    "AutoBackbone.from_config(AutoConfig.for_model('efficientnet_lite'))": "EfficientNetLiteBackbone",
    "pipeline('open-vocabulary-segmentation', model=folder)": "OpenVocabularySegmentationPipeline",
    "pipeline(model=folder)": "OpenVocabularySegmentationPipeline",
}
"""What transformers makes without a touch of a name of the package, and its class."""
IMPORTS = (
    "from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForTextEncoding\n"
    "from transformers import AutoProcessor, AutoTokenizer, pipeline\n"
)


def classes_of(code: str, routes: list[str], folder: str) -> list[str]:
    code += "".join(f"print(type({route}).__name__)\n" for route in routes)
    code = f"folder = {folder!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-len(routes) :]


@pytest.mark.parametrize("route", ROUTES)
def test_transformers_finds_a_class_by_itself(tiny_folder, route):
    assert classes_of(f"import pgseg_hf\n{IMPORTS}", [route], tiny_folder) == [ROUTES[route]]


@pytest.mark.parametrize(
    "code",
    [
        f"{IMPORTS}import pgseg_hf\n",
        f"import pgseg_hf.modeling_pgseg\n{IMPORTS}",
        f"import pgseg_hf.pipeline\n{IMPORTS}",
        f"from transformers import AutoConfig\nfrom pgseg_hf import *\n{IMPORTS}",
    ],
    ids=["transformers first", "the model first", "the pipeline first", "configurations before"],
)
def test_transformers_finds_all_classes_whatever_comes_first(tiny_folder, code):
    assert classes_of(code, list(ROUTES), tiny_folder) == list(ROUTES.values())


def test_the_packages_have_their_names():
    for package in (pgseg_hf, evaluation):
        assert set(package.__all__) <= set(dir(package))
        for name in package.__all__:
            value = getattr(package, name)
            assert not callable(value) or pickle.loads(pickle.dumps(value)) is value
            assert not callable(value) or inspect.getsource(value)
        with pytest.raises(AttributeError, match="no attribute 'absent'"):
            package.absent  # noqa: B018
    assert pgseg_hf.losses.__name__ == "pgseg_hf.losses" and "losses" not in pgseg_hf.__all__


def test_names_that_stand_twice_agree():
    assert (*catalogue.BENCHMARKS, "imagenet", "folder") == arguments.BENCHMARK_NAMES
    assert configuration_pgseg.PIPELINE_TASK in PIPELINE_REGISTRY.get_supported_tasks()
    stub = ast.parse(Path(pgseg_hf.__file__).read_text(encoding="utf-8"))
    imported = {
        (node.module, alias.name)
        for node in ast.walk(stub)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    found = {
        (getattr(pgseg_hf, name).__module__, name)
        for name in pgseg_hf.__all__
        if name != "DEFAULT_CHECKPOINT"
    }
    assert found <= {(f"pgseg_hf.{module}", name) for module, name in imported}
