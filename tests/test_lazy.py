"""What is imported when: checked in separate processes, by modules and not by time."""

import ast
import inspect
import json
import os
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

HEAVY = {"torch", "transformers", "scipy"}
EXTRAS = "accelerate datasets evaluate pyarrow pandas gradio matplotlib spacy onnx onnxruntime peft pycocotools cv2 av"


def printed(code: str, cwd=None) -> list:
    """The JSON values that a new process prints, one per line."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", '"'))]


def test_the_package_imports_neither_torch_nor_transformers():
    (modules,) = printed(
        "import json, sys, pgseg_hf, pgseg_hf.evaluation; print(json.dumps(list(sys.modules)))"
    )
    assert not HEAVY.intersection(modules)


COMMANDS = [
    "--help",
    "--version",
    *(f"{name} --help" for name in ("segment", "train", "convert", "evaluate", "prepare")),
    "segment a.jpg --lables cat",
    "segment a.jpg --labels cat,cat",
    "segment a.jpg --labels cat --background-threshold 7",
    "segment absent.jpg --labels cat",
    "segment . --labels cat --model /no/such/folder",
    "convert absent.pth out",
    "train absent --output out",
    "train . --output out --labels-from absent.csv",
    "evaluate --benchmark voc --data absent",
    "evaluate --benchmark folder --data . --templates full",
    "prepare lvis absent",
]


def test_help_and_errors_do_not_wait_for_torch(tmp_path):
    """All in one process. The last case, an unreadable image, needs transformers but not torch."""
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    code = f"""
import json, sys
from contextlib import redirect_stdout
from pgseg_hf.cli import main

for command in {[*COMMANDS, "segment broken.jpg --labels cat"]}:
    with redirect_stdout(sys.stderr):
        try:
            main(command.split())
        except SystemExit:
            pass
    print(json.dumps([command, *sys.modules]))
"""
    *light, broken = printed(code, tmp_path)
    assert len(light) == len(COMMANDS)
    for command, *modules in light:
        assert not HEAVY.intersection(modules), command
    assert "torch" not in broken


def test_segmenting_needs_no_extra_and_imports_little_beside_transformers(tiny_folder, tmp_path):
    make_photo().save(tmp_path / "photo.png")
    code = f"""
import json, sys
sys.modules.update(dict.fromkeys({EXTRAS.split()}))
import torch, transformers.models.clip.modeling_clip, PIL.Image, tokenizers
own_needs = set(sys.modules)
from pgseg_hf.cli import main
main(["segment", "photo.png", "--labels", "cat,dog", "--model", {tiny_folder!r}, "--quiet"])
print(json.dumps(sorted(set(sys.modules) - own_needs)))
"""
    (used,) = printed(code, tmp_path)
    assert (tmp_path / "photo-segmented.png").is_file() and "transformers.trainer" not in used
    apart = {name for name in used if name.startswith(("pgseg_hf.training", "pgseg_hf.evaluation."))}
    assert apart == {
        "pgseg_hf.evaluation.arguments",
        "pgseg_hf.training",
        "pgseg_hf.training.fine_tuning",
        "pgseg_hf.training.fine_tuning.options",
    }
    others = [name for name in used if not name.startswith("pgseg_hf")]
    assert len(others) < 150, others


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
"""What transformers creates without any access to a name of the package, and its class."""
IMPORTS = (
    "from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForTextEncoding\n"
    "from transformers import AutoProcessor, AutoTokenizer, pipeline\n"
)


FORKS = """
import json, os, sys
import torch

def in_a_fork(code, routes):
    if not os.fork():
        names = dict(folder={folder!r})
        exec(code, names)
        print(json.dumps([type(eval(route, names)).__name__ for route in routes]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, (code, routes)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks of POSIX")
def test_transformers_finds_a_class_by_itself(tiny_folder):
    """Each in a process that has used nothing else before, and all together in any order."""
    prefixes = [
        f"{IMPORTS}import pgseg_hf",
        f"import pgseg_hf.modeling_pgseg\n{IMPORTS}",
        f"import pgseg_hf.pipeline\n{IMPORTS}",
        f"from transformers import AutoConfig\nfrom pgseg_hf import *\n{IMPORTS}",
    ]
    code = FORKS.format(folder=tiny_folder)
    code += "".join(f"in_a_fork({prefix!r}, {list(ROUTES)!r})\n" for prefix in prefixes)
    code += f"import pgseg_hf\n{IMPORTS}"
    code += "".join(f"in_a_fork({IMPORTS!r}, [{route!r}])\n" for route in ROUTES)
    found = printed(code)
    assert found[:4] == [list(ROUTES.values())] * 4
    assert found[4:] == [[name] for name in ROUTES.values()]


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
