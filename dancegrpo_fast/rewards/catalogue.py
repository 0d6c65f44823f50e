"""The rewards there are: where each stands, and what one should know before training on it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One reward. Calling it builds the reward.

    Attributes:
        target: `module:Class` below `dancegrpo_fast.rewards`, imported when it is asked for.
        measures: What a high score means.
        weights: Where they come from, or empty.
        licence: Of code and weights; read it again before you ship.
        memory: Of the weights in float32 unless said otherwise, by arithmetic from their sizes.
        range: Usual scores.
        cheats: Known ways in which a trained model gets the score without the quality.
    """

    target: str
    measures: str
    range: str
    cheats: str
    weights: str = ""
    licence: str = "ours"
    memory: str = "none"

    def load(self) -> Callable[..., Any]:
        """The class."""
        module, _, name = self.target.partition(":")
        found: Callable[..., Any] = getattr(
            importlib.import_module(f"dancegrpo_fast.rewards.{module}"), name
        )
        return found

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The reward."""
        return self.load()(*args, **options)


REWARDS: dict[str, Entry] = {
    "moving_shape": Entry(
        "moving_shape:MovingShape",
        "the demo's coloured shape: right colour, direction and shape",
        range="0 to 1",
        cheats="none known; it judges nothing but its own toy domain",
    ),
    "clip_score": Entry(
        "clip:ClipScore",
        "how well the image fits the prompt",
        weights="openai/clip-vit-large-patch14, or any CLIP in transformers' or open_clip's layout",
        licence="MIT (OpenAI); Apple's DFN models have their own",
        memory="1.7 GB (ViT-L/14), 3.9 GB (ViT-H/14)",
        range="0.15 to 0.4",
        cheats="the prompt written into the picture; objects repeated; style collapses",
    ),
    "pickscore": Entry(
        "clip:PickScore",
        "which image people picked for the prompt",
        weights="yuvalkirstain/PickScore_v1",
        licence="MIT",
        memory="3.9 GB",
        range="18 to 26",
        cheats="saturated, contrasty pictures; close-ups",
    ),
    "hpsv2": Entry(
        "clip:Hps2",
        "which image people preferred for the prompt (HPS-v2 and v2.1)",
        weights="xswu/HPSv2",
        licence="Apache-2.0",
        memory="3.9 GB",
        range="0.2 to 0.36",
        cheats="over-bright, oily surfaces: add clip_score (DanceGRPO: 0.7 to 1.4)",
    ),
    "laion_aesthetic": Entry(
        "aesthetic:Aesthetic",
        "how pretty the picture is; the prompt is not read",
        weights="sac+logos+ava1-l14-linearMSE.pth and openai/clip-vit-large-patch14",
        licence="Apache-2.0 (predictor), MIT (CLIP)",
        memory="1.7 GB",
        range="4 to 8",
        cheats="drops the prompt for one painterly style",
    ),
    "imagereward": Entry(
        "image_reward:ImageReward",
        "which image people preferred for the prompt",
        weights="THUDM/ImageReward",
        licence="Apache-2.0",
        memory="1.8 GB",
        range="-2.3 to 2",
        cheats="alone it degrades FLUX pictures: mix it with another",
    ),
    "hpsv3": Entry(
        "hpsv3:Hps3",
        "which image people preferred for the prompt (Qwen2-VL 7B)",
        weights="MizzenAI/HPSv3 and Qwen/Qwen2-VL-7B-Instruct (configuration, tokenizer)",
        licence="MIT; Apache-2.0 (Qwen2-VL 7B)",
        memory="15.5 GB in bfloat16",
        range="-3 to 14",
        cheats="detail for its own sake",
    ),
    "videoalign": Entry(
        "video_align:VideoAlign",
        "visual quality (VQ), motion quality (MQ) and fit to the prompt (TA) of a video",
        weights="KlingTeam/VideoReward and Qwen/Qwen2-VL-2B-Instruct (configuration, tokenizer)",
        licence="Apache-2.0 (weights), MIT (code)",
        memory="4.4 GB in bfloat16",
        range="-3 to 3 each",
        cheats="MQ: stillness; VQ: saturated, static close-ups: watch motion_amplitude",
    ),
    "jpeg_compressibility": Entry(
        "pixels:JpegCompressibility",
        "how few bytes the picture needs as JPEG",
        range="-1.5 to 0",
        cheats="flat colour is the optimum",
    ),
    "jpeg_incompressibility": Entry(
        "pixels:JpegIncompressibility",
        "how many kB the picture needs as JPEG",
        range="0 to 800",
        cheats="noise is the optimum",
    ),
    "colour": Entry(
        "pixels:Colour",
        "share of the picture that has the colour the prompt names",
        range="0 to 1",
        cheats="paints everything in that colour",
    ),
    "colourfulness": Entry(
        "pixels:Colourfulness",
        "how colourful the picture is (Hasler and Suesstrunk)",
        range="0 to 1",
        cheats="coloured noise, rainbows",
    ),
    "motion_smoothness": Entry(
        "motion:MotionSmoothness",
        "little change of the change between frames",
        range="-0.5 to 0",
        cheats="stillness is the optimum: pair it with motion_amplitude",
    ),
    "motion_amplitude": Entry(
        "motion:MotionAmplitude",
        "how much changes between frames, up to a cap",
        range="0 to the cap",
        cheats="flicker and noise: pair it with motion_smoothness and flicker",
    ),
    "flicker": Entry(
        "motion:Flicker",
        "little change of the brightness and colour of whole frames",
        range="-0.5 to 0",
        cheats="stillness is one optimum",
    ),
    "counting": Entry(
        "objects:Counting",
        "as many separate bright things as the prompt or its metadata say",
        range="0 to 1",
        cheats="things that are mere dots",
    ),
    "position": Entry(
        "objects:Position",
        "things lie to each other as the prompt or its metadata say",
        range="0 to 1",
        cheats="the colours alone, without the things",
    ),
    "ocr": Entry(
        "ocr:Ocr",
        "the text in quotes in the prompt can be read in the picture",
        weights="in the package rapidocr-onnxruntime",
        licence="Apache-2.0",
        memory="16 MB",
        range="0 to 1",
        cheats="plain text on plain ground",
    ),
    "remote": Entry(
        "remote:Remote",
        "what a server of `dancegrpo-fast serve-reward` measures",
        range="of that reward",
        cheats="those of that reward",
    ),
    "unified_reward": Entry(
        "unified_reward:UnifiedReward",
        "ratings of an image or video by UnifiedReward, on a server or in a folder",
        range="1 to 5",
        cheats="text in the picture that asks for a high score",
    ),
    "unified_reward_pair": Entry(
        "unified_reward:UnifiedPair",
        "which of two images UnifiedReward prefers; needs win_rate",
        range="0 to 1",
        cheats="as unified_reward; ties where samples are alike",
    ),
    "unified_reward_think": Entry(
        "unified_reward:UnifiedThink",
        "which of two samples UnifiedReward-Think prefers; needs win_rate",
        range="0 to 1",
        cheats="as unified_reward; the place in the pair: both orders correct that",
    ),
    "judge_score": Entry(
        "judges:JudgeScore",
        "a rating by any vision-language model, on a server or in a folder",
        range="0 to 10",
        cheats="few distinct scores; text in the picture that asks for a high one",
    ),
    "judge_pair": Entry(
        "judges:JudgePair",
        "which of two samples any vision-language model prefers; needs win_rate",
        range="0 to 1",
        cheats="the place in the pair: both orders correct that",
    ),
    "yes_probability": Entry(
        "judges:YesProbability",
        "probability that a vision-language model answers yes",
        range="0 to 1",
        cheats="saturates near 0 and 1, where samples no longer differ",
    ),
    "deqa": Entry(
        "checklists:Deqa",
        "quality of the picture by DeQA-Score or another model that rates in words",
        weights="zhiyuanyou/DeQA-Score-Mix3 (own code: on a server of yours)",
        memory="on the server",
        licence="MIT (code)",
        range="1 to 5",
        cheats="none reported; the prompt is not read",
    ),
    "vision_reward": Entry(
        "checklists:VisionReward",
        "a checklist of 30 questions about an image or 29 about a video, weighted",
        weights="THUDM/VisionReward-Image, THUDM/VisionReward-Video (own code: on a server)",
        memory="on the server",
        licence="Apache-2.0 (code); of the models, see their cards",
        range="-2.5 to 2.5 (images, without the alignment), -0.22 to 0.22 (videos)",
        cheats="none reported; answers of yes and no give few distinct scores",
    ),
    "geneval": Entry(
        "geneval:GenEval",
        "things, counts, colours and positions that the prompt's metadata name",
        weights="facebook/mask2former-swin-small-coco-instance and openai/clip-vit-large-patch14",
        licence="MIT (GenEval, CLIP); of Mask2Former, see its card",
        memory="2.0 GB",
        range="0 to 1, below 0 for far too many things",
        cheats="none reported; style and beauty are not looked at",
    ),
    "preference": Entry(
        "preference:Preference",
        "what the pairs preferred that you trained it on (examples/train_reward.py)",
        weights="a folder of yours",
        licence="of the CLIP and the pairs that you took",
        memory="of its CLIP: 1.7 GB (ViT-L/14)",
        range="about -5 to 5",
        cheats="whatever differed between better and worse pictures beside quality",
    ),
}
