"""Settings that nothing would read, where no single choice decides it.

A part of `agreement`, which explains how checks read values, and has a table for single choices.
"""

from __future__ import annotations

from collections.abc import Iterator

from dancegrpo_fast.config.kinds import Disagreement, Get


def model(get: Get) -> Iterator[Disagreement]:
    """The model's section."""
    if get("model.fps") is not None and get("model.frames") == 1:
        yield "model.fps", "has no effect with model.frames = 1, which draws images; use null"
    if get("model.first_frame_steps") is not None and get("model.first_frame") is None:
        reason = "has no effect without model.first_frame; set that to a text-to-image pipeline"
        yield "model.first_frame_steps", f"{reason}, or this to null"


def data(get: Get) -> Iterator[Disagreement]:
    """Which prompts are read of a file."""
    shortest, longest = get("data.min_length"), get("data.max_length")
    if shortest is not None and longest is not None and shortest > longest:
        yield "data.max_length", f"must be at least data.min_length = {shortest}, or null"
    read = get("data.prompts"), get("evaluation.prompts")
    tables = [path for path in read if path is not None and not path.lower().endswith(".txt")]
    if get("data.column") != "prompt" and not tables:
        yield "data.column", "has no effect with text files, a prompt a line; leave it out"


def evaluation(get: Get) -> Iterator[Disagreement]:
    """Held-out samples without held-out prompts."""
    if get("evaluation.prompts") is not None:
        return
    if get("evaluation.every") is not None:
        yield "evaluation.every", "needs evaluation.prompts, a file of held-out prompts, or null"
    for name, default in (("seeds", 2), ("seed", 0)):
        if get(f"evaluation.{name}") != default:
            reason = "has no effect without evaluation.prompts; name a file of held-out prompts"
            yield f"evaluation.{name}", f"{reason}, or leave this at {default}"


def logging(get: Get) -> Iterator[Disagreement]:
    """Settings of a tracker that is not there."""
    if "wandb" in get("logging.trackers"):
        return
    defaults = (("project", None, "null"), ("name", None, "null"), ("offline", False, "false"))
    for name, default, shown in defaults:
        if get(f"logging.{name}") != default:
            reason = "has no effect without wandb in logging.trackers; add it"
            yield f"logging.{name}", f"{reason}, or leave this at {shown}"


CHECKS = (model, data, evaluation, logging)
