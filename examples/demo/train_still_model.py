"""Trains the still demo's base model from nothing: a stock diffusers `StableDiffusionPipeline`.

The images are drawn by `stills.py`. On the CPU:

1. a small `AutoencoderKL` learns to reconstruct images (3 x 32x32 pixels <-> 4 x 8x8 latents), and
   the spread of its latents goes into its config as the scaling factor;
2. a small `UNet2DConditionModel` learns the noise in noised latents (epsilon prediction);
3. the folder is written in half precision, and what the stock pipeline draws from it for the
   held-out prompts goes into `README.md`.

The text encoder keeps its random weights. The UNet is stopped early on purpose: it makes mistakes,
so that reinforcement learning has something to improve.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from stills import SIZE, StillShape, render, split_prompts
from tiny_unet import build_pipeline
from torch import Tensor
from train_model import draw_prompts, learn

STEPS = 10
VAE_BATCH = 32
README = f"""# The still demo's base model

A stock diffusers `StableDiffusionPipeline` that draws prompts such as "a red square at the top
left": 32x32 pixels, {STEPS} DDIM steps, guidance 1. It was trained from nothing and stopped early,
so that reinforcement learning has something to improve. To make it again:

    python examples/demo/train_still_model.py

Record of the run that made these files ({{threads}}):

{{table}}
"""


def train_vae(
    pipe: StableDiffusionPipeline, prompts: list[str], steps: int, generator: torch.Generator
) -> float:
    """Reconstruction; pixels of the shape count three times. A penalty keeps latents centred."""
    vae = pipe.vae

    def loss_of_batch() -> Tensor:
        images = render(draw_prompts(prompts, VAE_BATCH, generator), generator) * 2 - 1
        latents = vae.encode(images).latent_dist.mode()
        error = vae.decode(latents).sample - images
        weight = 1 + 2.0 * (images.amax(1, keepdim=True) > -0.5)
        return (weight * (0.3 * error.abs() + error.square())).mean() + 1e-3 * (
            latents.square().mean()
        )

    return learn(vae, 3e-3, steps, "vae", loss_of_batch)


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, names: list[str], generator: torch.Generator) -> Tensor:
    """One image per prompt, as latents [B, 4, 8, 8] of standard deviation 1.

    Writes the factor that makes it 1 into the VAE's config.
    """
    images = (render(names[i : i + 256], generator) for i in range(0, len(names), 256))
    latents = torch.cat([pipe.vae.encode(some * 2 - 1).latent_dist.mode() for some in images])
    factor = 1 / float(latents.std())
    pipe.vae.register_to_config(scaling_factor=factor)
    return latents * factor


def train_unet(
    pipe: StableDiffusionPipeline,
    latents: Tensor,
    names: list[str],
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> float:
    """Mean squared error of the noise at timesteps drawn uniformly (DDPM's simple loss)."""
    unique = sorted(set(names))
    with torch.no_grad():
        text, _ = pipe.encode_prompt(unique, None, 1, False)
    row = {prompt: i for i, prompt in enumerate(unique)}
    rows = torch.tensor([row[name] for name in names])
    count = pipe.scheduler.config.num_train_timesteps

    def loss_of_batch() -> Tensor:
        index = torch.randint(len(latents), (batch,), generator=generator)
        noise = torch.randn(latents[index].shape, generator=generator)
        timesteps = torch.randint(count, (batch,), generator=generator)
        noised = pipe.scheduler.add_noise(latents[index], noise, timesteps)
        output = pipe.unet(noised, timesteps, text[rows[index]], return_dict=False)[0]
        return F.mse_loss(output, noise)

    return learn(pipe.unet, 2e-3, steps, "unet", loss_of_batch)


@torch.no_grad()
def draw(pipe: StableDiffusionPipeline, prompts: list[str], seed: int) -> Tensor:
    """One image per prompt with the stock pipeline, [B, 1, 3, 32, 32] in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompt=prompts,
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))],
        output_type="pt",
    ).images
    return images[:, None]


@torch.no_grad()
def evaluate(pipe: StableDiffusionPipeline, generator: torch.Generator) -> list[str]:
    """Lines of the record: reconstruction, and the reward (with parts) of three kinds of images."""
    reward, held_out = StillShape(), split_prompts()[1]
    real = render(held_out, generator)
    rebuilt = pipe.vae.decode(pipe.vae.encode(real * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
    psnr = -10 * math.log10(F.mse_loss(rebuilt, real))
    lines = [f"| VAE reconstruction, held-out images | {psnr:.1f} dB PSNR |"]
    drawn = [draw(pipe, held_out, seed) for seed in (0, 1)]
    cases = (
        ("real images", real[:, None], held_out),
        ("VAE reconstructions", rebuilt[:, None].clamp(0, 1), held_out),
        ("samples of the base, 72 prompts x 2 seeds", torch.cat(drawn), [*held_out, *held_out]),
    )
    for title, images, prompts in cases:
        colour, place, shape = reward.parts(images, prompts).mean(0).tolist()
        parts = f"colour {colour:.3f}, place {place:.3f}, shape {shape:.3f}"
        lines.append(f"| reward of {title} | {(colour + place + shape) / 3:.3f} ({parts}) |")
    distance = (drawn[0] - drawn[1]).square().mean((1, 2, 3, 4)).sqrt().mean()
    lines.append(f"| RMS pixel distance between the two seeds | {float(distance):.4f} |")
    return lines


def save(pipe: StableDiffusionPipeline, folder: Path) -> StableDiffusionPipeline:
    """Write the pipeline in half precision; returns what a user loads, in float32."""
    shutil.rmtree(folder, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(folder)
    return StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path(__file__).parent / "still_model"
    parser.add_argument("--out", type=Path, default=folder, help="model folder (replaced)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--vae-steps", type=int, default=1500, help="VAE optimizer steps")
    parser.add_argument("--images", type=int, default=8192, help="images encoded for training")
    parser.add_argument("--steps", type=int, default=1400, help="UNet optimizer steps")
    parser.add_argument("--batch", type=int, default=64, help="latents per UNet step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    train, _ = split_prompts()
    pipe = build_pipeline()

    clock = [time.process_time()]
    vae_loss = train_vae(pipe, train, args.vae_steps, generator)
    clock.append(time.process_time())
    names = draw_prompts(train, args.images, generator)
    latents = encode(pipe, names, generator)
    clock.append(time.process_time())
    loss = train_unet(pipe, latents, names, args.steps, args.batch, generator)
    clock.append(time.process_time())

    seconds = [f"{after - before:.0f} CPU s" for before, after in pairwise(clock)]
    pipe = save(pipe, args.out)
    record = [
        f"| VAE, {args.vae_steps} steps of {VAE_BATCH} | loss {vae_loss:.4f}, {seconds[0]} |",
        f"| latents of {args.images} images | {seconds[1]} |",
        f"| UNet, {args.steps} steps of {args.batch} | loss {loss:.4f}, {seconds[2]} |",
        *evaluate(pipe, generator),
    ]
    threads = f"seed {args.seed}, {args.threads} thread, torch {torch.__version__}"
    table = "\n".join(["| what | measured |", "|---|---|", *record])
    (args.out / "README.md").write_text(README.format(threads=threads, table=table))
    print(table)


if __name__ == "__main__":
    main()
