"""Runs the `pgseg` command line with `python -m pgseg_hf`."""

import sys

from .cli import main

sys.exit(main())
