"""What a recipe holds: frozen, strict sections with bounds, defaults and a line on every field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from dancegrpo_fast.config.agreement import ONLY_WITH, disagreements, show
from dancegrpo_fast.config.learning import (
    AdvantageConfig,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
)
from dancegrpo_fast.config.presets import known_algorithm, with_preset
from dancegrpo_fast.config.running import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    ParallelConfig,
)
from dancegrpo_fast.config.sampling import DataConfig, ModelConfig, RolloutConfig
from dancegrpo_fast.config.section import Section


class RunConfig(Section):
    """A whole run. Construct it with `load_config`, or directly from its sections."""

    algorithm: Annotated[str | None, AfterValidator(known_algorithm)] = None
    """Published settings that stand beneath the recipe, by name (docs/algorithms.md)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Every random number of the run derives from it."""
    output: str
    """Folder of the run (relative to the working directory)."""
    iterations: int = Field(ge=1)
    """Rounds of sampling, scoring and updating."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig
    rewards: list[RewardConfig] = Field(min_length=1)
    """Rewards that score each sample."""
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="before")
    @classmethod
    def _over_its_preset(cls, raw: Any) -> Any:
        return with_preset(raw, ONLY_WITH)[0]

    @field_validator("rewards")
    @classmethod
    def _rewards_train_something(cls, rewards: list[RewardConfig]) -> list[RewardConfig]:
        if all(reward.weight == 0 for reward in rewards):
            raise ValueError("every weight is 0, so nothing is trained; give one another weight")
        names = [reward.name for reward in rewards]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is listed twice; keep one and add the weights")
        return rewards

    @model_validator(mode="after")
    def _fields_agree(self) -> RunConfig:
        def get(path: str) -> Any:
            value: Any = self
            for key in path.split("."):
                value = getattr(value, key)
            return value

        if problems := disagreements(get, default_at):
            lines = (f"{path} = {show(get(path))}: {reason}" for path, reason in problems)
            raise ValueError("\n".join(lines))
        return self


def section_at(keys: Sequence[str]) -> type[Section]:
    """Returns the section class at a path; list indices are passed over."""
    section: Any = RunConfig
    for key in keys:
        if not key.isdecimal():
            annotation = section.model_fields[key].annotation
            section = next(iter(get_args(annotation)), annotation)
    return section


def field_at(path: str) -> FieldInfo:
    """Returns the declaration of the field at a dotted path."""
    *parents, key = path.split(".")
    return section_at(parents).model_fields[key]


def default_at(path: str) -> Any:
    """Returns the default of the field at a dotted path."""
    return field_at(path).get_default(call_default_factory=True)
