"""One update of every family's tiny twin on some meshes; alone, or as a process of `torchrun`.

    torchrun --nproc-per-node N tests/mesh_worker.py MODELS OUT CASE[/MESH] ...

`test_meshes` compares what N processes did with what one does.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "families")]
from conformance import Case  # noqa: E402

from dancegrpo_fast.parallel.world import World, leave  # noqa: E402
from dancegrpo_fast.prompt import Prompt  # noqa: E402
from dancegrpo_fast.trainer import Trainer  # noqa: E402

FAMILIES = {
    "flux": "case_flux:flux", "sd3": "case_sd3:sd3_medium", "qwen": "case_qwen_image:qwen_image",
    "hunyuan": "case_hunyuan_video:hunyuan_t2v", "skyreels": "case_skyreels_i2v:skyreels_i2v",
    "wan": "case_wan:wan21",
}  # fmt: skip
MESHES: dict[str, dict[str, Any]] = {
    "alone": {},
    "ddp": {"parallel.engine": "ddp"},
    "fsdp": {},
    "fsdp_checkpointed": {"parallel.checkpointing": "full"},
    "sp": {"parallel.sp": 2},
    "sp_checkpointed": {"parallel.sp": 2, "parallel.checkpointing": "full"},
    "sp_selective": {"parallel.sp": 2, "parallel.checkpointing": "selective"},
    "fsdp_sp": {"parallel.sp": 2},  # On four processes: 2 x 2.
    "hsdp": {"parallel.dp_replicate": 2},
    "fsdp_lora": {"policy.train": "lora"},
    "alone_lora": {"policy.train": "lora"},
    "sp_lora": {"parallel.sp": 2, "policy.train": "lora"},
    "fsdp_sp_lora": {"parallel.sp": 2, "policy.train": "lora"},
}


def case_of(family: str) -> Case:
    module, name = FAMILIES[family].split(":")
    cases = importlib.import_module(module).CASES
    return next(case for case in cases if case.name == name)


def prompts_file(case: Case, folder: Path) -> Path:
    """The case's prompts, with their images."""
    prompts: list[Prompt] = case.made_prompts(folder)
    file = folder / "prompts.jsonl"
    rows = [
        {"prompt": p.text} | ({"image": Path(p.image).name} if p.image else {}) for p in prompts
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def run(family: str, mesh: str, models: Path, folder: Path) -> dict[str, Any]:
    """One iteration; rewards, gradients and samples."""
    case = case_of(family)
    changes = MESHES[mesh] | {
        "data.prompts": str(models / f"{family}-images" / "prompts.jsonl"),
        "loss.micro_batch_size": 4, "optimizer.max_grad_norm": 1e9,
        "parallel.timeout_seconds": 60.0,
    }  # fmt: skip
    with case.around():
        config = case.recipe(folder, models / family, changes)
        world = World.from_environment(config.parallel)
        trainer = Trainer(config, world)
        seen: dict[str, Any] = {"gradients": {}}
        trainer.engine.step = lambda name: seen["gradients"].update(  # type: ignore
            whole_gradients(trainer, name)
        )
        score = trainer.score

        def recorded(drawn: Any, prompts: Any) -> Any:
            seen["samples"] = dict(zip(drawn.leaves, drawn.samples(), strict=True))
            seen["rewards"] = score(drawn, prompts)
            return seen["rewards"]

        trainer.score = recorded  # type: ignore[method-assign]
        seen["metrics"] = trainer.iteration()
    seen["rewards"] = seen["rewards"].tolist()
    return seen


def whole_gradients(trainer: Trainer, name: str) -> dict[str, torch.Tensor]:
    """What the optimizer of a network is about to step with, gathered from slices."""
    return {
        key: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).detach().clone()
        for key, p in trainer.policy.trainable().items()
        if key.startswith(f"{name}.") and p.grad is not None
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    for pair in sys.argv[3:]:
        family, mesh = pair.split("/")
        rank = os.environ["RANK"]
        found = run(family, mesh, models, out / f"{family}-{mesh}-{rank}")
        torch.save(found, out / f"{family}-{mesh}-{rank}.pt")
    leave(0)
