"""`python -m dancegrpo_fast ...` and `torchrun -m dancegrpo_fast ...`."""

from dancegrpo_fast.cli import program

if __name__ == "__main__":
    program()
