"""What the owner of a server decides: by option, or by environment variable, as on a Space."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pgseg_hf.command_line import CommandParser

# The longest preset that is offered has as many (ImageNet-S-300).
MAX_LABELS = 300
MAX_TEMPLATES = 80  # as many as the longest list for ImageNet
MAX_LETTERS = 100  # of a label or template
# Pixels that a visitor may have an image's short side resized to.
MIN_SHORT_SIDE = 64
MAX_SHORT_SIDE = 672
LONGEST_EDGE = 2 * MAX_SHORT_SIDE  # of an image that is resized to these
# Of a `data:` address: a file of 20 MB in base64.
MAX_DATA_LETTERS = 28_000_000


@dataclass(frozen=True)
class Settings:
    """How the server runs.

    Args:
        models: beside the shipped one: folders of checkpoints, folders that hold such folders, or names on the Hub.
        any_hub_model: whether visitors may name any public model of the Hub.
        mcp: whether the API is an MCP server too.
        device: where models run.
        dtype: `"float32"`, or `"int8"` for PGSeg's models on a CPU.
        concurrency: requests that are worked on at once; the others wait.
        keep_seconds: how long images and results of a visitor stay on the server.
        max_seconds: that the model has for one request; what takes longer is given up.
        web_images: whether a program may name an image by a web address, which the server then fetches.
        max_pixels: of an image.
        max_file_size: of an upload, as Gradio takes it.
        max_model_bytes: of a model of the Hub that a visitor names.
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
    "models": "further models to offer: folders of checkpoints, folders of such folders, or names on the Hub "
    f"(in the variable separated by {os.pathsep!r}); no other folder of the server can be opened",
    "any_hub_model": "visitors may name any public model of the Hub",
    "mcp": "serve /segment as an MCP tool too; needs gradio[mcp]",
    "device": "where models run; a GPU by default, if there is one",
    "dtype": "int8, with --device cpu, keeps PGSeg's models in a third of the memory",
    "concurrency": "requests that are worked on at once",
    "keep_seconds": "how long a visitor's images and results stay on the server",
    "max_seconds": "that the model has for one request; what takes longer is given up",
    "web_images": "programs may name an image by a public web address, which the server fetches, of whatever size",
}


def read_settings(arguments: Sequence[str] | None = None) -> Settings:
    """The settings of a command line; the environment variables that `--help` names are its defaults."""
    parser = CommandParser(description="Segment images by words, in the browser.")
    defaults = vars(Settings()) | {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    for name, what in _HELP.items():
        variable, default = f"PGSEG_DEMO_{name.upper()}", defaults[name]
        given = os.environ.get(variable)
        how: dict[str, Any] = {"default": given or default}
        if isinstance(default, bool):
            how = {"action": argparse.BooleanOptionalAction, "default": _is_on(variable, default)}
        elif isinstance(default, int):
            how |= {"type": int, "metavar": "N"}  # argparse reads a default that is text by its type too
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
    """Whether this is a Space whose GPU is there only inside functions of `spaces.GPU`."""
    return _is_on("SPACES_ZERO_GPU", False)


def _is_on(variable: str, default: bool) -> bool:
    return os.environ.get(variable, str(default)).lower() in ("1", "true", "yes", "on")
