"""The fused step and losses against plain torch: time, bytes, share of a copy, memory.

    python benchmarks/kernels.py                   a few minutes on 2 cores
    python benchmarks/kernels.py --full --json benchmarks/results/kernels_cpu.json --plot k.png

Before anything is timed, every provider's loss and gradient are compared with float64, in this
process, on the tensors that are timed; a provider that fails ends the run and nothing is printed.
Bytes are a model, each tensor counted once per pass: a loss reads m, x and x' forward, the same
again backward, and writes one gradient. The share of a copy divides by a float32 `copy_` of 64 MiB
timed in the same rounds. Forward and backward are timed together, wrapper and autograd included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import formulas
import timing
import torch
from torch import Tensor

from dancegrpo_fast import ops
from dancegrpo_fast.ops.noise import NoiseKey, keys_table
from dancegrpo_fast.schedules import dance_schedule
from dancegrpo_fast.transitions import coefficient_table, transition

SIZES = {
    "1M": (16, 16, 64, 64),
    "FLUX 720x720": (16, 90, 90),
    "HunyuanVideo 480x640x53f": (16, 14, 60, 80),
    "Wan 480x832x81f": (16, 21, 60, 104),
    "HunyuanVideo 720x1280x129f": (16, 33, 90, 160),
    "64M": (16, 64, 256, 256),
}
COPY_ELEMENTS = 1 << 24
STEPS, STEP, ETA, CLIP = 16, 5, 0.3, 1e-4
BETA, ADVANTAGE_CLIP = 1.0, 5.0


@dataclass(frozen=True)
class Task:
    """One row group of the table: what is computed, on which tensors.

    Attributes:
        what: "policy loss", "NFT loss" (forward and backward) or "rollout step".
        size: A key of SIZES.
        states: Number of states.
        children: Of each state.
    """

    what: str
    size: str
    states: int = 1
    children: int = 1

    def title(self) -> str:
        """For the table."""
        return f"{self.what}, {self.states} x {self.size}, K = {self.children}"

    def bytes(self) -> int:
        """Of one call, m in bf16 and the rest in float32."""
        elements = self.states * torch.Size(SIZES[self.size]).numel()
        if self.what == "rollout step":
            return elements * (2 + 4 + 4 * self.children)
        inputs = 2 + 4 + 4 * self.children if self.what == "policy loss" else 2 + 4 + 4 + 2
        return elements * (2 * inputs + 2)


@dataclass(frozen=True)
class Inputs:
    """Tensors of one task; the `_rows` ones hold one row per child, as hosts lay them out."""

    m: Tensor
    x: Tensor
    y: Tensor
    table: Tensor
    offsets: Tensor | None
    advantages: Tensor
    old: Tensor
    keys: Tensor
    m_rows: Tensor
    x_rows: Tensor
    m_old: Tensor
    sigmas: Tensor
    schedule: Tensor  # on the CPU, as in the public code


def make_inputs(task: Task, device: str) -> Inputs:
    """Seeded inputs with log-ratios inside and outside the clip range."""
    generator = torch.Generator().manual_seed(0)
    dims = SIZES[task.size]

    def draw(count: int) -> Tensor:
        base = torch.randn(min(count, 4), *dims, generator=generator)
        return base.repeat(-(-count // len(base)), *[1] * len(dims))[:count].to(device)

    states, count = task.states, task.states * task.children
    grid = dance_schedule(STEPS, 3.0)
    rows = [transition(grid, STEP, STEP + 1, dynamics="dance", kind="sde", level=ETA)] * count
    table = coefficient_table(rows).to(device)
    m, x = draw(states).bfloat16(), draw(states)
    offsets = None
    if task.children > 1:
        offsets = torch.arange(0, count + 1, task.children, device=device)
    keys = keys_table([NoiseKey.from_seed(1).fold_in(i).draw() for i in range(count)]).to(device)
    y, log_prob = ops.sample_transition(m, x, table, keys=keys, child_offsets=offsets)
    spread = torch.linspace(-1.5 * CLIP, 1.5 * CLIP, count, device=device)
    return Inputs(
        m=m.requires_grad_(), x=x, y=y, table=table, offsets=offsets,
        advantages=torch.linspace(1.5, -0.5, count, device=device),
        old=log_prob - spread, keys=keys,
        m_rows=m.detach().repeat_interleave(task.children, 0).requires_grad_(),
        x_rows=x.repeat_interleave(task.children, 0) if task.children > 1 else x,
        m_old=(m.detach().float() + 0.05 * draw(states)).bfloat16(),
        sigmas=torch.full((states,), 0.6, device=device),
        schedule=torch.tensor([float(s) for s in grid.sigmas]),
    )  # fmt: skip


# ------------------------------------------------------------------ providers: name -> call


def differentiated(loss: Callable[..., Tensor], m: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(loss, its gradient with respect to m)."""
    value = loss(m, *rest)
    return value, torch.autograd.grad(value, m)[0]


def policy_providers(task: Task, given: Inputs, ours: list[str]) -> dict[str, Callable[[], Any]]:
    """Each returns (loss, gradient of m or of its rows)."""
    i = given

    def rows(loss: Callable[..., Tensor], *more: object) -> Callable[[], Any]:
        return partial(differentiated, loss, i.m_rows, i.x_rows, i.y, *more)

    def fused(implementation: str) -> tuple[Tensor, Tensor]:
        value = ops.policy_loss(
            i.m, i.x, i.y, i.table, i.advantages, old_log_prob=i.old, child_offsets=i.offsets,
            clip_range=CLIP, implementation=implementation,
        ).loss  # fmt: skip
        return value, torch.autograd.grad(value, i.m)[0]

    clean = (i.table, i.advantages, i.old, CLIP)
    public = (i.advantages, i.old, CLIP, i.schedule, STEP, ETA)
    compiled = torch.compile(formulas.clean_loss, dynamic=False)
    calls = {
        "public, eager": rows(formulas.public_loss, *public),
        "clean, eager": rows(formulas.clean_loss, *clean),
        "clean, compiled": rows(compiled, *clean),
    }
    if task.children > 1:
        wide = torch.compile(formulas.clean_loss_broadcast, dynamic=False)
        y = i.y.view(task.states, task.children, *i.y.shape[1:])
        calls["clean broadcast, compiled"] = partial(differentiated, wide, i.m, i.x, y, *clean)
    return calls | {name: partial(fused, name) for name in ours}


def nft_providers(task: Task, given: Inputs, ours: list[str]) -> dict[str, Callable[[], Any]]:
    """Each returns (loss, gradient of m)."""
    i = given
    plain = (i.x, i.y, i.m_old, i.sigmas, i.advantages, BETA, ADVANTAGE_CLIP)

    def formula(loss: Callable[..., Tensor]) -> Callable[[], Any]:
        return partial(differentiated, loss, i.m, *plain)

    def fused(implementation: str) -> tuple[Tensor, Tensor]:
        value = ops.nft_loss(
            i.m, i.x, i.y, i.sigmas, i.advantages, old_output=i.m_old, beta=BETA,
            advantage_clip=ADVANTAGE_CLIP, kl_weight=0.0, implementation=implementation,
        ).loss  # fmt: skip
        return value, torch.autograd.grad(value, i.m)[0]

    calls = {
        "public, eager": formula(formulas.public_nft_loss),
        "clean, eager": formula(formulas.clean_nft_loss),
        "clean, compiled": formula(torch.compile(formulas.clean_nft_loss, dynamic=False)),
    }
    return calls | {name: partial(fused, name) for name in ours}


def step_providers(task: Task, given: Inputs, ours: list[str]) -> dict[str, Callable[[], Any]]:
    """Each returns (x', log-prob); theirs draw with torch's generator."""
    i = given

    def clean(step: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: step(i.m_rows.detach(), i.x_rows, i.table, torch.randn_like(i.y))

    def public() -> Any:
        m = i.m_rows.detach()
        return formulas.public_log_prob(m, i.x_rows, None, i.schedule, STEP, ETA)

    def fused(implementation: str) -> Any:
        return ops.sample_transition(
            i.m, i.x, i.table, keys=i.keys, child_offsets=i.offsets, implementation=implementation
        )

    calls: dict[str, Callable[[], Any]] = {
        "public, eager": public,
        "clean, eager": clean(formulas.clean_step),
        "clean, compiled": clean(torch.compile(formulas.clean_step, dynamic=False)),
    }
    return calls | {name: partial(fused, name) for name in ours}


PROVIDERS = {
    "policy loss": policy_providers, "NFT loss": nft_providers, "rollout step": step_providers
}  # fmt: skip


# ------------------------------------------------------------------ the gate


def check(task: Task, given: Inputs, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The largest error of each provider, relative to the largest value.

    Raises:
        SystemExit: One is wrong: nothing of this task may be timed.
    """
    if task.what == "rollout step":
        return check_step(task, given, calls)
    if task.what == "NFT loss":
        m = given.m.detach().double().requires_grad_()
        doubles = [t.double() for t in (given.x, given.y, given.m_old, given.sigmas)]
        wanted = formulas.clean_nft_loss(
            m, *doubles, given.advantages.double(), BETA, ADVANTAGE_CLIP
        )
    else:
        m = given.m_rows.detach().double().requires_grad_()
        doubles = [t.double() for t in (given.x_rows, given.y, given.table)]
        wanted = formulas.clean_loss(m, *doubles, given.advantages.double(), given.old, CLIP)
    (gradient,) = torch.autograd.grad(wanted, m)
    shared = gradient.view(task.states, task.children, *gradient.shape[1:]).sum(1)
    errors = {}
    for name, call in calls.items():
        loss, ours = call()
        exact = gradient if ours.shape[0] == gradient.shape[0] else shared
        # bf16 gradients are within 2^-9 of themselves; the public formula rounds twice more in
        # bf16 inside, and its float32 density cancels: 2^-6.
        limit = 2**-6 if name.startswith("public") else 2**-8
        error = float((ours.double() - exact).abs().max() / exact.abs().max())
        off = abs(float(loss.detach()) - float(wanted.detach()))
        if not (error <= limit and off <= 1e-4):
            found = f"gradient {error:.1e}, loss {off:.1e}"
            raise SystemExit(f"{task.title()}: {name} is wrong: {found}")
        errors[name] = error
    return errors


def check_step(task: Task, given: Inputs, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Ours give the reference's latents bit for bit; theirs are random: mean and spread only."""
    exact = ops.sample_transition(
        given.m, given.x, given.table, keys=given.keys, child_offsets=given.offsets,
        implementation="reference",
    )  # fmt: skip
    errors = {}
    for name, call in calls.items():
        latents, log_prob = call()
        error = float((log_prob - exact.log_prob).abs().max())
        fused = name in ("native", "triton")
        if fused and not torch.equal(latents, exact.next_latents):
            raise SystemExit(f"{task.title()}: {name} draws other latents than the reference")
        if not error <= (1e-5 if fused else 0.05):
            raise SystemExit(f"{task.title()}: {name} is wrong: log-prob off by {error:.1e}")
        errors[name] = error
    return errors


# ------------------------------------------------------------------ measuring


def measure(task: Task, args: Any) -> dict[str, Any]:
    """Checks, then times all providers of one task and a copy, interleaved."""
    torch._dynamo.reset()
    device = args.device
    given = make_inputs(task, device)
    ours = ops.selected("auto", given.m)
    calls = PROVIDERS[task.what](task, given, [] if ours == "reference" else [ours])
    errors = check(task, given, calls)
    copy, copy_bytes = timing.copy_call(COPY_ELEMENTS, device)
    settings = [1, torch.get_num_threads()] if device == "cpu" and task.size == "1M" else [None]
    cases: dict[tuple[str, str], timing.Case] = {}
    for threads in dict.fromkeys(settings):
        label = "wall" if threads is None else f"wall, {threads} threads"
        for name, call in {**calls, "copy": copy}.items():
            cases[name, label] = timing.Case(call, device=device, threads=threads)
    if device != "cpu":
        for name, call in {**calls, "copy": copy}.items():
            cases[name, "graph"] = timing.graph_case(call)
    keyed = {f"{name} | {label}": case for (name, label), case in cases.items()}
    times = timing.interleaved(keyed, rounds=args.rounds, sample_seconds=0.02)
    rows = []
    for name, label in cases:
        got = times[f"{name} | {label}"]
        copied = copy_bytes / times[f"copy | {label}"].median
        moved = copy_bytes if name == "copy" else task.bytes()
        rows.append(
            {
                "provider": name, "timing": label, "seconds": got.record(), "bytes": moved,
                "share_of_copy": moved / got.median / copied, "error": errors.get(name),
                "bandwidth": moved / got.median,
            }
        )  # fmt: skip
        if name != "copy" and device != "cpu":
            rows[-1]["peak_bytes"] = peak_memory(calls[name])
    return {"task": task.title(), "what": task.what, "children": task.children, "rows": rows}


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes above what was allocated before the call (CUDA)."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def overhead(rounds: int) -> list[dict[str, Any]]:
    """What the wrappers cost on tensors so small that nothing else does (CPU, native)."""
    from overhead import cases  # 4 x 64 elements

    times = timing.interleaved(
        {name: timing.Case(call, threads=1) for name, call in cases().items()},
        rounds=rounds, sample_seconds=0.02,
    )  # fmt: skip
    return [{"call": name, "seconds": got.record()} for name, got in times.items()]


def tasks(full: bool, device: str) -> list[Task]:
    """What is measured; the first are the sizes that the bounds are stated for."""
    fixed = [
        Task("policy loss", "1M", 4),
        Task("policy loss", "1M", 4, 8),
        Task("NFT loss", "1M", 4),
        Task("rollout step", "1M", 4),
        Task("rollout step", "1M", 4, 8),
    ]
    real = [size for size in SIZES if size != "1M"]
    if not full:
        real = real[:1]
    return fixed + [Task(w, size) for size in real for w in ("policy loss", "rollout step")]


def main() -> None:
    parser = timing.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="samples of each case")
    parser.add_argument("--only", help="tasks whose title contains this")
    parser.add_argument("--plot", type=Path, help="write the shares of a copy as a picture")
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": timing.environment(args.device), "tasks": []}
    print(timing.headline(result["environment"]))
    for task in tasks(args.full, args.device):
        if args.only and args.only not in task.title():
            continue
        result["tasks"].append(measured := measure(task, args))
        print(f"\n{measured['task']}: {task.bytes() / 1e6:.0f} MB")
        print_task(measured)
        sys.stdout.flush()
        timing.write_json(args.json, result)  # Now: on a GPU the time may end before the tasks.
    if args.device == "cpu" and not args.only:
        result["overhead"] = overhead(args.rounds)
        print("\nCost of a call, 4 x 64 elements, 1 thread")
        timing.print_table(
            ("call", "microseconds [20%, 80%]"),
            [
                (r["call"], "{:.2f} [{:.2f}, {:.2f}]".format(
                    *(1e6 * r["seconds"][k] for k in ("median", "q20", "q80"))))
                for r in result["overhead"]
            ],
        )  # fmt: skip
    timing.write_json(args.json, result)
    if args.plot:
        from plot_kernels import plot

        plot(result, args.plot)


def print_task(measured: dict[str, Any]) -> None:
    """The table of one task."""
    timing.print_table(
        ("provider", "timing", "ms [20%, 80%]", "GB/s", "of copy", "max error"),
        [
            (
                row["provider"], row["timing"],
                "{:.3g} [{:.3g}, {:.3g}]".format(
                    *(1e3 * row["seconds"][k] for k in ("median", "q20", "q80"))),
                f"{row['bandwidth'] / 1e9:.1f}", f"{row['share_of_copy']:.2f}",
                "" if row["error"] is None else f"{row['error']:.0e}",
            )
            for row in measured["rows"]
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
