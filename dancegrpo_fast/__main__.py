"""`python -m dancegrpo_fast ...` and `torchrun -m dancegrpo_fast ...`."""

import os
import sys

from dancegrpo_fast.cli import main

if __name__ == "__main__":
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from dancegrpo_fast.parallel.world import leave

        leave(code)
    sys.exit(code)
