"""verl 0.9's functions of PPO on our kernels, and `patched()`, which puts them in their place.

    from rlhf_kernels.integrations import verl

    with verl.patched() as places:  # or verl.patch() and verl.unpatch()
        ...

Names, arguments, shapes, dtypes and meaning are those of `verl.trainer.ppo.core_algos` and
`verl.utils.torch_functional`. Patch in every process that computes (verl's workers are processes of
their own), and before workers are built: what they have compiled or bound to themselves by then
stays as it is.

Values and gradients are verl's up to rounding; bfloat16 and float16 are computed in float32 and
rounded once. Where they differ on purpose:

- Masks hold zeros and ones, of any dtype, bool where verl's GAE refuses it. (`masked_mean` and
  `agg_loss` take weights too, as verl's do.)
- NaN and infinities at masked places reach no output and no gradient. GAE, whitening and `agg_loss`
  over sequences let them through in verl. (Whitening leaves them where they stand, and GAE a
  value's in the return there.)
- Logits of -inf add nothing to an entropy, which is NaN in verl.
- A label of -100 has log-probability 0, as in verl where flash-attn is installed.
- Where a ratio is exactly the dual clip's bound, or both value losses are the same by chance, the
  gradient is that of the unclipped side, not the mean of both.
- Clip ranges and the micro-batch's `batch_num_tokens` and `global_batch_size` are above 0.

Not replaced: `compute_policy_loss`, which verl has deprecated, other policy losses and advantages
(they use the replaced `agg_loss` and `masked_mean`), and `masked_var`.
"""

from __future__ import annotations

from rlhf_kernels.integrations import _verl_samples as samples
from rlhf_kernels.integrations._patching import Patch, PatchError, Peer, Replacement
from rlhf_kernels.integrations._verl_functions import (
    agg_loss,
    compute_gae_advantage_return,
    compute_policy_loss_vanilla,
    compute_value_loss,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    kl_penalty,
    logprobs_from_logits,
    masked_mean,
    masked_whiten,
)

__all__ = [
    "PatchError",
    "agg_loss",
    "compute_gae_advantage_return",
    "compute_policy_loss_vanilla",
    "compute_value_loss",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "kl_penalty",
    "logprobs_from_logits",
    "masked_mean",
    "masked_whiten",
    "patch",
    "patched",
    "unpatch",
]

_ALGORITHMS = "verl.trainer.ppo.core_algos"
_TORCH = "verl.utils.torch_functional"

_PATCH = Patch(
    Peer("verl", "verl", since="0.9", before="0.10"),
    [
        Replacement(_TORCH, logprobs_from_logits, samples.logprobs),
        Replacement(_TORCH, entropy_from_logits, samples.entropy),
        Replacement(_TORCH, entropy_from_logits_with_chunking, samples.entropy),
        Replacement(_TORCH, masked_mean, samples.mean),
        Replacement(_TORCH, masked_whiten, samples.whitening),
        Replacement(
            *(_ALGORITHMS, compute_gae_advantage_return, samples.advantages),
            registered=("ADV_ESTIMATOR_REGISTRY", "gae"),
        ),
        Replacement(_ALGORITHMS, agg_loss, samples.aggregation),
        Replacement(
            *(_ALGORITHMS, compute_policy_loss_vanilla, samples.policy_loss),
            registered=("POLICY_LOSS_REGISTRY", "vanilla"),
        ),
        Replacement(_ALGORITHMS, compute_value_loss, samples.value_loss),
        Replacement(_ALGORITHMS, kl_penalty, samples.kl),
    ],
)

patch = _PATCH.patch
unpatch = _PATCH.unpatch
patched = _PATCH.patched
