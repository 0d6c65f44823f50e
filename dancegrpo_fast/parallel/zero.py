"""DeepSpeed's ZeRO behind the calls of an engine: optimizer, gradients and weights in slices.

Weights stay float32 and the networks' arithmetic is that of DDP: where the model is bfloat16,
DeepSpeed's `torch_autocast` repeats the autocast a family calls its network in. Its own bf16
mode would round norms and modulations too, and hide what is trained from the policy.

Imported only when a recipe asks for it (`parallel.engine: deepspeed`).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dancegrpo_fast.config import OptimizerConfig, ParallelConfig, UserError
from dancegrpo_fast.parallel.activations import kept_activations
from dancegrpo_fast.parallel.engine import Engine, OneGathered, adamw
from dancegrpo_fast.parallel.world import World

_BUCKET = 50_000_000  # Elements that are exchanged at once: 200 MB of float32 gradients.
_MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed(device: torch.device) -> Any:
    """The package, without what it would compile or print.

    Raises:
        UserError: It is not installed.
    """
    # Else it says that it chose one.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        deepspeed = import_module("deepspeed")
    except ImportError as error:
        raise UserError(
            f"parallel.engine = 'deepspeed': cannot be imported ({error}); pip install "
            "'dancegrpo-fast[deepspeed]', or use fsdp"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(all_gather|reduce_scatter).* is deprecated.*")
    # Its collectives in shared memory would be compiled at start (a minute, g++ and ninja); saying
    # so here also spares the trial runs of compilers that find out what could be compiled.
    operators = import_module("deepspeed.ops").__dict__
    operators.setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeedEngine(Engine):
    """ZeRO 1 (optimizer in slices), 2 (gradients too) or 3 (weights too).

    Each network is a DeepSpeed engine of its own, so that one with nothing to train is not stepped.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        world: World,
    ) -> None:
        super().__init__(modules, parallel, optimizer, world)
        self.deepspeed = import_deepspeed(world.device)
        self.engines: dict[str, Any] = {}
        self._frozen: list[nn.Module] = []
        self._dtype = torch.float32

    def shard(self, module: nn.Module, *, blocks: tuple[str, ...], dtype: torch.dtype) -> None:
        # Nothing is cut yet: DeepSpeed takes networks that have their weights.
        self._dtype = dtype
        if all(module is not trained for trained in self.modules.values()):
            self._frozen.append(module)

    def ready(self) -> None:
        mesh = init_device_mesh("cpu", (self.world.size,))
        optimizers: dict[str, Any] = self.optimizers
        for name, module in self.modules.items():
            self.engines[name], *_ = self.deepspeed.initialize(
                model=module,
                optimizer=adamw(module, self.settings),
                config=self._config(),
                dist_init_required=False,
            )
            zero = self.engines[name].optimizer
            optimizers[name] = SlicedAdamW(self.deepspeed, zero, self.parallel.zero_stage, mesh)
        if self.parallel.zero_stage == 3:
            for module in self._frozen:
                self.deepspeed.initialize(
                    model=module, config=self._config(), dist_init_required=False
                )

    def _config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self.parallel.zero_stage,
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
            # Kept whole, a small parameter would miss what `policy.averaged` writes to its slice.
            "stage3_param_persistence_threshold": 0,
            # It would replace torch.nn.functional.linear in the whole process.
            "memory_efficient_linear": False,
        }
        if self.parallel.offload_optimizer:
            pin = self.world.device.type == "cuda"
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
        config: dict[str, Any] = {
            "zero_optimization": zero,
            # Micro-batches are ours to count: `call` says which is the last of an update.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.settings.max_grad_norm,
            "zero_force_ds_cpu_optimizer": False,  # That one is compiled at start.
        }
        if self._dtype != torch.float32:
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": str(self._dtype).removeprefix("torch."),
                "lower_precision_safe_modules": [],  # Gradients are summed in float32.
            }
        return config

    @contextmanager
    def gathered(self) -> Iterator[Mapping[str, nn.Module]]:
        if self.parallel.zero_stage < 3:
            yield self.modules
            return
        gathered = _OneWhole(self.deepspeed, self.modules, self.engines)
        try:
            yield gathered
        finally:
            gathered.release()

    @contextmanager
    def call(self, name: str, last: bool) -> Iterator[nn.Module]:
        engine = self.engines[name]
        engine.set_gradient_accumulation_boundary(last)
        with kept_activations(self.parallel):
            yield engine

    def backward(self, name: str, loss: Tensor) -> None:
        # DeepSpeed averages over processes; exact where their number is a power of two.
        self.engines[name].backward(loss * self.world.size, scale_wrt_gas=False)

    @torch.no_grad()
    def clip_grad_norm(self, name: str) -> float:
        """The norm of a network's gradients, equal on all ranks; `step` scales them by it."""
        zero = self.engines[name].optimizer
        sliced = self.parallel.zero_stage == 3
        found = zero._get_norm_groups() if sliced else [zero.scaled_global_norm()]
        norms = torch.stack([torch.as_tensor(norm) for norm in found])
        # A norm that is not finite is -1 here.
        return float(torch.linalg.vector_norm(norms)) if (norms >= 0).all() else float("nan")

    def step(self, name: str) -> None:
        self.engines[name].step()

    def clear(self, name: str) -> None:
        zero = self.engines[name].optimizer
        zero.zero_grad(set_to_none=True)
        # What is left of gradients that were not stepped with. The next micro-batch overwrites.
        if self.parallel.offload_optimizer:
            zero.reset_cpu_buffers()
        if self.parallel.zero_stage < 3:
            zero.micro_step_id = -1
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = None


class _OneWhole(OneGathered):
    """Networks under ZeRO 3 whose weights are whole; asking for one lets go of the others."""

    def __init__(
        self, deepspeed: Any, modules: Mapping[str, nn.Module], engines: Mapping[str, Any]
    ) -> None:
        super().__init__(modules)
        self._deepspeed, self._engines = deepspeed, engines
        self._weights: Any = None

    def __getitem__(self, name: str) -> nn.Module:
        module = self._modules[name]
        if name != self._whole:
            self.release()
            zero = self._engines[name].optimizer
            zero.empty_partition_cache()  # Slices alone, whatever the last training call left.
            # The hooks would cut each layer again after its forward, and exchange checks of the
            # layers' order at each call: then ranks could not make unequal numbers of them.
            hooks = zero.parameter_offload
            hooks._remove_module_hooks()
            hooks.forward_hooks.clear()
            hooks.backward_hooks.clear()
            self._weights = self._deepspeed.zero.GatheredParameters(list(module.parameters()))
            self._weights.__enter__()
            self._whole = name
        return module

    def release(self) -> None:
        """Back to slices."""
        if self._whole:
            self._weights.__exit__(None, None, None)
            self._engines[self._whole].optimizer.parameter_offload.setup_zero_stage3_hooks()
        self._whole = ""


class SlicedAdamW:
    """A network's AdamW inside DeepSpeed, read and written one parameter at a time.

    A snapshot holds whole parameters, cut along their first axis as FSDP2 cuts them, so that
    another engine or another number of processes can load it. DeepSpeed's slices run across
    parameters: they are no views of that, and are copied to the CPU and back.
    """

    def __init__(self, deepspeed: Any, zero: Any, stage: int, mesh: DeviceMesh) -> None:
        self._utils, self._stage, self._mesh = deepspeed.utils, stage, mesh
        flat = zero.fp32_partitioned_groups_flat if stage == 3 else None
        self._states: list[dict[str, Any]] = []
        for part in flat or zero.single_partition_of_fp32_groups:
            state = zero.optimizer.state[part]
            state["step"] = torch.zeros(())  # As AdamW's own first step would make them.
            state |= {key: torch.zeros_like(part, requires_grad=False) for key in _MOMENTS}
            self._states.append(state)
        if stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def read(self, parameter: Any, average: Tensor | None) -> dict[str, Tensor]:
        """A parameter's `weights`, `step`, moments and `ema`, to be saved or loaded into.

        Args:
            parameter: A trained one.
            average: What the policy holds of its average, or None.

        Returns:
            Copies in slices along the first axis, on the CPU; live tensors where all is here.
        """
        found = {"step": self._states[0]["step"]}
        if self._stage == 3:
            found["weights"] = self._cut(_whole(parameter, parameter.ds_tensor))
        else:
            found["weights"] = parameter.data
        for key in _MOMENTS:
            found[key] = self._cut(self._utils.safe_get_full_optimizer_state(parameter, key))
        if average is not None:
            sliced = self._stage == 3
            found["ema"] = self._cut(_whole(parameter, average)) if sliced else average
        return found

    def write(
        self, parameter: Any, average: Tensor | None, values: Mapping[str, Tensor]
    ) -> None:
        """Give a parameter what was loaded into the tensors of `read`."""
        for state in self._states:
            state["step"].copy_(values["step"])
        for key in _MOMENTS:
            moment = _full(values[key])
            if self._stage == 3:
                own = slice_of(parameter, moment)
                self._utils.safe_set_local_optimizer_state(parameter, own, key)
            else:
                self._utils.safe_set_full_optimizer_state(parameter, moment, key)
        if self._stage < 3:
            self._utils.safe_set_full_fp32_param(parameter, parameter.data)
            return
        own = slice_of(parameter, _full(values["weights"]))
        parameter.ds_tensor.data.copy_(own)
        self._utils.safe_set_local_fp32_param(parameter, own)
        if average is not None:
            average.copy_(slice_of(parameter, _full(values["ema"])))

    def _cut(self, whole: Tensor) -> Tensor:
        if whole.dim() == 0:
            return whole.cpu()
        return distribute_tensor(whole.cpu(), self._mesh, [Shard(0)], src_data_rank=None)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _whole(parameter: Any, own: Tensor) -> Tensor:
    """A ZeRO-3 parameter's tensor from all ranks' slices [n], the last ones padded."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.detach())
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


def slice_of(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's slice [n] of a ZeRO-3 parameter's whole tensor, padded with zeros."""
    count = parameter.ds_tensor.numel()
    own = whole.new_zeros(count)
    part = whole.flatten()[count * dist.get_rank() :][:count]
    own[: len(part)] = part
    return own.to(parameter.ds_tensor.device)
