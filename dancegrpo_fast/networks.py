"""Puts the networks in place: loaded, adapted, split over processes; one order for all of it."""

from __future__ import annotations

from torch import Tensor

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.models import Family
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.parallel.activations import prepare_blocks
from dancegrpo_fast.parallel.engine import Engine, make_engine
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.policy import Policy


def assemble(
    config: RunConfig, family: Family, world: World, key: NoiseKey
) -> tuple[Policy, Engine]:
    """What is trained, and the engine that holds it.

    Args:
        config: The run.
        family: Opened, not loaded.
        world: The processes.
        key: Of the adapters' first weights.
    """
    policy = Policy(
        family.load().modules,
        config.policy,
        lora_targets=family.lora_targets,
        key=key,
        needs_reference=config.loss.kl_weight > 0,
    )
    engine = make_engine(policy.modules, config.parallel, config.optimizer, world)
    for module in [*policy.modules.values(), *policy.frozen.values()]:
        prepare_blocks(module, config.parallel, family.blocks)
        engine.shard(module, blocks=family.blocks, dtype=family.dtype)
    engine.ready()
    policy.start_average()
    return policy, engine


def base_weights(family: Family, policy: Policy) -> dict[str, Tensor]:
    """The base's weights of what is trained, read again from the pipeline's folder."""
    base = family.source  # A second instance: the first one's networks are being trained.
    found: dict[str, Tensor] = {}
    for name, parameter in policy.trainable().items():
        found[name] = parameter
    raise NotImplementedError(base)
