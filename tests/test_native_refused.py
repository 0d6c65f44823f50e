"""What the native kernels refuse before they touch any memory."""

from __future__ import annotations

import pytest
import torch
from ops_cases import draw_keys
from torch import Tensor

F32 = torch.float32

def refusals() -> dict[str, dict[str, object]]:
    nan = float("nan")
    return {
        "model_output needs at least 2": {"m": torch.zeros(4)},
        "latents has the wrong shape": {"x": torch.zeros(2, 4)},
        "next_latents has the wrong shape": {"y": torch.zeros(3, 5)},
        "reference_output has the wrong shape": {"ref": torch.zeros(1, 5)},
        "latents must be bfloat16": {"x": torch.zeros(2, 5, dtype=torch.int64)},
        r"coefficients: \[children, 8\]": {"table": torch.ones(2, 7)},
        "coefficients is not of a floating": {"table": torch.ones(2, 8, dtype=torch.int64)},
        "one child each": {"table": torch.ones(3, 8)},
        r"child_offsets: int64 \[states": {"offsets": torch.tensor([0, 2])},
        "child_offsets: int64": {"offsets": torch.tensor([0, 1, 2], dtype=torch.int32)},
        "child_offsets: 0 to children": {"offsets": torch.tensor([0, 1, 3])},
        "child_offsets must not fall": {"offsets": torch.tensor([0, 3, 2])},
        "action_box needs one": {"box": ((0, 5), (0, 1))},
        "action_box needs integers": {"box": (("a", 1),)},
        "action_box needs integers .start, stop": {"box": ((0, 1, 2),)},
        "action_box must satisfy": {"box": ((3, 3),)},
        "action_box must satisfy 0 <= start < stop <= size": {"box": ((0, 6),)},
        r"advantages: \[children\]": {"advantages": torch.zeros(3)},
        "advantages must be": {"advantages": torch.tensor([[[-1.0, 0]], [[0, 0]]])},
        r"advantages must be \(P >= 0, N <= 0\)": {"advantages": torch.ones(2, 1, 2)},
        "old_log_prob has the wrong shape": {"old_lp": torch.zeros(2, 1)},
        "weights must be at least 0": {"weights": torch.tensor([1.0, -1.0])},
        "weights sum to 0": {"weights": torch.zeros(2)},
        "weights has the wrong shape": {"weights": torch.ones(3)},
        "reward_weights has the wrong shape": {"u": torch.ones(2)},
        "a child with w = 0": {"table": torch.zeros(2, 8)},
        "clip range": {"low": 1.5},
        "divisor must be a": {"divisor": "all"},
        "divisor must be": {"divisor": 0.0},
        "divisor must be a positive": {"divisor": nan},
        "kl_weight without": {"kl_weight": 0.1},
        "kl_weight must be": {"kl_weight": nan},
        "old_output without old_log_prob": {"old": torch.zeros(2, 5)},
        "old_penalty without": {"old_penalty": 0.1},
        "power must be": {"power": 0.0},
        "x is a list|latents is a list": {"x": [[0.0] * 5] * 2},
        "not on the CPU|no memory": {"x": torch.zeros(2, 5, device="meta")},
        "has no memory": {"x": torch.zeros(2, 5).to_sparse()},
        "lazily negated": {"x": torch.zeros(2, 5, dtype=torch.complex64).conj().imag},
        "at most 8": {"m": torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, 1)},
    }


@pytest.mark.parametrize("message", refusals())
def test_refused(native_module, message) -> None:
    args = {
        "m": torch.zeros(2, 5), "x": torch.zeros(2, 5), "y": torch.zeros(2, 5),
        "table": torch.ones(2, 8), "advantages": torch.ones(2), "old_lp": None, "weights": None,
        "offsets": None, "u": None, "ref": None, "old": None, "low": 0.1, "high": 0.1,
        "divisor": None, "kl_weight": 0.0, "box": None, "power": 1.0, "old_penalty": None,
    }  # fmt: skip
    native_module.policy_loss(*args.values(), True, 1)  # as it stands it is taken
    with pytest.raises(native_module.Refused, match=message) as caught:
        native_module.policy_loss(*(args | refusals()[message]).values(), True, 1)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_sample_refuses(native_module) -> None:
    n, z, table = native_module, torch.zeros(2, 5), torch.ones(2, 8)
    for keys, noise, out, message in (
        (None, None, F32, "keys and noise are both None"),
        (draw_keys(2), z, F32, "keys and noise are both given"),
        (draw_keys(3), None, F32, r"keys: int64 \[children, 2\]"),
        (draw_keys(2).double(), None, F32, "keys: int64"),
        (None, z[:1], F32, "noise has the wrong shape"),
        (None, z, torch.int32, "latent_dtype must be"),
    ):
        with pytest.raises(n.Refused, match=message):
            n.sample_transition(z, z, table, keys, noise, None, None, out, 1)


def test_nft_and_gradient_refuse(native_module) -> None:
    n, z, one = native_module, torch.zeros(2, 5), torch.ones(2)
    good = dict(sigmas=one, advantages=one, weights=None, ref=None, old=z, beta=1.0, adv_max=5.0,
                divisor=None, kl_weight=0.0, minimum=1e-5)  # fmt: skip
    n.nft_loss(z, z, z, *good.values(), None, True, 1)
    for change, message in (
        ({"old": None}, "old_output is needed"), ({"beta": 0.0}, "beta"),
        ({"adv_max": -1.0}, "adv_max"), ({"sigmas": None}, "sigmas and advantages are needed"),
        ({"sigmas": torch.ones(3)}, "sigmas has"), ({"weights": -one}, "weights must"),
        ({"kl_weight": 0.1}, "kl_weight without"), ({"minimum": -1.0}, "minimum"),
    ):  # fmt: skip
        with pytest.raises(n.Refused, match=message):
            n.nft_loss(z, z, z, *(good | change).values(), None, True, 1)
    for upstream, scales, message in (
        (torch.ones(3), torch.ones(2, 3), "upstream"), (one, torch.ones(2, 2), "scales"),
    ):  # fmt: skip
        with pytest.raises(n.Refused, match=message):
            n.transition_gradient(upstream, scales, z, z, z, torch.ones(2, 8), *[None] * 4, 1)


def test_tensors_without_memory_are_refused_by_name(native_module) -> None:
    from torch._subclasses import FakeTensorMode

    class Sub(torch.Tensor):
        pass

    z, table = torch.zeros(2, 5), torch.ones(2, 8)
    with FakeTensorMode():
        fake = torch.zeros(2, 5)
    for tensor, name in ((fake, "FakeTensor"), (z.as_subclass(Sub), "Sub")):
        with pytest.raises(native_module.Refused, match=f"next_latents is a {name}"):
            native_module.transition_log_prob(z, z, tensor, table, None, None, 1)
    parameter = torch.nn.Parameter(z)
    assert native_module.transition_log_prob(parameter, z, z, table, None, None, 1).shape == (2,)

    def mapped(y: Tensor) -> Tensor:
        with pytest.raises(native_module.Refused, match="no memory"):
            native_module.transition_log_prob(z, z, y, table, None, None, 1)
        return y

    torch.vmap(mapped)(torch.zeros(3, 2, 5))
