"""Keep the libraries' own progress bars and advice out of a run's output.

Only what is known to be irrelevant here is hidden; warnings that tell of a problem stay.
"""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Call before a model is loaded."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    # Each import of transformers without torchvision says so once per image processor.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_tensor. is deprecated.*")
    warnings.filterwarnings("ignore", message=".*Mismatch dtype between input and weight.*")
    # FSDP2, of a network whose output is a view: nothing of ours changes an output in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor. An in-place op.*")
