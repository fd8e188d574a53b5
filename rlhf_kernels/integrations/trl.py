"""TRL on our kernels: PPO of 1.12, and log-probabilities and entropies of 1.16 and later.

    from rlhf_kernels.integrations import trl

    with trl.patched() as places:  # or trl.patch() and trl.unpatch()
        trainer = PPOTrainer(...)
        trainer.train()

The version that is installed decides what is replaced; any other is refused. Patch while no other
thread draws random numbers: old and new are compared on a sample that is drawn. Values and
gradients are TRL's up to rounding; bfloat16 and float16 are computed in float32 and rounded once.

TRL 1.12: names, arguments, shapes, dtypes and meaning are those of `trl.trainer.utils`
(`selective_log_softmax`, `entropy_from_logits`) and of `trl.experimental.ppo.ppo_trainer` (the
others). `PPOTrainer.train` stays TRL's own, with its metrics, its loop of GAE and its loss over
[B, T] numbers, which are little work. What changes is what they are given:

- `batch_generation` keeps the log-probability of each sampled token instead of scores [B, T, V].
- `forward` gives logits that are not computed. Their log-probabilities and entropies come from
  hidden states and the head's weight, a chunk at a time, at the response's positions alone. So it
  is where the head is a plain `torch.nn.Linear`, in one process or under DDP; adapters' and
  quantized heads, and autocast, have logits as ever. Sharded weights (FSDP, ZeRO-3) are gathered
  within the model only: do not patch there.
- On a CPU `forward`, `get_reward` and sampling run the layers by `rlhf_kernels.fast_layers`,
  without gradient checkpointing, and multiply float32 by oneDNN where the CPU is AMD's. Attention
  is ours where a batch has no padding and the model's is PyTorch's.
- On a machine without a GPU malloc keeps what is freed, for the whole process, until `unpatch`:
  the system is asked for every gradient's memory anew otherwise (`rlhf_kernels.cpu_memory`).

TRL 1.16 and later have no PPO. Replaced are `selective_log_softmax`, `entropy_from_logits` and
`selective_log_softmax_and_entropy` of `trl.trainer.utils`, and the `ChunkedLogProbFunction` of
`trl.kernels`, which a head made by `add_fused_lm_head` calls: GRPO and RLOO train through it.
Where it is asked for more than log-probabilities and entropies (DPO, KTO and SFT do), the logits
are capped, or ZeRO-3 has the weight in parts, TRL's own answers.
On a GPU, where TRL runs on Triton, ours does so if `RLHF_KERNELS_BACKEND=triton` asks for it.

Where they differ on purpose:

- Masks hold zeros and ones. NaN and infinities at masked places reach no mean or variance, which
  are float32 for 16-bit values.
- Logits of -inf add nothing to an entropy, which is NaN in TRL.
- TRL 1.12's entropy metric, a float32 sum of probabilities times logits, is off by some 6e-5 of its
  size on SmolLM2; ours by 2e-8.
- TRL 1.16 divides 16-bit logits by the temperature in 16 bits on a CPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from rlhf_kernels.cpu_memory import kept_freed_memory
from rlhf_kernels.integrations import _trl_newer as newer
from rlhf_kernels.integrations import _trl_samples as samples
from rlhf_kernels.integrations._patching import (
    Patch,
    PatchByVersion,
    PatchError,
    Peer,
    Replacement,
)
from rlhf_kernels.integrations._trl_functions import (
    entropy_from_logits,
    masked_mean,
    masked_var,
    masked_whiten,
    selective_log_softmax,
)
from rlhf_kernels.integrations._trl_ppo import batch_generation, forward, get_reward

__all__ = [
    "PatchError",
    "batch_generation",
    "entropy_from_logits",
    "forward",
    "get_reward",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "patch",
    "patched",
    "selective_log_softmax",
    "unpatch",
]

_UTILS = "trl.trainer.utils"
_PPO = "trl.experimental.ppo.ppo_trainer"
_SCORES = "trl.experimental.utils"

_PPO_PATCH = Patch(
    Peer("trl", "trl", since="1.12", before="1.13"),
    [
        Replacement(_UTILS, selective_log_softmax, samples.logprobs),
        Replacement(_UTILS, entropy_from_logits, samples.entropy),
        Replacement(_PPO, masked_mean, samples.mean),
        Replacement(_PPO, masked_var, samples.variance),
        Replacement(_PPO, masked_whiten, samples.whitening),
        Replacement(_PPO, batch_generation, samples.generation),
        Replacement(_PPO, forward, samples.forward),
        Replacement(_SCORES, get_reward, samples.reward),
    ],
    # A GPU's training has its memory elsewhere.
    meanwhile=lambda: nullcontext() if torch.cuda.is_available() else kept_freed_memory(),
)

_PATCH = PatchByVersion(_PPO_PATCH, newer.PATCH)

patch = _PATCH.patch
unpatch = _PATCH.unpatch
patched = _PATCH.patched
