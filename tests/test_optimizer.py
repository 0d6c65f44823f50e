"""The fused optimizer: as near to exact arithmetic as the others, the same in slices, resumable."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from launching import launch
from tiny_models import CPU, tiny_config

from dancegrpo_fast.config import OptimizerConfig
from dancegrpo_fast.parallel.engine import adamw
from dancegrpo_fast.parallel.world import leave
from dancegrpo_fast.trainer import Trainer

SETTINGS = OptimizerConfig(learning_rate=1e-2, weight_decay=1e-2)
SHAPES = ((5, 3), (1, 7), (4,), ())  # On two processes: uneven, one slice empty, even.
STEPS = 20


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    module, generator = torch.nn.Module(), torch.Generator().manual_seed(0)
    for i, shape in enumerate(SHAPES):
        value = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        module.register_parameter(f"p{i}", torch.nn.Parameter(value))
    module.register_parameter("frozen", torch.nn.Parameter(torch.ones(2), requires_grad=False))
    return module


def gradient(step: int, position: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + position)
    return torch.randn(SHAPES[position], generator=generator)


def stepped(fused: bool, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    module = network(dtype)
    optimizer = adamw(module, SETTINGS, fused=fused)
    for step in range(STEPS):
        for i in range(len(SHAPES)):
            module.get_parameter(f"p{i}").grad = gradient(step, i).to(dtype)
        optimizer.step()
    assert torch.equal(module.frozen, torch.ones(2))
    return [module.get_parameter(f"p{i}").detach() for i in range(len(SHAPES))]


def test_it_is_as_near_to_exact_arithmetic_as_the_plain_one():
    """Float64 is exact here. 20 steps of 0.01, each rounded by some units of 2^-24."""
    exact = stepped(fused=False, dtype=torch.float64)
    worst = {
        fused: max(
            float((found.double() - right).abs().max())
            for found, right in zip(stepped(fused), exact, strict=True)
        )
        for fused in (True, False)
    }
    assert worst[True] <= 1e-5
    assert worst[True] <= 2 * worst[False] + 2**-22


def test_the_engine_steps_with_it_and_zero_does_not(tmp_path, tiny_wan_folder):
    trainer = Trainer(tiny_config(tmp_path, tiny_wan_folder), CPU)
    (optimizer,) = trainer.engine.optimizers.values()
    assert optimizer.defaults["fused"]
    assert not adamw(network(), SETTINGS).defaults["fused"]


def test_a_resumed_run_has_the_same_bits(tmp_path, tiny_wan_folder):
    """Its step counter is a tensor of the state: the bias correction must go on from there."""

    def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in trainer.policy.trainable().items()}

    config = tiny_config(tmp_path, tiny_wan_folder)
    trainer = Trainer(config, CPU)
    trainer.iteration()
    trainer.save()
    trainer.saver.finish()
    trainer.iteration()
    again = Trainer(config, CPU)
    assert again.resume()
    again.iteration()
    right, found = weights(trainer), weights(again)
    assert all(torch.equal(right[name], found[name]) for name in right)
    (optimizer,) = again.engine.optimizers.values()
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def in_slices(folder: Path) -> None:
    """One of two processes: the same steps on FSDP2's slices."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2,))
    module = network()
    scalar = module.get_parameter("p3")  # FSDP2 has no slices of a number: it stays whole.
    fully_shard(module, mesh=mesh, ignored_params={scalar})
    optimizer = adamw(module, SETTINGS, fused=True)
    for step in range(STEPS):
        for i in range(len(SHAPES)):
            parameter = module.get_parameter(f"p{i}")
            whole = gradient(step, i)
            if parameter is scalar:
                parameter.grad = whole
            else:
                parameter.grad = dist.tensor.distribute_tensor(whole, mesh, parameter.placements)
        optimizer.step()
    found = [module.get_parameter(f"p{i}") for i in range(3)]
    whole = [p.full_tensor().detach() for p in found] + [scalar.detach()]
    if dist.get_rank() == 0:
        torch.save(whole, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_slices_of_two_processes_are_stepped_as_the_whole(tmp_path):
    """Uneven and empty ones too: each number is stepped by itself.

    A vector instruction may round otherwise than the rest of a row: one unit of float32 a step.
    """
    assert launch(Path(__file__), tmp_path).returncode == 0
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for whole, right in zip(found, stepped(fused=True), strict=True):
        torch.testing.assert_close(whole, right, rtol=STEPS * 2**-23, atol=STEPS * 2**-24)


if __name__ == "__main__":
    in_slices(Path(sys.argv[1]))
    leave(0)
