"""Prompts: `files` reads them, `prompts` is a set of them and the order in which they are drawn.

Which prompts an iteration draws is a function of the seed, and with skipping of rewards that all
processes hold.
"""

from dancegrpo_fast.data.files import clean_text, read_prompts
from dancegrpo_fast.data.prompts import Draws, PromptSet

__all__ = ["Draws", "PromptSet", "clean_text", "read_prompts"]
