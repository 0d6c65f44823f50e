"""What DiffusionNFT's and AWM's losses refuse, by the argument's name."""

from __future__ import annotations

import pytest
import torch
from ops_cases import F64, each_implementation, randn  # noqa: F401

from dancegrpo_fast.ops import awm_loss, awm_weighting, nft_loss


def bad_nft(**changes: object):
    ones = torch.ones(2, dtype=F64)
    args = {
        "model_output": randn(2, 6), "noised_latents": randn(2, 6), "clean_latents": randn(2, 6),
        "sigmas": ones, "advantages": ones, "old_output": randn(2, 6), **changes,
    }  # fmt: skip
    return lambda: nft_loss(**args)


def bad_awm(**changes: object):
    ones = torch.ones(2, dtype=F64)
    args = {
        "model_output": randn(2, 6), "clean_latents": randn(2, 6), "noise": randn(2, 6),
        "advantages": ones, "weighting": ones, **changes,
    }  # fmt: skip
    return lambda: awm_loss(**args)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad_nft(model_output=randn(6)), r"model_output has shape \[6\]"),
        (bad_nft(noised_latents=randn(2, 5)), r"noised_latents has shape \[2, 5\]: must be \[2, 6"),
        (bad_nft(clean_latents=randn(1, 6)), r"clean_latents has shape \[1, 6\]: must be \[2, 6\]"),
        (bad_nft(clean_latents=torch.ones(2, 6).long()), "clean_latents is torch.int64"),
        (bad_nft(old_output=randn(3, 6)), r"old_output has shape \[3, 6\]"),
        (bad_nft(old_output=randn(2, 6).requires_grad_()), "old_output requires a gradient"),
        (bad_nft(sigmas=torch.ones(3)), r"sigmas has shape \[3\]: must be \[2\]"),
        (bad_nft(advantages=torch.ones(2, 1)), r"advantages has shape \[2, 1\]: must be \[2\]"),
        (bad_nft(weights=torch.zeros(2)), "weights sum to 0"),
        (bad_nft(weights=torch.tensor([2.0, -1.0])), "minimum -1.0"),
        (bad_nft(beta=0.0), "beta = 0.0: must be a positive number"),
        (bad_nft(advantage_clip=-1.0), "advantage_clip = -1.0"),
        (bad_nft(minimum=-1e-5), "minimum = -1e-05"),
        (bad_nft(divisor=0.0), "divisor = 0.0"),
        (bad_nft(kl_weight=0.1), "without reference_output"),
        (bad_nft(action_box=((0, 7),)), r"action_box\[0\] = \(0, 7\)"),
        (bad_awm(clean_latents=randn(2, 5)), r"clean_latents has shape \[2, 5\]: must be \[2, 6\]"),
        (bad_awm(noise=randn(3, 6)), r"noise has shape \[3, 6\]: must be \[2, 6\]"),
        (bad_awm(noise=randn(2, 6).requires_grad_()), "noise requires a gradient"),
        (bad_awm(weighting=torch.ones(3)), r"weighting has shape \[3\]: must be \[2\]"),
        (bad_awm(weighting=torch.ones(2).requires_grad_()), "weighting requires a gradient"),
        (bad_awm(weighting=torch.tensor([1.0, 0.0])), r"weighting\[1\] has w = 0"),
        (bad_awm(form="square"), "form = 'square': must be one of 'linear', 'huber', 'ghuber'"),
        (bad_awm(ema_output=randn(2, 5)), r"ema_output has shape \[2, 5\]"),
        (bad_awm(ema_weight=0.1), "ema_weight = 0.1 without ema_output"),
        (bad_awm(ema_weight=-0.1, ema_output=randn(2, 6)), "ema_weight = -0.1"),
        (bad_awm(kl_weight=0.1), "without reference_output"),
        (bad_awm(clip_range=(2.0, 1.0)), "clip_range"),
        (bad_awm(advantages=torch.ones(3)), r"advantages has shape \[3\]"),
        (lambda: awm_weighting(torch.ones(1), "sqrt"), "kind = 'sqrt'"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
