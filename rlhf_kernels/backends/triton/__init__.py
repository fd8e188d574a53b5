"""The Triton kernels for GPUs: `launch_x` allocates for what is in `x`, and launches it.

With TRITON_INTERPRET=1 set before Triton is imported, the kernels run interpreted, on CPU tensors
too: slowly, to test them. No GPU has confirmed them yet, so this backend must be asked for by name.
"""

from __future__ import annotations

import torch
import triton

from rlhf_kernels.backends.triton import token_logprobs as row_kernels
from rlhf_kernels.backends.triton.launch_advantages import gae_forward, rollout_forward
from rlhf_kernels.backends.triton.launch_ppo_loss import ppo_loss_forward
from rlhf_kernels.backends.triton.launch_token_logprobs import (
    token_logprobs_backward,
    token_logprobs_forward,
)
from rlhf_kernels.backends.triton.launch_whitening import moments, whiten

__all__ = [
    "NAME",
    "PRIMITIVES",
    "availability",
    "describe",
    "gae_forward",
    "moments",
    "ppo_loss_forward",
    "rollout_forward",
    "token_logprobs_backward",
    "token_logprobs_forward",
    "whiten",
]

NAME = "triton"
PRIMITIVES = frozenset(
    {
        "token_logprobs_forward",
        "token_logprobs_backward",
        "gae_forward",
        "rollout_forward",
        "moments",
        "whiten",
        "ppo_loss_forward",
    }
)


def availability() -> str | None:
    """None where the kernels can be used, else the reason."""
    if _interpreted() or torch.cuda.is_available():
        return None
    return "no GPU was found; TRITON_INTERPRET=1 runs the kernels interpreted on CPU tensors"


def describe() -> str:
    """For `rlhf_kernels.info`: Triton's version, and what runs its kernels."""
    where = "interpreted" if _interpreted() else "compiled when first used"
    return f"Triton {triton.__version__}, {where}"


def _interpreted() -> bool:
    return not isinstance(row_kernels.forward_kernel, triton.JITFunction)
