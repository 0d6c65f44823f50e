"""What a run's random numbers are for: the first thing folded into the seed's key."""

from enum import IntEnum


class Role(IntEnum):
    """Every use of randomness in a run. Numbers are part of a run's identity: never reuse one."""

    DATA = 1  # prompt order
    LATENTS = 2  # initial and per-step noise
    SELECTION = 3  # update assignment, timestep subsets
    WINDOW = 4  # where the trained window lies
    ADAPTER = 5  # initial LoRA weights
    EVALUATION = 6  # initial noise of held-out samples
    FORWARD = 7  # noise that clean samples are mixed with (DiffusionNFT, AWM)
    GRADIENT = 8  # step from which a reward's gradient is taken
