"""What every diffusers model family has in common, and what each has to say for itself.

A family is our file for one diffusers model family. Constructing one reads configurations only, so
that a recipe is checked before anything large is loaded; `load` loads the networks. Latents are
canonical [B, C, F, H, W] everywhere outside a family's network call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dancegrpo_fast.config import ModelConfig, UserError
from dancegrpo_fast.models.conditions import Condition, Conditions
from dancegrpo_fast.models.loading import build, fill
from dancegrpo_fast.models.source import Grid, Source
from dancegrpo_fast.prompt import Prompt
from dancegrpo_fast.trajectories import Place
from dancegrpo_fast.trees.tree import TreePlan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Box = tuple[tuple[int, int], ...]


class Family(ABC):
    """One diffusers model family, of one pipeline folder.

    A subclass states the class attributes below and writes the abstract methods; docs/families.md
    walks through one.

    Attributes:
        config: The recipe's model section.
        device: Where networks run.
        dtype: Storage of frozen weights and of the network's arithmetic.
        source: The pipeline folder.
        grid: The points its sampler visits.
        latent_shape: Canonical latent of one sample, (C, F, H, W).
        action_box: Sub-box of the latent that the policy chooses, ((start, stop), ...) per axis, or
            None for all of it. What lies outside is copied from step to step.
        guidance: Classifier-free guidance scale per network; 1 means one branch.
        modules: The networks by name, once loaded.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """diffusers pipeline classes whose folders the family loads."""
    networks: ClassVar[tuple[str, ...]] = ("transformer",)
    """Components that may be trained, high noise first."""
    encoders: ClassVar[tuple[str, ...]]
    """Components that are needed only while prompts are embedded."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Components that are never loaded (a safety checker would black out samples)."""
    replaced: ClassVar[tuple[str, ...]] = ()
    """Components whose files the family reads itself, in place of the pipeline's own class."""
    blocks: ClassVar[tuple[str, ...]]
    """Names of a network's lists of blocks: sharded, checkpointed and compiled one by one."""
    lora_targets: ClassVar[list[str]]
    """Names of the layers that a LoRA adapts unless the recipe says otherwise."""
    text_length: ClassVar[int]
    """Text tokens that the stock pipeline gives the network (`model.max_text_length` overrides)."""
    sequence: ClassVar[str] = ""
    """How tokens are split over processes: "ulysses", "replicated_text", or "" for not at all."""
    pads_split_text: ClassVar[bool] = False
    """Whether `network` pads its trimmed text to `text_multiple` tokens, masked, when split."""
    guidance_input: ClassVar[float | None] = None
    """Scale that the network takes as an input unless the recipe says otherwise; None: no input."""
    takes_image: ClassVar[bool] = False
    """Whether a prompt needs an image."""
    draws_first_frame: ClassVar[bool] = False
    """Whether `model.first_frame` may draw the image of prompts that bring none."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None) -> None:
        self.config = config
        self.device = device or torch.device("cpu")
        self.dtype = DTYPES[config.dtype]
        self.source = Source.of(config, self.pipelines)
        if config.embedded_guidance is not None and self.guidance_input is None:
            raise UserError(
                f"model.embedded_guidance = {config.embedded_guidance}: family {config.family} has "
                "no such input; use model.guidance"
            )
        if config.first_frame is not None and not self.draws_first_frame:
            raise UserError(
                f"model.first_frame = {config.first_frame!r}: family {config.family} draws no "
                "first frame; leave it out"
            )
        second = 1.0 if config.guidance == 1 else config.guidance
        if config.guidance_2 is not None:
            second = config.guidance_2
        self.max_text_length = config.max_text_length or self.text_length
        self.latent_shape = self.read_latent_shape()
        self.action_box: Box | None = self.read_action_box()
        self.grid = self.read_grid()
        self.guidance = dict(zip(self.grid.networks, (config.guidance, second), strict=False))
        if config.guidance_2 is not None and len(self.guidance) < 2:
            raise UserError(
                f"model.guidance_2 = {config.guidance_2}: it is for the second expert of a Wan2.2 "
                "folder, and this one has a single network; use model.guidance"
            )
        self.modules: dict[str, nn.Module] = {}
        self.text_multiple = 1  # Split text must have a multiple of so many tokens.
        self._idle: dict[str, nn.Module] = {}  # Loaded components that are not working now.
        self._vae_users = 0

    # ---- what a family writes ------------------------------------------------------------------

    @abstractmethod
    def read_latent_shape(self) -> tuple[int, ...]:
        """(C, F, H, W) of the recipe's sample size; refuses sizes the model cannot take."""

    @abstractmethod
    def embed(self, pipeline: Any, prompt: Prompt) -> Condition:
        """What the network is told about one prompt.

        Args:
            pipeline: The stock pipeline without networks, on the device: its encoders, tokenizers
                and, where the family `takes_image`, its VAE.
            prompt: Text, and an image where the family `takes_image`.
        """

    @abstractmethod
    def network(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """One evaluation of the network, in the family's own layout.

        Args:
            module: One of `modules`, possibly wrapped by an engine.
            latents: [B, C, F, H, W] float32.
            timesteps: [B] float32 of the grid (0 .. 1000).
            inputs: [B, ...] tensors of one branch and those of both branches.

        Returns:
            [B, C, F, H, W], what the schedule's prediction type names (usually the velocity).
        """

    @abstractmethod
    def vae_latents(self, latents: Tensor, vae: Any) -> Tensor:
        """Canonical latents as `vae.decode` takes them: unscaled, and without F for image VAEs."""

    @abstractmethod
    def call_arguments(self) -> dict[str, Any]:
        """Literal arguments that make the stock pipeline draw what the recipe draws."""

    # ---- what a family may change --------------------------------------------------------------

    @property
    def needs_image(self) -> bool:
        """Whether every prompt must bring its image."""
        return self.takes_image and self.config.first_frame is None

    def token_patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the latent in one token; read where `sequence` is not ""."""
        return 1, 2, 2

    def read_action_box(self) -> Box | None:
        """The action box, from configurations alone."""
        return None

    def read_grid(self) -> Grid:
        """The sampling grid, from configurations alone."""
        present = tuple(name for name in self.networks if self.source.has(name))
        boundary = self.source.index.get("boundary_ratio")
        return Grid(self.source.scheduler(), present, boundary)

    def combine(self, unguided: Tensor, guided: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of two float32 outputs [B, C, F, H, W]."""
        return unguided + scale * (guided - unguided)

    def begin(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """Initial latents [B, C, F, H, W] from pure noise: puts given frames in place."""
        return latents

    def stock_latents(self, latents: Tensor) -> Tensor:
        """Canonical latents as the stock pipeline takes them (`latents=`)."""
        return latents

    def prompt_arguments(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Per-prompt arguments of the stock pipeline."""
        arguments: dict[str, Any] = {"prompt": [prompt.text for prompt in prompts]}
        if self.config.guidance != 1:
            arguments["negative_prompt"] = [self.config.negative_prompt] * len(prompts)
        return arguments

    def from_dance(self, record: Mapping[str, Tensor]) -> Condition:
        """What `embed` gives, from one prompt of DanceGRPO's files: tensors by subfolder."""
        raise UserError(f"--import: family {self.config.family} has no embedding folders to import")

    # ---- what all families do ------------------------------------------------------------------

    def build(self) -> dict[str, nn.Module]:
        """The networks on the meta device; all files that the run reads are there."""
        self.source.check(self.unused)
        for name in self.grid.networks:
            cls, folder = self.source.component_class(name), self.source.folder / name
            self.modules[name] = build(cls, folder)
        return self.modules

    def fill(self, name: str, module: nn.Module) -> None:
        """Load one network's weights: trained ones in float32, frozen ones in `model.dtype`."""
        fill(module, self.source.folder / name, self.dtype, self.device)

    def load(self) -> Family:
        """The networks on the device, with nothing trained or split."""
        for name, module in self.build().items():
            self.fill(name, module)
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt | str]) -> Conditions:
        """Conditions of P prompts, on the device; each is embedded alone, whatever its company."""
        full = [Prompt(p) if isinstance(p, str) else p for p in prompts]
        with self.encoder_pipeline() as pipeline:
            rows = [self.embed(pipeline, prompt).to(self.device) for prompt in full]
        return Conditions.of(rows)

    def model_output(
        self,
        module: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        name: str | None = None,
    ) -> Tensor:
        """The network's output after guidance.

        Args:
            module: One of `modules`, possibly wrapped by an engine.
            latents: [B, C, F, H, W].
            timesteps: [B] float32 of the grid.
            conditions: Of B prompts.
            name: Which of `modules` it is, for its guidance scale; None is the first.

        Returns:
            [B, C, F, H, W]; with guidance combined in float32.
        """
        scale = self.guidance[name or self.grid.networks[0]]
        positive, negative = conditions.positive(), conditions.negative()
        if scale == 1 or negative is None:
            return self._network(module, latents, timesteps, positive)
        if not conditions.one_forward:
            unguided = self._network(module, latents, timesteps, negative)
            guided = self._network(module, latents, timesteps, positive)
            return self.combine(unguided.float(), guided.float(), scale)
        # One forward for both branches: half the calls, and one collective under sharding.
        both = {key: torch.cat([negative[key], positive[key]]) for key in positive}
        twice = latents.repeat(2, 1, 1, 1, 1), timesteps.repeat(2)
        unguided, guided = self._network(module, *twice, both).float().chunk(2)
        return self.combine(unguided, guided, scale)

    def _network(
        self, module: nn.Module, latents: Tensor, timesteps: Tensor, inputs: dict[str, Tensor]
    ) -> Tensor:
        narrow = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=narrow):
            return self.network(module, latents, timesteps, inputs)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, F, 3, H, W] float32 in [0, 1] of canonical latents."""
        with self.vae() as vae:
            return self.pixels(latents, vae)

    def pixels(self, latents: Tensor, vae: Any) -> Tensor:
        """`decode` with a VAE at hand, differentiable in the latents."""
        given = self.vae_latents(latents.float(), vae).to(vae.dtype)
        pixels = vae.decode(given, return_dict=False)[0].float()
        if pixels.dim() == 4:
            pixels = pixels[:, :, None]
        return (pixels / 2 + 0.5).clamp(0, 1).transpose(1, 2).contiguous()

    @contextmanager
    def vae(self) -> Iterator[Any]:
        """The VAE, on the device only inside; whoever decodes several batches stays around all."""
        if "vae" not in self._idle:
            cls, folder = self.source.component_class("vae"), self.source.folder
            dtype = DTYPES[self.config.vae_dtype]
            vae = cls.from_pretrained(
                folder, subfolder="vae", dtype=dtype, local_files_only=True
            )
            if self.config.vae_tiling:
                vae.enable_tiling()
            self._idle["vae"] = vae.eval().requires_grad_(False)
        vae = self._idle["vae"].to(self.device)
        self._vae_users += 1
        try:
            yield vae
        finally:
            self._vae_users -= 1
            if not self._vae_users:
                vae.to("cpu")

    @contextmanager
    def encoder_pipeline(self) -> Iterator[Any]:
        """The stock pipeline without networks, on the device only inside."""
        if not hasattr(self, "_encoder_pipeline"):
            with self.vae() as vae:
                self._encoder_pipeline = self.source.pipeline_class.from_pretrained(
                    self.source.folder,
                    **dict.fromkeys((*self.networks, *self.unused, *self.replaced)),
                    vae=vae,
                    dtype=self.dtype,
                    local_files_only=True,
                )
        pipeline = self._encoder_pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False).to(self.device)
        try:
            yield pipeline
        finally:
            pipeline.to("cpu")

    # ---- the stock pipeline: evaluation, export, samples ---------------------------------------

    def stock_pipeline(self, exported: Path | None, train: str) -> Any:
        """A stock pipeline as a user loads it, on the device: the base (None), or an export."""
        whole = exported is not None and train == "full"
        pipeline = self.source.pipeline_class.from_pretrained(
            exported if whole else self.source.folder,
            **dict.fromkeys((*self.unused, *self.replaced)),
            dtype={"default": self.dtype, "vae": DTYPES[self.config.vae_dtype]},
            local_files_only=True,
        ).to(self.device)
        if exported is not None and train == "lora":
            pipeline.load_lora_weights(exported)
            for name in self.grid.networks[1:]:
                pipeline.load_lora_weights(exported / name, load_into_transformer_2=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @contextmanager
    def live_pipeline(self) -> Iterator[Any]:
        """The stock pipeline around the networks that are being trained."""
        with self.encoder_pipeline() as bare:
            parts = {k: v for k, v in bare.components.items() if k not in self.networks}
            pipeline = type(bare)(**parts, **self.modules, **self.pipeline_options())
            pipeline.set_progress_bar_config(disable=True)
            yield pipeline

    def pipeline_options(self) -> dict[str, Any]:
        """Constructor arguments of the stock pipeline, from its index, that are no components."""
        index = self.source.index
        return {k: v for k, v in index.items() if k[0] != "_" and not isinstance(v, list)}

    @torch.no_grad()
    def draw(
        self, pipeline: Any, prompts: Sequence[Prompt], latents: Tensor, steps: int
    ) -> Tensor:
        """Samples [B, F, 3, H, W] in [0, 1] of a stock pipeline, from canonical initial noise."""
        output = pipeline(
            **self.prompt_arguments(prompts),
            **self.call_arguments(),
            num_inference_steps=steps,
            latents=self.stock_latents(latents),
            output_type="pt",
        )[0].float()
        return output if output.dim() == 5 else output[:, None]


def evaluate(
    family: Family,
    module: nn.Module,
    plan: TreePlan,
    conditions: Conditions,
    places: Sequence[Place],
    latents: Tensor,
) -> Tensor:
    """The network's output at some states: the one call that rollout and training share."""
    steps = [plan.states[state].step for _, state in places]
    # Timesteps stay float32: bfloat16 would turn 954.5 into 956.
    timesteps = torch.tensor([plan.schedule.timesteps[i] for i in steps], dtype=torch.float32)
    return family.model_output(
        module,
        latents,
        timesteps.to(latents.device),
        conditions.select([p for p, _ in places]),
        family.grid.module_names(plan.schedule)[steps[0]],
    )
