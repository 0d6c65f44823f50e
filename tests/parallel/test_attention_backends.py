"""Attention backends: what is refused, and that a choice stays with its network."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from split_networks import flux, hunyuan, qwen, sd3, seeded, skyreels, wan

from dancegrpo_fast.config import UserError
from dancegrpo_fast.parallel import attention
from dancegrpo_fast.parallel.attention import BACKENDS, check_attention, set_attention

GPU, CPU = torch.device("cuda"), torch.device("cpu")
FLUX = "FluxTransformer2DModel"
HUNYUAN = "HunyuanVideoTransformer3DModel"
RUN: dict[str, Any] = {
    "network": FLUX, "kind": "ulysses", "degree": 1, "masked": False, "trained": True,
    "dtype": torch.bfloat16, "device": GPU,
}  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    """Every package that a backend can need."""
    monkeypatch.setattr(attention, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("name", "run", "reason"),
    [
        ("flash", {"network": HUNYUAN, "masked": True}, "masks its text and it takes no such mask"),
        ("xformers", {"network": HUNYUAN, "masked": True}, "takes no such mask; use default or"),
        ("flash_3", {}, "it has no backward and this network is trained; use .*flash_3_hub"),
        ("xformers", {"degree": 2}, r"is split by diffusers \(parallel.sp = 2\), which cannot"),
        ("cudnn", {"dtype": torch.float32}, "does not compute in float32; use default or native"),
        ("cudnn", {"degree": 2, "masked": True}, "takes no such mask; use default or native$"),
        ("flash", {"device": CPU}, "needs a GPU and this is cpu; use default or native$"),
        ("cudnn", {"network": "UNet2DConditionModel"}, "always calls PyTorch's SDPA; use default$"),
        ("flash_3", {"degree": 2, "device": CPU}, "no backward.*; .*is split.*; it needs a GPU"),
    ],
)
def test_a_wrong_choice_is_refused_with_every_reason(installed, name, run, reason):
    with pytest.raises(UserError, match=f"^parallel.attention = {name}: .*{reason}"):
        check_attention(name, **RUN | run)


@pytest.mark.parametrize(
    ("name", "package"),
    [("flash", "flash-attn>="), ("flash_3_hub", "kernels>="), ("xformers", "xformers>=")],
)
def test_a_missing_package_is_named(monkeypatch, name, package):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"it needs {package}.*; use default or native or cudnn$"):
        check_attention(name, **RUN)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match="parallel.attention = sage: must be one of default, nat"):
        check_attention("sage", **RUN)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        *((name, {}) for name in BACKENDS if name != "flash_3"),
        ("flash_3", {"trained": False}),
        # Our exchange stands outside the kernel, and trimmed text needs no mask.
        ("xformers", {"network": HUNYUAN, "kind": "replicated_text", "degree": 4}),
        ("flash", {"degree": 4}),
        ("cudnn", {"network": HUNYUAN, "masked": True}),
        ("xformers", {"dtype": torch.float32}),
        ("native", {"device": CPU, "dtype": torch.float32, "degree": 4, "masked": True}),
    ],
)
def test_a_fitting_choice_passes(installed, name, run):
    check_attention(name, **RUN | run)


def test_the_table_is_what_diffusers_says():
    """Masks, sequence parallelism and names, read from the installed version's registry."""
    from diffusers.models import attention_dispatch
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    assert attention_dispatch._wrapped_flash_attn_3._backward_fn is None  # flash_3 cannot train
    for name, row in BACKENDS.items():
        if row.diffusers is not None:
            there = AttentionBackendName(row.diffusers)
            split = _AttentionBackendRegistry._is_context_parallel_available(there)
            assert split == row.ulysses, name
    query = torch.zeros(1, 4, 2, 8)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    for name in ("flash", "flash_3", "flash_3_hub"):
        function = _AttentionBackendRegistry._backends[
            AttentionBackendName(BACKENDS[name].diffusers)
        ]
        with pytest.raises(ValueError, match="`attn_mask` is not supported"):
            function(query, query, query, attn_mask=mask)


def test_a_bool_mask_would_reach_xformers_as_numbers_to_add(monkeypatch):
    """Why xformers is refused with masks: hidden tokens get +0 and the others +1."""
    from diffusers.models import attention_dispatch

    kernel = mock.Mock()
    monkeypatch.setattr(attention_dispatch, "xops", kernel)
    query = torch.zeros(1, 4, 2, 8)
    mask = torch.tensor([True, True, False, False])[None, None, None]
    attention_dispatch._xformers_attention(query, query, query, attn_mask=mask)
    added = kernel.memory_efficient_attention.call_args.args[3]
    assert added.dtype == torch.float32
    assert added[0, 0, 0].tolist() == [1, 1, 0, 0]


def output(network: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return network(**inputs, return_dict=False)[0]


def attentions(network: Any) -> int:
    """Calls of one forward that ask the dispatcher, counted in the blocks."""
    blocks = [*getattr(network, "transformer_blocks", []), *getattr(network, "blocks", []),
              *getattr(network, "single_transformer_blocks", [])]  # fmt: skip
    names = ("attn", "attn1", "attn2")
    return sum(getattr(block, name, None) is not None for block in blocks for name in names)


@pytest.mark.parametrize("build", [flux, wan, partial(qwen, (5, 8)), hunyuan, skyreels, sd3])
def test_every_attention_of_the_network_and_no_other_is_switched(build):
    """Also SD3's, whose stock processor never asks; the numbers stay those of the stock one."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    stock, inputs = seeded(build)
    network, other = copy.deepcopy(stock), copy.deepcopy(stock)
    set_attention(network, "native", masked=True)
    active = _AttentionBackendRegistry._active_backend
    cudnn = AttentionBackendName("_native_cudnn")
    native = _AttentionBackendRegistry._backends[AttentionBackendName("native")]
    assert torch.equal(output(network, inputs), output(stock, inputs))
    set_attention(network, "cudnn", masked=True)
    stand_in = mock.Mock(wraps=native)
    with mock.patch.dict(_AttentionBackendRegistry._backends, {cudnn: stand_in}):
        assert torch.equal(output(network, inputs), output(stock, inputs))
        assert stand_in.call_count == attentions(network)
        stand_in.reset_mock()
        output(other, inputs)
        assert stand_in.call_count == 0, "the choice reached another network"
    assert _AttentionBackendRegistry._active_backend == active


def test_default_leaves_the_network_as_it_is():
    for build in (flux, sd3, hunyuan):
        network, _ = seeded(build)
        before = [type(p) for p in network.attn_processors.values()]
        set_attention(network, "default", masked=True)
        assert [type(p) for p in network.attn_processors.values()] == before


def test_trimmed_text_needs_no_mask_and_padding_stops_the_forward():
    """Leaving out an all-true mask changes nothing, with it SDPA takes another kernel."""
    stock, inputs = seeded(partial(hunyuan, (7, 7)))
    network = copy.deepcopy(stock)
    set_attention(network, "native", masked=False)
    set_attention(network, "native", masked=False)  # once more changes nothing
    seen: list[bool] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask is None)
        return original(*args, attn_mask=attn_mask, **kwargs)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", watched):
        ours = output(network, inputs)
    # Only the text refiner's own attention still has one (over its 7 tokens).
    assert seen.count(False) == 1 and seen.count(True) == attentions(network)
    torch.testing.assert_close(ours, output(stock, inputs), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="text with padding"):
        output(network, hunyuan((7, 4))[1])


def test_under_autocast_kernels_get_one_dtype():
    """float32 norms leave q and k wider than v; flash-attn would refuse them."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    cudnn = AttentionBackendName("_native_cudnn")
    native = _AttentionBackendRegistry._backends[AttentionBackendName("native")]
    for build in (flux, wan, qwen, partial(hunyuan, (7,)), sd3):
        network, inputs = seeded(build)
        set_attention(network, "cudnn", masked=True)
        seen = set()

        def watched(query, key, value, seen=seen, **options):
            seen.add((query.dtype, key.dtype, value.dtype))
            return native(query, key, value, **options)

        with mock.patch.dict(_AttentionBackendRegistry._backends, {cudnn: watched}):
            with torch.autocast("cpu", torch.bfloat16):
                output(network, inputs)
        assert seen == {(torch.bfloat16,) * 3}, build
