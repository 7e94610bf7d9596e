"""Trains PGSeg on images and texts, on one CPU or many GPUs.

    accelerate launch --quiet examples/train_pgseg.py examples/configs/own_folder.yaml --data photos --output_dir run

The first argument may be a YAML file. Options override it; `--help` lists them all. To resume a stopped run, add
`--resume_from_checkpoint latest` to the same command. The output folder works with `from_pretrained` and also has
checkpoints, `log.jsonl`, images of the grouping and `all_results.json`. An error is a single line;
`TRANSFORMERS_VERBOSITY=info` adds the traceback, and `accelerate launch --quiet` hides that of the launcher.

The training loop is `pgseg_hf.training.run.Run`. Subclass it to change a step (`train_step`), the evaluation
(`evaluate`) or what is saved (`finish`).
"""

import sys

from transformers.utils import logging

from pgseg_hf.training.arguments import parse_arguments
from pgseg_hf.training.run import Run


def main() -> int:
    try:
        Run(parse_arguments()).train()
    except (ValueError, OSError) as error:
        if logging.get_verbosity() <= logging.INFO:
            raise
        print(f"train_pgseg.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
