"""Puts the networks in place: loaded, adapted, split over processes; one order for all of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from torch import Tensor, nn

from dancegrpo_fast.config import OptimizerConfig, ParallelConfig, RunConfig, UserError
from dancegrpo_fast.models import Family
from dancegrpo_fast.models.loading import stored_tensors, weight_files
from dancegrpo_fast.ops.noise import NoiseKey
from dancegrpo_fast.parallel.activations import prepare_blocks
from dancegrpo_fast.parallel.attention import check_attention, set_attention
from dancegrpo_fast.parallel.engine import Engine, Replicated, Sharded
from dancegrpo_fast.parallel.graphs import check_graphs
from dancegrpo_fast.parallel.sequence import check_sequence, split_sequence
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.parallel.zero import DeepSpeedEngine
from dancegrpo_fast.placing import like
from dancegrpo_fast.policy import Policy

logger = logging.getLogger(__name__)


def check(config: RunConfig, family: Family, world: World) -> None:
    """Refuse a split or an attention that the networks cannot do, before anything is loaded."""
    parallel = config.parallel
    if parallel.compile == "graphs":
        check_graphs(parallel, world)
    if config.loss.reuse_forwards and world.size > 1 and parallel.engine != "ddp":
        raise UserError(
            "loss.reuse_forwards = true: verified with one process and with parallel.engine = ddp, "
            f"not with {parallel.engine} on {world.size} processes; use ddp where the network "
            "fits, or leave it at false"
        )
    tokens = math.prod(
        size // patch
        for size, patch in zip(family.latent_shape[1:], family.token_patch(), strict=True)
    )
    if parallel.engine == "deepspeed" and parallel.sp > 1:
        raise UserError(
            f"parallel.sp = {parallel.sp}: not verified with parallel.engine = deepspeed; use fsdp"
        )
    padded = family.pads_split_text
    text_tokens = parallel.sp if padded else family.max_text_length
    for name in family.grid.networks:
        network = family.source.config(name)
        check_sequence(network, family.sequence, parallel.sp, tokens, text_tokens)
        check_attention(
            parallel.attention,
            network=network["_class_name"],
            kind=family.sequence,
            degree=parallel.sp,
            masked=padded and parallel.sp > 1,
            trained=True,
            dtype=family.dtype,
            device=world.device,
        )
    if parallel.compile and parallel.sp > 1 and family.sequence == "ulysses":
        raise UserError(
            f"parallel.compile = true: blocks of {family.config.family} split over "
            f"parallel.sp = {parallel.sp} processes do not compile for training; use one of the two"
        )


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
    parallel = config.parallel
    if family.sequence == "ulysses":
        family.text_multiple = parallel.sp
    policy = Policy(
        family.build(),
        config.policy,
        lora_targets=family.lora_targets,
        key=key,
        needs_reference=config.loss.kl_weight > 0,
    )
    engine = make_engine(policy.modules, parallel, config.optimizer, world)
    # Adapters and copies are there; a split network cannot be copied.
    for module in [*policy.modules.values(), *policy.frozen.values()]:
        masked = family.pads_split_text and parallel.sp > 1
        set_attention(module, parallel.attention, masked=masked)
        if parallel.sp > 1:
            assert world.tokens is not None
            split_sequence(module, family.sequence, world.tokens)
        prepare_blocks(module, parallel, family.blocks)
        engine.shard(module, blocks=family.blocks, dtype=family.dtype)
    for networks in (policy.modules, policy.frozen):
        for name, module in networks.items():
            family.fill(name, module)
    policy.initialise_adapters(world.device)
    engine.ready()
    policy.start_average()
    return policy, engine


def base_weights(family: Family, policy: Policy) -> dict[str, Tensor]:
    """The base's weights of a policy trained in full, read again from the pipeline's folder."""
    trained = policy.trainable()
    found: dict[str, Tensor] = {}
    for network in policy.modules:
        for name, tensor in stored_tensors(weight_files(family.source.folder / network)):
            parameter = trained.get(f"{network}.{name}")
            if parameter is not None:
                found[f"{network}.{name}"] = like(parameter, tensor)
    return found


def make_engine(
    modules: Mapping[str, nn.Module],
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    world: World,
) -> Engine:
    """The engine a recipe asks for; alone, weights stay where they are."""
    if world.size == 1 and (parallel.engine == "deepspeed" or parallel.defer_reduction):
        logger.warning("one process: parallel.engine and its settings have nothing to spread")
    kinds: dict[str, type[Engine]] = {
        "ddp": Replicated, "fsdp": Sharded, "deepspeed": DeepSpeedEngine,
    }  # fmt: skip
    kind = Replicated if world.size == 1 else kinds[parallel.engine]
    return kind(modules, parallel, optimizer, world)
