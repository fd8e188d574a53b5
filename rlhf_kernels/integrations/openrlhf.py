"""OpenRLHF 0.11's PPO on our kernels, and `patched()`, which puts them in its functions' place.

    from rlhf_kernels.integrations import openrlhf

    with openrlhf.patched() as places:  # or openrlhf.patch() and openrlhf.unpatch()
        ...

Names, arguments, shapes, dtypes and meaning are those of `openrlhf.models.utils`
(`log_probs_from_logits`, `compute_entropy`, `compute_approx_kl`), `openrlhf.models.loss`
(`PolicyLoss`, `ValueLoss`) and `RemoteExperienceMaker.get_advantages_and_returns`. Both losses and
the advantages are replaced in OpenRLHF's own classes, so for instances that are there already too:
their `forward` reads the settings that OpenRLHF's constructor has checked and kept.

Patch in every process that computes: OpenRLHF's actors of Ray are processes of their own, the
trainer with its GAE as well as the workers with the losses. Ray's own hook does,

    ray.init(
        runtime_env={"worker_process_setup_hook": "rlhf_kernels.integrations.openrlhf.patch"}
    )

before OpenRLHF starts, which then takes this Ray as it is. Patching imports OpenRLHF's modules, and
with them DeepSpeed, Ray and vLLM: the hook does so in vLLM's processes too, which OpenRLHF itself
keeps free of DeepSpeed.

Tried on a CPU, with DeepSpeed 0.19.6 and Ray 2.55.0 and stand-ins for flash-attn and vLLM: every
function, `Actor` on a small model, the experience maker's advantages, and the hook. Not tried: a
whole training, which needs GPUs.

Values and gradients are OpenRLHF's up to rounding; bfloat16 and float16 are computed in float32 and
rounded once. Where they differ on purpose:

- Masks hold zeros and ones, of any dtype. No mask at all means that all is valid, in each
  aggregation.
- NaN and infinities at masked places reach no output and no gradient, where 0 · NaN is NaN. So a
  batch of nothing valid, whose loss is NaN, has gradients of 0, not NaN.
- `log_probs_from_logits` leaves the logits as they are at any temperature, where OpenRLHF's divides
  them in place. A label of -100 has log-probability 0, as in OpenRLHF on flash-attn.
- Logits of -inf add nothing to an entropy, which is NaN in OpenRLHF.
- Where a ratio is exactly the dual clip's bound, or both value losses are the same by chance, the
  gradient is that of the unclipped side, not the mean of both.
- Clip ranges, `batch_num_tokens` and `global_batch_size` are above 0; gamma and lambd in [0, 1].

GSPO and the corrections of the rollout's probabilities are the kernel of the loss over ratios and
weights that PyTorch computes. Not replaced, and OpenRLHF's own as ever: `aggregate_loss`, with
which it adds up its KL and entropy losses, `masked_mean`, `masked_normalize`, `compute_reward`, the
whitening of advantages, `get_cumulative_returns` (REINFORCE and its like), and the losses of SFT,
DPO and reward models.
"""

from __future__ import annotations

from rlhf_kernels.integrations import _openrlhf_samples as samples
from rlhf_kernels.integrations._openrlhf_functions import (
    PolicyLoss,
    ValueLoss,
    compute_approx_kl,
    compute_entropy,
    get_advantages_and_returns,
    log_probs_from_logits,
)
from rlhf_kernels.integrations._patching import Patch, PatchError, Peer, Replacement

__all__ = [
    "PatchError",
    "PolicyLoss",
    "ValueLoss",
    "compute_approx_kl",
    "compute_entropy",
    "get_advantages_and_returns",
    "log_probs_from_logits",
    "patch",
    "patched",
    "unpatch",
]

_UTILS = "openrlhf.models.utils"
_LOSS = "openrlhf.models.loss"
_EXPERIENCE = "openrlhf.trainer.ppo_utils.experience_maker"

_PATCH = Patch(
    Peer("openrlhf", "openrlhf", since="0.11", before="0.12"),
    [
        Replacement(_UTILS, log_probs_from_logits, samples.logprobs),
        Replacement(_UTILS, compute_entropy, samples.entropy),
        Replacement(_UTILS, compute_approx_kl, samples.kl),
        Replacement(
            *(_LOSS, PolicyLoss.forward, samples.policy_loss),
            owner="PolicyLoss",
            constructor=PolicyLoss,
        ),
        Replacement(
            *(_LOSS, ValueLoss.forward, samples.value_loss),
            owner="ValueLoss",
            constructor=ValueLoss,
        ),
        Replacement(
            *(_EXPERIENCE, get_advantages_and_returns, samples.advantages),
            owner="RemoteExperienceMaker",
        ),
    ],
)

patch = _PATCH.patch
unpatch = _PATCH.unpatch
patched = _PATCH.patched
