"""The house's order: which part of the package may import which, read from the sources."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dancegrpo_fast"

# Lowest first; a unit (file or folder of the package) may import every unit of the levels below.
LEVELS: tuple[set[str], ...] = (
    {"ops"},
    {"schedules", "dynamics", "transitions"},
    {"policy", "batching", "trees", "trajectories", "advantages", "roles", "prompt", "placing",
     "faults"},
    {"rollout", "search", "losses", "models", "rewards", "parallel", "checkpoint", "data",
     "report"},
    {"trainer", "planner", "sampling", "updating", "run", "networks", "held_out", "profiling",
     "evaluating"},
    {"cli"},
    {"__main__"},
)
CORE = LEVELS[0] | LEVELS[1]
LEVEL_OF = {unit: number for number, level in enumerate(LEVELS) for unit in level}

# The only arrows inside one level.
ARROWS = {
    ("transitions", "dynamics"),
    ("transitions", "schedules"),
    ("advantages", "trees"),
    ("batching", "trees"),
    ("batching", "advantages"),
    ("trajectories", "trees"),
    ("trajectories", "batching"),
    ("rollout", "models"),
    ("search", "models"),
    ("losses", "models"),
    ("checkpoint", "parallel"),  # World: who writes, and who waits.
    ("report", "parallel"),  # World: evaluation is spread over processes.
    ("report", "data"),  # Prompt sets of benchmarks are read by the same readers.
    ("report", "rewards"),  # The Reward protocols: evaluation asks a reward for its parts.
    ("trainer", "updating"),
    ("trainer", "sampling"),
    ("planner", "sampling"),  # What is drawn in which part, and again.
    ("trainer", "networks"),
    ("planner", "networks"),  # Which splits a network can do.
    ("planner", "updating"),  # Where old log-probs come from.
    ("policy", "placing"),
    ("run", "trainer"),
    ("run", "held_out"),
    ("run", "profiling"),
    ("held_out", "trainer"),
}

# Distributions whose modules have another name, and modules that come with another distribution.
MODULES_OF = {"pyyaml": {"yaml"}, "pillow": {"PIL"}, "pydantic": {"pydantic", "pydantic_core"}}


def modules_of(requirements: list[str]) -> set[str]:
    """Top-level modules that a list of requirements brings."""
    names = [re.split(r"[^\w-]", requirement, maxsplit=1)[0] for requirement in requirements]
    return {module for name in names for module in MODULES_OF.get(name, {name})}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE_MODULES = modules_of(PROJECT["dependencies"])
KERNELS = "ops/kernels/"  # Loaded only where Triton runs; nothing imports them at its top.
TRAIN_MODULES = CORE_MODULES | modules_of(PROJECT["optional-dependencies"]["train"])
SERVE_MODULES = modules_of(PROJECT["optional-dependencies"]["serve"])
TRACKER_MODULES = modules_of(PROJECT["optional-dependencies"]["wandb"])
SERVE_FILES = {"rewards/server.py", "rewards/transport.py"}  # They import them inside functions.


def sources() -> dict[str, str]:
    """Path below the package -> text."""
    root = ROOT / PACKAGE
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(root.rglob("*.py"))
    }


def unit_of(path: str) -> str:
    """ "ops/noise.py" -> "ops", "rollout.py" -> "rollout", "__init__.py" -> "__init__"."""
    return path.split("/")[0].removesuffix(".py")


def imported(text: str, units: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, also inside functions and type-checking blocks."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: write imports absolutely"
            if node.module != PACKAGE:
                yield node.lineno, node.module
                continue
            for alias in node.names:  # `from dancegrpo_fast import checkpoint` names a unit.
                name = alias.name if alias.name in units else "__init__"
                yield node.lineno, f"{PACKAGE}.{name}"


def objection(path: str, module: str) -> str | None:
    """Why a file must not import a module; None if it may."""
    unit, kernel = unit_of(path), path.startswith(KERNELS)
    top, _, rest = module.partition(".")
    if top == PACKAGE:
        if rest.startswith("ops.kernels") and not kernel:
            return "imports Triton: look it up by name where it is asked for"
        return _objection_to_ours(unit, rest.split(".")[0] or "__init__")
    if kernel and top == "triton":
        return None
    allowed = CORE_MODULES if unit in CORE | {"__init__", "integrations"} else TRAIN_MODULES
    if path in SERVE_FILES:
        allowed = allowed | SERVE_MODULES
    if path == "report/trackers.py":
        allowed = allowed | TRACKER_MODULES
    if top in sys.stdlib_module_names or top in allowed:
        return None
    return f"{top} is not among the dependencies it may use ({', '.join(sorted(allowed))})"


def _objection_to_ours(unit: str, target: str) -> str | None:
    if unit == target:
        return None
    if target in ("__init__", "integrations"):
        return f"nothing in the package imports {target}"
    if unit in ("__init__", "integrations"):
        return None if target in CORE else f"{unit} sees the core only"
    if unit == "config":
        return "config imports nothing of ours"
    if target == "config":
        return "config is not for the core" if unit in CORE else None
    if unit not in LEVEL_OF or target not in LEVEL_OF:
        return "is not in LEVELS: give the new unit its level"
    if LEVEL_OF[target] < LEVEL_OF[unit] or (unit, target) in ARROWS:
        return None
    return "imports point downwards; on one level only the arrows listed in ARROWS"


def objections(files: dict[str, str]) -> list[str]:
    units = {unit_of(path) for path in files}
    return [
        f"{path}:{line}: imports {module}: {reason}"
        for path, text in files.items()
        for line, module in imported(text, units)
        if (reason := objection(path, module))
    ]


def test_imports_point_downwards_and_stay_within_the_declared_dependencies() -> None:
    assert objections(sources()) == []


def test_the_table_names_what_exists() -> None:
    # A stale row would allow an arrow that nobody decided on.
    files = sources()
    units = {unit_of(path) for path in files}
    assert set(LEVEL_OF) == units - {"__init__", "config", "integrations"}
    used = {
        (unit_of(path), module.split(".")[1])
        for path, text in files.items()
        for _, module in imported(text, units)
        if module.startswith(f"{PACKAGE}.")
    }
    assert used >= ARROWS


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("ops/noise.py", "import diffusers"),
        ("ops/noise.py", "import triton"),
        ("ops/policy_loss.py", "from dancegrpo_fast.ops.kernels import policy_loss"),
        ("ops/kernels/gradient.py", "import scipy"),
        ("dynamics.py", "from dancegrpo_fast.config import UserError"),
        ("schedules.py", "from dancegrpo_fast.transitions import transition"),
        ("trees/tree.py", "from dancegrpo_fast import batching"),
        ("losses/gate.py", "from dancegrpo_fast.rollout import draw_trees"),
        ("models/wan.py", "import dancegrpo_fast.rewards.scoring"),
        ("updating/stepping.py", "from dancegrpo_fast.trainer import Trainer"),
        ("run.py", "from dancegrpo_fast.cli import main"),
        ("config/run.py", "from dancegrpo_fast.data import PromptSet"),
        ("trainer.py", "from dancegrpo_fast import NoiseKey"),
        ("trainer.py", "from dancegrpo_fast.integrations.trl import patch"),
        ("integrations/trl.py", "from dancegrpo_fast.trees.tree import TreePlan"),
        ("__init__.py", "from dancegrpo_fast.trees.tree import TreePlan"),
        ("report/page.py", "import pandas"),
        ("report/page.py", "import scipy.stats"),  # Of the extra [dev], not of [train].
        ("new_part.py", "from dancegrpo_fast.ops import noise"),
    ],
)
def test_a_planted_import_is_found(path: str, line: str) -> None:
    planted = f"def inside():\n    {line}\n"
    files = {**sources(), "integrations/trl.py": "", path: planted}
    found = objections(files)
    assert len(found) == 1 and found[0].startswith(f"{path}:2: "), found


def test_files_stay_readable_in_one_go() -> None:
    folders = {PACKAGE: "*.py", "csrc": "*.[ch]*", "examples": "*.py"}
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for folder, pattern in folders.items()
        for path in (ROOT / folder).rglob(pattern)
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}
