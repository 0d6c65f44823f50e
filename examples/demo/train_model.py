"""Trains the demo's base model from nothing: a complete, stock diffusers `WanPipeline` folder.

The clips are drawn by `shapes.py`. Four stages, all on the CPU:

1. a small `AutoencoderKLWan` learns to reconstruct single frames, then clips (3 x 9x32x32 pixels
   <-> 8 x 5x8x8 latents);
2. the mean and spread of its latents go into its config, where `WanPipeline` expects them;
3. a small `WanTransformer3DModel` learns the rectified-flow velocity of the normalised latents;
4. the stock pipeline draws the held-out prompts, and what was measured goes into `README.md`.

The text encoder keeps its random weights: with one token per word and a residual stream, words stay
apart, and that is all the transformer needs. The transformer is stopped early on purpose. It draws
coloured moving shapes but makes mistakes, so that reinforcement learning has something to improve.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from shapes import FRAMES, SIZE, render, split_prompts
from tiny_wan import SHIFT, TEXT_LENGTH, build_pipeline
from torch import Tensor
from tqdm import tqdm

from dancegrpo_fast.rewards.moving_shape import MovingShape

STEPS = 10
VAE_BATCH = 8
README = f"""# The demo's base model

A stock diffusers `WanPipeline` that draws prompts such as "a red square moving left": 9 frames of
32x32 pixels, {STEPS} steps, guidance 1, `max_sequence_length={TEXT_LENGTH}`.
It was trained from nothing and stopped early, so that reinforcement learning has something to
improve. To make it again:

    python examples/demo/train_model.py

Record of the run that made these files ({{threads}}):

{{table}}
"""


def to_vae(clips: Tensor) -> Tensor:
    """`[B, F, 3, H, W]` in [0, 1] to the VAE's `[B, 3, F, H, W]` in [-1, 1]."""
    return clips.transpose(1, 2) * 2 - 1


def from_vae(clips: Tensor) -> Tensor:
    """The inverse of `to_vae`."""
    return clips.transpose(1, 2) * 0.5 + 0.5


def draw_prompts(prompts: list[str], count: int, generator: torch.Generator) -> list[str]:
    """`count` prompts, uniformly with replacement."""
    index = torch.randint(len(prompts), (count,), generator=generator)
    return [prompts[i] for i in index.tolist()]


def learn(
    module: torch.nn.Module,
    rate: float,
    steps: int,
    title: str,
    batch_loss: Callable[[], Tensor],
) -> float:
    """AdamW, short warm-up, cosine decay to zero; returns the mean of the last 50 losses."""
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / 50) * 0.5 * (1 + math.cos(math.pi * i / steps)),
    )
    last: list[float] = []
    with tqdm(range(steps), desc=title) as bar:
        for _ in bar:
            loss = batch_loss()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            last = [*last[-49:], float(loss.detach())]
            bar.set_postfix(loss=f"{sum(last) / len(last):.4f}")
    module.eval().requires_grad_(False)
    return sum(last) / len(last)


def start_as_images(vae: AutoencoderKLWan) -> None:
    """Initialises every convolution to look at the newest frame only, with gain 1.

    PyTorch's default shrinks the signal at each layer, and this loss then rests for long at "all
    background". A clip starts as independent frames; what links them is learned in the second half.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            newest = module.weight.data if module.weight.ndim == 4 else module.weight.data[:, :, -1]
            module.weight.data.zero_()
            torch.nn.init.kaiming_normal_(newest, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)


def train_vae(
    vae: AutoencoderKLWan, prompts: list[str], image_steps: int, clip_steps: int, generator
) -> float:
    """Reconstruction, first of single frames (cheap), then of clips, in one learning-rate decay.

    Pixels of the shape count three times: they are few. A light penalty keeps latents centred.
    """
    step = 0

    def loss_of_batch() -> Tensor:
        nonlocal step
        step += 1
        clips = to_vae(render(draw_prompts(prompts, VAE_BATCH, generator), generator))
        if step <= image_steps:  # two frames of each clip, as clips of one frame
            clips = clips[:, :, torch.randperm(FRAMES, generator=generator)[:2]]
            clips = clips.transpose(1, 2).flatten(0, 1)[:, :, None]
        latents = vae.encode(clips).latent_dist.mode()
        error = vae.decode(latents).sample - clips
        weight = 1 + 2.0 * (clips.amax(1, keepdim=True) > -0.5)
        loss = (weight * (0.3 * error.abs() + error.square())).mean()
        return loss + 1e-3 * latents.square().mean()

    start_as_images(vae)
    return learn(vae, 4e-3, image_steps + clip_steps, "vae", loss_of_batch)


@torch.no_grad()
def encode_clips(pipe: WanPipeline, names: list[str], generator: torch.Generator) -> Tensor:
    """Renders one clip per prompt; returns the means of their latents, `[B, 8, 5, 8, 8]`."""
    latents = []
    for i in tqdm(range(0, len(names), 64), desc="encode"):
        clips = to_vae(render(names[i : i + 64], generator))
        latents.append(pipe.vae.encode(clips).latent_dist.mode())
    return torch.cat(latents)


def normalise(pipe: WanPipeline, latents: Tensor) -> Tensor:
    """Writes the statistics of `latents` into the VAE's config; returns (latents - mean) / std."""
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return (latents - mean[:, None, None, None]) / std[:, None, None, None]


def train_transformer(
    pipe: WanPipeline, latents: Tensor, names: list[str], steps: int, batch: int, generator
) -> float:
    """Rectified flow: at x = (1 - sigma) x0 + sigma eps the target velocity is eps - x0."""
    unique = sorted(set(names))
    with torch.no_grad():  # padded with zeros after the end token, as the pipeline does
        text, _ = pipe.encode_prompt(unique, None, False, max_sequence_length=TEXT_LENGTH)
    row = {prompt: i for i, prompt in enumerate(unique)}
    rows = torch.tensor([row[name] for name in names])

    def loss_of_batch() -> Tensor:
        index = torch.randint(len(latents), (batch,), generator=generator)
        x0 = latents[index]
        noise = torch.randn(x0.shape, generator=generator)
        u = torch.rand(batch, generator=generator)
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)  # the sampler's own spacing
        mix = sigma[:, None, None, None, None]
        velocity = pipe.transformer(
            hidden_states=(1 - mix) * x0 + mix * noise,
            timestep=1000 * sigma,
            encoder_hidden_states=text[rows[index]],
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, noise - x0)

    return learn(pipe.transformer, 2e-3, steps, "transformer", loss_of_batch)


@torch.no_grad()
def draw(pipe: WanPipeline, prompts: list[str], seed: int) -> Tensor:
    """One clip per prompt with the stock pipeline, `[B, F, 3, H, W]` in [0, 1]."""
    pipe.set_progress_bar_config(desc="draw", leave=False)
    return pipe(
        prompt=prompts,
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        max_sequence_length=TEXT_LENGTH,
        generator=[torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))],
        output_type="pt",
    ).frames


@torch.no_grad()
def evaluate(pipe: WanPipeline, held_out: list[str], generator: torch.Generator) -> list[str]:
    """Lines of the record: reconstruction, and the reward (with parts) of three kinds of clips."""
    reward = MovingShape()
    real = render(held_out, generator)
    latents = pipe.vae.encode(to_vae(real)).latent_dist.mode()
    rebuilt = from_vae(pipe.vae.decode(latents).sample)
    psnr = -10 * math.log10(F.mse_loss(rebuilt, real))
    lines = [f"| VAE reconstruction, held-out clips | {psnr:.1f} dB PSNR |"]
    drawn = [draw(pipe, held_out, seed) for seed in (0, 1)]
    twice = [*held_out, *held_out]
    cases = (
        ("real clips", real, held_out),
        ("VAE reconstructions", rebuilt, held_out),
        ("samples of the base, 64 prompts x 2 seeds", torch.cat(drawn), twice),
    )
    for title, clips, prompts in cases:
        colour, direction, shape = reward.parts(clips, prompts).mean(0).tolist()
        mean = (colour + direction + shape) / 3
        parts = f"colour {colour:.3f}, direction {direction:.3f}, shape {shape:.3f}"
        lines.append(f"| reward of {title} | {mean:.3f} ({parts}) |")
    distance = (drawn[0] - drawn[1]).square().mean((1, 2, 3, 4)).sqrt().mean()
    lines.append(f"| RMS pixel distance between the two seeds | {float(distance):.4f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path(__file__).parent / "model"
    parser.add_argument("--out", type=Path, default=folder, help="model folder (replaced)")
    for name, default, text in (
        ("seed", 0, "of weights and data"),
        ("threads", 2, "CPU threads"),
        ("image-steps", 600, "VAE steps on frames"),
        ("clip-steps", 900, "VAE steps on clips"),
        ("clips", 4096, "clips encoded for training"),
        ("steps", 650, "transformer optimizer steps"),
        ("batch", 96, "latents per transformer step"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default {default})"
        )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    train, held_out = split_prompts()
    pipe = build_pipeline()

    clock = [time.perf_counter()]
    vae_loss = train_vae(pipe.vae, train, args.image_steps, args.clip_steps, generator)
    clock.append(time.perf_counter())
    names = draw_prompts(train, args.clips, generator)
    latents = normalise(pipe, encode_clips(pipe, names, generator))
    clock.append(time.perf_counter())
    loss = train_transformer(pipe, latents, names, args.steps, args.batch, generator)
    clock.append(time.perf_counter())

    seconds = [f"{after - before:.0f} s" for before, after in pairwise(clock)]
    vae_steps = f"{args.image_steps} steps on frames, {args.clip_steps} on clips"
    record = [
        f"| VAE, {vae_steps} | loss {vae_loss:.4f}, {seconds[0]} |",
        f"| latents of {args.clips} clips | {seconds[1]} |",
        f"| transformer, {args.steps} steps of {args.batch} | loss {loss:.4f}, {seconds[2]} |",
        *evaluate(pipe, held_out, generator),
    ]
    shutil.rmtree(args.out, ignore_errors=True)
    pipe.save_pretrained(args.out)
    threads = f"seed {args.seed}, {args.threads} threads, torch {torch.__version__}"
    table = "\n".join(["| what | measured |", "|---|---|", *record])
    (args.out / "README.md").write_text(README.format(threads=threads, table=table))
    print(table)


if __name__ == "__main__":
    main()
