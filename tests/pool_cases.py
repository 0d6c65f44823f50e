"""What iterations draw, train and leave, for runs that must agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny_models import CPU

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.trainer import Trainer


def iterations(config: RunConfig, count: int = 2) -> dict[str, Any]:
    """What some iterations drew, trained and left."""
    torch.set_num_threads(1)
    trainer = Trainer(config, CPU)
    seen: dict[str, Any] = {"trained": [], "rewards": [], "parts": []}
    score, update = trainer.score, trainer.update

    def scored(*arguments: Any) -> np.ndarray:
        seen["rewards"].append(score(*arguments))
        return seen["rewards"][-1]

    def updated(updates: Any, drawn: Any, *arguments: Any) -> dict[str, float]:
        items = [item for u in updates for call in u.calls for item in call.items]
        places = {(i.prompt, s) for i in items for s in (i.state, *i.children)}
        log_probs = {(i.prompt, child) for i in items for child in i.children}
        seen["trained"].append({place: drawn.latents[place].clone() for place in sorted(places)})
        seen["trained"].append({place: drawn.log_prob[place].clone() for place in log_probs})
        seen["stored"] = len(drawn.latents)
        return update(updates, drawn, *arguments)

    trainer.score, trainer.update = scored, updated  # type: ignore[method-assign]
    seen["metrics"] = [trainer.iteration() for _ in range(count)]
    seen["weights"] = {k: p.detach().clone() for k, p in trainer.policy.trainable().items()}
    seen["parts"] = len(trainer.chunks)
    return seen
