"""Prompts: reading them, turning them into ids that fit, and the order in which they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from rlhf.data import ChatFormat, DataError, Prompt, load_as, to_prompts
from rlhf.models import check_token_ids, context_length
from rlhf.ppo.scoring import reward_models
from rlhf.ppo.seeds import derive_seed

Item = TypeVar("Item")
PromptRow = dict[str, Any]  # {"prompt": Prompt, **other columns, which go to the reward}


def read_prompts(source: Any, called: str = "prompts") -> list[PromptRow]:
    """Rows from a file, a folder or a hub name (or a slice of one), or a list of rows, texts or
    token ids, which errors call ``called``.

    Raises:
        DataError: naming source and row.
    """
    if isinstance(source, str | Path):
        return load_as(source, to_prompts)
    return to_prompts(source, called)


def name_of_prompts(source: Any, called: str = "prompts") -> str:
    """What errors call prompts that are read: their file, folder or name, else ``called``."""
    return str(source) if isinstance(source, str | Path) else called


def repeat_each(items: Sequence[Item], copies: int) -> list[Item]:
    """Each item so many times in a row."""
    return [item for item in items for _ in range(copies)]


def prepare_prompts(
    rows: Sequence[PromptRow],
    chat_format: ChatFormat,
    policy: Any,
    reward: Any,
    *,
    max_new_tokens: int,
    context: int | None,
    source: str,
) -> tuple[list[PromptRow], list[list[int]]]:
    """The rows as the reward gets them, and the prompts' token ids; both checked.

    Raises:
        DataError: As ``encode_prompts`` and ``check_room_for_reward``.
        ModelError: The tokenizer gives ids that the policy does not know.
    """
    room: dict[str, Any] = {"max_new_tokens": max_new_tokens, "source": source}
    encoded = encode_prompts(rows, chat_format, context=context, **room)
    check_token_ids(encoded, policy, "the policy")
    rows = rows_for_reward(rows, chat_format)
    check_room_for_reward(rows, reward, **room)
    return rows, encoded


def encode_prompts(
    rows: Sequence[PromptRow],
    chat_format: ChatFormat,
    *,
    max_new_tokens: int,
    context: int | None,
    source: str = "prompts",
) -> list[list[int]]:
    """Token ids of prompts that leave room for a whole response.

    Args:
        rows: The prompts.
        chat_format: Turns them into ids.
        max_new_tokens: Room to leave.
        context: Positions that the models have; None if unknown.
        source: What to call the rows in errors.

    Raises:
        DataError: naming the row of a prompt that is too long or cannot be rendered, or that has a
            token id which the tokenizer does not have.
    """
    encoded = []
    for number, row in enumerate(rows, start=1):
        try:
            ids = _ids_of(row["prompt"], chat_format)
        except DataError as error:
            raise error.at(source, number) from error
        if context is not None and len(ids) + max_new_tokens > context:
            raise DataError(
                f"{source}, row {number}: the prompt has {len(ids)} tokens, and the model's "
                f"context of {context} leaves {max(0, context - max_new_tokens)} beside "
                f"max_new_tokens={max_new_tokens}. Shorten or remove the prompt, or lower "
                "max_new_tokens."
            )
        encoded.append(ids)
    return encoded


def _ids_of(prompt: Any, chat_format: ChatFormat) -> list[int]:
    if not is_token_ids(prompt):
        return chat_format.prompt_ids(prompt)
    if max(prompt) > chat_format.largest_id:
        raise DataError(
            f"the prompt has the token id {max(prompt)}, and the policy's tokenizer has none above "
            f"{chat_format.largest_id}; make the ids with that tokenizer."
        )
    return list(prompt)


def is_token_ids(prompt: Prompt) -> bool:
    """Whether a prompt was given as token ids."""
    return isinstance(prompt, list) and isinstance(prompt[0], int)


def rows_for_reward(rows: Sequence[PromptRow], chat_format: ChatFormat) -> list[PromptRow]:
    """The rows with texts or messages as prompts: token ids as their text, for whoever reads it.

    Args:
        rows: Whose ids ``encode_prompts`` has checked.
        chat_format: Turns the ids into text.
    """
    return [
        {**row, "prompt": chat_format.prompt_text(row["prompt"])}
        if is_token_ids(row["prompt"])
        else row
        for row in rows
    ]


def check_room_for_reward(
    rows: Sequence[PromptRow], reward: Any, *, max_new_tokens: int, source: str = "prompts"
) -> None:
    """Check that a reward model can read every prompt with a whole response behind it.

    It reads both anew, under its own tokenizer and template, which close the response with an EOS
    that the policy need not have sampled. Any other reward is left unchecked.

    Raises:
        DataError: naming the row of a prompt that leaves too little room.
    """
    for model in reward_models(reward):
        check_room_to_close(
            rows,
            model.chat_format,
            max_new_tokens=max_new_tokens,
            context=context_length(model.model),
            source=source,
        )


def check_room_to_close(
    rows: Sequence[PromptRow],
    chat_format: ChatFormat,
    *,
    max_new_tokens: int,
    context: int | None,
    source: str = "prompts",
) -> None:
    """``check_room_for_reward`` for a reward model with this format and context."""
    if context is None:
        return
    for number, row in enumerate(rows, start=1):
        closed = len(chat_format.encode(row["prompt"], "")[0])
        if closed + max_new_tokens > context:
            raise DataError(
                f"{source}, row {number}: for the reward model the prompt and the end of a "
                f"response have {closed} tokens, and its context of {context} leaves "
                f"{max(0, context - max_new_tokens)} beside max_new_tokens={max_new_tokens}. "
                "Shorten or remove the prompt, or lower max_new_tokens."
            )


class PromptOrder:
    """An endless seeded order of ``count`` prompts: every one once, shuffled anew, and so on.

    Any batch can be asked for by its number, so a run can be taken up in the middle.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed

    def batch(self, number: int) -> list[int]:
        """Indices of the prompts in a batch, counted from 0."""
        indices: list[int] = []
        position = number * self.batch_size
        while len(indices) < self.batch_size:
            round_number, place = divmod(position + len(indices), self.count)
            missing = self.batch_size - len(indices)
            indices += self._shuffled(round_number)[place : place + missing]
        return indices

    def _shuffled(self, round_number: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "prompts", round_number))
        return torch.randperm(self.count, generator=generator).tolist()
