"""Sections of a recipe on what is drawn: model, data, tree, rollout."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dancegrpo_fast.config.section import Section

FAMILY_NAMES = (
    "flux", "hunyuan_video", "qwen_image", "qwen_image_edit", "sd", "sd3", "skyreels_i2v",
    "wan", "wan_i2v",
)  # fmt: skip


def _one_family(name: str) -> str:
    """A name of ours, or a file and a class; that the file exists is asked when it is loaded."""
    if name in FAMILY_NAMES or re.fullmatch(r".+\.py:\w+", name):
        return name
    if name.endswith(".py"):
        raise ValueError(f"which class of the file? write {name}:ClassName")
    ours = f"{', '.join(map(repr, FAMILY_NAMES[:-1]))} or {FAMILY_NAMES[-1]!r}"
    near = difflib.get_close_matches(name, FAMILY_NAMES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"must be {ours}, or path/to/file.py:ClassName for your own{hint}")


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return pattern


class ModelConfig(Section):
    family: Annotated[str, AfterValidator(_one_family)]
    """A model family of ours, or `path/to/file.py:ClassName` for your own (docs/families.md)."""
    path: str
    """Folder of a diffusers pipeline (relative to the working directory), or its hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its main branch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of frozen weights and of the network's arithmetic; trained weights are float32."""
    height: int = Field(ge=1)
    """Height of the samples in pixels."""
    width: int = Field(ge=1)
    """Width of the samples in pixels."""
    frames: int = Field(default=1, ge=1)
    """Frames of one sample; 1 draws images."""
    fps: float | None = Field(default=None, gt=0)
    """Frames per second of the samples: for rewards on motion and for video files."""
    guidance: float = Field(default=1.0, ge=0)
    """Classifier-free guidance scale in rollout and training; 1 means one forward, no guidance."""
    guidance_2: float | None = Field(default=None, ge=0)
    """Guidance scale of the second expert (Wan2.2); null is `guidance`."""
    embedded_guidance: float | None = Field(default=None, ge=0)
    """Scale that a distilled model takes as an input (FLUX, HunyuanVideo); null is its default."""
    negative_prompt: str = ""
    """Prompt of the unconditional branch; read when guidance is not 1."""
    max_text_length: int | None = Field(default=None, ge=1)
    """Text tokens given to the network, longer prompts are cut; null is the stock pipeline's."""
    first_frame: str | None = None
    """Image-to-video: text-to-image pipeline that draws the first frame of prompts without one."""
    first_frame_steps: int | None = Field(default=None, ge=1)
    """Steps of that pipeline; null is its own default."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage and arithmetic of the VAE."""
    vae_tiling: bool = False
    """Decode in tiles: less memory, slower, faint seams."""


class DataConfig(Section):
    prompts: str
    """File with one training prompt a line (relative to the working directory): text, .jsonl,
    .csv, .tsv or .parquet; or a data set of the hub, `organisation/name[:split]`."""
    prompts_per_iteration: int = Field(ge=1)
    """Prompts drawn for one iteration, over all processes."""
    column: str = "prompt"
    """Key or column of the prompt's text, where a file has several."""
    malformed: Literal["refuse", "skip"] = "refuse"
    """Malformed lines end the run before it begins, or are left out with a warning."""
    min_length: int | None = Field(default=None, ge=1)
    """Characters of a prompt at least; shorter ones are left out."""
    max_length: int | None = Field(default=None, ge=1)
    """Characters of a prompt at most; longer ones are left out."""
    match: Annotated[str, AfterValidator(_regex)] | None = None
    """Regular expression that is found in every prompt; others are left out."""
    exclude: Annotated[str, AfterValidator(_regex)] | None = None
    """Regular expression that is found in no prompt; others are left out."""
    skip_zero_variance: int | None = Field(default=None, ge=1)
    """Epochs for which a prompt is left out after a group without a spread; null draws all."""
    embeddings: str | None = None
    """Folder of embedded prompts, shared by runs; null is `embeddings` in the output folder."""


class TreeConfig(Section):
    kind: Literal[
        "shared_root", "independent_roots", "window", "branch_points", "trunk_with_branches",
        "search",
    ] = "shared_root"
    """Shape of one prompt's denoising tree; `search` grows it by what previews best."""
    window_size: int | None = Field(default=None, ge=1)
    """`window`: stochastic, trained steps in a row, the others are deterministic; `branch_points`:
    the steps that are trained (depth pruning), the others stay stochastic."""
    window_start: int | None = Field(default=None, ge=0)
    """First step of the window; null lets it move inside window_range."""
    window_range: Annotated[tuple[int, int], Field(strict=False)] | None = None
    """[first, end) that a moving window stays inside; null is every trainable step."""
    window_order: Literal["random", "progressive", "decaying", "exponential"] = "random"
    """How the window moves: drawn, or from the first place to the last and again, staying equally
    long at each, or ever shorter (MixGRPO's four strategies)."""
    window_iterations: int = Field(default=1, ge=1)
    """Iterations at one place; `decaying`: at the first."""
    window_stride: int = Field(default=1, ge=1)
    """Steps from one place to the next."""
    window_decay: float = Field(default=0.1, gt=0)
    """`exponential`: rate at which the stay shortens."""
    window_decay_from: int = Field(default=13, ge=0)
    """`exponential`: start of the window from which on it shortens."""
    flash: float | None = Field(default=None, gt=0, le=1)
    """`window`: share of the steps after the window that are kept, as DPM-Solver++ 2M steps
    (MixGRPO-Flash); null keeps them all, as Euler steps."""
    branch_steps: list[Annotated[int, Field(ge=0)]] = []
    """Steps at which states branch, ascending; `search`: at which a trunk has candidates."""
    branches: int | None = Field(default=None, ge=1, le=1024)
    """Children of a state at each branch step; `search`: candidates, of which the best goes on."""
    noise_scale: float = Field(default=1.0, gt=0)
    """`branch_points`: multiplies the noise of steps that branch; their log-prob knows of it."""
    trunks: int = Field(default=1, ge=1)
    """`trunk_with_branches`, `search`: trunks per prompt, each with its own initial noise."""


class RolloutConfig(Section):
    group_size: int = Field(ge=1)
    """Samples of one prompt (leaves of its tree)."""
    steps: int = Field(ge=1, le=1000)
    """Denoising steps."""
    schedule: Literal["diffusers", "dance"] = "diffusers"
    """Sigma grid: the model's own scheduler, or DanceGRPO's shifted one."""
    shift: float | None = Field(default=None, gt=0)
    """Time shift of the `dance` schedule (DanceGRPO: 3 for FLUX, 5 for HunyuanVideo)."""
    dynamics: Literal["dance", "flow", "flow_wan", "cps", "ddim", "vp"] = "dance"
    """Kind of stochastic step; `ddim` and `vp` for family sd, the others for flow models."""
    noise_level: float = Field(ge=0)
    """Strength of the stochastic step (dance: about .3; flow, cps: .7; ddim: 1); 0: none."""
    solver: Literal["euler", "multistep"] = "euler"
    """Deterministic step: Euler's (DDIM's), or DPM-Solver++ 2M."""
    exact_density: bool = False
    """`cps`: the true Gaussian density instead of FlowCPS's -mean(r^2)."""
    final: Literal["x0", "sample", "ode"] = "x0"
    """The last step: decode the clean estimate, take the noisy sample, or a deterministic step."""
    train_last: bool = False
    """Also train the last step; needs `final: sample`."""
    latent_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of latents between steps; log-probs are those of the stored values."""
    batch_size: int = Field(ge=1)
    """States per forward in rollout; memory and speed only."""
    chunk: int | None = Field(default=None, ge=1)
    """Samples that a process draws before it scores them, whole prompts unless `redraw`; null is
    all, or `batch_size` where a reward waits for a server and can be asked meanwhile."""
    offload: bool = False
    """Keep the latents that wait for training in host memory; for GPUs."""
    suffix_every: int = Field(default=1, ge=1)
    """`window`, `trunk_with_branches`: the model is evaluated at every so many of the deterministic
    states after the trained steps; between them its last output is used."""
    redraw: bool = False
    """`best_of_n`: keep the rewards only, and draw the chosen samples again from their noise."""
    pool_dtype: Literal["bfloat16", "float8_e4m3"] | None = None
    """`redraw`: arithmetic in which the pool is drawn and scored, the chosen are drawn again in
    `model.dtype`; null is that for all."""
    tree: TreeConfig = TreeConfig()
