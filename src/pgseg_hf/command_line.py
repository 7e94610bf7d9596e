"""Option parsing shared by all commands."""

import argparse
import difflib
import os
import sys
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """Accepts `--output_dir` for `--output-dir` and vice versa, and suggests the nearest option for an unknown one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        # argparse calls this method again for a subcommand's parser, which handles its own options.
        for place, argument in enumerate(given if self._subparsers is None else ()):
            if argument == "--":
                break
            if argument.startswith("--"):
                name, equals, value = argument.partition("=")
                given[place] = f"{self._option(name)}{equals}{value}"
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> Any:
        """Exits with a single line, without the long usage text."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def _option(self, name: str) -> str:
        """The option that a name stands for, in another spelling or abbreviated."""
        known = {_with_hyphens(option): option for option in self._option_string_actions}
        hyphens = _with_hyphens(name)
        if hyphens in known:
            return known[hyphens]
        begun = [option for spelt, option in known.items() if spelt.startswith(hyphens)]
        if len({id(self._option_string_actions[option]) for option in begun}) == 1:
            return begun[0]
        nearest = difflib.get_close_matches(hyphens, known, n=1)
        if nearest and not begun:
            self.error(f"unknown option {name}; did you mean {nearest[0]}?")
        return name


def _with_hyphens(option: str) -> str:
    return option.replace("_", "-")


def process_rank(name: str = "RANK") -> int:
    """This process's rank under `accelerate launch` or `torchrun`, 0 for a single process. With `"LOCAL_RANK"`, the
    rank on this machine."""
    return int(os.environ.get(name) or 0)
