"""UnifiedReward and UnifiedReward-Think: judges trained on their authors' texts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from dancegrpo_fast.rewards.judge import NUMBER, Pairs, Points, better, within
from dancegrpo_fast.rewards.judge_prompts import fill, official


class UnifiedReward(Points):
    """UnifiedReward's scores (arXiv 2503.05236) of images or videos, 1 to 5.

    Args:
        path: Address of a server, or a folder.
        version: `2` rates alignment, coherence (of videos physics) and style; `1` gives one score.
        part: One of version 2's ratings, or their mean.
        template: The authors' file; fetched if null.
        **settings: See `judge.Settings`.
    """

    name = "unified_reward"

    def __init__(
        self,
        path: str,
        *,
        version: Literal["1", "2"] = "2",
        part: Literal["mean", "alignment", "coherence", "physics", "style"] = "mean",
        template: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, settings)
        if version == "1" and part != "mean":
            raise ValueError(f"options.part = {part!r}: version 1 gives one score; leave it out")
        self.version, self.part = version, part
        self.texts = official("point", version, template)

    def text(self, prompt: str, kind: str) -> str:
        """See `Judge.text`."""
        return _asked(self.texts, kind, prompt)

    def value(self, reply: str) -> float:
        """See `Points.value`: a rating outside 0 to 5 or a missing one leaves no score."""
        if self.version == "1":
            found = re.findall(rf"Final Score:\s*{NUMBER}", reply)
            return within(found[-1], 1, 5) if found else math.nan
        ratings = dict(re.findall(rf"(\w+) Score \(1-5\):\s*{NUMBER}", reply))
        known = {name.lower(): within(text, 0, 5) for name, text in ratings.items()}
        if self.part != "mean":
            return known.get(self.part, math.nan)
        second = known.get("coherence", known.get("physics", math.nan))
        return (known.get("alignment", math.nan) + second + known.get("style", math.nan)) / 3


class UnifiedPair(Pairs):
    """UnifiedReward's comparison of two images (videos: version 1).

    Args:
        path: Address of a server, or a folder.
        version: `2` shares 1 between the two on three measures; the mean counts. `1` names one.
        template: The authors' file; fetched if null.
        **settings: See `judge.Settings`.
    """

    name = "unified_reward_pair"

    def __init__(
        self,
        path: str,
        *,
        version: Literal["1", "2"] = "2",
        template: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, settings)
        self.version, self.texts = version, official("pair", version, template)

    def text(self, prompt: str, kind: str) -> str:
        """See `Judge.text`."""
        return _asked(self.texts, kind, prompt)

    def first_wins(self, reply: str) -> float:
        """See `Pairs.first_wins`."""
        if self.version == "1":
            return better(reply)
        pairs = re.findall(rf"Image 1:\s*{NUMBER}\s+Image 2:\s*{NUMBER}", reply)
        shares = [float(a) / (float(a) + float(b)) for a, b in pairs if float(a) + float(b) > 0]
        return sum(shares) / len(shares) if len(shares) == 3 else 0.5


class UnifiedThink(Pairs):
    """UnifiedReward-Think (arXiv 2505.03318): a comparison after a chain of thought.

    Args:
        path: Address of a server, or a folder.
        version: `2` is the Qwen3-VL model, which also knows videos; `1` the Qwen2.5-VL one.
        template: The authors' file; fetched if null.
        **settings: See `judge.Settings`.
    """

    name = "unified_reward_think"

    def __init__(
        self,
        path: str,
        *,
        version: Literal["1", "2"] = "2",
        template: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, {"max_tokens": 4096} | settings)
        self.texts = official("think", version, template)

    def text(self, prompt: str, kind: str) -> str:
        """See `Judge.text`."""
        return _asked(self.texts, kind, prompt)

    def first_wins(self, reply: str) -> float:
        """See `Pairs.first_wins`; what is thought before the answer does not count."""
        found = re.findall(r"<answer>(.*?)</answer>", reply, re.DOTALL)
        return better(found[-1]) if found else 0.5


def _asked(texts: Mapping[str, str], kind: str, prompt: str) -> str:
    if kind not in texts:
        raise ValueError(f"this version has no text for {kind}s, only for {', '.join(texts)}s")
    return fill(texts[kind], prompt)
