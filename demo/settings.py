"""What the owner of a server decides: by option, or by environment variable, as on a Space."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pgseg_hf.command_line import CommandParser

# The longest preset that is offered has as many (ImageNet-S-300).
MAX_LABELS = 300
MAX_TEMPLATES = 80  # as many as the longest list for ImageNet
MAX_LETTERS = 100  # of a label or template
# Pixels that a visitor may have an image's short side resized to.
MIN_SHORT_SIDE = 64
MAX_SHORT_SIDE = 672
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
        web_pictures: whether a program may name a picture by a web address, which the server then fetches.
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
    web_pictures: bool = False
    max_pixels: int = 16_000_000
    max_file_size: str = "20mb"
    max_model_bytes: int = 2 * 10**9


# Options with their defaults and what they are; all are at least 1.
_WHOLE_NUMBERS = {
    "concurrency": (Settings.concurrency, "requests that are worked on at once"),
    "keep_seconds": (Settings.keep_seconds, "how long a visitor's images and results stay on the server"),
    "max_seconds": (
        Settings.max_seconds,
        "that the model has for one request; what takes longer is given up",
    ),
}


def read_settings(arguments: Sequence[str] | None = None) -> Settings:
    """The settings of a command line; the environment variables that `--help` names are its defaults."""
    parser = CommandParser(description="Segment images by words, in the browser.")
    models = [name for name in os.environ.get("PGSEG_DEMO_MODELS", "").split(os.pathsep) if name]
    parser.add_argument(
        "--models",
        nargs="+",
        default=models,
        metavar="MODEL",
        help="further models to offer: folders of checkpoints, folders of such folders, or names on the Hub "
        f"(PGSEG_DEMO_MODELS, separated by {os.pathsep!r}); no other folder of the server can be opened",
    )
    parser.add_argument(
        "--any-hub-model",
        action=argparse.BooleanOptionalAction,
        default=_is_on("PGSEG_DEMO_ANY_HUB_MODEL", "1"),
        help="visitors may name any public model of the Hub (PGSEG_DEMO_ANY_HUB_MODEL)",
    )
    parser.add_argument(
        "--mcp",
        action=argparse.BooleanOptionalAction,
        default=_is_on("PGSEG_DEMO_MCP", "0"),
        help="serve /segment as an MCP tool too; needs gradio[mcp] (PGSEG_DEMO_MCP)",
    )
    parser.add_argument(
        "--device",
        default=os.environ.get("PGSEG_DEMO_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"),
        help="where models run (PGSEG_DEMO_DEVICE)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "int8"),
        default=os.environ.get("PGSEG_DEMO_DTYPE") or "float32",
        help="int8, with --device cpu, keeps PGSeg's models in a third of the memory (PGSEG_DEMO_DTYPE)",
    )
    for option, (default, what) in _WHOLE_NUMBERS.items():
        variable = f"PGSEG_DEMO_{option.upper()}"
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            type=int,
            default=int(os.environ.get(variable, default)),
            help=f"{what} ({variable})",
        )
    parser.add_argument(
        "--web-pictures",
        action=argparse.BooleanOptionalAction,
        default=_is_on("PGSEG_DEMO_WEB_PICTURES", "0"),
        help="programs may name an image by a public web address, which the server fetches, of whatever size "
        "(PGSEG_DEMO_WEB_PICTURES)",
    )
    args = parser.parse_args(arguments)
    for name in _WHOLE_NUMBERS:
        if getattr(args, name) < 1:
            parser.error(f"{name} is {getattr(args, name)}, expected at least 1")
    return Settings(**{**vars(args), "models": tuple(args.models)})


def is_zerogpu() -> bool:
    """Whether this is a Space whose GPU is there only inside functions of `spaces.GPU`."""
    return _is_on("SPACES_ZERO_GPU", "0")


def _is_on(variable: str, default: str) -> bool:
    return os.environ.get(variable, default).lower() in ("1", "true", "yes", "on")
