"""Settings of the server, by command-line option or, as on a Space, by environment variable."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pgseg_hf.command_line import CommandParser

MAX_LABELS = 300  # the size of the longest preset, ImageNet-S-300
MAX_TEMPLATES = 80  # the size of CLIP's longest list for ImageNet
MAX_LETTERS = 100  # characters of a label or template
# Range of the short side in pixels.
MIN_SHORT_SIDE = 64
MAX_SHORT_SIDE = 672
LONGEST_EDGE = 2 * MAX_SHORT_SIDE  # limit of the long side when the short side is set
# Characters of a `data:` URL: a file of 20 MB in base64.
MAX_DATA_LETTERS = 28_000_000


@dataclass(frozen=True)
class Settings:
    """Settings of the server.

    Args:
        models: models to offer besides the included one: folders of checkpoints, their parent folders, or names on the
            Hub.
        any_hub_model: whether visitors can use any public model on the Hub.
        mcp: whether the API is also an MCP server.
        device: device of the models.
        dtype: `"float32"`, or `"int8"` for PGSeg models on a CPU.
        concurrency: number of requests processed at the same time; others wait.
        keep_seconds: how long visitors' images and results are kept.
        max_seconds: time limit of the models for one request.
        web_images: whether API clients can pass an image by URL, which the server fetches.
        max_pixels: largest number of pixels of an image.
        max_file_size: largest size of an upload, in Gradio's format.
        max_model_bytes: largest size of a visitor's model from the Hub.
    """

    models: tuple[str, ...] = ()
    any_hub_model: bool = True
    mcp: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    concurrency: int = 2
    keep_seconds: int = 900
    max_seconds: int = 60
    web_images: bool = False
    max_pixels: int = 16_000_000
    max_file_size: str = "20mb"
    max_model_bytes: int = 2 * 10**9


_HELP = {
    "models": "additional models: folders of checkpoints, their parent folders, or names on the Hub (separated by "
    f"{os.pathsep!r} in the variable); visitors cannot open other folders of the server",
    "any_hub_model": "let visitors use any public model on the Hub",
    "mcp": "also serve /segment as an MCP tool; requires gradio[mcp]",
    "device": "device of the models; by default a GPU, if available",
    "dtype": "int8, with --device cpu, stores PGSeg models in a third of the memory",
    "concurrency": "number of requests processed at the same time",
    "keep_seconds": "how long visitors' images and results are kept, in seconds",
    "max_seconds": "time limit of the models for one request, in seconds",
    "web_images": "let API clients pass images by public URL, which the server fetches without a size limit",
}


def read_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Parses the command line; the defaults come from the environment variables listed by `--help`."""
    parser = CommandParser(description="Segment images by words, in the browser.")
    defaults = vars(Settings()) | {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    for name, what in _HELP.items():
        variable, default = f"PGSEG_DEMO_{name.upper()}", defaults[name]
        given = os.environ.get(variable)
        how: dict[str, Any] = {"default": given or default}
        if isinstance(default, bool):
            how = {"action": argparse.BooleanOptionalAction, "default": _is_on(variable, default)}
        elif isinstance(default, int):
            how |= {"type": int, "metavar": "N"}  # argparse also converts a default that is a string
        elif name == "models":
            places = [place for place in (given or "").split(os.pathsep) if place]
            how = {"nargs": "+", "default": places, "metavar": "MODEL"}
        elif name == "dtype":
            how["choices"] = ("float32", "int8")
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{what} ({variable})", **how)
    found = vars(parser.parse_args(arguments))
    for name, value in found.items():
        if type(value) is int and value < 1:
            parser.error(f"{name} is {value}, expected at least 1")
    return Settings(**found | {"models": tuple(found["models"])})


def is_zerogpu() -> bool:
    """Whether this is a Space with ZeroGPU, whose GPU is only available inside `spaces.GPU` functions."""
    return _is_on("SPACES_ZERO_GPU", False)


def _is_on(variable: str, default: bool) -> bool:
    return os.environ.get(variable, str(default)).lower() in ("1", "true", "yes", "on")
