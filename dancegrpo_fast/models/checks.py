"""Refusals that families share: one line with the field, the value and the way out."""

from __future__ import annotations

from dancegrpo_fast.config import ModelConfig, UserError


def check_multiple(field: str, value: int, factor: int) -> None:
    """Refuse a size that is not a multiple of `factor`, with the nearest that are."""
    if value % factor:
        below = value // factor * factor
        near = " or ".join(str(n) for n in (below, below + factor) if n > 0)
        raise UserError(
            f"model.{field} = {value}: must be a multiple of {factor} here; use {near}"
        )


def check_frames(frames: int, factor: int) -> None:
    """Refuse a frame count whose (frames - 1) is not a multiple of `factor`."""
    if (frames - 1) % factor:
        below = (frames - 1) // factor * factor + 1
        raise UserError(
            f"model.frames = {frames}: (frames - 1) must be divisible by {factor} here; use "
            f"{below} or {below + factor}"
        )


def check_one_frame(config: ModelConfig) -> None:
    """Refuse more than one frame, for models of images."""
    if config.frames != 1:
        raise UserError(
            f"model.frames = {config.frames}: family {config.family} draws images; leave it at 1"
        )


def check_guidance(config: ModelConfig) -> None:
    """Refuse a guidance scale below 1, for stock pipelines that guide above 1 only."""
    if config.guidance < 1:
        raise UserError(
            f"model.guidance = {config.guidance}: the stock pipeline guides only above 1; use 1 "
            "for no guidance, or more"
        )


def check_text_length(config: ModelConfig, most: int) -> None:
    """Refuse more text tokens than the stock pipeline takes."""
    if (config.max_text_length or 0) > most:
        raise UserError(
            f"model.max_text_length = {config.max_text_length}: the stock pipeline takes at most "
            f"{most} tokens"
        )
