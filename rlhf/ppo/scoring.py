"""Calling a reward, and trusting nothing that it returns."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.data import Text
from rlhf.reward_model import RewardModel

# (prompts, responses, **columns) -> one number for each response: a list, an array or a tensor, or
# what is awaited for one.
Reward = Callable[..., Any]


class RewardError(RuntimeError):
    """A reward failed, or returned something other than one finite number for each response."""


def check_reward(reward: Any) -> None:
    """Check, before anything is sampled, that a reward can be called with responses.

    Raises:
        TypeError: It cannot; the message names what is accepted.
    """
    if callable(reward) and not isinstance(reward, type | PreTrainedModel):
        return
    what = f"the class {reward.__name__}" if isinstance(reward, type) else type(reward).__name__
    raise TypeError(
        f"the reward is {what} ({_shown(reward)}); give a RewardModel "
        "(RewardModel.from_pretrained(folder) loads one) or a function (prompts, responses, "
        "**columns) that returns a list with one number for each response"
    )


class WeightedRewards:
    """The weighted sum of rewards; PPO shows the mean of each as the figure ``score/NAME``.

    Args:
        rewards: ``{name: (reward, weight)}``; each reward as ``PPOTrainer`` takes it.

    Raises:
        TypeError: A reward cannot be called.
        ValueError: There is none, or a weight is no finite number.
    """

    def __init__(self, rewards: Mapping[str, tuple[Reward, float]]) -> None:
        if not rewards:
            raise ValueError("give at least one reward")
        for name, (reward, weight) in rewards.items():
            check_reward(reward)
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} is {weight!r}; give a number")
        self.rewards = dict(rewards)

    def __call__(
        self, prompts: Sequence[Text], responses: Sequence[str], /, **columns: list[Any]
    ) -> list[float]:
        """The weighted sums alone."""
        rows = [
            {"prompt": prompt, **{name: values[row] for name, values in columns.items()}}
            for row, prompt in enumerate(prompts)
        ]
        return score_responses(self, rows, responses).tolist()


def score_responses(reward: Reward, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> Tensor:
    """The scores of responses, checked.

    Args:
        reward: A ``RewardModel`` or any callable ``(prompts, responses, **columns)``. A callable
            that names its columns, or takes none, is given those that it names.
        rows: ``{"prompt": Text, **columns}`` for each response.
        texts: The responses.

    Returns:
        fp32 [B] on the CPU.

    Raises:
        RewardError: It raised, returned a wrong number of scores, or a score that is not a finite
            number; the message names the prompt. Or a column has the name of its first parameters.
    """
    return score_in_parts(reward, rows, texts)[0]


def score_in_parts(
    reward: Reward, rows: Sequence[dict[str, Any]], texts: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """As ``score_responses``, and of a ``WeightedRewards`` the scores of each part by name."""
    if not isinstance(reward, WeightedRewards):
        return _score(reward, rows, texts), {}
    total, parts = torch.zeros(len(texts)), {}
    for name, (part, weight) in reward.rewards.items():
        try:
            parts[name] = score_responses(part, rows, texts)
        except RewardError as error:
            raise RewardError(f"reward {name!r}: {error}") from error
        total += weight * parts[name]
    return _numbers(total.tolist(), [row["prompt"] for row in rows], texts), parts


def reward_models(reward: Reward) -> list[RewardModel]:
    """The reward models among a reward's parts."""
    if isinstance(reward, WeightedRewards):
        return [model for part, _ in reward.rewards.values() for model in reward_models(part)]
    return [reward] if isinstance(reward, RewardModel) else []


def _score(reward: Reward, rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> Tensor:
    prompts = [row["prompt"] for row in rows]
    columns = _accepted_columns(reward, rows)
    try:
        scores = _listed(_awaited(reward(prompts, list(texts), **columns)))
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"the reward raised {type(error).__name__}: {error} (while scoring {len(texts)} "
            f"responses, the first of them to the prompt {shorten(prompts[0])})"
        ) from error
    if len(scores) != len(texts):
        raise RewardError(
            f"the reward returned {len(scores)} scores for {len(texts)} responses, the first of "
            f"them to the prompt {shorten(prompts[0])}; it must return one number for each response"
        )
    return _numbers(scores, prompts, texts)


def _awaited(returned: Any) -> Any:
    """What an async reward comes to; anything else as it is."""
    if not inspect.isawaitable(returned):
        return returned

    async def wait() -> Any:
        return await returned

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # A loop runs in this thread already, as in a notebook: another thread has none.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, wait()).result()


def shorten(text: Text, length: int = 80) -> str:
    """A prompt or response in quotes, short enough for a message."""
    words = text if isinstance(text, str) else text[-1]["content"]
    return repr(words if len(words) <= length else words[: length - 1] + "…")


def _accepted_columns(reward: Reward, rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The rows' other columns, as far as the reward can take them."""
    names = {name: None for row in rows for name in row if name != "prompt"}
    try:
        parameters = list(inspect.signature(reward).parameters.values())
    except ValueError:  # written in C: no signature to read
        return {}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    # prompts and responses, whatever the reward calls them
    taken = {p.name for p in parameters[:2] if p.kind is p.POSITIONAL_OR_KEYWORD}
    if takes_all and (clash := sorted(taken & names.keys())):
        raise RewardError(
            f"the data has a column {clash[0]!r}, and the reward has a parameter of that name for "
            "the prompts or the responses; rename one of them, or let the reward begin with "
            "(prompts, responses, /, ...), which takes such a column too"
        )
    named = {p.name for p in parameters[2:]}
    return {name: [row.get(name) for row in rows] for name in names if takes_all or name in named}


def _listed(returned: Any) -> list[Any]:
    if hasattr(returned, "tolist"):  # a tensor or an array
        returned = returned.tolist()
    # Iterable too, but text is no number, and neither a set nor a dict has an order.
    no_list = str | bytes | bytearray | Set | Mapping
    if isinstance(returned, no_list) or not hasattr(returned, "__iter__"):
        raise RewardError(
            f"the reward returned {type(returned).__name__} ({_shown(returned)}); it must return "
            "a list with one number for each response"
        )
    return list(returned)


def _numbers(scores: Sequence[Any], prompts: Sequence[Text], texts: Sequence[str]) -> Tensor:
    """The scores as fp32 [B], each of them finite."""
    numbers = [_number(score, index, prompts, texts) for index, score in enumerate(scores)]
    return torch.tensor(numbers, dtype=torch.float32)


def _number(score: Any, index: int, prompts: Sequence[Text], texts: Sequence[str]) -> float:
    try:
        number = math.nan if isinstance(score, str | bytes | bytearray) else float(score)
    except Exception:  # whatever the user's type raises; of an int, that it is too large
        number = math.nan
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise RewardError(
            f"the reward of response {index + 1} of {len(texts)} is {_shown(score)}; it must be "
            f"a finite number. Prompt: {shorten(prompts[index])}. "
            f"Response: {shorten(texts[index])}. Nothing was updated."
        )
    return number


def _shown(value: Any) -> str:
    """A value in a message, whatever it is."""
    try:
        return repr(value)[:80]
    except Exception:  # an int of more digits than Python prints, or the user's own type
        return f"a {type(value).__name__}"
