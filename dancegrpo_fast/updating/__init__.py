"""The update phase of an iteration: one class per kind of loss, over one way to step."""

from __future__ import annotations

from collections.abc import Sequence

from dancegrpo_fast.config import RunConfig
from dancegrpo_fast.models import Family
from dancegrpo_fast.parallel.engine import Engine
from dancegrpo_fast.parallel.world import World
from dancegrpo_fast.policy import Policy
from dancegrpo_fast.rewards import Reward
from dancegrpo_fast.updating.forward_process import AwmUpdater, NftUpdater
from dancegrpo_fast.updating.policy_gradient import Updater, old_log_prob_mode
from dancegrpo_fast.updating.reward_gradient import RewardUpdater
from dancegrpo_fast.updating.stepping import Iteration

UPDATERS: dict[str, type[Updater | NftUpdater | AwmUpdater | RewardUpdater]] = {
    "policy_gradient": Updater,
    "nft": NftUpdater,
    "awm": AwmUpdater,
    "refl": RewardUpdater,
    "draft": RewardUpdater,
}


def check_loss(config: RunConfig, family: Family, rewards: Sequence[Reward]) -> None:
    """Refuse what a recipe's kind of loss cannot train, before networks are loaded.

    Raises:
        UserError: The model or a reward.
    """
    UPDATERS[config.loss.kind].check(config, family, rewards)


def make_updater(
    config: RunConfig,
    family: Family,
    policy: Policy,
    engine: Engine,
    world: World,
    rewards: Sequence[Reward],
) -> Updater | NftUpdater | AwmUpdater | RewardUpdater:
    """The update phase of a recipe that passed `check_loss`, whose networks are in place."""
    updater = UPDATERS[config.loss.kind](config, family, policy, engine, world)
    if isinstance(updater, RewardUpdater):
        updater.use(rewards)
    return updater


__all__ = [
    "UPDATERS",
    "Iteration",
    "RewardUpdater",
    "check_loss",
    "make_updater",
    "old_log_prob_mode",
]
