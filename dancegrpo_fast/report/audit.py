"""Has training found a way round the reward? What pixels and other rewards say about it.

Each check compares one trait of the trained model's samples with the base's, on the same prompts
and seeds. It is flagged if the change is larger than the stated threshold and larger than chance
(the 95% interval over prompts excludes no change). A flag says where to look: whether the change is
wanted, only the prompts can say. Nothing is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dancegrpo_fast.report.compare import paired

_LUMA = (0.299, 0.587, 0.114)
_PERIODS = (8, 16)  # Of grids that patches and VAEs of common models would leave, in pixels.


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        name: What was looked at.
        base, trained: Its mean over prompts.
        threshold: Change that is flagged, in words.
        flagged: It was exceeded, and not by chance.
        advice: What to look at and to try, if it is flagged.
    """

    name: str
    base: float
    trained: float
    threshold: str
    flagged: bool
    advice: str


@dataclass(frozen=True)
class _Check:
    """How a trait may change.

    Attributes:
        kind: What is limited: the ratio of the means, their difference, or spread: that in standard
            deviations of the base's samples.
        low, high: Limits of the change; None where that side is never flagged.
        least: A change of the mean smaller than this is never flagged.
        advice: See `Finding`.
    """

    kind: str
    low: float | None
    high: float | None
    least: float
    advice: str


_LOOK = "look at the samples first; if this is not what the prompts ask for, "
_KL = "add loss.kl_weight, or stop earlier"
CHECKS: dict[str, _Check] = {
    "brightness": _Check(
        "ratio", 0.7, 1.4, 0.02,
        _LOOK + "the reward pays for light or dark: add a reward that compares with the prompt "
        "(clip_score, a preference model), lower the weight of this one, or " + _KL,
    ),
    "saturation": _Check(
        "ratio", 0.6, 1.7, 0.02,
        _LOOK + "colours are driven for their own sake: mix in a second reward, or " + _KL,
    ),
    "colour cast": _Check(
        "spread", None, 1.5, 0.02,
        _LOOK + "all samples take on one tint: mix in a second reward, or " + _KL,
    ),
    "clipped pixels": _Check(
        "ratio", None, 2.0, 0.02,
        _LOOK + "light or colour is pushed to its end: lower optimizer.learning_rate, or " + _KL,
    ),
    "fine detail": _Check(
        "ratio", 0.5, 1.5, 0.002,
        _LOOK + "above: texture or noise is paid for, below: blur is: score with a reward that "
        "resizes or blurs first, mix in a second one, or " + _KL,
    ),
    "grid": _Check(
        "difference", None, 0.7, 0.0,
        _LOOK + "a pattern repeats every 8 or 16 pixels, as patches and VAEs leave it: "
        "lower optimizer.learning_rate, train fewer late steps (loss.timesteps), or " + _KL,
    ),
    "noise in flat areas": _Check(
        "ratio", None, 1.5, 1 / 255,
        _LOOK + "sharpness that is noise: rewards that count detail like it; mix in a preference "
        "model, train fewer late steps (loss.timesteps), or " + _KL,
    ),
    "motion": _Check(
        "ratio", 0.6, 1.8, 0.002,
        _LOOK + "below: stillness is safe for rewards that judge single frames; add "
        "motion_amplitude or a video reward. Above: flicker may pass for motion; add "
        "motion_smoothness",
    ),
    "diversity in groups": _Check(
        "ratio", 0.7, None, 0.0,
        "the samples of a prompt grow alike: stop earlier, lower optimizer.learning_rate, raise "
        "rollout.noise_level, or add loss.kl_weight",
    ),
}  # fmt: skip
_REWARD = (
    "a reward that was not trained on falls: it is traded for those that were; give it a weight of "
    "its own, or " + _KL
)
_CAPTION = (
    "samples follow their captions less: add clip_score with a small weight, or " + _KL
)  # fmt: skip
#: Names of the traits that `traits` returns; stored ones are named by the version too.
TRAITS_VERSION = 1
TRAITS = (
    *(name for name in CHECKS if name != "colour cast"), "red", "green", "blue",
)  # fmt: skip
FALL = 0.3  # Of a reward not trained on, in the base's deviations.


def audit(
    base_videos: Tensor,
    trained_videos: Tensor,
    *,
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    trained_on: Sequence[str] = (),
) -> list[Finding]:
    """Every check on the samples of two models.

    Args:
        base_videos: [P, S, F, 3, H, W] uint8 of P prompts and S seeds; one frame is an image.
        trained_videos: The same prompts and seeds of the trained model.
        scores: Rewards by name: [P, S] of the base and of the trained model, NaN where one failed.
        trained_on: Names of the rewards that were trained on: these may rise alone.
    """
    pair = [all_traits(videos) for videos in (base_videos, trained_videos)]
    return findings(pair[0], pair[1], scores=scores or {}, trained_on=trained_on)


def findings(
    base: Mapping[str, np.ndarray],
    trained: Mapping[str, np.ndarray],
    *,
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
    trained_on: Sequence[str] = (),
) -> list[Finding]:
    """The checks from traits by name, [P, S] each; see `audit` for the rest."""
    found = []
    cast = _cast(base, trained)
    for name, check in CHECKS.items():
        first, second = cast if name == "colour cast" else [side[name] for side in (base, trained)]
        if np.isfinite(first).any():  # An image has no motion, a single seed no diversity.
            found.append(_judged(name, check, first, second))
    for name, (first, second) in scores.items():
        if name not in trained_on:
            advice = _CAPTION if name == "clip_score" else _REWARD
            check = _Check("spread", -FALL, None, 0.0, advice)
            found.append(_judged(f"{name} (not trained on)", check, first, second))
    return found


def _judged(name: str, check: _Check, first: np.ndarray, second: np.ndarray) -> Finding:
    told = paired(first, second)
    scale, unit = told.base, "of the base"
    change = told.trained / scale if scale else (math.inf if told.trained else 1.0)
    if check.kind == "difference":
        change, unit = told.difference, "in difference"
    elif check.kind == "spread":
        scale, unit = float(np.nanstd(first)), "deviations of the base's samples"
        change = told.difference / scale if scale else told.difference * math.inf
    beyond = (check.low is not None and change < check.low) or (
        check.high is not None and change > check.high
    )
    sure = told.verdict != "unclear" and abs(told.difference) >= check.least
    limits = {"below": check.low, "above": check.high}
    sign = "" if check.kind == "ratio" else "+"
    shown = " or ".join(f"{k} {v:{sign}g}" for k, v in limits.items() if v is not None)
    threshold = f"{shown} {unit}, here {change:.2f}"
    flagged = bool(beyond and sure)
    return Finding(name, told.base, told.trained, threshold, flagged, check.advice)


def _cast(
    base: Mapping[str, np.ndarray], trained: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """[P, S] of each: mean colours, without their grey, along the way that their mean has moved."""
    colours = [np.stack([side[c] for c in ("red", "green", "blue")]) for side in (base, trained)]
    first, second = (colour - colour.mean(axis=0) for colour in colours)
    centre = first.mean(axis=(1, 2))
    way = second.mean(axis=(1, 2)) - centre
    way = way / max(float(np.linalg.norm(way)), 1e-12)
    along = [np.einsum("cps,c->ps", side - centre[:, None, None], way) for side in (first, second)]
    return along[0].round(12), along[1].round(12)  # The base's mean is 0 by construction.


# ---- traits --------------------------------------------------------------------------------------


def all_traits(videos: Tensor) -> dict[str, np.ndarray]:
    """Traits [P, S] by name of videos [P, S, F, 3, H, W] uint8, a prompt at a time."""
    rows = [traits(group) for group in videos]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def traits(videos: Tensor) -> dict[str, np.ndarray]:
    """What the pixels of one prompt's samples are like.

    Args:
        videos: [S, F, 3, H, W] uint8.

    Returns:
        [S] float64 by name: brightness, saturation (mean of the largest less the smallest channel),
        red, green, blue, clipped pixels (share of values 0 or 255), fine detail (share of the
        spectrum's energy, without the mean, beyond half the highest frequency), grid (log of the
        energy at frequencies of patterns that repeat every 8 or 16 pixels over that beside them, at
        least 0), noise in flat areas (Immerkaer's mask, median of its size over 6: edges are too
        few to move a median), motion (mean change of brightness between frames; NaN for images),
        diversity in groups (mean RMS distance to the other seeds' samples; NaN for a single one).
    """
    found: dict[str, list[float]] = {}
    for video in videos:
        for name, value in _one(video.float() / 255).items():
            found.setdefault(name, []).append(value)
    result = {name: np.array(values) for name, values in found.items()}
    return result | {"diversity in groups": _diversity(videos)}


def _one(video: Tensor) -> dict[str, float]:
    """Traits of one sample [F, 3, H, W] in [0, 1]."""
    light = torch.einsum("fchw,c->fhw", video, video.new_tensor(_LUMA))
    means = video.mean(dim=(0, 2, 3)).tolist()
    chroma = video.amax(dim=1) - video.amin(dim=1)
    return {
        "brightness": float(light.mean()),
        "saturation": float(chroma.mean()),
        **dict(zip(("red", "green", "blue"), means, strict=True)),
        "clipped pixels": float(((video == 0) | (video == 1)).float().mean()),
        "fine detail": _fine(light),
        "grid": _grid(light),
        "noise in flat areas": _noise(light),
        "motion": float(light.diff(dim=0).abs().mean()) if len(light) > 1 else math.nan,
    }


def _fine(light: Tensor) -> float:
    height, width = light.shape[-2:]
    energy = _windowed(light).sum(dim=0)
    rows, columns = (torch.fft.fftfreq(n, device=light.device).abs() for n in (height, width))
    high = torch.maximum(rows[:, None], columns[None]) > 0.25
    total = float(energy.sum())
    # A frame of one colour has no detail, and rounding of the transform is none either.
    return float(energy[high].sum()) / total if total > 1e-6 * energy.numel() else 0.0


def _windowed(light: Tensor) -> Tensor:
    """Energy spectra [F, H, W] without the mean.

    A picture is not periodic: without a window the jump at its border would pass for detail.
    """
    down, across = (torch.hann_window(n, device=light.device) for n in light.shape[-2:])
    window = down[:, None] * across
    centred = light - (light * window).sum(dim=(1, 2), keepdim=True) / window.sum()
    return torch.fft.fft2(centred * window).abs().square()


def _grid(light: Tensor) -> float:
    """Log of the largest ratio over periods: energy at a grid's frequencies to that beside them."""
    ratios = [1.0]
    for period in _PERIODS:
        height, width = (side - side % period for side in light.shape[-2:])
        if min(height, width) < 4 * period:
            continue
        # Whole periods: a grid's energy lies at bins k / period and, by the window, one beside.
        frames = light[:, :height, :width]
        energy = _windowed(frames).sum(dim=0)
        lattice = torch.zeros_like(energy, dtype=torch.bool)
        lattice[:: height // period, :: width // period] = True
        lattice[0, 0] = False
        shifts = [(i, j) for i in (-2, 0, 2) for j in (-2, 0, 2) if (i, j) != (0, 0)]
        beside = torch.stack([energy.roll(shift, (0, 1)) for shift in shifts]).mean(dim=0)
        least = 1e-6 * energy.numel()  # Rounding of a picture of one colour is no grid.
        ratios.append(float((energy[lattice].sum() + least) / (beside[lattice].sum() + least)))
    return math.log(max(ratios))  # A mean of ratios would be that of its largest.


def _noise(light: Tensor) -> float:
    if min(light.shape[-2:]) < 3:
        return math.nan
    across = light[..., 2:] - 2 * light[..., 1:-1] + light[..., :-2]
    mask = across[:, 2:] - 2 * across[:, 1:-1] + across[:, :-2]
    # Of Gaussian noise the mask has 6 times its deviation, and the median of the size is 0.6745 of
    # that.
    return float(mask.abs().median()) / (6 * 0.6745)


def _diversity(videos: Tensor) -> np.ndarray:
    flat = videos.flatten(1).double() / 255
    if len(flat) < 2:
        return np.full(len(flat), math.nan)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    means = distances.sum(dim=1) / (len(flat) - 1) / math.sqrt(flat.shape[1])
    found: np.ndarray = means.cpu().numpy()
    return found
