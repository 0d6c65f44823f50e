"""Split networks against whole ones, as one process of `torchrun`.

    torchrun --nproc-per-node 2 tests/parallel/split_worker.py two OUT

runs one table of cases and writes OUT/found.pt: what each case measured.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from split_networks import Built, flux, hunyuan, noise, qwen, sd3, seeded, skyreels, wan
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

LIMIT = timedelta(seconds=60)  # A collective that another process never joins fails after this.
OURS, THEIRS = "replicated_text", "ulysses"


@dataclass(frozen=True)
class Case:
    """A network, how it is split, and what else is on."""

    build: Callable[[], Built]
    kind: str
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    lora: list[str] | None = None
    masked: bool = True
    shard: bool = False
    compiled: bool = False


QKV = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT = [*QKV, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
TWO = {
    "flux": Case(flux, THEIRS),
    "flux checkpointed": Case(flux, THEIRS, checkpointing=True),
    "flux lora checkpointed": Case(flux, THEIRS, lora=JOINT, checkpointing=True),
    "wan": Case(wan, THEIRS),
    "wan checkpointed": Case(wan, THEIRS, checkpointing=True),
    "qwen": Case(qwen, THEIRS),
    "qwen mixed masks": Case(partial(qwen, (5, 8)), THEIRS, checkpointing=True),
    "hunyuan padded": Case(hunyuan, OURS),
    "hunyuan mixed masks": Case(partial(hunyuan, (7, 2)), OURS, checkpointing=True),
    "hunyuan trimmed": Case(partial(hunyuan, (7, 7)), OURS, masked=False),
    "hunyuan image": Case(partial(hunyuan, (3,), size=(1, 6, 6)), OURS),
    "hunyuan lora": Case(hunyuan, OURS, lora=JOINT),
    "hunyuan lora checkpointed": Case(hunyuan, OURS, lora=JOINT, checkpointing=True),
    "skyreels": Case(skyreels, OURS),
    "skyreels checkpointed": Case(skyreels, OURS, checkpointing=True),
    "sd3": Case(sd3, OURS),
    "sd3 checkpointed": Case(sd3, OURS, checkpointing=True),
    "sd3 one sample": Case(partial(sd3, 1, size=(8, 8)), OURS),
}
DOUBLE = {"flux": flux, "wan": wan, "qwen": partial(qwen, (5, 8)), "hunyuan": hunyuan, "sd3": sd3}
TWO |= {
    f"{name} float64": Case(build, OURS if name in ("hunyuan", "sd3") else THEIRS, torch.double)
    for name, build in DOUBLE.items()
}
FOUR = {
    "hunyuan": Case(partial(hunyuan, (7, 2)), OURS, checkpointing=True),
    "sd3": Case(sd3, OURS),
    "flux sharded": Case(flux, THEIRS, shard=True),
    "flux sharded lora": Case(flux, THEIRS, shard=True, lora=JOINT, checkpointing=True),
    "hunyuan sharded": Case(partial(hunyuan, (5, 7)), OURS, shard=True, checkpointing=True),
    "hunyuan sharded lora": Case(partial(hunyuan, (5, 7)), OURS, shard=True, lora=JOINT),
}
COMPILED = {
    "hunyuan": Case(hunyuan, OURS, compiled=True),
    "sd3 checkpointed": Case(sd3, OURS, checkpointing=True, compiled=True),
}
TABLES = {"two": TWO, "four": FOUR, "compiled": COMPILED}


def a_loss(output: Tensor) -> Tensor:
    """Linear, with a weight of its own for each element: no gradient cancels by symmetry."""
    return (output * noise(*output.shape, seed=7).to(output.dtype)).sum()


def gradients(network: nn.Module) -> dict[str, Tensor | None]:
    """Of every trainable parameter, whole; by the name it has without checkpoint wrappers."""
    found = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            if hasattr(gradient, "full_tensor"):
                gradient = gradient.full_tensor()
            found[name] = None if gradient is None else gradient.detach().clone()
    return found


def summed(found: dict[str, Tensor | None], group: Any) -> dict[str, Tensor | None]:
    """Over the ranks of a group; a parameter without gradient must have none on any of them."""
    for gradient in found.values():
        if gradient is not None:
            dist.all_reduce(gradient, group=group)
    return found


def errors(
    found: dict[str, Tensor | None], whole: dict[str, Tensor | None]
) -> dict[str, float]:
    """|g - ref| / max(|ref|, median of the tensors' norms / 1000) of every parameter."""
    norms = [g.double().norm() for g in whole.values() if g is not None]
    floor = 1e-3 * torch.stack(norms).median()
    result = {}
    for name, reference in whole.items():
        ours = found[name]
        if reference is None:
            reference = torch.zeros(()) if ours is None else torch.zeros_like(ours)
        ours = torch.zeros_like(reference) if ours is None else ours
        difference = (ours.double() - reference.double()).norm()
        result[name] = float(difference / torch.maximum(reference.double().norm(), floor))
    return result


def whole_and_split(case: Case, mesh: DeviceMesh) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """The stock network, the split one (sharded where the case says so), and the inputs."""
    from dancegrpo_fast.parallel.attention import set_attention
    from dancegrpo_fast.parallel.sequence import split_sequence

    whole, inputs = seeded(case.build, case.dtype, case.lora)
    network = copy.deepcopy(whole)
    if case.checkpointing:
        network.enable_gradient_checkpointing()
    set_attention(network, "default", masked=case.masked)
    split_sequence(network, case.kind, mesh)
    if case.compiled:
        for block in blocks(network):
            block.compile(backend="aot_eager", fullgraph=True)
    if case.shard:
        shard(network, mesh["dp", "ulysses"]._flatten("fsdp"))
    return whole, network, inputs


def blocks(network: nn.Module) -> list[nn.Module]:
    lists = ("transformer_blocks", "single_transformer_blocks", "blocks")
    return [block for name in lists for block in getattr(network, name, [])]


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 of blocks and root, its reductions sums."""
    from torch.distributed.fsdp import fully_shard

    for part in (*blocks(network), network):
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def run_case(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Errors of the output and of every parameter's gradient."""
    whole, network, inputs = whole_and_split(case, mesh)
    reference = whole(**inputs, return_dict=False)[0]
    a_loss(reference).backward()
    rows = slice(None)
    if case.shard:  # One sample to each data-parallel rank; the loss is the sum over samples.
        at = mesh["dp"].get_local_rank()
        rows = slice(at, at + 1)
        shared = ("img_ids", "txt_ids")
        inputs = {k: v if k in shared else v[rows] for k, v in inputs.items()}
    with torch.no_grad():
        drawn = network(**inputs, return_dict=False)[0]
    output = network(**inputs, return_dict=False)[0]
    assert output.shape == reference[rows].shape
    weights = noise(*reference.shape, seed=7).to(output.dtype)[rows]
    (output * weights).sum().backward()
    expected, found = gradients(whole), gradients(network)
    own = errors(found, expected)
    if not case.shard:
        found = summed(found, mesh["ulysses"].get_group())
    difference = (output - reference[rows]).detach().norm()
    return {
        "forward": float(difference / reference[rows].detach().norm()),
        "same in rollout": torch.equal(drawn, output),
        "gradients": errors(found, expected),
        "own part": max(own.values()),
    }


def planted(case: Case, mesh: DeviceMesh, backward: Callable[..., Any]) -> dict[str, Any]:
    """The case with another backward of the text gather."""
    from dancegrpo_fast.parallel.joint_attention import GatherHeads

    with mock.patch.object(GatherHeads, "backward", staticmethod(backward)):
        return run_case(case, mesh)


def own_slice(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    """The defect of public code: what the other ranks know of the text is dropped."""
    return gradient.chunk(ctx.mesh.size(), 2)[ctx.mesh.get_local_rank()].contiguous(), None




def _true_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    total = gradient.clone()
    dist.all_reduce(total, group=ctx.mesh.get_group())
    return own_slice(ctx, total)


def sizes_between(
    build: Callable[..., Built], other: Callable[..., Built], mesh: DeviceMesh
) -> dict[str, float]:
    """Gradients where a forward of another size stands between a checkpointed forward and its
    backward: blocks computed again must use their own size."""
    case = Case(build, OURS, checkpointing=True)
    whole, network, inputs = whole_and_split(case, mesh)
    a_loss(whole(**inputs, return_dict=False)[0]).backward()
    first = network(**inputs, return_dict=False)[0]
    network(**other()[1], return_dict=False)
    a_loss(first).backward()
    return errors(summed(gradients(network), mesh["ulysses"].get_group()), gradients(whole))


def typical(found: dict[str, float]) -> float:
    return float(torch.tensor(list(found.values())).median())


def narrow(build: Callable[[], Built], kind: str, mesh: DeviceMesh) -> dict[str, float]:
    """float32 weights under bfloat16 autocast, whole and split, against float32."""
    whole, network, inputs = whole_and_split(Case(build, kind), mesh)
    exact = whole(**inputs, return_dict=False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        reference = whole(**inputs, return_dict=False)[0].float()
        output = network(**inputs, return_dict=False)[0].float()
    a_loss(reference).backward()
    a_loss(output).backward()
    found = summed(gradients(network), mesh["ulysses"].get_group())
    rounded = gradients(whole)
    whole.zero_grad()
    a_loss(exact).backward()
    return {
        "whole": float((reference - exact).detach().norm() / exact.detach().norm()),
        "split": float((output - exact).detach().norm() / exact.detach().norm()),
        "whole gradients": typical(errors(rounded, gradients(whole))),
        "split gradients": typical(errors(found, gradients(whole))),
    }


class Counting(TorchDispatchMode):
    """Counts collectives by kind, whichever of PyTorch's two interfaces issues them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].replace("_", "")
        for kind in ("alltoall", "allgather", "allreduce", "reducescatter", "broadcast"):
            if func.namespace in ("c10d", "_c10d_functional") and name.startswith(kind):
                self.found[kind] = self.found.get(kind, 0) + 1
        return func(*args, **(kwargs or {}))


def collectives(name: str, mesh: DeviceMesh) -> dict[str, int]:
    """Collectives of one forward without gradients."""
    _, network, inputs = whole_and_split(TWO[name], mesh)
    with torch.no_grad(), Counting() as counting:
        network(**inputs, return_dict=False)
    return counting.found


def refused_copy(mesh: DeviceMesh) -> str:
    """What copying a network says that diffusers has split."""
    network = whole_and_split(TWO["flux"], mesh)[1]
    try:
        copy.deepcopy(network)
    except RuntimeError as error:
        return str(error)
    return "copied"


def a_copy(case: Case, mesh: DeviceMesh) -> float:
    """A copy of a split network is split, and lives without the original."""
    whole, network, inputs = whole_and_split(case, mesh)
    twin = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        difference = twin(**inputs, return_dict=False)[0] - whole(**inputs, return_dict=False)[0]
    return float(difference.abs().max())


def beside_the_cases(mesh: DeviceMesh) -> dict[str, Any]:
    """What two processes measure beside the cases."""
    other = partial(hunyuan, size=(1, 4, 14))  # 14 tokens: a rank's share is 7
    images = partial(sd3, size=(4, 14)), partial(sd3, size=(6, 10))  # 14 and 15 tokens
    return {
        "own slice": planted(TWO["hunyuan padded"], mesh, own_slice),
        "own slice sd3": planted(TWO["sd3"], mesh, own_slice),
        "sum written out": planted(TWO["hunyuan padded"], mesh, _true_backward),
        "sizes hunyuan": sizes_between(hunyuan, other, mesh),
        "sizes sd3": sizes_between(*images, mesh),
        "narrow": {
            "flux": narrow(flux, THEIRS, mesh),
            "wan": narrow(wan, THEIRS, mesh),
            "qwen": narrow(partial(qwen, (5, 8)), THEIRS, mesh),
            "hunyuan": narrow(hunyuan, OURS, mesh),
            "sd3": narrow(sd3, OURS, mesh),
        },
        "collectives": {n: collectives(n, mesh) for n in ("flux", "hunyuan padded", "sd3")},
        "refused copy": refused_copy(mesh),
        "copies": {name: a_copy(TWO[name], mesh) for name in ("hunyuan padded", "sd3")},
    }


def main(table: str, out: Path) -> None:
    """Run every case of a table; rank 0 writes what was found."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=LIMIT)
    size = dist.get_world_size()
    names = ("dp", "ring", "ulysses")
    one_group = init_device_mesh("cpu", (1, 1, size), mesh_dim_names=names)
    meshes = {False: one_group}
    if table == "four":
        meshes[True] = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=names)
    found: dict[str, Any] = {
        name: run_case(case, meshes[case.shard]) for name, case in TABLES[table].items()
    }
    if table == "two":
        found |= beside_the_cases(one_group)
    if dist.get_rank() == 0:
        torch.save(found, out / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    from dancegrpo_fast.parallel.world import leave

    main(sys.argv[1], Path(sys.argv[2]))
    leave(0)
