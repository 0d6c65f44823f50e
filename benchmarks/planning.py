"""Writes docs/planning.md: what large runs need and which mesh to choose. All of it is projected.

    python benchmarks/planning.py [--json PATH] [--out PATH]

Configurations of published models stand in benchmarks/sizes, without weights; nothing is loaded
and no GPU is asked. The runs are those of recipes/, with one prompt a GPU unless said otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from timing import write_json

from dancegrpo_fast.config import RunConfig, load_config
from dancegrpo_fast.models import open_family
from dancegrpo_fast.planner import Estimate, Hardware, Planner, plan_values
from dancegrpo_fast.planner.network import Networks

ROOT = Path(__file__).parents[1]
GPUS = (8, 64, 512)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "HunyuanVideo, 53 frames, 480 x 480": ("hunyuan_t2v", {"path": "hunyuan_video"}),
    # Of 30 MB a latent: one prompt's trajectories fill a GPU, so eight GPUs share one.
    "HunyuanVideo, 129 frames, 720 x 1280, a prompt for 8 GPUs": (
        "hunyuan_t2v", {"path": "hunyuan_video", "frames": 129, "height": 720, "width": 1280},
    ),
    "FLUX.1-dev, 720 x 720": ("flux_hps", {"path": "flux_dev"}),
    "Wan2.1-14B, 81 frames, 480 x 832": (
        "wan21_t2v", {"path": "wan21_14b", "frames": 81, "height": 480, "width": 832},
    ),
}  # fmt: skip


HEAD = """# Planning a large run

Written by `python benchmarks/planning.py`; for your recipe: `dancegrpo-fast plan RECIPE --gpus N`.

**All numbers here are projected; nothing was run on GPUs.** Products and memory come from running
the real classes on tensors without storage (compared with measurements of small models on the CPU
in `tests/test_planner.py`), bytes on the wire from formulas that give the counts of
`benchmarks/traffic.py`. Times assume {assumed}; transfers are added to products, none overlapped;
embedding, scoring and saving are not in them. Under sequence parallelism memory and products are
scaled from one process by linearity, and its exchanges come from a formula that no count confirms.

The runs are those of `recipes/`, with one prompt a GPU and iteration unless said otherwise, on GPUs
of 80 GB, 8 a machine, of which 10% are left for the driver, NCCL and fragmentation. Text is taken
at its longest. FSDP everywhere; a mesh is copies of the weights x shards x sequence parallelism.
For a recipe of its own `plan` compares the settings of the recipe's engine (`ddp`: checkpointing;
`deepspeed`: zero_stage, too), and FSDP's only if nothing of that fits; it prints which.

## What is verified, and what is not

- products of an iteration: torch's counter around real ones (full, LoRA, guided, recomputed, a
  window with best-of-n, a pool that is drawn again): equal within 2%;
- products of a forward: the same for seven families, with embedded prompts: within 2% where a
  family pads its text, and not below where it trims it;
- memory of rollout and training: the CPU allocator's events around a real iteration of a Wan of 9.0
  million parameters, 46 to 284 MB, in six settings: 0.967 to 0.995 of what is measured;
- memory of a pool of 24 samples that is kept, or drawn again, with and without `loss.ratio_norm`:
  the same, 4 to 8 MB: 0.95 to 1.061;
- memory of a float32 network's rollout in `rollout.pool_dtype`, autocast's and float8's copies of
  the weights among it: the same, 125 and 128 MB: 0.999 to 1.002;
- activations of the VAE's decoder with what the CPU's convolutions need while they run, of six
  families in batches of 1 and 3: 1.000 to 1.020 of the allocator's peak (cuDNN's workspaces: not
  counted);
- bytes and collectives of FSDP2: counted on 4 gloo processes in three settings: equal.

Not compared with anything: memory on a GPU (CUDA's autocast is imitated, and its attention taken to
keep what flash attention keeps); memory of FSDP2, DDP and DeepSpeed on several processes; traffic
of DeepSpeed and of sequence parallelism; every time. Not counted: activations of encoders and
rewards, evaluation, workspaces of kernels.

## Large pools

`advantage.best_of_n` draws many samples of a prompt and trains few. With `rollout.redraw: true`
nothing of the many is kept but their rewards: a sample's latents go when it is decoded, and the
chosen ones are drawn again from their noise, up to the last trained step. `rollout.chunk: 16` lets
a process draw, decode and score 16 samples at a time. HunyuanVideo, 53 frames, 8 prompts of 256
samples on 8 GPUs (1 x 8 x 1, selective, one update), 16 of each trained; projected, GB and PFLOP of
a GPU:

| | trajectories in training | rollout | decode | train | PFLOP of the rollout |
|---|---|---|---|---|---|
| kept | 13.2 | 64.1 | 40.0 | 77.5: does not fit | 1139.6 |
| `redraw` | 0.8 | 52.5 | 27.7 | 65.1 | 1206.4 |
| `redraw`, `chunk: 16` | 0.8 | 51.7 | 26.9 | 65.1 | 1210.9 |

- What it costs: the chosen samples' forwards once more (less where only a window is trained), what
  a part shares with the part before (roots, trunks, branch points: take parts that hold whole
  subtrees), and with FSDP one gathering of the weights for each part and one for the second draw.
  All are counted here.
- The samples are the same bit for bit where the network's bits do not depend on what else is in its
  batch (tested on a CPU in batches of one). Elsewhere they agree up to its rounding: the reward is
  the first draw's, log-probs and training are the second's, and the ratio gate measures these.
  Nothing compares the two draws in a run.
- A process trains what it drew. Which samples are chosen is not known ahead: the planner draws
  scores at random, and a process may get more.
"""
# Runs that DanceGRPO's scripts make; the other recipes follow other code.
PUBLIC_RUNS = ("HunyuanVideo, 53 frames, 480 x 480", "FLUX.1-dev, 720 x 720")
PUBLIC_HEAD = """## Against the public call pattern (projected)

What one GPU receives in an iteration and in how many collectives, as DanceGRPO's code runs it
(`fastvideo/train_grpo_flux.py`, `train_grpo_hunyuan.py`, `--fsdp_sharding_startegy full`) and as we
do on the meshes below. The formulas are those that `tests/test_traffic.py` compares with counts of
both patterns on 4 processes, to the byte and the collective. The public pattern: weights sharded
over all GPUs and gathered in every forward and backward, gradients reduced in every backward, one
sample a call, no state shared, blocks recomputed.

Times assume {assumed},
for both ways, nothing overlapped: what larger calls, faster attention or compiled blocks gain is
not in them, nor what overlapping hides. What spans several machines is taken to move at the speed
between them.
"""
PUBLIC_COLUMNS = (
    "run", "GPUs", "", "collectives", "GB received (inside + between)", "PFLOP a GPU",
    "s (products + transfers)", "",
)  # fmt: skip
COLUMNS = (
    "GPUs", "mesh", "activations", "gradients reduced", "weights gathered in rollout", "peak",
    "PFLOP a GPU", "GB received (inside + between)", "s (products + transfers)",
)  # fmt: skip


def recipe(name: str, model: dict[str, Any], gpus: int) -> RunConfig:
    """A recipe on the sizes of a published model, one prompt a GPU, or eight GPUs a prompt."""
    settings = model | {"path": str(ROOT / "benchmarks" / "sizes" / model["path"])}
    overrides = [f"model.{key}={value}" for key, value in settings.items()]
    prompts = gpus // 8 if model.get("frames") == 129 else gpus
    overrides += [f"data.prompts_per_iteration={prompts}", "parallel.engine=fsdp"]
    return load_config(ROOT / "recipes" / f"{name}.yaml", overrides)


def row(estimate: Estimate, hardware: Hardware) -> str:
    """One line of the table."""
    parallel, memory = estimate.config.parallel, estimate.memory
    moved = estimate.received.values()
    transfers = sum(v for k, v in estimate.seconds.items() if k.endswith("transfers"))
    cells = [
        str(hardware.gpus),
        f"{parallel.dp_replicate} x {parallel.dp_shard} x {parallel.sp}",
        {"none": "kept", "full": "recomputed", "selective": "selective"}[parallel.checkpointing],
        "once an update" if parallel.defer_reduction else "every micro-batch",
        "once" if parallel.gather_rollout else "every forward",
        f"{memory.peak}, {memory.total(memory.peak) / 1e9:.0f} GB",
        f"{sum(estimate.flops.values()) / 1e15:.1f}",
        f"{sum(m.inside for m in moved) / 1e9:.0f} + {sum(m.between for m in moved) / 1e9:.0f}",
        f"{estimate.total - transfers:.0f} + {transfers:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def section(title: str, name: str, model: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The lines and values of one run on every number of GPUs."""
    lines = [f"## {title} (projected)", "", "| " + " | ".join(COLUMNS) + " |"]
    lines.append("|" + "---|" * len(COLUMNS))
    values: dict[str, Any] = {}
    why: list[str] = []
    networks: Networks | None = None
    for gpus in GPUS:
        config, hardware = recipe(name, model, gpus), Hardware(gpus)
        planner = Planner(config, open_family(config.model), networks)
        networks = planner.networks
        found = planner.recommend(hardware)
        if found is None:
            nearest = planner.smallest(hardware)
            assert nearest is not None
            need = nearest.memory.total(nearest.memory.peak) / 1e9
            lines.append(f"| {gpus} | none fits: the smallest needs {need:.0f} GB |" + " |" * 7)
            values[str(gpus)] = None
            continue
        best, reasons = found
        lines.append(row(best, hardware))
        values[str(gpus)] = plan_values(best, hardware)
        why += ["", f"Why on {gpus} GPUs:", "", *(f"- {reason}" for reason in reasons)]
    return [*lines, *why, ""], values


def public(config: RunConfig, gpus: int) -> RunConfig:
    """The same run as the public code makes it."""
    changes: dict[str, dict[str, Any]] = {
        # Samples that share their start and are walked one by one cost what unrelated ones do.
        "rollout": {"batch_size": 1, "tree": config.rollout.tree.model_copy(
            update={"kind": "independent_roots"})},
        "loss": {"micro_batch_size": 1},
        "parallel": {"engine": "fsdp", "dp_replicate": 1, "dp_shard": gpus, "sp": 1,
                     "checkpointing": "full", "gather_rollout": False, "defer_reduction": False},
    }  # fmt: skip
    parts = {name: getattr(config, name).model_copy(update=new) for name, new in changes.items()}
    return config.model_copy(update=parts)


def against_public(assumed: str) -> tuple[list[str], dict[str, Any]]:
    """The lines and values of both ways, on every number of GPUs."""
    lines = [PUBLIC_HEAD.format(assumed=assumed), "| " + " | ".join(PUBLIC_COLUMNS) + " |"]
    lines.append("|" + "---|" * len(PUBLIC_COLUMNS))
    values: dict[str, Any] = {}
    for title in PUBLIC_RUNS:
        networks: Networks | None = None
        for gpus in GPUS:
            hardware, config = Hardware(gpus), recipe(*RUNS[title], gpus)
            planner = Planner(config, open_family(config.model), networks)
            networks = planner.networks
            theirs = Planner(public(config, gpus), planner.family, networks).estimate(hardware)
            found = planner.recommend(hardware)
            assert found is not None
            for way, estimate in (("public", theirs), ("ours", found[0])):
                times = f"{theirs.total / estimate.total:.1f} times" if way == "ours" else ""
                lines.append(public_row(title, way, estimate, hardware, times))
                values[f"{title}, {gpus} GPUs, {way}"] = plan_values(estimate, hardware)
    return [*lines, ""], values


def public_row(title: str, way: str, estimate: Estimate, hardware: Hardware, times: str) -> str:
    """One line of that table."""
    moved = estimate.received.values()
    transfers = sum(v for k, v in estimate.seconds.items() if k.endswith("transfers"))
    cells = [
        title, str(hardware.gpus), way, str(sum(m.collectives for m in moved)),
        f"{sum(m.inside for m in moved) / 1e9:.0f} + {sum(m.between for m in moved) / 1e9:.0f}",
        f"{sum(estimate.flops.values()) / 1e15:.1f}",
        f"{estimate.total - transfers:.0f} + {transfers:.0f}", times,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the plans here")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "planning.md")
    arguments = parser.parse_args()
    hardware = Hardware(1)
    assumed = (
        f"{hardware.efficiency:.0%} of {hardware.peak / 1e12:.0f} TFLOP/s, "
        f"{hardware.inside / 1e9:.0f} GB/s inside a machine and {hardware.link / 1e9:.0f} GB/s "
        "between machines, per GPU"
    )
    part, against = against_public(assumed)
    print("\n".join(part), flush=True)
    lines, values = [HEAD.format(assumed=assumed), *part], {"against the public": against}
    for title, (name, model) in RUNS.items():
        part, values[title] = section(title, name, model)
        lines += part
        print("\n".join(part), flush=True)
    arguments.out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    write_json(arguments.json, values)


if __name__ == "__main__":
    main()
