"""Responses of a policy to the demo's prompts, with what the evaluation wants to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rlhf.data import ChatFormat, prepare_tokenizer
from rlhf.models import load_causal_lm, load_tokenizer
from rlhf.ppo import Generated, GenerationSettings, generate
from rlhf.ppo.experience import Sequences
from rlhf.ppo.forward import response_logprobs
from rlhf.ppo.rollout import without_gradient

MICRO_BATCH = 16


def sample(
    folder: Path, prompts: Sequence[str], count: int, settings: GenerationSettings, seed: int
) -> Generated:
    """``count`` responses to each prompt from the model in ``folder``, one after another."""
    policy, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    prepare_tokenizer(tokenizer)
    chat_format = ChatFormat(tokenizer)
    ids = [chat_format.prompt_ids(prompt) for prompt in prompts]
    return generate(policy, tokenizer, ids, settings, seed=seed, num_return=count)


def kl_per_response(
    generated: Generated, policy: Path, reference: Path, temperature: float
) -> list[float]:
    """Sum over each response of log policy - log reference: its mean over samples of the policy
    estimates the KL divergence from the reference, in nats per response.
    """
    batch = Sequences(
        generated.prompt_ids, generated.prompt_mask, generated.responses, generated.response_mask
    )
    ours, theirs = (
        without_gradient(
            partial(response_logprobs, load_causal_lm(folder).eval(), temperature=temperature),
            batch,
            MICRO_BATCH,
        )
        for folder in (policy, reference)
    )
    return (ours - theirs).sum(1).tolist()
