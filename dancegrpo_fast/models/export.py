"""Writing what was trained, for a stock diffusers pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dancegrpo_fast.models.family import Family
from dancegrpo_fast.policy import ADAPTER, Policy


def export(family: Family, policy: Policy, out: Path) -> None:
    """Write what a stock pipeline loads: a whole folder, or LoRA weights.

    With an average (`policy.ema_decay`), the averaged weights are written. Components that were
    not trained are copied from the base folder, byte for byte.
    """
    out.mkdir(parents=True, exist_ok=True)
    with policy.averaged():
        if policy.config.train == "full":
            _copy_all_but(family.source.folder, out, set(policy.modules))
            for name, module in policy.modules.items():
                module.save_pretrained(out / name, safe_serialization=True)
        else:
            _write_lora(family, policy, out)


def _copy_all_but(folder: Path, out: Path, networks: set[str]) -> None:
    for part in sorted(folder.iterdir()):
        if part.is_file() and part.name == "model_index.json":
            shutil.copyfile(part, out / part.name)
        elif part.is_dir() and part.name not in networks and not part.name.startswith("."):
            shutil.copytree(part, out / part.name, dirs_exist_ok=True)


def _write_lora(family: Family, policy: Policy, out: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    modules: dict[str, Any] = dict(policy.modules)
    kind = family.networks[0]  # "transformer" or "unet"
    for position, (name, module) in enumerate(modules.items()):
        # diffusers loads a second expert's LoRA from a file of its own.
        family.source.pipeline_class.save_lora_weights(
            out / name if position else out,
            **{
                f"{kind}_lora_layers": get_peft_model_state_dict(module, adapter_name=ADAPTER),
                f"{kind}_lora_adapter_metadata": module.peft_config[ADAPTER].to_dict(),
            },
        )
