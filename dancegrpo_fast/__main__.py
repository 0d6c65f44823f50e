"""`python -m dancegrpo_fast ...` and `torchrun -m dancegrpo_fast ...`."""

import sys

from dancegrpo_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
