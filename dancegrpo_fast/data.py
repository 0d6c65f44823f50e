"""Training prompts: which are drawn in which iteration is a function of the seed, not a state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from dancegrpo_fast.config import UserError
from dancegrpo_fast.ops.noise import NoiseKey, permutation
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.roles import Role


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their file.

    Attributes:
        prompts: The prompts; repeated lines are repeated prompts, drawn as often as they stand.
    """

    prompts: tuple[Prompt, ...]

    @classmethod
    def load(cls, path: str | Path, *, field: str = "data.prompts") -> PromptSet:
        """Reads one prompt a line; blank lines are skipped.

        Args:
            path: UTF-8 text file; or, named .jsonl, one JSON object a line with "prompt", perhaps
                "image" (a file in the folder of `path` or below), and what rewards are told.
            field: Configuration field that named the file, for the error message.

        Raises:
            UserError: The file cannot be read, a line is malformed, or there is no prompt.
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
        lines = [(n, line) for n, raw in enumerate(text.split("\n"), 1) if (line := raw.strip())]
        if not lines:
            raise UserError(f"{where}: holds no prompt; write one a line")
        if Path(path).suffix == ".jsonl":
            folder = Path(path).parent
            return cls(tuple(_record(line, f"{where}: line {n}", folder) for n, line in lines))
        return cls(tuple(Prompt(line) for _, line in lines))

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts' texts."""
        return tuple(prompt.text for prompt in self.prompts)

    def need_images(self, field: str) -> None:
        """Refuse prompts without an image, for families that start from one.

        Args:
            field: Configuration field that named the file.
        """
        missing = [number for number, p in enumerate(self.prompts, 1) if p.image is None]
        if missing:
            raise UserError(
                f"{field}: prompt {missing[0]} of {len(self.prompts)} has no image ({len(missing)} "
                "have none), and this family starts from one; give a .jsonl file with an \"image\" "
                "a line, or model.first_frame"
            )

    def batch(self, iteration: int, seed: int, count: int) -> list[tuple[int, Prompt]]:
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


def _record(line: str, where: str, folder: Path) -> Prompt:
    """A line of a .jsonl file."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f'{where}: must be an object with a text under "prompt"')
    text, image = record.pop("prompt"), record.pop("image", None)
    if image is None:
        return Prompt(text, None, record)
    file = folder / str(image)
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where}: image {image!r} lies outside {folder}; move it there")
    if not file.is_file():
        raise UserError(f"{where}: image {image!r}: no such file in {folder}")
    return Prompt(text, file, record)


@lru_cache(maxsize=4)
def _epoch_order(total: int, seed: int, epoch: int) -> np.ndarray:
    order = permutation(total, NoiseKey.from_seed(seed).fold_in(Role.DATA).fold_in(epoch).draw())
    order.flags.writeable = False  # shared by every caller through the cache
    return order
