"""`python -m rlhf_kernels.info`: which backends this machine has, and what runs where."""

from __future__ import annotations

import os

import torch

from rlhf_kernels import backends

# The public operations, by the primitive that the choice of a backend turns on.
OPERATIONS = {
    "token_logprobs": "token_logprobs_forward",
    "token_logprobs (backward)": "token_logprobs_backward",
    "linear_token_logprobs": "token_logprobs_forward",
    "linear_token_logprobs (backward)": "token_logprobs_backward",
    "linear_cross_entropy": "token_logprobs_forward",
    "linear_cross_entropy (backward)": "token_logprobs_backward",
    "gae": "gae_forward",
    "rollout_advantages": "rollout_forward",
    "ppo_loss": "ppo_loss_forward",
    "linear_ppo_loss": "token_logprobs_forward",
    "linear_ppo_loss (backward)": "token_logprobs_backward",
    "kl_penalty": "kl_penalty",
    "shaped_rewards": "shaped_rewards",
    "masked_mean": "masked_mean",
    "masked_whiten": "whiten",
}


def report() -> str:
    """The whole page as text."""
    lines = [f"torch {torch.__version__}, devices: {', '.join(_devices())}", "", "Backends"]
    lines += [f"  {name:<12}{_state(name)}" for name in backends.BACKENDS]
    forced = os.environ.get(backends.ENVIRONMENT_VARIABLE)
    lines += ["", "Operations, and the backend of each by default"]
    if forced:
        lines.append(
            f"  ({backends.ENVIRONMENT_VARIABLE}={forced} is set and replaces the default)"
        )
    for operation, primitive in OPERATIONS.items():
        choices = [f"{device}: {_runs(primitive, device, forced)}" for device in _devices()]
        lines.append(f"  {operation:<34}{'   '.join(choices)}")
    lines.append("  (float64 tensors always run on reference)")
    return "\n".join(lines)


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _state(name: str) -> str:
    reason = backends.unavailable_reason(name)
    if reason is not None:
        return f"not available: {reason}"
    # A compiled backend says what it was built for and which code this machine runs.
    describe = getattr(backends.load(name), "describe", None)
    by_name = "" if backends.BACKENDS[name].default else ", by name only"
    return f"available{by_name}" if describe is None else f"available{by_name}: {describe()}"


def _runs(primitive: str, device: str, forced: str | None) -> str:
    try:
        if forced:
            return backends.named(forced, primitive, device, torch.float32).NAME
        return backends.default(primitive, device, torch.float32).NAME
    except (backends.BackendUnavailableError, backends.UnsupportedOperationError) as error:
        return f"error: {error}"


if __name__ == "__main__":
    print(report())
