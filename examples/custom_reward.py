"""A reward of your own: one class with a `name` and a call. Here: bright clips, on average.

A recipe names it by file and class (the path counts from the working directory):

    rewards: [{name: "examples/custom_reward.py:Brightness"}]
"""

from torch import Tensor


class Brightness:
    """Mean brightness, 0 (black) to 1 (white), by the luma weights of ITU-R BT.709."""

    name = "brightness"  # The metric's: reward/brightness.

    def __call__(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """[B] float32 of videos [B, F, 3, H, W] in [0, 1]; return NaN for what cannot be scored."""
        weights = videos.new_tensor([0.2126, 0.7152, 0.0722])
        return videos.mean(dim=(1, 3, 4)) @ weights
