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
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from shapes import FRAMES, SIZE, render, split_prompts
from torch import Tensor
from tqdm import tqdm
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from dancegrpo_fast.rewards.moving_shape import COLOURS, DIRECTIONS, SHAPES, MovingShape

TEXT_LENGTH = 16
LATENT_CHANNELS = 8
SHIFT = 2.0
STEPS = 10
VAE_BATCH = 8


@dataclass(frozen=True)
class Sizes:
    """How long each stage runs."""

    image_steps: int
    clip_steps: int
    clips: int
    steps: int
    batch: int


def build_pipeline() -> WanPipeline:
    """The untrained pipeline: real classes, small sizes."""
    words = dict.fromkeys(" ".join(["a", "moving", *COLOURS, *SHAPES, *DIRECTIONS]).split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -9.0)]
    pieces += [("\u2581" + word, -3.0) for word in words]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)
    text_config = UMT5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4
    )
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,  # 2x2 pixels are folded into channels: a quarter of the convolution work
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=64,
        freq_dim=128,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text_config).eval(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=transformer,
    )


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
    parameters: list[torch.nn.Parameter], rate: float, steps: int, title: str, loss_of_batch
) -> float:
    """AdamW with a short warm-up and a cosine decay to zero; returns the mean loss at the end."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / 50) * 0.5 * (1 + math.cos(math.pi * i / steps)),
    )
    last: list[float] = []
    with tqdm(range(steps), desc=title) as bar:
        for _ in bar:
            loss = loss_of_batch()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            last = [*last[-49:], float(loss.detach())]
            bar.set_postfix(loss=f"{sum(last) / len(last):.4f}")
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


def train_vae(pipe: WanPipeline, prompts: list[str], sizes: Sizes, generator) -> float:
    """Reconstruction, first of single frames (cheap), then of clips, in one learning-rate decay.

    Pixels of the shape count three times: they are few. A light penalty keeps latents centred.
    """
    step = 0

    def loss_of_batch() -> Tensor:
        nonlocal step
        step += 1
        clips = to_vae(render(draw_prompts(prompts, VAE_BATCH, generator), generator))
        if step <= sizes.image_steps:  # two frames of each clip, as clips of one frame
            clips = clips[:, :, torch.randperm(FRAMES, generator=generator)[:2]]
            clips = clips.transpose(1, 2).flatten(0, 1)[:, :, None]
        latents = pipe.vae.encode(clips).latent_dist.mode()
        error = pipe.vae.decode(latents).sample - clips
        weight = 1 + 2.0 * (clips.amax(1, keepdim=True) > -0.5)
        loss = (weight * (0.3 * error.abs() + error.square())).mean()
        return loss + 1e-3 * latents.square().mean()

    start_as_images(pipe.vae)
    pipe.vae.train()
    steps = sizes.image_steps + sizes.clip_steps
    loss = learn(list(pipe.vae.parameters()), 4e-3, steps, "vae", loss_of_batch)
    pipe.vae.eval().requires_grad_(False)
    return loss


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
    pipe: WanPipeline, latents: Tensor, names: list[str], sizes: Sizes, generator: torch.Generator
) -> float:
    """Rectified flow: at x = (1 - sigma) x0 + sigma eps the target velocity is eps - x0."""
    unique = sorted(set(names))
    with torch.no_grad():  # padded with zeros after the end token, as the pipeline does
        text, _ = pipe.encode_prompt(unique, None, False, max_sequence_length=TEXT_LENGTH)
    row = {prompt: i for i, prompt in enumerate(unique)}
    rows = torch.tensor([row[name] for name in names])

    def loss_of_batch() -> Tensor:
        index = torch.randint(len(latents), (sizes.batch,), generator=generator)
        x0 = latents[index]
        noise = torch.randn(x0.shape, generator=generator)
        u = torch.rand(sizes.batch, generator=generator)
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)  # the sampler's own spacing
        mix = sigma[:, None, None, None, None]
        velocity = pipe.transformer(
            hidden_states=(1 - mix) * x0 + mix * noise,
            timestep=1000 * sigma,
            encoder_hidden_states=text[rows[index]],
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, noise - x0)

    pipe.transformer.train()
    parameters = list(pipe.transformer.parameters())
    loss = learn(parameters, 2e-3, sizes.steps, "transformer", loss_of_batch)
    pipe.transformer.eval()
    return loss


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--image-steps", type=int, default=1500, help="VAE steps on frames")
    parser.add_argument("--clip-steps", type=int, default=1000, help="VAE steps on clips")
    parser.add_argument("--clips", type=int, default=4096, help="clips encoded for training")
    parser.add_argument("--steps", type=int, default=600, help="transformer optimizer steps")
    parser.add_argument("--batch", type=int, default=96, help="latents per transformer step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    sizes = Sizes(args.image_steps, args.clip_steps, args.clips, args.steps, args.batch)

    train, held_out = split_prompts()
    pipe = build_pipeline()
    seconds = [time.perf_counter()]
    vae_loss = train_vae(pipe, train, sizes, generator)
    seconds.append(time.perf_counter())
    names = draw_prompts(train, sizes.clips, generator)
    latents = normalise(pipe, encode_clips(pipe, names, generator))
    seconds.append(time.perf_counter())
    loss = train_transformer(pipe, latents, names, sizes, generator)
    seconds.append(time.perf_counter())
    record = [
        f"| VAE: {sizes.image_steps} steps on frames, {sizes.clip_steps} on clips | "
        f"loss {vae_loss:.4f}, {seconds[1] - seconds[0]:.0f} s |",
        f"| latents: {sizes.clips} clips | {seconds[2] - seconds[1]:.0f} s |",
        f"| transformer: {sizes.steps} steps of {sizes.batch} latents | loss {loss:.4f}, "
        f"{seconds[3] - seconds[2]:.0f} s |",
        *evaluate(pipe, held_out, generator),
    ]
    shutil.rmtree(args.out, ignore_errors=True)
    pipe.save_pretrained(args.out)
    print("\n".join(record))


if __name__ == "__main__":
    main()
