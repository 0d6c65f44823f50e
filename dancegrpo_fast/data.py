"""Training prompts: which are drawn in which iteration is a function of the seed, not a state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from dancegrpo_fast.config import UserError
from dancegrpo_fast.ops.noise import NoiseKey, permutation
from dancegrpo_fast.roles import Role


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their file.

    Attributes:
        prompts: The prompts; repeated lines are repeated prompts, drawn as often as they stand.
    """

    prompts: tuple[str, ...]

    @classmethod
    def load(cls, path: str | Path, *, field: str = "data.prompts") -> PromptSet:
        """Reads one prompt a line; blank lines are skipped.

        Args:
            path: UTF-8 text file.
            field: Configuration field that named the file, for the error message.

        Raises:
            UserError: The file cannot be read or holds no prompt.
        """
        where = f"{field} = {str(path)!r}"
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise UserError(
                f"{where}: no such file; give a text file with one prompt a line "
                f"(relative paths count from {Path.cwd()})"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: cannot be read as UTF-8 text: {error}") from None
        # Not splitlines(): a prompt may hold U+2028 and its kin.
        prompts = tuple(line for raw in text.split("\n") if (line := raw.strip()))
        if not prompts:
            raise UserError(f"{where}: holds no prompt; write one a line")
        return cls(prompts)

    def batch(self, iteration: int, seed: int, count: int) -> list[tuple[int, str]]:
        """Returns the `count` prompts of one iteration as (index in the file, prompt).

        Each epoch goes through a fresh permutation. Up to `len(prompts)` prompts are distinct in
        an iteration: the rest of an epoch, too short for one more, is left out (other prompts each
        time). A larger count goes round the set without leaving any out.

        Args:
            iteration: Counted from 0.
            seed: The run's seed.
            count: Prompts of every iteration, at least 1.
        """
        if iteration < 0 or count < 1:
            raise ValueError(f"iteration = {iteration}, count = {count}: need >= 0 and >= 1")
        total = len(self.prompts)
        epoch_length = total - total % count if count <= total else total
        chosen = []
        for position in range(iteration * count, (iteration + 1) * count):
            epoch, place = divmod(position, epoch_length)
            index = int(_epoch_order(total, seed, epoch)[place])
            chosen.append((index, self.prompts[index]))
        return chosen


@lru_cache(maxsize=4)
def _epoch_order(total: int, seed: int, epoch: int) -> np.ndarray:
    order = permutation(total, NoiseKey.from_seed(seed).fold_in(Role.DATA).fold_in(epoch).draw())
    order.flags.writeable = False  # shared by every caller through the cache
    return order
