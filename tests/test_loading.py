"""Networks loaded from safetensors: diffusers' own bits, clear refusals, flat memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dancegrpo_fast.config import UserError
from dancegrpo_fast.models.loading import build, fill, load, weight_files

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXT = {"encoder_hidden_states": draw(1, 8, 16, seed=1)}
WAN: dict[str, Any] = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
    out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1, cross_attn_norm=True,
    qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
)  # fmt: skip

# class, its tiny configuration, the inputs of one forward
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "wan": (
        "WanTransformer3DModel",
        WAN,
        {"hidden_states": draw(1, 4, 2, 4, 4), "timestep": torch.tensor([500.0]), **TEXT},
    ),
    "flux": (
        "FluxTransformer2DModel",
        dict(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=32,
            guidance_embeds=True, axes_dims_rope=(4, 4, 8),
        ),
        {
            "hidden_states": draw(1, 16, 4), "pooled_projections": draw(1, 32, seed=2),
            "timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5]),
            "img_ids": torch.arange(48).reshape(16, 3).float(), "txt_ids": torch.zeros(8, 3),
            **TEXT,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        dict(
            sample_size=32, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=16,
            pooled_projection_dim=64, out_channels=4, pos_embed_max_size=32,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        {
            "hidden_states": draw(1, 4, 8, 8), "pooled_projections": draw(1, 64, seed=2),
            "timestep": torch.tensor([500.0]), **TEXT,
        },
    ),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
            num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1,
            guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        {
            "hidden_states": draw(1, 4, 2, 8, 8), "pooled_projections": draw(1, 8, seed=2),
            "encoder_attention_mask": torch.ones(1, 8, dtype=torch.long),
            "timestep": torch.tensor([500.0]), "guidance": torch.tensor([6016.0]), **TEXT,
        },
    ),
    "qwen": (
        "QwenImageTransformer2DModel",
        dict(
            patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, guidance_embeds=False,
            axes_dims_rope=(8, 4, 4),
        ),
        {
            "hidden_states": draw(1, 16, 16), "encoder_hidden_states_mask": None,
            "timestep": torch.tensor([0.5]), "img_shapes": [(1, 4, 4)], **TEXT,
        },
    ),
    "unet": (
        "UNet2DConditionModel",
        dict(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
            block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
        ),
        {"sample": draw(1, 4, 8, 8), "timestep": torch.tensor([500]), **TEXT},
    ),
}  # fmt: skip


def saved(name: str, folder: Path, **options: Any) -> Any:
    """A tiny network's folder; returns its class."""
    kind, config, _ = NETWORKS[name]
    cls = getattr(diffusers, kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cls(**config).save_pretrained(folder, **options)
    return cls


def everything(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def forward(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    narrow = {"hidden_states", "sample", "encoder_hidden_states", "pooled_projections"}
    inputs = {k: v.to(dtype) if k in narrow else v for k, v in NETWORKS[name][2].items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found: Tensor = module(**inputs, return_dict=False)[0]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [None, "20KB"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_bits_to_diffusers(name, shards, dtype, tmp_path):
    """Parameters, stored buffers and computed ones, their dtypes, and what the network makes."""
    cls = saved(name, tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert (len(weight_files(tmp_path)) > 3) == (shards is not None)
    expected = cls.from_pretrained(tmp_path, dtype=dtype, local_files_only=True)
    found = load(cls, tmp_path, dtype, CPU)
    own, stock = everything(found), everything(expected)
    assert own.keys() == stock.keys()
    for key, tensor in own.items():
        assert tensor.dtype == stock[key].dtype and torch.equal(tensor, stock[key]), key
        assert tensor.device == CPU and not tensor.requires_grad
    assert not found.training and found.config["in_channels"] == expected.config["in_channels"]
    result = forward(found, name, dtype)
    assert result.isfinite().all() and torch.equal(result, forward(expected, name, dtype))


def test_what_a_class_keeps_in_float32(tmp_path):
    cls = saved("wan", tmp_path)
    found = load(cls, tmp_path, torch.bfloat16, CPU)
    dtypes = {name: tensor.dtype for name, tensor in everything(found).items()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    for kept in ("scale_shift_table", "blocks.0.norm2.weight", "rope.freqs_cos"):
        assert dtypes[kept] == torch.float32
    assert any(n.startswith("condition_embedder.time_embedder.") for n in dtypes)
    for name, dtype in dtypes.items():
        assert (dtype == torch.float32) == (not {*name.split(".")}.isdisjoint(
            cls._keep_in_fp32_modules
        )), name  # fmt: skip


def test_stored_dtype_is_converted(tmp_path):
    """A bfloat16 file read as float32, as for training in full."""
    cls = saved("wan", tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(narrow, file)
    found = dict(load(cls, tmp_path, torch.float32, CPU).named_parameters())
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in narrow.items())


def test_built_without_weights(tmp_path):
    cls = saved("wan", tmp_path)
    module = build(cls, tmp_path)
    assert all(p.is_meta for p in module.parameters())
    assert not any(b.is_meta for b in module.buffers())
    assert not any(p.requires_grad for p in module.parameters())
    module.proj_out.requires_grad_(True)
    fill(module, tmp_path, torch.bfloat16, CPU)
    frozen, trained = module.blocks[0].attn1.to_q.weight, module.proj_out.weight
    assert not frozen.requires_grad and frozen.dtype == torch.bfloat16
    assert trained.requires_grad and trained.dtype == torch.float32, "trained weights are float32"
    # The hook that drops storage is gone again.
    assert not nn.Linear(2, 2).weight.is_meta


def test_parts_of_a_sharded_module(tmp_path):
    """Each process takes its part of DTensor parameters from the file, without communication."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cls = saved("wan", tmp_path, max_shard_size="20KB")
    whole = dict(load(cls, tmp_path, torch.bfloat16, CPU).named_parameters())
    # Rank 1 of 2 alone: a collective in `fill` would leave what the others never sent.
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        module = build(cls, tmp_path)
        mesh = init_device_mesh("cpu", (2,))
        for block in module.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        fill(module, tmp_path, torch.bfloat16, CPU)
        for name, parameter in module.named_parameters():
            assert isinstance(parameter, DTensor) and parameter.dtype == whole[name].dtype
            if parameter.placements == (Replicate(),):
                expected = whole[name]
            else:
                pieces = whole[name].chunk(2)
                expected = pieces[1] if len(pieces) > 1 else whole[name][:0]
            assert torch.equal(parameter.to_local(), expected), name
    finally:
        dist.destroy_process_group()


# ---- refusals ------------------------------------------------------------------------------------


def changed(folder: Path, change) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, file)


QUERY = "blocks.0.attn1.to_q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), f"diffusion_pytorch_model.safetensors: {QUERY} is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra has no place in the model"),
        (
            lambda t: t.update({QUERY: torch.zeros(3, 24)}),
            f"diffusion_pytorch_model.safetensors: {QUERY} has shape [3, 24], not [24, 24]",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message, tmp_path):
    """All are refused before one is loaded, with file, tensor and what to do."""
    cls = saved("wan", tmp_path)
    changed(tmp_path, change)
    module = build(cls, tmp_path)
    with pytest.raises(UserError) as caught:
        fill(module, tmp_path, torch.float32, CPU)
    text = str(caught.value)
    assert message in text and "WanTransformer3DModel" in text and "fetch both again" in text
    assert "\n" not in text and all(p.is_meta for p in module.parameters())


def test_many_that_do_not_fit_are_counted(tmp_path):
    cls = saved("wan", tmp_path)
    changed(tmp_path, lambda t: [t.pop(name) for name in list(t)[:10]])
    with pytest.raises(UserError, match="is missing; and 7 more"):
        load(cls, tmp_path, torch.float32, CPU)


def test_tensors_a_class_ignores(tmp_path):
    cls = saved("wan", tmp_path)
    changed(tmp_path, lambda t: t.update({"blocks.0.norm_added_q.weight": torch.zeros(2)}))
    load(cls, tmp_path, torch.float32, CPU)


def test_files_that_are_not_there_or_not_whole(tmp_path):
    cls = saved("wan", tmp_path / "cut")
    file = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read .*save it again"):
        load(cls, tmp_path / "cut", torch.float32, CPU)

    saved("wan", tmp_path / "shards", max_shard_size="20KB")
    gone = weight_files(tmp_path / "shards")[1]
    gone.unlink()
    with pytest.raises(UserError, match=rf"{gone.name} is missing \(1 of .*fetch RECIPE"):
        load(cls, tmp_path / "shards", torch.float32, CPU)

    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no diffusion_pytorch_model\.safetensors or"):
        weight_files(tmp_path / "empty")
    (tmp_path / "empty" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"only safetensors are loaded: convert it once"):
        weight_files(tmp_path / "empty")


@pytest.mark.parametrize("text", ['{"weight_map": {"a": "../a.safetensors"}}', "{", "[]"])
def test_index_that_is_none(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="not a file of its folder|is no index"):
        weight_files(tmp_path)


# ---- memory --------------------------------------------------------------------------------------

_MEASURE = """
import json, sys
from pathlib import Path
import torch, diffusers
from dancegrpo_fast.models import loading

def kib(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name + ":"))

cls, assign = diffusers.WanTransformer3DModel, loading.assign
cls.from_config(cls.load_config(sys.argv[2]))  # Imports, kernels and allocator are warm.
peak = 0

def counted(*arguments):
    global peak
    assign(*arguments)
    peak = max(peak, kib("RssAnon"))

loading.assign = counted
found = {}
for dtype in (torch.float32, torch.bfloat16):
    start = peak = kib("RssAnon")
    module = loading.load(cls, Path(sys.argv[1]), dtype, torch.device("cpu"))
    found[str(dtype)] = {"peak": (peak - start) * 1024, "left": (kib("RssAnon") - start) * 1024}
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts pages as Linux does")
def test_host_memory_stays_flat(tmp_path):
    """74 MB of float32: as they are they cost nothing beside the page cache, converted their size.

    Private pages are counted (the file's own are the kernel's to drop): after every tensor, in a
    process of its own. 4 MB are allowed for Python's objects, beside the largest tensor of 6 MB.
    """
    small = saved("wan", tmp_path / "small")
    config = WAN | dict(num_attention_heads=8, attention_head_dim=64, ffn_dim=1152, num_layers=5)
    with torch.random.fork_rng():
        model = small(**config)
        model.save_pretrained(tmp_path / "model", max_shard_size="20MB")
    numbers = [p.numel() for p in model.parameters()]
    assert sum(numbers) * 4 > 70e6
    spare = max(numbers) * 4 + 4e6
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, tmp_path / "model", tmp_path / "small"],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["torch.float32"]["peak"] < spare, found
    assert found["torch.bfloat16"]["peak"] < 2 * sum(numbers) + spare, found
    assert found["torch.bfloat16"]["left"] > 1.8 * sum(numbers), found  # The measure does see it.
