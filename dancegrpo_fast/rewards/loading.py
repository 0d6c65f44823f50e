"""From a recipe's `rewards` to rewards: finds the class, checks its options, builds, combines."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, ValidationError, create_model

from dancegrpo_fast.config import RewardConfig, UserError
from dancegrpo_fast.rewards.catalogue import REWARDS
from dancegrpo_fast.rewards.combine import (
    Judge,
    Movable,
    OnFrames,
    Part,
    SharedParts,
    Threshold,
    WinRate,
)
from dancegrpo_fast.rewards.interface import HasParts, Placeable, Reward
from dancegrpo_fast.rewards.transport import Pool

_OPTIONS = ConfigDict(strict=True, allow_inf_nan=False)


def load_rewards(
    configs: Sequence[RewardConfig],
    device: torch.device | str = "cpu",
    *,
    timeout_seconds: float | None = None,
) -> list[Reward]:
    """The rewards a recipe names, their weights on the device (or in CPU memory with `offload`).

    Args:
        configs: Of the recipe.
        device: For the weights.
        timeout_seconds: How long the run's processes wait for each other; a reward that may wait
            as long for its server would end the run instead of failing its samples.

    Raises:
        UserError: One line per problem: a name that is neither one of ours nor an existing
            `file.py:ClassName`, options that the reward does not take, weights that do not load,
            a deadline that is too long.
    """
    found: list[tuple[Callable[..., Any], dict[str, Any], str | None]] = []
    lines: list[str] = []
    for index, config in enumerate(configs):
        try:
            make, part = _find(f"rewards.{index}.name", config.name)
            found.append((make, arguments(make, config, f"rewards.{index}"), part))
        except UserError as error:
            lines.append(str(error))
    if lines:
        raise UserError("\n".join(lines))
    rewards, shared = [], dict[str, SharedParts]()
    for index, (config, (make, given, part)) in enumerate(zip(configs, found, strict=True)):
        field, key = f"rewards.{index}", f"{config.name.rpartition('.')[0]} {given}"
        if part is not None and key in shared:
            rewards.append(_combined(Part(shared[key], part), config, field))
            continue
        inner = _built(make, given, config, field)
        longest = deadline(inner)
        if timeout_seconds is not None and longest is not None and longest >= timeout_seconds:
            raise UserError(
                f"{field}.options.seconds = {longest:g}: must be below parallel.timeout_seconds = "
                f"{timeout_seconds:g}, or the other processes give up first; lower it"
            )
        if config.offload and not isinstance(inner, Movable):
            raise UserError(f"{field}.offload = true: {config.name} has no weights; leave it out")
        if isinstance(inner, Movable) and not config.offload:
            inner.place(device)
        if part is not None:
            assert isinstance(inner, HasParts)  # _find has looked the part up.
            shared[key] = SharedParts(inner)
            inner = Part(shared[key], part)
        rewards.append(_combined(inner, config, field))
    names = [reward.name for reward in rewards]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UserError(
                f"rewards.{index}.name = {configs[index].name!r}: calls itself {name!r}, as "
                f"rewards.{names.index(name)} does, and scores are kept by that; rename one"
            )
    return rewards


def deadline(reward: Any) -> float | None:
    """Seconds that one call of a reward waits for its servers; None for one in this process."""
    # A judge asks through its `chat`, and VisionReward another server for the `alignment`.
    asked = (reward, getattr(reward, "chat", None), getattr(reward, "alignment", None))
    pools = [getattr(one, "pool", None) for one in asked]
    seconds = [pool.seconds for pool in pools if isinstance(pool, Pool)]
    return sum(seconds) if seconds else None


def arguments(make: Callable[..., Any], config: RewardConfig, field: str) -> dict[str, Any]:
    """The arguments of a reward's constructor, checked against its signature.

    Raises:
        UserError: One line per problem.
    """
    parameters = inspect.signature(make).parameters
    constructor = getattr(make, "__init__", None)
    plain = constructor is None or constructor is object.__init__
    hints = {} if plain else get_type_hints(constructor, include_extras=True)
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if p.default is inspect.Parameter.empty else p.default)
        for name, p in parameters.items()
        if p.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }
    if "path" in config.options:
        raise UserError(f"{field}.options.path: stands outside the options, as {field}.path")
    if config.path is not None and not (anything or "path" in fields):
        raise UserError(f"{field}.path = {config.path!r}: {config.name} takes none; leave it out")
    given = dict(config.options) | ({} if config.path is None else {"path": config.path})
    try:
        settings = _OPTIONS | ConfigDict(extra="allow" if anything else "forbid")
        create_model("Options", __config__=settings, **fields).model_validate(given)
    except ValidationError as error:
        names = [name for name in fields if name != "path"]
        raise UserError(
            "\n".join(_explain(detail, config.name, names, field) for detail in error.errors())
        ) from None
    return given


def _explain(detail: Any, name: str, known: list[str], field: str) -> str:
    key = ".".join(map(str, detail["loc"]))
    where = f"{field}.path" if key == "path" else f"{field}.options.{key}"
    if detail["type"] == "missing":
        return f"{where}: is missing; {name} needs it"
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
        return f"{where} = {detail['input']!r}: {name} has no such option; {hint}"
    reason = detail["msg"].replace("Input should be", "must be")
    return f"{where} = {detail['input']!r}: {reason}"


def _find(field: str, name: str) -> tuple[Callable[..., Any], str | None]:
    """The class of a name, and the part after a dot, if any."""
    if name in REWARDS:
        return REWARDS[name].load(), None
    whole, _, part = name.partition(".")
    if whole in REWARDS:
        known = getattr(REWARDS[whole].load(), "part_names", ())
        if part in known:
            return REWARDS[whole].load(), part
        raise UserError(
            f"{field} = {name!r}: {whole} has no part {part!r}; known: {', '.join(known) or 'none'}"
        )
    path, _, class_name = name.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(
            f"{field} = {name!r}: no such reward; known: {', '.join(REWARDS)}; your own is "
            "path/to/file.py:ClassName"
        )
    if not Path(path).is_file():
        raise UserError(f"{field} = {name!r}: {path} is not a file; paths count from {Path.cwd()}")
    spec = importlib.util.spec_from_file_location(f"user_reward_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _of_the_user(f"{field} = {name!r}: {path} does not load"):
        spec.loader.exec_module(module)
    found = getattr(module, class_name, None)
    if not callable(found):
        raise UserError(f"{field} = {name!r}: {path} defines no {class_name}")
    return found, None


@contextmanager
def _of_the_user(told: str) -> Iterator[None]:
    """Inside runs code of the user's: what it raises is told with its line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        # That of a mistake in writing names its line itself.
        at = "" if isinstance(error, SyntaxError) else f" ({last.filename}, line {last.lineno})"
        reason = " ".join(str(error).split())
        raise UserError(f"{told}: {type(error).__name__}: {reason}{at}") from error


def _built(
    make: Callable[..., Any], given: dict[str, Any], config: RewardConfig, field: str
) -> Reward | Judge:
    if config.name.partition(".")[0] in REWARDS:
        try:
            reward = make(**given)
        except (OSError, ValueError, ImportError) as error:
            source = "" if config.path is None else f" with path = {config.path!r}"
            reason = " ".join(str(error).split())
            raise UserError(
                f"{field}.name = {config.name!r}: cannot be built{source}: {reason}"
            ) from error
    else:
        with _of_the_user(f"{field}.name = {config.name!r}: cannot be built"):
            reward = make(**given)
    if isinstance(reward, Judge) and config.win_rate is None and not isinstance(reward, Reward):
        raise UserError(
            f"{field}.name = {config.name!r}: it compares pairs; set {field}.win_rate to balanced "
            "or both"
        )
    if not isinstance(reward, (Judge, Reward)):
        raise UserError(
            f"{field}.name = {config.name!r}: {type(reward).__name__} needs a `name` and "
            "`__call__(videos, prompts)`"
        )
    return reward


def _combined(inner: Reward | Judge, config: RewardConfig, field: str) -> Reward:
    """Frames first, then the comparison, then the threshold."""
    reward: Any = inner
    if config.frames is not None:
        if isinstance(inner, Judge):
            raise UserError(
                f"{field}.frames = {config.frames}: {config.name} compares whole samples; leave it "
                "out"
            )
        reward = OnFrames(reward, config.frames)
    if config.win_rate is not None:
        reward = WinRate(reward, config.win_rate)
    if config.threshold is not None:
        reward = Threshold(reward, config.threshold)
    if isinstance(reward, Placeable):
        reward.offload = config.offload
    found: Reward = reward
    return found
