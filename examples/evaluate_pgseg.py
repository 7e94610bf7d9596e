"""Evaluates a checkpoint on a standard benchmark, or on your own images with masks, with any number of processes.

    accelerate launch examples/evaluate_pgseg.py my-pgseg --benchmark voc --data VOCdevkit --protocol pgseg

The script is the same as `pgseg evaluate`; `--help` lists all options. The same command resumes a stopped run.
"""

import sys

from pgseg_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
