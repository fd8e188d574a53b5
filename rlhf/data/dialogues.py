"""Dialogues: hh-rlhf's text form, and the prompt that two dialogues share.

The text form is that of Bai et al., "Training a Helpful and Harmless Assistant with
Reinforcement Learning from Human Feedback" (2022): turns that begin with ``\\n\\nHuman:`` or
``\\n\\nAssistant:``.
"""

from __future__ import annotations

import re

from rlhf.data.errors import DataError
from rlhf.data.types import Message

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(text: object) -> bool:
    """Whether a text is written in the ``Human:``/``Assistant:`` form, beginning with a turn."""
    return isinstance(text, str) and _TURN.match("\n\n" + text.lstrip("\n")) is not None


def parse_dialogue(text: str) -> list[Message]:
    """The turns of a dialogue text as messages, white space around each removed.

    Neighbouring turns of one speaker are joined by a blank line, because most chat templates
    demand that speakers alternate.
    """
    if not is_dialogue(text):
        raise DataError("is not a dialogue; it must begin with 'Human:' or 'Assistant:'.")
    pieces = _TURN.split("\n\n" + text.lstrip("\n"))[1:]
    messages: list[Message] = []
    for speaker, words in zip(pieces[::2], pieces[1::2], strict=True):
        role, content = _ROLE[speaker], words.strip()
        if messages and messages[-1]["role"] == role:
            joined = f"{messages[-1]['content']}\n\n{content}".strip()
            messages[-1] = {"role": role, "content": joined}
        else:
            messages.append({"role": role, "content": content})
    return messages


def split_shared_prompt(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two conversations into their shared prompt and what each says after it.

    The prompt ends with the last user turn before which, and at which, both are the same; what
    follows begins and ends with an assistant turn and may hold several turns.

    Returns:
        ``(prompt, chosen_completion, rejected_completion)``.

    Raises:
        DataError: if they share no user turn, or one does not end with an assistant turn.
    """
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"{name} ends with the {messages[-1]['role']}'s turn; it must end with the "
                "assistant's."
            )
    shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared += 1
    while shared and not (
        chosen[shared - 1]["role"] == "user"
        and chosen[shared]["role"] == rejected[shared]["role"] == "assistant"
    ):
        shared -= 1
    if not shared:
        raise DataError(
            "chosen and rejected share no user turn, so they do not answer the same prompt; "
            "remove the row or correct it."
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]
