"""Writing what was trained, for a stock diffusers pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dancegrpo_fast.models.family import Family
from dancegrpo_fast.policy import ADAPTER, Policy


def export(family: Family, policy: Policy, out: Path, *, main: bool = True) -> None:
    """Write what a stock pipeline loads: a whole folder, or LoRA weights.

    With an average (`policy.ema_decay`), the averaged weights are written. Components that were
    not trained are copied from the base folder, byte for byte. Every process takes part (sharded
    weights are gathered, one tensor at a time); the `main` one writes.
    """
    full = policy.config.train == "full"
    if main:
        out.mkdir(parents=True, exist_ok=True)
        if full:
            _copy_all_but(family.source.folder, out, set(policy.modules))
    with policy.averaged():
        for position, (name, module) in enumerate(policy.modules.items()):
            if full:
                state = whole_state(module, lambda _: True, main)
                if main:
                    _write_network(family.source.component_class(name), module, state, out / name)
            else:
                state = whole_state(module, lambda key: "lora_" in key, main)
                if main:  # diffusers loads a second expert's LoRA from a file of its own.
                    _write_lora(family, module, state, out / name if position else out)


def load_lines(family: Family, exported: Path, train: str, steps: int) -> str:
    """Python that loads the result without this package and draws one sample."""
    name = family.source.pipeline_class.__name__
    folder = exported if train == "full" else family.source.folder
    lines = [
        f"from diffusers import {name}",
        f"pipeline = {name}.from_pretrained({str(folder)!r})",
    ]
    if train == "lora":
        lines.append(f"pipeline.load_lora_weights({str(exported)!r})")
        for network in family.grid.networks[1:]:
            path = str(exported / network)
            lines.append(f"pipeline.load_lora_weights({path!r}, load_into_transformer_2=True)")
    arguments = {"num_inference_steps": steps, **family.call_arguments()}
    if family.config.guidance != 1:  # Without it some pipelines do not guide at all.
        arguments["negative_prompt"] = family.config.negative_prompt
    image = ["    image=load_image('YOUR IMAGE'),"] if family.takes_image else []
    if family.takes_image:
        lines.insert(1, "from diffusers.utils import load_image")
    lines += ["sample = pipeline(", "    prompt='YOUR PROMPT',", *image]
    lines += [f"    {key}={value!r}," for key, value in arguments.items()]
    return "\n".join([*lines, ")[0][0]"])


def whole_state(
    module: torch.nn.Module, wanted: Callable[[str], bool], keep: bool
) -> dict[str, Tensor]:
    """A module's state on the CPU, gathered from its slices; empty where it is not kept."""
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if wanted(name):
            with _whole(tensor) as whole:
                if keep:
                    # A copy where it is on the CPU already: ZeRO 3 lets go of the gathered one.
                    state[name] = whole.detach().to("cpu", copy=hasattr(tensor, "ds_id"))
    return state


@contextmanager
def _whole(tensor: Any) -> Iterator[Tensor]:
    """A parameter or buffer gathered from the slices of FSDP2 or ZeRO 3."""
    if hasattr(tensor, "ds_id"):
        tensor.all_gather()
        yield tensor
        tensor.partition()
    else:
        yield tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write_network(cls: Any, module: Any, state: dict[str, Tensor], out: Path) -> None:
    with torch.device("meta"):
        empty = cls.from_config(module.config)
    empty.load_state_dict(state, assign=True)
    empty.save_pretrained(out, safe_serialization=True)


def _copy_all_but(folder: Path, out: Path, networks: set[str]) -> None:
    for part in sorted(folder.iterdir()):
        if part.is_file() and part.name == "model_index.json":
            shutil.copyfile(part, out / part.name)
        elif part.is_dir() and part.name not in networks and not part.name.startswith("."):
            shutil.copytree(part, out / part.name, dirs_exist_ok=True)


def _write_lora(family: Family, module: Any, state: dict[str, Tensor], out: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    kind = family.networks[0]  # "transformer" or "unet"
    layers = get_peft_model_state_dict(module, state_dict=state, adapter_name=ADAPTER)
    family.source.pipeline_class.save_lora_weights(
        out,
        **{
            f"{kind}_lora_layers": layers,
            f"{kind}_lora_adapter_metadata": module.peft_config[ADAPTER].to_dict(),
        },
    )
