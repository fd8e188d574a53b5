"""Inputs that cannot be right: each raises a message that names the argument."""

from __future__ import annotations

import math
import re

import pytest
import torch
from kernel_cases import normal, ppo_inputs

import rlhf_kernels as kernels
from rlhf_kernels import PPOLossConfig

X = normal(2, 3, seed=1)
MASK = torch.ones(2, 3, dtype=torch.bool)
LOGITS = normal(2, 3, 7, seed=2)
TARGETS = torch.zeros(2, 3, dtype=torch.long)
HIDDEN, WEIGHT = normal(2, 3, 4, seed=3), normal(7, 4, seed=4)
BAD_TEMPERATURES = torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, 0.0]])
PPO = {name: ppo_inputs(2, 3)[name] for name in ("logprobs", "old_logprobs", "advantages")}
VALUES = {name: ppo_inputs(2, 3)[name] for name in ("values", "old_values", "returns")}


def logprobs(logits=LOGITS, targets=TARGETS, **options):
    return kernels.token_logprobs(logits, targets, **options)


def linear(hidden=HIDDEN, weight=WEIGHT, targets=TARGETS, **options):
    return kernels.linear_token_logprobs(hidden, weight, targets, **options)


def cross_entropy(**options):
    return kernels.linear_cross_entropy(HIDDEN, WEIGHT, TARGETS, **options)


def gae(rewards=X, values=X, mask=MASK, **options):
    return kernels.gae(rewards, values, mask, **options)


def rollout(scores=X[:, 0], logprobs=X, values=X, mask=MASK, **options):
    return kernels.rollout_advantages(scores, logprobs, X, values, mask, kl_coef=0.1, **options)


def ppo(mask=MASK, **changes):
    return kernels.ppo_loss(**(PPO | {"mask": mask} | changes))


def linear_ppo(hidden=HIDDEN, targets=TARGETS, mask=MASK, old=X, **options):
    return kernels.linear_ppo_loss(hidden, WEIGHT, targets, old, X, mask, **options)


def shaped(scores=X[:, 0], kl=X, mask=MASK, kl_coef=0.1):
    return kernels.shaped_rewards(scores, kl, mask, kl_coef=kl_coef)


def packed(cu_seqlens, series=X, **options):
    cu_seqlens = torch.as_tensor(cu_seqlens)
    return gae(*(x.flatten() for x in (series, X, MASK)), cu_seqlens=cu_seqlens, **options)


VALUE_ERRORS = {
    "rewards has shape (2, 3); expected 1 dimensions, [N], as cu_seqlens is": lambda: gae(
        cu_seqlens=torch.tensor([0, 6])
    ),
    "cu_seqlens goes from 0 to 5; expected 0 to 6, the length of rewards": lambda: packed([0, 5]),
    "cu_seqlens goes from 1 to 6; expected 0 to 6": lambda: packed([1, 6]),
    "cu_seqlens holds 2 after 4 at index 2": lambda: packed([0, 4, 2, 6]),
    "cu_seqlens has shape (); expected [B + 1]": lambda: packed(6),
    "bootstrap_values has shape (2,); expected (1,), one a sequence": lambda: packed(
        [0, 6], bootstrap_values=X[:, 0]
    ),
    "gamma holds 1.5 at row 1": lambda: gae(gamma=torch.tensor([0.5, 1.5])),
    "value_lam is 2.0; expected a number in [0, 1]": lambda: gae(value_lam=2.0),
    "lam has shape (3,); expected (2,), one a sequence": lambda: gae(lam=X[0].abs()),
    "masked is 'jump'; choose one of skip, decay": lambda: rollout(masked="jump"),
    "score_clip is -1.0; expected a positive": lambda: rollout(score_clip=-1.0),
    "scores has shape (2,); expected (3,), one score a sequence": lambda: kernels.shaped_rewards(
        X[:, 0], X[0], MASK[0], kl_coef=0.1, cu_seqlens=torch.tensor([0, 1, 2, 3])
    ),
    "targets has shape (2, 2); expected (2, 3)": lambda: logprobs(targets=TARGETS[:, :2]),
    "logits has shape (2, 3, 0)": lambda: logprobs(LOGITS[..., :0]),
    "logits has shape ()": lambda: logprobs(torch.tensor(1.0), torch.tensor(0)),
    "targets is on meta; expected cpu": lambda: logprobs(targets=TARGETS.to("meta")),
    "temperature is 0.0": lambda: logprobs(temperature=0.0),
    "temperature is -1": lambda: logprobs(temperature=-1),
    "temperature is nan": lambda: logprobs(temperature=float("nan")),
    "temperature has shape (3,); expected (2, 3)": lambda: logprobs(temperature=X[0].abs()),
    "temperature holds -1.0 at flat row 4": lambda: logprobs(temperature=BAD_TEMPERATURES),
    "temperature holds 0.0 at flat row 0": lambda: linear(temperature=0 * X),
    "temperature holds nan at flat row 5": lambda: logprobs(
        temperature=torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, float("nan")]])
    ),
    "targets holds 7 at flat row 4": lambda: logprobs(targets=torch.tensor([[0, 1, 2], [3, 7, 9]])),
    "targets holds 7 at flat row 5": lambda: linear(
        targets=torch.tensor([[0, -100, 2], [3, -100, 7]]), chunk_size=2
    ),
    "hidden has shape (2, 3, 3); expected [..., 4]": lambda: linear(HIDDEN[..., :3]),
    "weight has shape (4,); expected 2 dimensions": lambda: linear(weight=WEIGHT[0]),
    "weight has shape (0, 4)": lambda: linear(weight=WEIGHT[:0]),
    "bias has shape (4,); expected (7,)": lambda: linear(bias=WEIGHT[0]),
    "targets has shape (3,); expected (2, 3), the shape of hidden": lambda: linear(
        targets=TARGETS[0]
    ),
    "chunk_size is 0": lambda: linear(chunk_size=0),
    "reduction is 'none'; choose one of mean, sum": lambda: cross_entropy(reduction="none"),
    "normalizer is 0": lambda: cross_entropy(normalizer=0),
    "normalizer has shape (2,)": lambda: cross_entropy(normalizer=torch.ones(2)),
    "values has shape (2, 2); expected (2, 3)": lambda: gae(values=X[:, :2]),
    "mask has shape (3,); expected (2, 3)": lambda: gae(mask=MASK[0]),
    "rewards has shape (3,); expected 2 dimensions": lambda: gae(X[0], X[0], MASK[0]),
    "bootstrap_values has shape (3,); expected (2,)": lambda: gae(bootstrap_values=X[0]),
    "gamma is 1.5": lambda: gae(gamma=1.5),
    "lam is -0.1": lambda: gae(lam=-0.1),
    "mask is on meta": lambda: gae(mask=MASK.to("meta")),
    "scores has shape (2, 3); expected (2,)": lambda: rollout(scores=X),
    "values has shape (2, 2); expected (2, 3), the shape of logprobs": lambda: rollout(
        values=X[:, :2]
    ),
    "kl_estimator is 'k4'; choose one of k1, k2, k3, abs": lambda: rollout(kl_estimator="k4"),
    "estimator is 'k4'": lambda: kernels.kl_penalty(X, X, estimator="k4"),
    "ref_logprobs has shape (2, 2)": lambda: kernels.kl_penalty(X, X[:, :2]),
    "kl has shape (3,); expected 2 dimensions": lambda: shaped(kl=X[0]),
    "scores has shape (3,); expected (2,)": lambda: shaped(scores=X[0]),
    "mask has shape (2, 2); expected (2, 3), the shape of x": lambda: kernels.masked_mean(
        X, MASK[:, :2]
    ),
    "mask has shape (2, 2); expected (2, 3), the shape of kl": lambda: shaped(mask=MASK[:, :2]),
    "advantages has shape (2, 2)": lambda: ppo(advantages=X[:, :2]),
    "entropy has shape (3,)": lambda: ppo(entropy=X[0]),
    "logprobs has shape (3,); expected 2 dimensions": lambda: ppo(logprobs=X[0]),
    "returns or old_values were given without values": lambda: ppo(returns=X),
    "values were given without returns": lambda: ppo(values=X, old_values=X),
    "values were given without old_values": lambda: ppo(values=X, returns=X),
    "normalizer is -2": lambda: ppo(normalizer=-2),
    "clip_range is 0": lambda: PPOLossConfig(clip_range=0),
    "value_clip_range is -1": lambda: PPOLossConfig(value_clip_range=-1),
    "dual_clip is 1.0; it must be above 1": lambda: PPOLossConfig(dual_clip=1.0),
    "kl_loss_coef is inf": lambda: PPOLossConfig(kl_loss_coef=math.inf),
    "kl_loss_estimator is 'abs'; choose one of k1, k2, k3": lambda: PPOLossConfig(
        kl_loss_estimator="abs"
    ),
    "ref_logprobs has shape (2, 2); expected (2, 3)": lambda: ppo(ref_logprobs=X[:, :2]),
    "importance_weights has shape (3,)": lambda: linear_ppo(importance_weights=X[0]),
    "logprobs has shape (2, 3); expected 1 dimensions": lambda: ppo(cu_seqlens=torch.tensor([0])),
    "hidden has shape (2, 3, 4); expected 2 dimensions": lambda: linear_ppo(
        cu_seqlens=torch.tensor([0, 6])
    ),
    "entropy_coef is nan": lambda: PPOLossConfig(entropy_coef=float("nan")),
    "aggregation is 'mean'; choose one of token-mean": lambda: PPOLossConfig(aggregation="mean"),
    "hidden has shape (3, 4); expected 3 dimensions": lambda: linear_ppo(HIDDEN[0]),
    "mask has shape (2, 2)": lambda: linear_ppo(mask=MASK[:, :2]),
    "old_logprobs has shape (2, 2)": lambda: linear_ppo(old=X[:, :2]),
    "chunk_size is 1.5; expected a whole number": lambda: linear(chunk_size=1.5),
    "kl_coef is nan; expected a finite number": lambda: shaped(kl_coef=math.nan),
}

TYPE_ERRORS = {
    "cu_seqlens has dtype torch.float32": lambda: packed([0.0, 6.0]),
    "lam has dtype torch.int64": lambda: gae(lam=torch.tensor([1, 1])),
    "group is 'world'; expected a process group": lambda: linear(group="world"),
    "logits has dtype torch.int64": lambda: logprobs(LOGITS.long()),
    "targets has dtype torch.float32; expected integers": lambda: logprobs(targets=X),
    "targets has dtype torch.bool": lambda: linear(targets=MASK),
    "hidden has dtype torch.int64": lambda: linear(HIDDEN.long()),
    "weight has dtype torch.bfloat16 and hidden torch.float32": lambda: linear(
        weight=WEIGHT.bfloat16()
    ),
    "bias has dtype torch.float64": lambda: linear(bias=WEIGHT[:, 0].double()),
    "temperature has dtype torch.int64": lambda: logprobs(temperature=TARGETS + 1),
    "rewards has dtype torch.int64": lambda: gae(X.long()),
    "mask has dtype torch.float32; expected bool": lambda: gae(mask=MASK.float()),
    "advantages has dtype torch.int64": lambda: ppo(advantages=X.long()),
    "importance_weights has dtype torch.bool": lambda: ppo(importance_weights=MASK),
    "x has dtype torch.int64": lambda: kernels.masked_whiten(X.long(), MASK),
    "scores has dtype torch.int64": lambda: shaped(scores=X[:, 0].long()),
}


@pytest.mark.parametrize("message", VALUE_ERRORS)
def test_values_that_do_not_fit(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VALUE_ERRORS[message]()


@pytest.mark.parametrize("message", TYPE_ERRORS)
def test_types_that_do_not_fit(message):
    with pytest.raises(TypeError, match=re.escape(message)):
        TYPE_ERRORS[message]()


def test_the_same_calls_without_the_mistake_work():
    """Guards the tests above: what they call is right but for the one change."""
    for call in (logprobs, linear, cross_entropy, gae, rollout, ppo, linear_ppo, shaped):
        call()
    assert torch.equal(logprobs(temperature=torch.tensor(0.5)), logprobs(temperature=0.5))
    # What stands in ignored rows plays no part.
    ignored = torch.where(BAD_TEMPERATURES > 0, TARGETS, -100)
    logprobs(targets=ignored, temperature=BAD_TEMPERATURES)
    linear(targets=ignored, temperature=BAD_TEMPERATURES)
    ppo(**VALUES)
    packed([0, 2, 2, 6])
    for one, number in zip(gae(gamma=torch.tensor(0.5)), gae(gamma=0.5)):
        assert torch.equal(one, number)
    ppo(values=X, returns=X, config=PPOLossConfig(value_clip_range=None))
    kernels.kl_penalty(X, X)
    kernels.masked_whiten(X, MASK.int())


def test_integer_masks_are_valid_where_not_zero():
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    for a, b in zip(gae(mask=mask), gae(mask=mask.bool())):
        assert torch.equal(a, b)
    assert torch.equal(ppo(mask=mask)[0], ppo(mask=mask.bool())[0])
