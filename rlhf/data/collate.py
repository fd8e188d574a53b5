"""Examples to token ids within a length, and token ids to padded batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.data.chat import ChatFormat
from rlhf.data.errors import DataError
from rlhf.data.formats import Demonstration
from rlhf.data.preferences import PreferencePair
from rlhf.data.types import Message, Text, completion_messages, prompt_messages


@dataclass(frozen=True)
class EncodedExample:
    """Token ids [L] with a 0/1 loss mask [L]; ``truncated`` if the end was cut off."""

    input_ids: list[int]
    loss_mask: list[int]
    truncated: bool = False


@dataclass(frozen=True)
class EncodedPair:
    """The two sides of a preference pair, each the whole of prompt and completion."""

    chosen: EncodedExample
    rejected: EncodedExample


def encode_demonstrations(
    demonstrations: Iterable[Demonstration],
    chat_format: ChatFormat,
    max_length: int,
    source: str = "data",
) -> list[EncodedExample]:
    """Token ids of demonstrations, cut on the right at ``max_length``; one warning counts them.

    Another warning counts the rows whose texts spell special tokens, which stay ordinary text.

    Raises:
        DataError: naming source and row, if no token to learn from is left within the length.
    """
    examples = []
    spelled: dict[int, list[str]] = {}
    for number, demonstration in enumerate(demonstrations, start=1):
        row = demonstration.row or number
        try:
            examples.append(_encode_demonstration(demonstration, chat_format, max_length))
        except DataError as error:
            raise error.at(source, row) from error
        spelled[row] = _special_tokens_in(_messages(demonstration), chat_format)
    _warn_of_special_tokens(spelled, source)
    _warn_of_truncation(sum(e.truncated for e in examples), len(examples), max_length, source)
    return examples


def encode_preferences(
    pairs: Iterable[PreferencePair],
    chat_format: ChatFormat,
    max_length: int,
    source: str = "data",
) -> list[EncodedPair]:
    """Token ids of preference pairs, completions cut on the right at ``max_length``; one warning
    counts the completions that were cut, another the rows whose texts spell special tokens, which
    stay ordinary text.

    Raises:
        DataError: naming source and row, if the prompt alone fills the length, or the two sides
            are the same within it.
    """
    encoded = []
    spelled: dict[int, list[str]] = {}
    for number, pair in enumerate(pairs, start=1):
        row = pair.row or number
        try:
            encoded.append(_encode_pair(pair, chat_format, max_length))
        except DataError as error:
            raise error.at(source, row) from error
        completions = completion_messages(pair.chosen) + completion_messages(pair.rejected)
        spelled[row] = _special_tokens_in(prompt_messages(pair.prompt) + completions, chat_format)
    _warn_of_special_tokens(spelled, source)
    cut = sum(pair.chosen.truncated + pair.rejected.truncated for pair in encoded)
    _warn_of_truncation(cut, 2 * len(encoded), max_length, source)
    return encoded


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids, the padding after them.

    Returns:
        ``(ids int64 [B, L], mask bool [B, L])``, L the longest length; the mask is True on the
        sequences' own tokens, from their lengths and never from ``pad_id``.
    """
    ids, mask = _blank(sequences, pad_id)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.int64)
        mask[row, : len(sequence)] = True
    return ids, mask


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids, the padding before them; returns what ``pad_right`` does."""
    ids, mask = _blank(sequences, pad_id)
    for row, sequence in enumerate(sequences):
        start = ids.shape[1] - len(sequence)
        ids[row, start:] = torch.as_tensor(sequence, dtype=torch.int64)
        mask[row, start:] = True
    return ids, mask


def _blank(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    if not sequences:
        raise ValueError("there is nothing to pad; give at least one sequence.")
    shape = (len(sequences), max(map(len, sequences)))
    return torch.full(shape, pad_id, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)


def _encode_demonstration(
    demonstration: Demonstration, chat_format: ChatFormat, max_length: int
) -> EncodedExample:
    if demonstration.messages is not None:
        encoded = chat_format.encode_messages(demonstration.messages)
    else:
        encoded = chat_format.encode(demonstration.prompt, demonstration.completion)
    example = _truncate(*encoded, max_length)
    if not any(example.loss_mask):
        raise DataError(
            f"the prompt alone fills max_length={max_length} tokens, so nothing is left to learn "
            "from; raise max_length, shorten the prompt or remove the row."
        )
    return example


def _encode_pair(pair: PreferencePair, chat_format: ChatFormat, max_length: int) -> EncodedPair:
    sides = [
        _truncate(*chat_format.encode(pair.prompt, completion), max_length)
        for completion in (pair.chosen, pair.rejected)
    ]
    if not all(any(side.loss_mask) for side in sides):
        raise DataError(_too_long(pair.prompt, chat_format, max_length))
    if sides[0].input_ids == sides[1].input_ids:
        raise DataError(
            f"chosen and rejected are the same within max_length={max_length} tokens; raise "
            "max_length or remove the row."
        )
    return EncodedPair(*sides)


def _too_long(prompt: Text, chat_format: ChatFormat, max_length: int) -> str:
    return (
        f"the prompt alone has {len(chat_format.prompt_ids(prompt))} tokens and max_length is "
        f"{max_length}; raise max_length, shorten the prompt or remove the row."
    )


def _truncate(ids: list[int], mask: list[int], max_length: int) -> EncodedExample:
    return EncodedExample(ids[:max_length], mask[:max_length], len(ids) > max_length)


def _warn_of_truncation(count: int, total: int, max_length: int, source: str) -> None:
    if count:
        warnings.warn(
            f"{source}: {count} of {total} sequences were longer than max_length={max_length} "
            "tokens and lost their end.",
            stacklevel=3,
        )


def _messages(demonstration: Demonstration) -> list[Message]:
    if demonstration.messages is not None:
        return demonstration.messages
    return prompt_messages(demonstration.prompt) + completion_messages(demonstration.completion)


def _special_tokens_in(messages: list[Message], chat_format: ChatFormat) -> list[str]:
    return [t for message in messages for t in chat_format.special_tokens_in(message["content"])]


def _warn_of_special_tokens(spelled: dict[int, list[str]], source: str) -> None:
    """One warning for the rows whose texts spell special tokens."""
    rows = {row: tokens for row, tokens in spelled.items() if tokens}
    if rows:
        tokens = ", ".join(sorted({repr(token) for found in rows.values() for token in found}))
        warnings.warn(
            f"{source}: {len(rows)} rows, the first of them row {next(iter(rows))}, hold {tokens} "
            "in their texts. It is read as ordinary text there; remove it if it was meant to mark "
            "a turn: the template does that.",
            stacklevel=3,
        )


def prepare_tokenizer(tokenizer: Any) -> None:
    """Give a tokenizer a padding token that is not EOS, where its vocabulary has one.

    Masks here come from lengths, so nothing of this project needs it; code that tells padding by
    its id (``transformers``' sequence classification) reads wrong positions without it. Tried in
    turn: a special token called "pad", unk, any other special token. Where there is none, EOS
    pads and a warning says so.
    """
    eos = tokenizer.eos_token_id
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != eos:
        return
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    named = [token for token in special if "pad" in token.lower()]
    unknown = [tokenizer.unk_token] if tokenizer.unk_token_id is not None else []
    for token in (*named, *unknown, *special):
        if tokenizer.convert_tokens_to_ids(token) != eos:
            tokenizer.pad_token = token
            return
    tokenizer.pad_token = tokenizer.eos_token
    warnings.warn(
        "the tokenizer has no special token besides EOS, so EOS pads; read scores and losses "
        "through masks, not through the pad id.",
        stacklevel=2,
    )
