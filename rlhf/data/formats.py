"""Rows to demonstrations, preference pairs and prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf.data.dialogues import is_dialogue, parse_dialogue, split_shared_prompt
from rlhf.data.errors import DataError
from rlhf.data.preferences import PreferencePair
from rlhf.data.types import (
    Message,
    Prompt,
    Text,
    as_list,
    check_completion,
    check_messages,
    check_prompt,
    check_prompt_or_ids,
    check_string,
    describe,
    prompt_messages,
)

Row = Mapping[str, Any]
Item = TypeVar("Item")

_SHOWN_ROWS = 10


@dataclass(frozen=True)
class Demonstration:
    """What an assistant should have said.

    Either ``prompt`` and ``completion``, of which the completion is trained, or ``messages``, of
    which every assistant turn is. ``row`` is the row of the source, counted from 1 (0: none).
    """

    prompt: Text = ""
    completion: str | list[Message] = ""
    messages: list[Message] | None = None
    row: int = 0


def to_demonstrations(
    rows: Iterable[Row], source: str = "data", first_row: int = 1
) -> list[Demonstration]:
    """Rows for supervised fine-tuning, in one of the forms

    - ``messages``: ends with the assistant's turn;
    - ``prompt``, ``completion``: each text or messages;
    - ``instruction``[, ``input``], ``output`` or ``response``: texts.

    ``first_row`` is the number of the first row in the source.

    Raises:
        DataError: naming source and row, for unknown columns, missing, null or empty cells,
            wrong types and unknown roles.
    """
    rows = _listed(rows, source, first_row)
    columns = _columns(rows)
    convert: Callable[[Row, int], Demonstration]
    if "messages" in columns:
        convert = _from_messages
    elif {"prompt", "completion"} <= columns:
        convert = _from_completion
    elif "instruction" in columns and columns & {"output", "response"}:
        answer = "output" if "output" in columns else "response"

        def convert(row: Row, number: int) -> Demonstration:
            return _from_instruction(row, answer, number)
    else:
        raise _unknown_columns(
            source,
            columns,
            "messages",
            "prompt, completion",
            "instruction[, input], output",
            "instruction[, input], response",
        )
    return _convert_all(rows, source, convert, first_row)


def to_preferences(
    rows: Iterable[Row], source: str = "data", first_row: int = 1
) -> list[PreferencePair]:
    """Rows of preferences, in one of the forms

    - ``prompt``, ``chosen``, ``rejected``: each text or messages;
    - ``chosen``, ``rejected`` as messages that begin with the shared prompt;
    - ``chosen``, ``rejected`` as ``\\n\\nHuman: ...\\n\\nAssistant: ...`` dialogues (hh-rlhf) that
      begin with it.

    ``first_row`` is the number of the first row in the source.

    Other columns become the pair's metadata (null cells are left out). An empty response is an
    error except where a dialogue text ends in a silent assistant, as a few of hh-rlhf's do: the
    judge saw that silence, so it is kept, with one warning that lists the rows.

    Raises:
        DataError: naming source and row, for unknown columns, missing, null or empty cells,
            wrong types, unknown roles, identical completions and pairs without a shared prompt.
    """
    rows = _listed(rows, source, first_row)
    columns = _columns(rows)
    if not {"chosen", "rejected"} <= columns:
        raise _unknown_columns(source, columns, "prompt, chosen, rejected", "chosen, rejected")
    convert = _explicit_pair if "prompt" in columns else _implicit_pair
    decided = [(n, row) for n, row in enumerate(rows, first_row) if not _is_tie(row)]
    pairs = [_convert(row, n, source, convert) for n, row in decided]
    _warn_of(len(rows) - len(decided), [], source, "ties were left out: they prefer nothing")
    silent = [pair.row for pair in pairs if _has_silence(pair)]
    _warn_of(len(silent), silent, source, "dialogues hold an empty assistant turn, kept as it is")
    return pairs


def to_prompts(
    rows: Iterable[Row | str | list[int]], source: str = "data", first_row: int = 1
) -> list[dict[str, Any]]:
    """Prompts alone, each ``{"prompt": Prompt, **other columns}``, from rows in one of the forms

    - ``prompt``: text, messages that end with the user's turn, or token ids;
    - ``instruction``[, ``input``];
    - ``messages``: an assistant's last turn is left out;
    - ``chosen``, ``rejected``: the prompt that they share;
    - a text, or a list of token ids, that is the prompt itself.

    ``first_row`` is the number of the first row in the source.

    Raises:
        DataError: naming source and row.
    """
    given = as_list(rows, source)
    rows = _listed(
        [{"prompt": row} if _is_prompt(row) else row for row in given], source, first_row
    )
    columns = _columns(rows)
    if {"chosen", "rejected"} <= columns and not columns & {"prompt", "instruction", "messages"}:
        pairs = to_preferences(rows, source, first_row)
        return [{"prompt": pair.prompt, **pair.metadata} for pair in pairs]

    def convert(row: Row, number: int) -> dict[str, Any]:
        if "prompt" in columns:
            return _prompt_row(row, check_prompt_or_ids(_cell(row, "prompt")))
        if "instruction" in columns:
            return _prompt_row(row, _instruction(row), "instruction", "input")
        return _prompt_row(row, _opening(row), "messages")

    if columns & {"prompt", "instruction", "messages"}:
        return _convert_all(rows, source, convert, first_row)
    raise _unknown_columns(
        source, columns, "prompt", "instruction[, input]", "messages", "chosen, rejected"
    )


# One row at a time


def _from_messages(row: Row, number: int) -> Demonstration:
    messages = check_messages(_cell(row, "messages"), "messages")
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"messages ends with the {messages[-1]['role']}'s message; to be learnt from it must "
            "end with the assistant's."
        )
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if not any(message["role"] == "user" for message in messages[:first]):
        raise DataError("messages has no user's message before the assistant's; add the prompt.")
    return Demonstration(messages=messages, row=number)


def _from_completion(row: Row, number: int) -> Demonstration:
    prompt = _prompt_cell(row)
    return Demonstration(prompt, check_completion(_cell(row, "completion")), row=number)


def _from_instruction(row: Row, answer: str, number: int) -> Demonstration:
    return Demonstration(_instruction(row), check_string(_cell(row, answer), answer), row=number)


def _instruction(row: Row) -> str:
    instruction = check_string(_cell(row, "instruction"), "instruction")
    extra = row.get("input")
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return instruction
    return f"{instruction}\n\n### Input:\n{check_string(extra, 'input')}"


def _explicit_pair(row: Row, number: int) -> PreferencePair:
    prompt = _prompt_cell(row)
    chosen, rejected = (_answer(row, name, prompt) for name in ("chosen", "rejected"))
    return PreferencePair(prompt, chosen, rejected, _metadata(row), number)


def _answer(row: Row, name: str, prompt: Text) -> str | list[Message]:
    """A completion; one that is given as the whole conversation loses the prompt."""
    value = _cell(row, name)
    if isinstance(value, str):
        return check_string(value, name)
    opening, messages = prompt_messages(prompt), check_messages(value, name)
    if messages[: len(opening)] == opening:
        messages = messages[len(opening) :]
    return check_completion(messages, name)


def _implicit_pair(row: Row, number: int) -> PreferencePair:
    chosen, rejected = _cell(row, "chosen"), _cell(row, "rejected")
    if is_dialogue(chosen) and is_dialogue(rejected):
        conversations = parse_dialogue(chosen), parse_dialogue(rejected)
    elif isinstance(chosen, str) or isinstance(rejected, str):
        for name, value in (("chosen", chosen), ("rejected", rejected)):
            check_string(value, name)
        raise DataError(
            "chosen and rejected are plain texts without a prompt; add a prompt column, or write "
            "both as dialogues that begin with 'Human:'."
        )
    else:
        conversations = check_messages(chosen, "chosen"), check_messages(rejected, "rejected")
    return PreferencePair(*split_shared_prompt(*conversations), _metadata(row), number)


def _prompt_cell(row: Row) -> Text:
    return check_prompt(_cell(row, "prompt"))


def _opening(row: Row) -> Text:
    messages = check_messages(_cell(row, "messages"), "messages")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError("messages holds no prompt; add the user's message.")
    return check_prompt(messages, "messages without the last answer")


def _is_prompt(row: Any) -> bool:
    """Whether a row is no row but a prompt: a text or token ids."""
    return isinstance(row, str) or (
        isinstance(row, list) and isinstance(next(iter(row), None), int)
    )


def _prompt_row(row: Row, prompt: Prompt, *used: str) -> dict[str, Any]:
    others = {name: value for name, value in row.items() if name not in ("prompt", *used)}
    return {"prompt": prompt, **others}


def _cell(row: Row, name: str) -> Any:
    if row.get(name) is not None:
        return row[name]
    # A table gives each row all columns, with null for those that it was given without.
    flaw = f"{name} is null or missing" if name in row else f"the column {name!r} is missing"
    others = ", ".join(other for other, value in row.items() if value is not None)
    raise DataError(f"{flaw}; the row has {others or 'nothing'}. Fill it in or remove the row.")


def _metadata(row: Row) -> dict[str, Any]:
    used = ("prompt", "chosen", "rejected")
    return {name: value for name, value in row.items() if name not in used and value is not None}


def _is_tie(row: Row) -> bool:
    """Whether this is a line that ``PreferenceDataset.save`` wrote for a tie."""
    return row.get("preference") == "tie" and row.get("chosen") is None


def _has_silence(pair: PreferencePair) -> bool:
    return any(
        not message["content"]
        for completion in (pair.chosen, pair.rejected)
        if not isinstance(completion, str)
        for message in completion
    )


# All rows


def _listed(rows: Iterable[Row], source: str, first_row: int) -> list[Row]:
    listed = as_list(rows, source)
    if not listed:
        raise DataError(f"{source}: there are no rows; give at least one.")
    for number, row in enumerate(listed, first_row):
        if not isinstance(row, Mapping):
            raise DataError(f"the row is {describe(row)}; give an object.").at(source, number)
    return listed


def _columns(rows: list[Row]) -> set[str]:
    return {name for row in rows for name in row}


def _convert(row: Row, number: int, source: str, convert: Callable[[Row, int], Item]) -> Item:
    try:
        return convert(row, number)
    except DataError as error:
        raise error.at(source, number) from None


def _convert_all(
    rows: list[Row], source: str, convert: Callable[[Row, int], Item], first_row: int
) -> list[Item]:
    return [_convert(row, n, source, convert) for n, row in enumerate(rows, first_row)]


def _unknown_columns(source: str, columns: set[str], *forms: str) -> DataError:
    return DataError(
        f"{source}: the columns are {', '.join(sorted(columns)) or 'none'}. Expected one of: "
        f"{'; '.join(forms)}. Rename the columns to match."
    )


def _warn_of(count: int, numbers: list[int], source: str, what: str) -> None:
    if not count:
        return
    shown = ", ".join(map(str, numbers[:_SHOWN_ROWS]))
    more = ", ..." if len(numbers) > _SHOWN_ROWS else ""
    place = f" (rows {shown}{more})" if shown else ""
    warnings.warn(f"{source}: {count} {what}{place}.", stacklevel=3)
