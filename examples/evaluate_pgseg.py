"""Measure a checkpoint on a benchmark of the field, or on your own images with masks, on any number of processes.

    accelerate launch examples/evaluate_pgseg.py my-pgseg --benchmark voc --data VOCdevkit --protocol pgseg

The same as `pgseg evaluate`, whose `--help` lists all options. A stopped run goes on with the same command.
"""

import sys

from pgseg_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
