"""The run configuration: one YAML recipe plus `key=value` overrides.

`sections` says what a recipe holds, `agreement` which fields must fit each other, `recipe` reads,
checks and writes it. Imports nothing else of ours.
"""

from dancegrpo_fast.config.errors import Interrupted, UserError
from dancegrpo_fast.config.recipe import dump, load_config
from dancegrpo_fast.config.sections import (
    AdvantageConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TreeConfig,
)

__all__ = [
    "AdvantageConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "Interrupted",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PolicyConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TreeConfig",
    "UserError",
    "dump",
    "load_config",
]
