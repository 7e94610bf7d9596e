"""How all commands read their options."""

import argparse
import difflib
import os
import sys
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """Takes `--output_dir` for `--output-dir` and the other way round, and names the nearest option for a wrong one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `argparse.ArgumentParser`, whose subcommands come by here too."""
        given = sys.argv[1:] if args is None else list(args)
        # Options of a subcommand are its own parser's affair.
        for place, argument in enumerate(given if self._subparsers is None else ()):
            if argument == "--":
                break
            if argument.startswith("--"):
                name, equals, value = argument.partition("=")
                given[place] = f"{self._option(name)}{equals}{value}"
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> Any:
        """Ends in one line, which twenty of usage would push out of sight."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help tells all options)\n")

    def _option(self, name: str) -> str:
        """The option that a name stands for: in another spelling, or by what it begins with."""
        known = {_with_hyphens(option): option for option in self._option_string_actions}
        hyphens = _with_hyphens(name)
        if hyphens in known:
            return known[hyphens]
        begun = [option for spelt, option in known.items() if spelt.startswith(hyphens)]
        if len({id(self._option_string_actions[option]) for option in begun}) == 1:
            return begun[0]
        nearest = difflib.get_close_matches(hyphens, known, n=1)
        if nearest and not begun:
            self.error(f"there is no option {name}; did you mean {nearest[0]}?")
        return name


def _with_hyphens(option: str) -> str:
    return option.replace("_", "-")


def process_rank(name: str = "RANK") -> int:
    """Which of several processes this is, that `accelerate launch` or `torchrun` started; 0 for one by itself. Under
    "LOCAL_RANK" it counts on this machine."""
    return int(os.environ.get(name) or 0)
