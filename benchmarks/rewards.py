"""What scoring costs: each reward at the size of its real model, with random weights.

    python benchmarks/rewards.py [--only NAME ...] [--full] [--device cuda] [--json PATH]

Each row runs in a process of its own, so that its peak memory is its own. First a batch must give
the scores of its samples one by one, and different samples different scores; then batches and
singles are timed in turn. Texts are stand-ins with as many tokens as the official ones. On the CPU
HPSv3 is run with 2 and with 5 of its 28 layers, which are alike, and extrapolated.

Without arguments: the rewards without weights, CLIP ViT-L/14 and ImageReward. `--full`: all.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import arguments, environment, headline, print_table, write_json
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextModel,
    BlipVisionModel,
    CLIPModel,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLModel,
)

from dancegrpo_fast.rewards import REWARDS, Reward, Samples, clip, hpsv3, score, video_align
from dancegrpo_fast.rewards.aesthetic import ScoreHead
from dancegrpo_fast.rewards.image_reward import ImageReward, text_config_of, vision_config_of
from dancegrpo_fast.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from dancegrpo_fast.rewards.qwen import QwenReader
from dancegrpo_fast.rewards.weights import build

PROMPT = "a red square moving left of a blue square"
MOTION = ("motion_smoothness", "motion_amplitude", "flicker", "moving_shape")
PLAIN = ("jpeg_compressibility", "colour", "colourfulness", "counting", "position", *MOTION)
QUICK = (*PLAIN, "clip_score", "imagereward")
#: Tokens of the official texts (HPSv3's and VideoAlign's), to the nearest 50.
TOKENS = {"hpsv3": 350, "videoalign": 900}
LAYERS = 28  # Of Qwen2-VL 2B and 7B.


# ---- models of full size -------------------------------------------------------------------------


def random_model(make: Callable[[], nn.Module], dtype: torch.dtype) -> Any:
    """A frozen module with random weights: one million normal numbers (spread 0.05), repeated."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = make()
    finally:
        torch.set_default_dtype(default)
    noise = torch.randn(2**20 - 3, generator=torch.Generator().manual_seed(0)).mul_(0.05).to(dtype)
    for parameter in module.parameters():
        for piece in parameter.detach().view(-1).split(len(noise)):
            piece.copy_(noise[: len(piece)])
        if parameter.ndim == 1:
            parameter.detach().add_(1)
    return module.to(dtype).eval().requires_grad_(False)


def alphabet() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level vocabularies."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in kept] + [chr(256 + n) for n in range(256 - len(kept))]


def clip_tokenizer() -> CLIPTokenizer:
    """A token per letter; the length is padded to 77 anyway."""
    tokens = [*alphabet(), *(c + "</w>" for c in alphabet()), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def clip_reward(kind: type, cfg: dict[str, Any], preprocess: Preprocess) -> Any:
    """A CLIP reward of open_clip's configuration."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = random_model(lambda: CLIPModel(clip.open_clip_config(cfg)), torch.float32)
    reward = kind.__new__(kind)
    # The stand-in tokenizer's end token is 513.
    model.text_model.eos_token_id = 513
    reward.clip = clip.Clip(model, clip_tokenizer(), preprocess, clean=False)
    return reward


def clip_score() -> Any:
    vision = {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12}
    large = {"embed_dim": 768, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    return clip_reward(clip.ClipScore, large, Preprocess((224, 224)))


def hpsv2() -> Any:
    preprocess = Preprocess((224, 224), mode="longest", mean=CLIP_MEAN, std=CLIP_STD)
    return clip_reward(clip.Hps2, clip.VIT_H_14, preprocess)


def imagereward() -> Any:
    shapes = {
        "embeddings.position_embedding": torch.empty(1, 197, 1024),
        "embeddings.patch_embedding.weight": torch.empty(1024, 3, 16, 16),
        "encoder.layers.0.mlp.fc1.weight": torch.empty(4096, 1),
    } | {f"encoder.layers.{layer}.x": torch.empty(0) for layer in range(24)}
    med = {
        "vocab_size": 30524, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    }  # fmt: skip
    vision, text = vision_config_of(shapes), text_config_of(med, 1024)
    reward = ImageReward.__new__(ImageReward)
    reward.vision = random_model(lambda: BlipVisionModel(vision), torch.float32)
    reward.text = random_model(lambda: BlipTextModel(text, add_pooling_layer=False), torch.float32)
    reward.head = random_model(lambda: ScoreHead(768), torch.float32)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PROMPT.split()]
    reward.tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(dict.fromkeys(words))})
    reward.preprocess = Preprocess((224, 224), crop="even")
    return reward


def reader(tokens: list[str], layers: int, sizes: tuple[int, int, int, int]) -> QwenReader:
    """Qwen2-VL in bfloat16 with some of its layers; (width, inner width, heads, heads of keys)."""
    special = [
        "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>",
    ]  # fmt: skip
    tokenizer = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(alphabet())}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special + tokens})
    ids = tokenizer.convert_tokens_to_ids
    width, inner, heads, keys = sizes
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 151657 + len(tokens), "hidden_size": width, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
            },
        },
        vision_config={
            "depth": 32, "embed_dim": 1280, "hidden_size": width, "num_heads": 16, "mlp_ratio": 4,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = random_model(lambda: Qwen2VLModel(config), torch.bfloat16)
    return QwenReader(model, tokenizer, ids(tokens))


def stand_in(name: str, rewards: list[str]) -> str:
    """A text of about as many tokens as the official one: a letter is a token here."""
    left = TOKENS[name] - len(PROMPT)
    return "x" * left + "{text_prompt}" + "".join(rewards)


def hps3(layers: int) -> Any:
    reward = hpsv3.Hps3.__new__(hpsv3.Hps3)
    reward.text, reward.max_pixels = stand_in("hpsv3", ["<|Reward|>"]), hpsv3.PIXELS
    reward.reader = reader(["<|Reward|>"], layers, (3584, 18944, 28, 4))
    linear = [nn.Linear(3584, 1024), nn.Linear(1024, 16), nn.Linear(16, 2)]
    shapes = {f"rm_head.{n}.{k}": v for n, one in zip((0, 3, 5), linear, strict=True)
              for k, v in one.state_dict().items()}  # fmt: skip
    reward.head = hpsv3.reward_head(shapes)
    return reward


def videoalign() -> Any:
    reward = video_align.VideoAlign.__new__(video_align.VideoAlign)
    reward.text = stand_in("videoalign", list(video_align.TOKENS))
    reward.reader = reader(list(video_align.TOKENS), LAYERS, (1536, 8960, 12, 2))
    head = {"weight": torch.randn(1, 1536, generator=torch.Generator().manual_seed(0)) * 0.02}
    reward.head = build(lambda: nn.Linear(1536, 1, bias=False), head, torch.float32)
    reward.frame_pixels, reward.wanted_fps, reward.fps, reward.batch_size = 448**2, 2.0, None, 4
    reward.shift, reward.spread = torch.zeros(3), torch.ones(3)
    return reward


#: Name: (how to build it, samples of a batch, repeats).
MODELS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "clip_score": (clip_score, 4, 3),
    "hpsv2": (hpsv2, 4, 2),
    "imagereward": (imagereward, 4, 3),
    "hpsv3": (lambda: hps3(LAYERS), 2, 2),
    "videoalign": (videoalign, 2, 1),
}


# ---- one row -------------------------------------------------------------------------------------


def samples_of(name: str, count: int) -> tuple[Samples, str]:
    """Smooth pictures or clips that differ, uint8; and their size in words."""
    frames, side = (16, 64) if name in MOTION else (16, 512) if name == "videoalign" else (1, 512)
    y = torch.linspace(0, 6, side).view(-1, 1)
    x = torch.linspace(0, 6, side).view(1, -1)
    waves = [
        (x * (1 + k % 3) + y * (1 + k % 4) + 0.7 * k + 0.1 * f).sin()
        for k in range(3 * count)
        for f in range(frames)
    ]
    pixels = torch.stack(waves).view(count, 3, frames, side, side).transpose(1, 2)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(pixels.shape, generator=generator) * 8
    videos = (127 + 110 * pixels + noise).clamp(0, 255).to(torch.uint8)
    prompt = "a red square moving left" if name == "moving_shape" else PROMPT
    what = f"{side} x {side}" if frames == 1 else f"{frames} x {side} x {side}"
    return Samples(videos, [prompt] * count, fps=8), what


def scores(reward: Reward, samples: Samples, batch: int) -> Tensor:
    """In batches of a size."""
    found = []
    for first in range(0, len(samples), batch):
        scored = score(reward, samples.of(range(first, min(first + batch, len(samples)))))
        if any(scored.errors):
            raise SystemExit(f"{reward.name}: {scored.errors}")
        found.append(scored.values)
    return torch.cat(found)


def check(reward: Reward, samples: Samples, narrow: bool) -> float:
    """The largest difference of batch and singles.

    float32: 2e-5 of the largest score, as in the tests. bfloat16: matrix products round to 8 bits
    in another order for another shape, 28 layers deep; 3e-2 of the largest score, and far less
    than another picture changes.

    Raises:
        SystemExit: They differ more, or a model does not see that pictures differ.
    """
    one, many = scores(reward, samples, 1), scores(reward, samples, len(samples))
    gap = float((one - many).abs().max())
    limit = (3e-2 if narrow else 2e-5) * max(float(one.abs().max()), 1e-3)
    if not gap <= limit:
        raise SystemExit(f"{reward.name}: a batch differs from its samples by {gap:.3g}")
    if reward.name in MODELS and not float(one.max() - one.min()) > gap:
        raise SystemExit(f"{reward.name}: pictures change the score less than batches do")
    return gap


def times(reward: Reward, samples: Samples, repeats: int) -> list[float]:
    """Seconds per sample one at a time and in a batch, medians of runs in turn."""
    found: dict[int, list[float]] = {1: [], len(samples): []}
    for _ in range(repeats):
        for batch, seconds in found.items():
            start = time.perf_counter()
            scores(reward, samples, batch)
            seconds.append((time.perf_counter() - start) / len(samples))
    return [statistics.median(seconds) for seconds in found.values()]


def weight_bytes(reward: Any) -> int:
    modules = reward.modules() if hasattr(reward, "modules") else []
    return sum(p.numel() * p.element_size() for m in modules for p in m.parameters())


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, device: torch.device) -> dict[str, Any]:
    """One row; `extrapolated_from` names the layers that were run, if not all."""
    make, count, repeats = MODELS.get(name, (REWARDS.get(name), 16, 5))
    samples, what = samples_of(name, count)
    row: dict[str, Any] = {"reward": name, "sample": what, "batch": count}
    if name == "hpsv3" and device.type == "cpu":
        return row | extrapolated(samples, repeats)
    reward = make()
    if hasattr(reward, "place"):
        reward.place(device)
    narrow = name in TOKENS
    row["difference"] = check(reward, samples, narrow)
    one, many = times(reward, samples, repeats)
    row |= {"one_s": one, "batch_s": many, "weights_bytes": weight_bytes(reward)}
    if name in MODELS:
        row["peak_bytes"] = peak_bytes(device)
    if isinstance(reward, (clip.ClipScore, clip.Hps2)):
        start = time.perf_counter()
        reward.clip._encode([PROMPT])
        row["text_s"] = time.perf_counter() - start
    return row


def extrapolated(samples: Samples, repeats: int) -> dict[str, Any]:
    """HPSv3 from 2 and 5 layers: time and memory are linear in the layers between."""
    few, some = 2, 5
    reward = hps3(some)
    row: dict[str, Any] = {"difference": check(reward, samples, narrow=True)}
    layers = reward.reader.model.language_model.layers
    each = sum(p.numel() * p.element_size() for p in layers[0].parameters())
    found = {some: times(reward, samples, repeats)}
    peak = peak_bytes(torch.device("cpu"))
    weights = weight_bytes(reward)
    reward.reader.model.language_model.layers = layers[:few]
    found[few] = times(reward, samples, repeats)
    one, many = (
        found[few][k] + (LAYERS - few) * (found[some][k] - found[few][k]) / (some - few)
        for k in (0, 1)
    )
    more = (LAYERS - some) * each
    return row | {
        "one_s": one, "batch_s": many, "weights_bytes": weights + more, "peak_bytes": peak + more,
        "extrapolated_from": [few, some], "measured_s": found, "measured_peak_bytes": peak,
    }  # fmt: skip


# ---- all rows ------------------------------------------------------------------------------------


def shown(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    gigabytes = [
        f"{row[key] / 1e9:.2f}" if row.get(key) else "" for key in ("weights_bytes", "peak_bytes")
    ]
    layers = row.get("extrapolated_from")
    mark = f" (extrapolated from {layers[0]} and {layers[1]} layers)" if layers else ""
    one, many = row["one_s"] * 1e3, row["batch_s"] * 1e3
    cells = [f"`{row['reward']}`{mark}", row["sample"], str(row["batch"])]
    return [*cells, f"{one:.3g}", f"{many:.3g}", f"{one / many:.2f}", *gigabytes]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=[*PLAIN, *MODELS], help="these rows")
    parser.add_argument("--row", help="used by itself: measure one row and print it as JSON")
    args = parser.parse_args()
    if args.row:
        found = [measure(name, torch.device(args.device)) for name in args.row.split(",")]
        print(json.dumps(found))
        return
    names = args.only or ([*PLAIN, *MODELS] if args.full else list(QUICK))
    plain = ",".join(name for name in names if name in PLAIN)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for group in filter(None, [plain, *(name for name in names if name in MODELS)]):
        command = [sys.executable, __file__, "--row", group, "--device", args.device]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:  # The others still say what they cost.
            failed.append(group)
        else:
            rows += json.loads(done.stdout.splitlines()[-1])
    record = environment(args.device)
    print(headline(record))
    head = ["reward", "sample", "batch", "ms, one at a time", "ms, in a batch", "gain",
            "weights, GB", "peak, GB"]  # fmt: skip
    print_table(head, [shown(row) for row in rows])
    write_json(args.json, {"environment": record, "tokens": TOKENS, "results": rows})
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
