"""A tiny Qwen2-VL folder, stand-ins for the authors' template files, and the official forward."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_reward_models import byte_alphabet, randomise
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from dancegrpo_fast.rewards.templates import HPSV3, VIDEO_REWARD, Template

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip


def qwen_base(folder: Path) -> Qwen2VLConfig:
    """Configuration (with a padded vocabulary, like the real one) and tokenizer of a tiny model."""
    vocab = {token: i for i, token in enumerate(byte_alphabet())}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 16, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2],
            },
            "bos_token_id": ids("<|endoftext|>"), "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        },
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)
    return config


def qwen_model(
    folder: Path, reward_tokens: list[str]
) -> tuple[Qwen2VLForConditionalGeneration, Qwen2Tokenizer]:
    """A random model whose vocabulary was resized to the tokenizer's, as the authors do."""
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": reward_tokens})
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder)).eval()
    model.resize_token_embeddings(len(tokenizer))
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)  # It shrank.
    randomise(model, 4, scale=0.15)
    return model, tokenizer


def old_names(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as transformers 4 named it, where both towers stood side by side."""
    names = (("model.visual.", "visual."), ("model.language_model.", "model."))
    state = {}
    for name, value in model.state_dict().items():
        for new, old in names:
            if name.startswith(new):
                name = old + name.removeprefix(new)
                break
        state[name] = value.clone()
    return state


def official_states(model, tokenizer, pixels: Tensor, grid: list[int], text: str, pad: str):
    """Hidden states [L, D] and ids of one sample, by the authors' forward: embeddings with the
    merged vision tokens scattered in, positions counted from 0 on all three axes."""
    tokens = int(torch.tensor(grid).prod()) // 4
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{pad * tokens}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(chat, return_tensors="pt")["input_ids"]
    seen = model.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output
    embeddings = model.get_input_embeddings()(ids).clone()
    embeddings[ids == tokenizer.convert_tokens_to_ids(pad)] = seen
    positions = torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1)
    out = model.model.language_model(inputs_embeds=embeddings, position_ids=positions)
    return out.last_hidden_state[0], ids[0]


def patches_by_loops(frames: Tensor) -> tuple[Tensor, list[int]]:
    """Qwen's patch order spelled out; frames [F even, 3, H, W] normalised."""
    t, h, w = frames.shape[0] // 2, frames.shape[2] // 14, frames.shape[3] // 14
    rows = []
    for time in range(t):
        for block_y in range(h // 2):
            for block_x in range(w // 2):
                for dy in range(2):
                    for dx in range(2):
                        y, x = (2 * block_y + dy) * 14, (2 * block_x + dx) * 14
                        piece = frames[2 * time : 2 * time + 2, :, y : y + 14, x : x + 14]
                        rows.append(piece.transpose(0, 1).flatten())
    return torch.stack(rows), [t, h, w]


def stand_in(template: Template, folder: Path, texts: dict[str, str]) -> tuple[Template, Path]:
    """A file of the same structure with other texts, and the template that expects its hash."""
    lines = ["import a_module_that_is_not_there", "OTHER = 1"]
    lines += [f"{name} = {text!r}" for name, text in texts.items()]
    path = folder / "template.py"
    path.write_text("\n".join(lines) + "\n\ndef build():\n    raise RuntimeError('executed')\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(template, sha256=digest), path


def tiny_hpsv3(folder: Path) -> tuple[nn.Module, nn.Module, Qwen2Tokenizer, Template, Path]:
    """A folder of HPSv3; returns (model, head, tokenizer, template, template file)."""
    qwen_base(folder)
    model, tokenizer = qwen_model(folder, ["<|Reward|>"])
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Dropout(0.05), nn.Linear(24, 16),
                         nn.ReLU(), nn.Linear(16, 2)).eval()  # fmt: skip
    state = old_names(model) | {f"rm_head.{k}": v for k, v in head.state_dict().items()}
    assert "lm_head.weight" in state
    save_file(state, folder / "HPSv3.safetensors")
    texts = {
        "INSTRUCTION": "\nRate {text_prompt}\n\n",
        "prompt_with_special_token": "\n<|Reward|>\n",
    }
    template, file = stand_in(HPSV3, folder, texts)
    return model, head, tokenizer, template, file


STATISTICS = {"VQ_mean": 0.3, "VQ_std": 2.0, "MQ_mean": -0.2, "MQ_std": 0.7, "TA_mean": 0.1,
              "TA_std": 1.3}  # fmt: skip


def tiny_videoalign(
    folder: Path, outputs: int
) -> tuple[nn.Module, nn.Module, Qwen2Tokenizer, Template, Path]:
    """A folder of VideoReward; returns (adapted model, head, tokenizer, template, its file)."""
    qwen_base(folder)
    model, tokenizer = qwen_model(folder, ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"])
    torch.manual_seed(1)
    head = nn.Linear(32, outputs, bias=False)
    # Rank 2, alpha 8; also in the vision tower (the authors' `vision_lora`).
    targets = ["q_proj", "v_proj", "down_proj", "qkv"]
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=targets)
    adapted = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    state = {}
    for name, value in adapted.state_dict().items():
        for new, old in (("model.visual.", "visual."), ("model.language_model.", "model.")):
            if name.startswith("base_model.model." + new):
                name = "base_model.model." + old + name.removeprefix("base_model.model." + new)
                break
        state[name] = value.clone()
    state["base_model.model.rm_head.weight"] = head.weight.detach()
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-20").mkdir()
    torch.save({}, folder / "checkpoint-3/model.pth")
    torch.save(state, folder / "checkpoint-20/model.pth")
    config = {
        "data_config": {"fps": 2, "max_frame_pixels": 12 * 28 * 28, "num_frames": None,
                        "sample_type": "uniform", "prompt_template_type": "detailed_special"},
        "model_config": {"output_dim": outputs, "use_special_tokens": True,
                         "reward_token": "special"},
        "peft_lora_config": {"lora_r": 2, "lora_alpha": 8},
        "inference_config": STATISTICS,
    }  # fmt: skip
    (folder / "model_config.json").write_text(json.dumps(config))
    text = "Rate {text_prompt}: <|VQ_reward|>, <|MQ_reward|>, <|TA_reward|>"
    template, file = stand_in(
        VIDEO_REWARD, folder, {"DETAILED_PROMPT_WITH_SPECIAL_TOKEN": text}
    )
    return adapted, head, tokenizer, template, file
