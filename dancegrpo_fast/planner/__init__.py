"""What a recipe needs, told before it runs: memory, products, bytes on the wire, time, a mesh.

Nothing is loaded: configurations are read, and the real classes run on tensors without storage.
"""

from dancegrpo_fast.planner.batches import largest_batches
from dancegrpo_fast.planner.estimate import Estimate, Hardware, Planner
from dancegrpo_fast.planner.memory import PHASES, Memory
from dancegrpo_fast.planner.table import (
    batch_lines,
    compared_text,
    mesh_text,
    plan_lines,
    plan_values,
)

__all__ = [
    "PHASES",
    "Estimate",
    "Hardware",
    "Memory",
    "Planner",
    "batch_lines",
    "compared_text",
    "largest_batches",
    "mesh_text",
    "plan_lines",
    "plan_values",
]
