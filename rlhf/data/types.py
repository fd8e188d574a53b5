"""Messages, texts and the checks that both share.

A prompt is a ``Text``: plain text, which a template renders as one user turn, or a list of
messages; a policy's prompt may also be token ids. A completion is plain text, which is one
assistant turn, or a list of messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from rlhf.data.errors import DataError

Message = dict[str, str]
Text = str | list[Message]
Prompt = Text | list[int]

ROLES = ("system", "user", "assistant")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can spell it, UTF-8 cannot


def describe(value: Any) -> str:
    """What a value is, in a person's words."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a value of type {type(value).__name__}"


def as_list(rows: Any, source: str) -> list[Any]:
    """Rows as a list; refuses what would fall into letters, keys or column names."""
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise DataError(f"{source}: the rows are {describe(rows)}; give a list of objects.")
    if hasattr(rows, "iterrows"):
        raise DataError(f"{source}: the rows are a DataFrame; read it with load_rows.")
    return list(rows)


def check_string(value: Any, what: str, *, allow_empty: bool = False) -> str:
    """``value`` if it is text with something in it."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {describe(value)}; give it text.")
    if not allow_empty and not value.strip():
        raise DataError(f"{what} is empty; fill it in or remove the row.")
    if SURROGATE.search(value):
        raise DataError(
            f"{what} holds half a surrogate pair, which is no character; correct the text or "
            "remove the row."
        )
    return value


def check_message(value: Any, what: str, *, allow_empty: bool = False) -> Message:
    """One message reduced to its role and content; other keys are dropped."""
    if not isinstance(value, dict):
        raise DataError(
            f'{what} is {describe(value)}; a message is {{"role": ..., "content": ...}}.'
        )
    role = value.get("role")
    if role not in ROLES:
        raise DataError(f"{what} has the unknown role {role!r}; use one of {', '.join(ROLES)}.")
    content = check_string(
        value.get("content"), f"the content of {what} ({role})", allow_empty=allow_empty
    )
    return {"role": role, "content": content}


def check_messages(value: Any, what: str, *, allow_empty: bool = False) -> list[Message]:
    """A list of messages with known roles, texts in them, and ``system`` only in first place."""
    if not isinstance(value, list | tuple):
        raise DataError(f"{what} is {describe(value)}; give a list of messages.")
    if not value:
        raise DataError(f"{what} is an empty list; fill it in or remove the row.")
    messages = [
        check_message(item, f"message {number} of {what}", allow_empty=allow_empty)
        for number, item in enumerate(value, start=1)
    ]
    for number, message in enumerate(messages[1:], start=2):
        if message["role"] == "system":
            raise DataError(
                f"message {number} of {what} has the role 'system'; only the first may have it."
            )
    return messages


def check_prompt(value: Any, what: str = "prompt") -> Text:
    """A prompt: text, or messages that end with the user's turn."""
    if isinstance(value, str):
        return check_string(value, what)
    messages = check_messages(value, what)
    if messages[-1]["role"] != "user":
        raise DataError(
            f"{what} ends with the {messages[-1]['role']}'s message; it must end with the user's."
        )
    return messages


def check_prompt_or_ids(value: Any, what: str = "prompt") -> Prompt:
    """A prompt as ``check_prompt`` takes it, or token ids, which no tokenizer has seen yet."""
    if not isinstance(value, list | tuple) or not any(isinstance(item, Real) for item in value):
        return check_prompt(value, what)
    for number, item in enumerate(value, start=1):
        # A table that holds one fraction holds fractions alone, so 1.0 is 1.
        is_number = isinstance(item, Real) and not isinstance(item, bool)
        if not (is_number and item >= 0 and item % 1 == 0):
            raise DataError(
                f"token {number} of {what} is {item!r}; token ids are whole numbers of at least 0."
            )
    return [int(item) for item in value]


def check_completion(
    value: Any, what: str = "completion", *, allow_empty: bool = False
) -> str | list[Message]:
    """A completion: text, or messages from an assistant's turn to an assistant's turn."""
    if isinstance(value, str):
        return check_string(value, what)
    messages = check_messages(value, what, allow_empty=allow_empty)
    for place, message in (("begins", messages[0]), ("ends", messages[-1])):
        if message["role"] != "assistant":
            raise DataError(
                f"{what} {place} with the {message['role']}'s message; it must begin and end "
                "with the assistant's."
            )
    return messages


def prompt_messages(prompt: Text) -> list[Message]:
    """Plain text as one user turn; messages as they are."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def completion_messages(completion: Text) -> list[Message]:
    """Plain text as one assistant turn; messages as they are."""
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return list(completion)
