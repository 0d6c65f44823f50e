"""Losses that turn comparisons of people into a reward model. All are means over B pairs.

A difference is score(first) - score(second); an outcome is 1 where the first is better, 0 where the
second is, 0.5 for a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Losses that `pair_loss` knows.
LOSSES = ("bt", "ties", "soft", "uncertain")


def bradley_terry(better: Tensor, worse: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(better - worse - margin).

    Args:
        better: [B] scores, floating point.
        worse: [B].
        margin: [B] or one number >= 0 that a difference should exceed; VideoAlign takes the gap of
            the people's ratings (arXiv 2501.13918).
    """
    return -F.logsigmoid(better - worse - margin).mean()


def bradley_terry_ties(difference: Tensor, outcome: Tensor, theta: float = 5.0) -> Tensor:
    """Bradley-Terry with ties (Rao and Kupper 1967; VideoAlign, arXiv 2501.13918, uses theta = 5).

    P(first) = sigmoid(d - log theta), P(second) = sigmoid(-d - log theta), and a tie has the rest:
    (theta^2 - 1) P(first) P(second).

    Args:
        difference: [B].
        outcome: [B] of 0, 0.5 and 1.
        theta: Above 1; how near a draw scores must be.

    Raises:
        ValueError: theta <= 1, or another outcome.
    """
    if not theta > 1:
        raise ValueError(f"theta = {theta}: must be above 1, or ties cannot happen")
    if not bool(((outcome == 0) | (outcome == 0.5) | (outcome == 1)).all()):
        raise ValueError("outcome: must be 0, 0.5 or 1; for other labels take soft_labels")
    first = F.logsigmoid(difference - math.log(theta))
    second = F.logsigmoid(-difference - math.log(theta))
    tie = math.log(theta**2 - 1) + first + second
    log_p = torch.where(outcome == 1, first, torch.where(outcome == 0, second, tie))
    return -log_p.mean()


def uncertain_bradley_terry(
    better: Tensor, worse: Tensor, better_log_std: Tensor, worse_log_std: Tensor, points: int = 64
) -> Tensor:
    """HPSv3's loss (arXiv 2508.03789): scores are Gaussian, and the expected Bradley-Terry counts.

    E[-log sigmoid(z)], z ~ N(better - worse, std_better^2 + std_worse^2). The authors draw 1000
    half-precision z per pair; here it is Gauss-Hermite quadrature, without noise.

    Args:
        better: [B] means.
        worse: [B].
        better_log_std: [B] logarithms of the standard deviations.
        worse_log_std: [B].
        points: Of the quadrature; 64 leave an error below 1e-3 at deviations up to 10.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    node = torch.as_tensor(nodes, dtype=better.dtype, device=better.device)
    weight = torch.as_tensor(weights / weights.sum(), dtype=better.dtype, device=better.device)
    std = (torch.exp(2 * better_log_std) + torch.exp(2 * worse_log_std)).sqrt()
    z = (better - worse)[:, None] + std[:, None] * node
    return -(F.logsigmoid(z) @ weight).mean()


def soft_labels(scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """KL(labels || softmax(scores)): 0 where they agree (HPS-v2, PickScore).

    Against plain cross-entropy the labels' own entropy is missing: log 2 at a tie, no gradient.

    Args:
        scores: [B, K] of the K images of a prompt, times the logit scale.
        labels: [B, K], each row a distribution.
        weight: [B], such as one over the prompt's pairs; None is 1. The mean stays over B.

    Raises:
        ValueError: Labels that are no distributions.
    """
    if bool((labels < 0).any()) or bool(((labels.sum(dim=1) - 1).abs() > 1e-4).any()):
        raise ValueError("labels: rows must be >= 0 and sum to 1")
    divergence = F.kl_div(scores.log_softmax(dim=1), labels, reduction="none").sum(dim=1)
    return (divergence if weight is None else divergence * weight).mean()


def yes_or_no(logits: Tensor, outcome: Tensor, yes: Sequence[int], no: Sequence[int]) -> Tensor:
    """Cross-entropy of a model that answers yes or no (RewardDance, OneReward).

    Ask about both orders of each pair, with outcome 1 and 0: otherwise the model may learn to
    say yes to whatever comes first.

    Args:
        logits: [B, vocabulary] at the place of the answer.
        outcome: [B], probability that the answer is yes.
        yes: Tokens that mean yes; their probabilities add up.
        no: Tokens that mean no.

    Raises:
        ValueError: No tokens, or one that means both.
    """
    if not yes or not no or set(yes) & set(no):
        raise ValueError(f"yes = {list(yes)}, no = {list(no)}: must be distinct and not empty")
    log_p = logits.log_softmax(dim=1)
    says_yes, says_no = (log_p[:, list(words)].logsumexp(dim=1) for words in (yes, no))
    return -(outcome * says_yes + (1 - outcome) * says_no).mean()


def pair_loss(name: str, first: Tensor, second: Tensor, label: Tensor) -> Tensor:
    """One of `LOSSES`; `bt` and `uncertain` leave ties out.

    Args:
        name: Which.
        first: [B, outputs]: a score, and for `uncertain` the log of its standard deviation.
        second: [B, outputs].
        label: [B], 1 where the first is better, 0 where the second is, 0.5 for a tie.
    """
    if name == "soft":
        both = torch.stack([first[:, 0], second[:, 0]], dim=1)
        return soft_labels(both, torch.stack([label, 1 - label], dim=1))
    if name == "ties":
        return bradley_terry_ties(first[:, 0] - second[:, 0], label)
    chosen = label != 0.5
    turned = (label < 0.5)[chosen, None]
    first, second = first[chosen], second[chosen]
    better, worse = torch.where(turned, second, first), torch.where(turned, first, second)
    if not len(better):
        return 0.0 * first.sum()  # A batch of ties alone; the mean of nothing would be NaN.
    if name == "bt":
        return bradley_terry(better[:, 0], worse[:, 0])
    return uncertain_bradley_terry(better[:, 0], worse[:, 0], better[:, 1], worse[:, 1])


def stranger_loss(own: Tensor, strangers: Tensor) -> Tensor:
    """Bradley-Terry for: what was drawn for a prompt is better than what was drawn for another.

    Samples of one prompt have much in common (the demo's all have the right colour), so comparing
    them says nothing about it, and a policy could lose it unpunished.

    Args:
        own: [B] scores.
        strangers: [B] of other prompts' samples; NaN where there is none.
    """
    there = ~strangers.isnan()
    return bradley_terry(own[there], strangers[there]) if there.any() else 0.0 * own.sum()


def agreement(difference: Tensor, outcome: Tensor, bins: int = 10) -> tuple[float, float]:
    """Accuracy, and the expected calibration error of sigmoid(difference).

    Args:
        difference: [B].
        outcome: [B]; ties count for neither.
        bins: Of equal width over the confidence in [0.5, 1].

    Returns:
        Share of pairs that are ranked right (a difference of 0 is half right), and the mean gap
        between confidence and share per bin, weighted by the bin's pairs; NaN without pairs.
    """
    decided = outcome != 0.5
    difference, outcome = difference[decided].double(), outcome[decided].double()
    if not len(difference):
        return math.nan, math.nan
    correct = ((difference * (outcome - 0.5)).sign() + 1) / 2
    confidence = torch.sigmoid(difference.abs())
    which = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    error = 0.0
    for one in which.unique().tolist():
        own = which == one
        error += float((confidence[own] - correct[own]).sum().abs())
    return float(correct.mean()), error / len(difference)
