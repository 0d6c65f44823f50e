"""The ops as Triton kernels: CUDA tensors, or CPU tensors under TRITON_INTERPRET=1; float32.

The five functions take checked arguments in the order of the native module and know nothing of
autograd. Importing this package imports Triton, so `ops` does it only when it is asked for.

`tiles.py` holds the sum and the layouts that all kernels share; `philox.py` the normal;
`rollout.py`, `residual.py`, `finalise.py`, `nft.py` and `gradient.py` one step each; `rows.py`
makes coefficients from sigmas on the device; `layout.py`, `configs.py` and `launch.py` are the
host's side.
"""

from dancegrpo_fast.ops.kernels.finalise import policy_loss, transition_log_prob
from dancegrpo_fast.ops.kernels.gradient import transition_gradient
from dancegrpo_fast.ops.kernels.nft import nft_loss
from dancegrpo_fast.ops.kernels.rollout import sample_transition

__all__ = [
    "nft_loss",
    "policy_loss",
    "sample_transition",
    "transition_gradient",
    "transition_log_prob",
]
