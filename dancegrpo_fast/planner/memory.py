"""Bytes on the device of the busiest process, phase by phase, by what holds them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from dancegrpo_fast.config import RewardConfig, RunConfig
from dancegrpo_fast.models import Family
from dancegrpo_fast.models.family import DTYPES
from dancegrpo_fast.planner.inputs import condition
from dancegrpo_fast.planner.network import Networks
from dancegrpo_fast.planner.tracing import without_storage
from dancegrpo_fast.planner.work import Work
from dancegrpo_fast.rewards import REWARDS
from dancegrpo_fast.rewards.weights import DTYPES as REWARD_DTYPES
from dancegrpo_fast.updating import old_log_prob_mode

PHASES = ("embed", "rollout", "decode", "score", "train", "step", "save")
_MASTER = 4  # Trained weights, gradients, each Adam moment and the average are float32.
_BUCKET = 200e6  # DeepSpeed's exchange buffers, as parallel/zero.py sets them; two of them.
_LIVE = 1_000_000_000  # Elements that ZeRO 3 leaves whole between uses: its default.
_UNITS = {"MB": 1e6, "GB": 1e9}


@dataclass
class Memory:
    """What is on the device in each phase.

    Attributes:
        phases: Phase -> what -> bytes.
        host: Bytes of pinned or pageable host memory that the run needs beside.
        unknown: What is on the device and not in `phases`, in words.
    """

    phases: dict[str, dict[str, float]]
    host: float = 0.0
    unknown: list[str] = field(default_factory=list)

    def total(self, phase: str) -> float:
        """Bytes of a phase."""
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.total)


def memory_of(
    config: RunConfig, family: Family, networks: Networks, work: Work, shards: int, processes: int,
    *, cuda: bool = True,
) -> Memory:  # fmt: skip
    """The memory of a recipe on a mesh.

    Args:
        config: The recipe.
        family: Opened.
        networks: Its networks.
        work: Of an iteration on this mesh.
        shards: Processes that share one copy of the weights (`fsdp`).
        processes: All of them.
        cuda: Follow CUDA: its autocast. False: the CPU.
    """
    parallel, found = config.parallel, Memory({})
    sharded = parallel.engine == "fsdp" and processes > 1
    shards = shards if sharded else 1
    resident = _resident(config, networks, found, shards, processes)
    latent = math.prod(family.latent_shape) * DTYPES[config.rollout.latent_dtype].itemsize
    resident_rewards, brought, unknown = reward_bytes(config.rewards)
    found.unknown += unknown
    if resident_rewards:
        resident["rewards"] = resident_rewards
    fixed = resident | {
        "conditions": config.data.prompts_per_iteration * _condition_bytes(family)
    }
    stored = {"trajectories": float(work.stored * latent)}
    outputs = float(work.outputs * math.prod(family.latent_shape) * _output_width(family))
    if cuda and config.rollout.offload:
        found.host += stored["trajectories"] + outputs
        stored, outputs = {"trajectories": 0.0}, 0.0
    old = {"old outputs": outputs} if outputs else {}
    clip = config.model.frames * 3 * config.model.height * config.model.width * 4
    look = {} if cuda else {"sample to look at": float(clip)}
    graphs = {"graphs": _graphs(config, networks, work, cuda)} if work.graphs else {}
    stepping = fixed | stored | old | look
    during = stepping | graphs
    decoded = {"trajectories": float(work.decoded * latent)}
    if config.rollout.redraw:  # The most is drawn with the first scores known.
        drawing, scoring = during, fixed | look | decoded
    else:
        known = old if old_log_prob_mode(config) == "rollout" else {}
        drawing = fixed | stored | known | graphs
        scoring = drawing | look
    encoders, absent = networks.encoder_bytes()
    if absent:
        found.unknown.append(f"encoders without a config.json: {', '.join(absent)}")
    vae = networks.vae_bytes()
    batch = min(config.rollout.batch_size, work.samples)
    decoding = networks.decode(batch, cuda=cuda).forward_peak
    stepping["gradients"] = _gradients(config, networks, shards, processes)
    zero = processes > 1 and parallel.engine == "deepspeed"
    if zero and not parallel.offload_optimizer:  # Of its slice; others' optimizer is fused.
        stepping["temporary"] = trained_elements(networks) * _MASTER / processes
    rollout = drawing | _rollout(config, networks, work, sharded, latent, cuda)
    train = during | _train(config, networks, work, found, shards, processes, latent, cuda)
    if zero and parallel.zero_stage == 3:
        rollout["gathered weights"] = _live(networks, math.inf)
        train["gathered weights"] = _live(networks, _LIVE)
    if config.rollout.tree.kind == "search":  # It scores between its steps, networks gathered.
        rollout["VAE"] = vae
        scoring = scoring | {row: size for row, size in rollout.items() if row != "activations"}
    found.phases = {
        "embed": resident | {"encoders": encoders, "VAE": vae},
        "rollout": rollout,
        "decode": scoring | {"VAE": vae, "activations": decoding},
        "score": scoring | {"rewards on loan": brought, "pixels": float(batch * clip)},
        "train": train,
        "step": stepping,
        "save": dict(resident),
    }
    kinds = 3 + (config.policy.ema_decay is not None)  # Weights, two moments, the average.
    copied = float(trained_elements(networks, shards) * _MASTER * kinds)
    if zero:  # Moments are cut as FSDP's are, the others with stage 3 only: parallel/zero.py.
        others = (kinds - 2) / (processes if parallel.zero_stage == 3 else 1)
        copied = trained_elements(networks) * _MASTER * (2 / processes + others)
    if cuda:
        found.host += copied  # Staged there, then written in the background.
    elif config.checkpoint.background:
        found.phases["save"]["copy being written"] = copied
    return found


def _output_width(family: Family) -> int:
    """Bytes of an element of `Family.model_output`: guidance is combined in float32."""
    guided = any(scale != 1 for scale in family.guidance.values())
    return 4 if guided else family.dtype.itemsize


def trained_elements(networks: Networks, shards: int = 1) -> int:
    """Elements that are trained on one process, all networks together."""
    return sum(n.elements(trained=True, shards=shards) for n in networks.networks.values())


def _resident(
    config: RunConfig, networks: Networks, found: Memory, shards: int, processes: int
) -> dict[str, float]:
    parallel, all_networks = config.parallel, networks.networks.values()
    trained = trained_elements(networks, shards) * _MASTER
    weights = float(sum(n.stored(shards) + n.buffers for n in all_networks))
    copies = 0.0
    if config.loss.kl_weight > 0 and config.policy.train == "full":
        # Frozen, so in `model.dtype`; the little that its class keeps in float32 is not told apart.
        width = networks.family.dtype.itemsize
        copies = float(sum(n.elements(shards=shards) * width + n.buffers for n in all_networks))
    optimizer, average = 2.0 * trained, float(trained)
    rows: dict[str, float] = {}
    if processes > 1 and parallel.engine == "deepspeed":
        found.unknown.append("DeepSpeed's buffers: by ZeRO's formulas, not measured")
        optimizer = 3.0 * trained / processes  # A master copy of its slice besides.
        if parallel.zero_stage == 3:
            weights, copies = weights / processes, copies / processes
            average = trained / processes
        if parallel.offload_optimizer:
            found.host, optimizer = found.host + optimizer, 0.0
        rows["buffers"] = 2 * _BUCKET
    if processes > 1 and parallel.engine == "ddp":
        rows["buffers"] = trained  # DDP's buckets, beside the gradients.
    rows |= {"weights": weights, "optimizer": optimizer}
    if copies:
        rows["reference"] = copies
    if config.policy.ema_decay is not None:
        rows["average"] = average
    return rows


def _rollout(
    config: RunConfig, networks: Networks, work: Work, sharded: bool, latent: int, cuda: bool
) -> dict[str, float]:
    most, lower = 0.0, config.rollout.pool_dtype
    pool = work.pool if lower else {}
    for name, batches in work.rollout.items():
        # The narrower copies that autocast keeps of wide weights are among these, and float8's.
        lowered = Counter(pool.get(name))
        for arithmetic, sizes in ((None, Counter(batches) - lowered), (lower, lowered)):
            if not sizes:
                continue
            trace = networks.call(
                name, max(sizes), "none", gathered=sharded, cuda=cuda, sp=config.parallel.sp,
                lower=arithmetic,
            )  # fmt: skip
            most = max(most, trace.forward_peak)
    # Initial noise and a level's children stand beside what is kept of them.
    passing = work.level if cuda and config.rollout.offload else work.passing
    rows = {"activations": most, "passing latents": float(passing * latent)}
    if sharded:
        rows["gathered weights"] = _gathered(networks, whole=config.parallel.gather_rollout)
    if lower == "float8_e4m3" and len(pool) > 1:  # Converted once a draw: the other expert's wait.
        blocks = [sum(g.elements() for g in networks.networks[name].groups[1:]) for name in pool]
        rows["float8 weights"] = float(sum(blocks) - min(blocks))
    return rows


def _graphs(config: RunConfig, networks: Networks, work: Work, cuda: bool) -> float:
    """What the rollout's forwards keep for their backwards until the update."""
    checkpointing = config.parallel.checkpointing
    return sum(
        networks.call(name, size, checkpointing, gathered=False, cuda=cuda).saved
        for name, sizes in work.graphs.items()
        for size in sizes
    )


def _gathered(networks: Networks, *, whole: bool) -> float:
    """Weights that are whole at once: a network's, or what is outside blocks and two blocks."""
    width, most = networks.family.dtype.itemsize, 0
    for network in networks.networks.values():
        blocks = sorted((g.elements() for g in network.groups[1:]), reverse=True)
        parts = blocks if whole else blocks[:2]  # The next block arrives while one works.
        most = max(most, network.groups[0].elements() + sum(parts))
    return float(most * width)


def _live(networks: Networks, most: float) -> float:
    """Weights that ZeRO 3 has whole at once, of a network at most so many elements."""
    parts = networks.networks.values()
    return max(part.stored() * min(1.0, most / part.elements()) for part in parts)


def _gradients(config: RunConfig, networks: Networks, shards: int, processes: int) -> float:
    whole = trained_elements(networks) * _MASTER
    parallel = config.parallel
    if processes > 1 and parallel.engine == "deepspeed":
        return whole / (processes if parallel.zero_stage > 1 else 1)
    return trained_elements(networks, shards) * _MASTER


def _train(
    config: RunConfig, networks: Networks, work: Work, found: Memory, shards: int, processes: int,
    latent: int, cuda: bool,
) -> dict[str, float]:  # fmt: skip
    parallel = config.parallel
    sharded = parallel.engine == "fsdp" and processes > 1
    gradients = _gradients(config, networks, shards, processes)
    activations = waiting = 0.0
    several = any(len(batches) > 1 for update in work.training for batches in update.values())
    for update in work.training:
        for name, batches in update.items():
            trace = networks.call(
                name, max(batches), parallel.checkpointing, gathered=sharded, cuda=cuda,
                sp=parallel.sp,
            )  # fmt: skip
            peak = trace.train_peak
            if not sharded and not several:  # Gradients grow while activations go.
                peak = max(trace.first_peak - gradients, 0.0)
            if config.loss.kl_weight > 0:
                peak = max(peak, trace.saved + trace.forward_peak)
            if work.graphs:  # What waits stands in a row of its own.
                peak = max(trace.train_peak - trace.saved, 0.0)
                if config.loss.kl_weight > 0:
                    peak = max(peak, trace.forward_peak)
            if parallel.offload_activations:
                peak, waiting = peak - trace.saved, max(waiting, trace.saved)
            activations = max(activations, peak)
    found.host += waiting
    kept = work.children * latent  # The children's latents, beside their states'.
    if config.loss.kl_weight > 0:
        kept += config.loss.micro_batch_size * math.prod(networks.family.latent_shape) * 4
    rows = {"gradients": gradients, "activations": activations, "loss": float(kept)}
    if sharded:
        rows["gathered weights"] = _gathered(networks, whole=False)
        rows["gradients on the wire"] = _reducing(networks)
        if parallel.defer_reduction and several:
            rows["gradients"] = gradients + trained_elements(networks) * _MASTER
    return rows


def _reducing(networks: Networks) -> float:
    """Of the largest block: its gradients as they come, and as float32 to be reduced."""
    width = networks.family.dtype.itemsize + _MASTER
    return float(
        max(
            (g.elements(trained=True) for n in networks.networks.values() for g in n.groups),
            default=0,
        )
        * width
    )


def _condition_bytes(family: Family) -> int:
    with without_storage():
        return sum(t.numel() * t.element_size() for t in condition(family).flat().values())


def reward_bytes(rewards: Iterable[RewardConfig]) -> tuple[float, float, list[str]]:
    """(bytes that stay on the device, most that are brought for scoring, what is not known).

    Sizes are those that the catalogue states: of the weights, without activations; those of judges
    that a folder holds are read from its files.
    """
    stay, brought, unknown = 0.0, 0.0, []
    counted: set[str] = set()
    for reward in rewards:
        name = reward.name.partition(".")[0] if reward.name not in REWARDS else reward.name
        if name not in REWARDS:
            unknown.append(f"weights and activations of the reward {reward.name}")
            continue
        if name != reward.name:  # Parts of one model, as `load_rewards` shares them.
            whole = f"{name} {reward.path} {reward.options}"
            if whole in counted:
                continue
            counted.add(whole)
        stated = REWARDS[name].memory
        sizes = re.findall(r"([\d.]+) (MB|GB)", stated)
        here = 0.0 if sizes else _judge_bytes(reward)
        if sizes or here:
            # Where there are several the largest: which one a recipe loads is not read here.
            size = max([here, *(float(number) * _UNITS[unit] for number, unit in sizes)])
            stay, brought = (stay, brought + size) if reward.offload else (stay + size, brought)
            unknown.append(f"activations of the reward {name} (weights: {size / 1e9:g} GB)")
        elif stated != "none":
            unknown.append(f"weights and activations of the reward {name} ({stated})")
    return stay, brought, unknown


def _judge_bytes(reward: RewardConfig) -> float:
    """Of the weights of a model that judges in this process; 0 for one behind a server."""
    if reward.path is None:
        return 0.0
    elements = 0
    for file in Path(reward.path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
            elements += sum(math.prod(weights.get_slice(n).get_shape()) for n in names)
    return float(elements * REWARD_DTYPES[reward.options.get("dtype", "bfloat16")].itemsize)
