"""The run configuration: one YAML recipe plus `key=value` overrides.

`sampling`, `learning`, `running` and `run` say what a recipe holds, `agreement` which fields must
fit each other, `recipe` reads, checks and writes it. Imports nothing else of ours.
"""

from dancegrpo_fast.config.errors import Interrupted, UserError
from dancegrpo_fast.config.learning import (
    AdvantageConfig,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
)
from dancegrpo_fast.config.recipe import dump, load_config, parse_value
from dancegrpo_fast.config.run import RunConfig
from dancegrpo_fast.config.running import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ParallelConfig,
)
from dancegrpo_fast.config.sampling import DataConfig, ModelConfig, RolloutConfig, TreeConfig

__all__ = [
    "AdvantageConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "Interrupted",
    "LoggingConfig",
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
    "parse_value",
]
