"""HunyuanVideo: videos, and images of one frame."""

from __future__ import annotations

from case_wan import scaled_timesteps, scaled_vae
from conformance import Case
from tiny_hunyuan_video import tiny_hunyuan_video

BREAKS = {
    "guidance": {"model.guidance": 3.3},
    "embedded guidance": {"model.embedded_guidance": 5.0},
    "shift": {"rollout.schedule": "dance", "rollout.shift": 4.0},
    "timestep scale": scaled_timesteps,
    "vae scale": scaled_vae,
}
MODEL = {"guidance": 3.0, "negative_prompt": "dull", "max_text_length": 40}

CASES = [
    Case("hunyuan_t2v", "hunyuan_video", tiny_hunyuan_video, MODEL, breaks=BREAKS),
    # Distilled guidance only, as DanceGRPO trains it.
    Case(
        "hunyuan_t2i",
        "hunyuan_video",
        tiny_hunyuan_video,
        {"frames": 1, "height": 32, "width": 16, "max_text_length": 40},
        breaks=BREAKS | {"guidance": {"model.embedded_guidance": 5.0}},
    ),
]
