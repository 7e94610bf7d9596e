"""`python -m pgseg_hf`, the same as `pgseg`."""

import sys

from .cli import main

sys.exit(main())
