"""Train PGSeg on images and their texts, on one CPU or many GPUs.

    accelerate launch --quiet examples/train_pgseg.py examples/configs/own_folder.yaml --data photos --output_dir run

The first argument may be a YAML file; options override it, `--help` lists them all. A stopped run goes on with the same
command and `--resume_from_checkpoint latest`. The output folder ends as one for `from_pretrained`, with checkpoints,
`log.jsonl`, images of the grouping and `all_results.json`. An error is one line; with `TRANSFORMERS_VERBOSITY=info`
it comes with its traceback, and `accelerate launch --quiet` leaves out the launcher's own.

The loop is `pgseg_hf.training.run.Run`: change a step, what is measured or what is saved in a class of your own that
inherits from it (`train_step`, `evaluate`, `finish`).
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
