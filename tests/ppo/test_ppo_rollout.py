"""Log-probabilities, values and advantages of sampled responses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_policy import EOS_IDS, make_policy

from rlhf.models import scalar_model_from_causal
from rlhf.ppo import Experience, PPOConfig
from rlhf.ppo.experience import Sequences
from rlhf.ppo.forward import response_logprobs, response_values
from rlhf.ppo.rollout import estimate_advantages, without_gradient
from rlhf.ppo.score_shaping import ScoreShaper

# Sums of a few hundred float32 products of size 1 to 10 in another order.
ROUNDING = {"atol": 2e-5, "rtol": 1e-5}


def sequences() -> Sequences:
    """Three rows: full, short prompt, short response with a masked token in between."""
    generator = torch.Generator().manual_seed(3)
    prompt_mask = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1]]).bool()
    response_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 1, 0, 0]]).bool()
    return Sequences(
        prompt_ids=torch.randint(4, 100, (3, 3), generator=generator),
        prompt_mask=prompt_mask,
        responses=torch.randint(4, 100, (3, 5), generator=generator),
        response_mask=response_mask,
    )


def test_logprobs_and_values_match_a_plain_forward_of_each_row_alone() -> None:
    policy, batch, temperature = make_policy().eval(), sequences(), 0.7
    critic = scalar_model_from_causal(policy, seed=1)
    critic.config.reward_mean = 0.25
    logprobs = response_logprobs(policy, batch, temperature).detach()
    values = response_values(critic, batch).detach()
    for row, (prompt, response) in enumerate(batch.lengths()):
        ids = torch.cat([batch.prompt_ids[row, 3 - prompt :], batch.responses[row, :response]])[
            None
        ]
        logits = policy(ids).logits[0, prompt - 1 : -1].detach() / temperature
        expected = logits.log_softmax(-1).gather(1, ids[0, prompt:, None]).squeeze(1)
        hidden = critic.model(ids).last_hidden_state[0, prompt - 1 : -1].detach()
        expected_values = (hidden @ critic.score.weight.T).squeeze(1).detach() - 0.25
        mask = batch.response_mask[row, :response]
        torch.testing.assert_close(logprobs[row, :response], expected * mask, **ROUNDING)
        torch.testing.assert_close(values[row, :response], expected_values * mask, **ROUNDING)
        assert not logprobs[row, response:].any()
        assert not values[row, response:].any()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_do_not_change_a_pass(size: int) -> None:
    policy, batch = make_policy().eval(), sequences()
    together = response_logprobs(policy, batch, 1.0).detach()
    parts = without_gradient(lambda part: response_logprobs(policy, part, 1.0), batch, size)
    assert not parts.requires_grad
    torch.testing.assert_close(parts, together, **ROUNDING)


def test_the_value_pass_does_not_touch_a_vocabulary() -> None:
    """No tensor of the critic's pass is as wide as the vocabulary."""
    critic, batch = scalar_model_from_causal(make_policy()), sequences()
    widths = []
    for module in critic.modules():
        module.register_forward_hook(
            lambda _, __, out: widths.append(out.shape[-1]) if torch.is_tensor(out) else None
        )
    response_values(critic, batch)
    assert widths
    assert critic.config.vocab_size not in widths


def experience(**changes: Any) -> Experience:
    """Two responses, of three tokens with EOS and of two tokens cut off before it."""
    zeros = torch.zeros(2, 3)
    fields = {
        "prompt_ids": torch.tensor([[5], [6]]),
        "prompt_mask": torch.ones(2, 1).bool(),
        "responses": torch.tensor([[7, 8, 3], [9, 10, 1]]),
        "response_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
        "ended": torch.tensor([True, False]),
        "prompts": [{"prompt": "a"}, {"prompt": "b"}],
        "texts": ["x", "y"],
        "scores": torch.tensor([2.0, -1.0]),
        "logprobs": torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.0, float("nan")]]),
        "ref_logprobs": torch.tensor([[-1.5, -2.0, -1.0], [-0.5, -1.0, float("nan")]]),
        "values": torch.tensor([[0.5, 1.0, 1.5], [0.0, -0.5, float("nan")]]),
        **dict.fromkeys(("advantages", "returns", "rewards", "kl"), zeros),
    }
    return Experience(**{**fields, **changes})


def config(**settings: Any) -> PPOConfig:
    plain = {"kl_coef": 0.1, "gamma": 0.9, "lam": 0.5, "whiten_advantages": False}
    return PPOConfig(**{**plain, **settings})


def estimate(made: Experience, settings: PPOConfig) -> None:
    estimate_advantages(made, settings, ScoreShaper(settings), settings.kl_coef)


def test_an_episode_by_hand() -> None:
    """KL (0.5, 0, 0.5) and (-0.5, 0), penalised by 0.1 each; scores at the last valid tokens."""
    made = experience()
    estimate(made, config())
    rewards = torch.tensor([[-0.05, 0.0, -0.05 + 2.0], [0.05, -1.0, 0.0]])
    # delta = r + 0.9 V_next - V; A = delta + 0.45 A_next
    a2 = 1.95 - 1.5
    a1 = 0.0 + 0.9 * 1.5 - 1.0 + 0.45 * a2
    a0 = -0.05 + 0.9 * 1.0 - 0.5 + 0.45 * a1
    b1 = -1.0 + 0.5
    b0 = 0.05 + 0.9 * -0.5 - 0.0 + 0.45 * b1
    advantages = torch.tensor([[a0, a1, a2], [b0, b1, 0.0]])
    values = torch.tensor([[0.5, 1.0, 1.5], [0.0, -0.5, 0.0]])
    close = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(made.kl, torch.tensor([[0.5, 0.0, 0.5], [-0.5, 0.0, 0.0]]), **close)
    torch.testing.assert_close(made.rewards, rewards, **close)
    torch.testing.assert_close(made.advantages, advantages, **close)
    torch.testing.assert_close(made.returns, advantages + values, **close)


def test_a_missing_eos_costs_its_penalty_at_the_last_token() -> None:
    plain, penalised = experience(), experience()
    estimate(plain, config())
    estimate(penalised, config(missing_eos_penalty=3.0))
    difference = penalised.rewards - plain.rewards
    torch.testing.assert_close(difference, torch.tensor([[0.0, 0, 0], [0, -3.0, 0]]))
    assert penalised.scores.tolist() == [2.0, -1.0]  # what the reward said stays


def test_whitened_advantages_have_mean_0_and_variance_1_over_valid_tokens() -> None:
    made = experience()
    estimate(made, config(whiten_advantages=True))
    valid = made.advantages[made.response_mask]
    torch.testing.assert_close(valid.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(valid.std(correction=0), torch.tensor(1.0), atol=1e-6, rtol=0)
    assert made.advantages[1, 2] == 0


def test_selecting_rows_keeps_every_field_in_step() -> None:
    made = experience()
    made.score_parts = {"length": torch.tensor([3.0, 4.0])}
    picked = made.select([1])
    assert picked.score_parts["length"].tolist() == [4.0]
    for field in dataclasses.fields(Experience):
        value, whole = getattr(picked, field.name), getattr(made, field.name)
        if torch.is_tensor(whole):
            torch.testing.assert_close(value, whole[1:], equal_nan=True)
        elif isinstance(whole, list):
            assert value == whole[1:]
    part = made.micro_batch([1], made.lengths())
    assert part.responses.shape == (1, 2)  # the column of padding is gone
    assert part.response_mask.any()
    filler = made.micro_batch([], made.lengths())
    assert len(filler) == 1 and not filler.response_mask.any()


def test_rollout_takes_each_prompt_with_its_own_response(make_trainer: Any) -> None:
    trainer = make_trainer(reward=lambda prompts, responses, bonus: bonus)
    made = trainer.rollout(trainer.rows)
    assert made.scores.tolist() == [0, 1, 2, 3, 4, 5]
    assert [row["prompt"] for row in made.prompts] == [row["prompt"] for row in trainer.rows]
    assert made.prompt_mask.sum(1).tolist() == [1, 2, 3, 4, 5, 6]
    for ids, mask, text in zip(made.responses, made.response_mask, made.texts):
        assert text == trainer.chat_format.decode_completion(ids[mask].tolist())


def test_temperature_enters_every_logprob(make_trainer: Any) -> None:
    trainer = make_trainer(temperature=0.5)
    made = trainer.rollout(trainer.rows)
    expected = response_logprobs(trainer.policy, made, 0.5).detach()
    torch.testing.assert_close(made.logprobs, expected, **ROUNDING)
    torch.testing.assert_close(made.ref_logprobs, expected, **ROUNDING)
    assert (made.logprobs - response_logprobs(trainer.policy, made, 1.0)).abs().max() > 0.1


def test_the_score_stands_at_the_last_valid_token_whatever_is_masked() -> None:
    """A tool's output in the middle, a last token that is not trained, a response of one token."""
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    made = experience(
        responses=torch.full((3, 4), 7),
        response_mask=mask,
        prompts=[{"prompt": "a"}] * 3,
        texts=["x"] * 3,
        ended=torch.tensor([True, True, True]),
        scores=torch.tensor([2.0, -1.0, 3.0]),
        logprobs=torch.where(mask, -1.0, torch.nan),
        ref_logprobs=torch.where(mask, -1.5, torch.nan),
        values=torch.where(mask, 0.5, torch.nan),
    )
    estimate(made, config())
    penalty = -0.1 * 0.5  # at every valid token
    expected = torch.tensor(
        [
            [penalty, 0, penalty + 2.0, 0],
            [penalty, penalty - 1.0, 0, 0],
            [penalty + 3.0, 0, 0, 0],
        ]
    )
    torch.testing.assert_close(made.rewards, expected, atol=1e-6, rtol=1e-6)
    # A = δ + γλ A_next over valid tokens; the first row's two are neighbours.
    last = penalty + 2.0 - 0.5
    first = penalty + 0.9 * 0.5 - 0.5 + 0.45 * last
    torch.testing.assert_close(made.advantages[0], torch.tensor([first, 0, last, 0]))
    torch.testing.assert_close(made.advantages[2], torch.tensor([penalty + 3.0 - 0.5, 0, 0, 0]))


def test_the_score_of_a_sampled_response_stands_at_the_token_that_ended_it(
    make_trainer: Any,
) -> None:
    trainer = make_trainer(
        kl_coef=0.0, reward=lambda prompts, responses: [1.0 + n for n in range(len(responses))]
    )
    made = trainer.rollout(trainer.rows * 4)
    assert made.ended.any() and not made.ended.all()
    for row, (mask, ended) in enumerate(zip(made.response_mask, made.ended)):
        last = int(mask.sum()) - 1
        assert mask[: last + 1].all()
        assert made.rewards[row, last] == made.scores[row]
        assert made.rewards[row].count_nonzero() == 1
        assert (made.responses[row, last].item() in EOS_IDS) == ended
        assert ended or last + 1 == trainer.config.max_new_tokens
