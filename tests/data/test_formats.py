"""Rows to demonstrations, pairs and prompts, and what is said of rows that are none."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from rlhf.data import (
    DataError,
    Demonstration,
    PreferencePair,
    load_rows,
    to_demonstrations,
    to_preferences,
    to_prompts,
)

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "world"}
OTHER = {"role": "assistant", "content": "go away"}
SYSTEM = {"role": "system", "content": "Be kind."}


def test_instruction_rows() -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
        {"instruction": "Greet.", "input": None, "output": "Hi"},
    ]
    assert to_demonstrations(rows) == [
        Demonstration("Add.\n\n### Input:\n1 and 2", "3", row=1),
        Demonstration("Greet.", "Hi", row=2),
        Demonstration("Greet.", "Hi", row=3),
    ]
    assert to_demonstrations([{"instruction": "Greet.", "response": "Hi"}])[0].completion == "Hi"


def test_prompt_completion_and_message_rows() -> None:
    assert to_demonstrations([{"prompt": "hello", "completion": "world"}]) == [
        Demonstration("hello", "world", row=1)
    ]
    assert to_demonstrations([{"prompt": [USER], "completion": [ANSWER]}]) == [
        Demonstration([USER], [ANSWER], row=1)
    ]
    messages = [SYSTEM, USER, ANSWER, USER, OTHER]
    assert to_demonstrations([{"messages": messages}]) == [Demonstration(messages=messages, row=1)]


def test_rows_of_a_dataset_work_like_lists() -> None:
    rows = [{"messages": [USER, {**ANSWER, "name": "bot"}]}, {"messages": [USER, OTHER]}]
    found = to_demonstrations(load_rows(rows))
    assert [d.messages for d in found] == [[USER, ANSWER], [USER, OTHER]]


DEMONSTRATION_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "completion": " \n"}, "completion is empty"),
    ({"prompt": "", "completion": "b"}, "prompt is empty"),
    ({"prompt": "a", "completion": None}, "completion is null"),
    ({"prompt": "a"}, "the column 'completion' is missing"),
    ({"prompt": 5, "completion": "b"}, "prompt is a value of type int; give a list of messages"),
    ({"prompt": "a", "completion": {"x": 1}}, "completion is an object"),
    ({"prompt": [], "completion": "b"}, "prompt is an empty list"),
    ({"prompt": [ANSWER], "completion": "b"}, "prompt ends with the assistant's message"),
    ({"prompt": "a", "completion": [USER, ANSWER]}, "completion begins with the user's"),
    ({"prompt": "a", "completion": [ANSWER, USER]}, "completion ends with the user's"),
]


@pytest.mark.parametrize(("row", "message"), DEMONSTRATION_ERRORS)
def test_bad_demonstrations_name_source_and_row(row: dict[str, Any], message: str) -> None:
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match=f"^sft.jsonl, row 2: {message}"):
        to_demonstrations([good, row], "sft.jsonl")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "robot", "content": "x"}], "unknown role 'robot'; use one of system, user"),
        ([USER, SYSTEM, ANSWER], "message 2 of messages has the role 'system'; only the first"),
        ([USER], "ends with the user's message"),
        ([ANSWER], "no user's message before the assistant's"),
        ([SYSTEM, ANSWER], "no user's message before the assistant's"),
        ([USER, {"role": "assistant", "content": ""}], "content of message 2 of messages .*empty"),
        ([USER, {"role": "assistant", "content": None}], "content of message 2 .* is null"),
        ([USER, "world"], "message 2 of messages is text; a message is"),
        ("hello", "messages is text; give a list of messages"),
        ([], "messages is an empty list"),
    ],
)
def test_bad_messages(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"row 1: .*{message}"):
        to_demonstrations([{"messages": messages}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "", "output": "b"}, "instruction is empty"),
        ({"instruction": "a", "output": None}, "output is null"),
        ({"instruction": "a", "output": 5}, "output is a value of type int; give it text"),
        ({"instruction": "a", "input": 5, "output": "b"}, "input is a value of type int"),
    ],
)
def test_bad_instructions(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"row 1: {message}"):
        to_demonstrations([row])


def test_unknown_columns_list_what_is_there_and_what_is_accepted() -> None:
    rows = [{"question": "a", "answer": "b"}]
    with pytest.raises(DataError, match=r"qa: the columns are answer, question\. Expected one of"):
        to_demonstrations(rows, "qa")
    with pytest.raises(DataError, match="prompt, chosen, rejected; chosen, rejected"):
        to_preferences(rows, "qa")
    with pytest.raises(DataError, match=r"prompt; instruction\[, input\]; messages"):
        to_prompts(rows, "qa")


@pytest.mark.parametrize("convert", [to_demonstrations, to_preferences, to_prompts])
def test_no_rows_and_no_objects(convert: Any) -> None:
    with pytest.raises(DataError, match="there are no rows"):
        convert([])
    with pytest.raises(DataError, match="data, row 1: the row is a value of type int"):
        convert([5])


def test_pairs_with_a_prompt() -> None:
    rows = [
        {"prompt": "hello", "chosen": "world", "rejected": "no", "judge": "me", "sure": None},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER], "judge": "you", "sure": 3},
    ]
    assert to_preferences(rows) == [
        PreferencePair("hello", "world", "no", {"judge": "me"}),
        PreferencePair([USER], [ANSWER], [OTHER], {"judge": "you", "sure": 3}),
    ]
    assert [pair.row for pair in to_preferences(rows)] == [1, 2]


def test_whole_conversations_beside_a_prompt_lose_it() -> None:
    row = {"prompt": "hello", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    assert to_preferences([row]) == [PreferencePair("hello", [ANSWER], [OTHER])]


def test_pairs_of_conversations() -> None:
    row = {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]}
    assert to_preferences([row]) == [PreferencePair([SYSTEM, USER], [ANSWER], [OTHER])]


def test_pairs_of_dialogues() -> None:
    row = {
        "chosen": "\n\nHuman: hello\n\nAssistant: world",
        "rejected": "\n\nHuman: hello\n\nAssistant: go away",
    }
    assert to_preferences([row]) == [PreferencePair([USER], [ANSWER], [OTHER])]


def test_a_silent_assistant_in_a_dialogue_is_kept_and_told() -> None:
    row = {
        "chosen": "\n\nHuman: hello\n\nAssistant: ",
        "rejected": "\n\nHuman: hello\n\nAssistant: go away",
    }
    with pytest.warns(UserWarning, match=r"hh: 1 dialogues hold an empty.*\(rows 2\)"):
        pairs = to_preferences(
            [{"chosen": row["rejected"], "rejected": row["chosen"] + "x"}, row], "hh"
        )
    assert pairs[1].chosen == [{"role": "assistant", "content": ""}]


PAIR_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "chosen": "b", "rejected": " b\n"}, "chosen and rejected are identical"),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
    ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen is null"),
    ({"prompt": "a", "chosen": "b"}, "the column 'rejected' is missing"),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, "prompt is empty"),
    ({"prompt": "a", "chosen": 1, "rejected": "c"}, "chosen is a value of type int"),
    ({"prompt": "a", "chosen": [USER], "rejected": "c"}, "chosen begins with the user's"),
    ({"prompt": "a", "chosen": [{"role": "bot", "content": "b"}], "rejected": "c"}, ".*role 'bot'"),
]


@pytest.mark.parametrize(("row", "message"), PAIR_ERRORS)
def test_bad_pairs_name_source_and_row(row: dict[str, Any], message: str) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match=f"^rm.csv, row 3: {message}"):
        to_preferences([good, good, row], "rm.csv")


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("yes", "no", "plain texts without a prompt; add a prompt column"),
        ("", "no", "chosen is empty"),
        ([USER, ANSWER], "no", "plain texts|chosen is a list"),
        ([USER, ANSWER], [USER, ANSWER], "identical"),
        ([USER, ANSWER], [{"role": "user", "content": "bye"}, OTHER], "share no user turn"),
        ([USER, ANSWER], [USER], "rejected ends with the user's turn"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d", "share no user turn"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b ", "identical"),
        ("\n\nHuman: a", "\n\nHuman: a\n\nAssistant: b", "chosen ends with the user's turn"),
    ],
)
def test_bad_pairs_without_a_prompt(chosen: Any, rejected: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"row 1: .*({message})"):
        to_preferences([{"chosen": chosen, "rejected": rejected}])


def test_prompts_keep_other_columns() -> None:
    assert to_prompts([{"prompt": "a", "topic": 1}, {"prompt": [USER], "topic": None}]) == [
        {"prompt": "a", "topic": 1},
        {"prompt": [USER], "topic": None},
    ]
    assert to_prompts([{"instruction": "a", "input": "b", "output": "c"}]) == [
        {"prompt": "a\n\n### Input:\nb", "output": "c"}
    ]
    assert to_prompts(["a", "b"]) == [{"prompt": "a"}, {"prompt": "b"}]


def test_a_mistyped_column_is_named_beside_the_missing_one() -> None:
    rows = [{"prompt": "a", "n": 1}, {"promt": "b", "n": 2}]
    with pytest.raises(DataError, match="row 2: the column 'prompt' is missing; the row has promt"):
        to_prompts(rows)
    with pytest.raises(DataError, match="row 2: prompt is null or missing; the row has n, promt"):
        to_prompts(load_rows(rows))


def test_prompts_may_be_token_ids() -> None:
    rows = [{"prompt": [1, 5, 6], "topic": 1}, {"prompt": "a"}, {"prompt": [USER]}]
    assert to_prompts(rows) == rows
    assert to_prompts([[1, 5, 6], "a"]) == [{"prompt": [1, 5, 6]}, {"prompt": "a"}]
    with pytest.raises(DataError, match="message 1 of prompt"):  # only a policy takes ids
        to_preferences([{"prompt": [1], "chosen": "a", "rejected": "b"}])


def test_prompts_of_conversations_and_pairs() -> None:
    assert to_prompts([{"messages": [SYSTEM, USER, ANSWER], "n": 1}]) == [
        {"prompt": [SYSTEM, USER], "n": 1}
    ]
    assert to_prompts([{"messages": [USER]}]) == [{"prompt": [USER]}]
    row = {"chosen": [USER, ANSWER], "rejected": [USER, OTHER], "n": 1}
    assert to_prompts([row]) == [{"prompt": [USER], "n": 1}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": None}, "prompt is null or missing; the row has nothing"),
        (
            {"prompt": [{"role": "robot", "content": "a"}]},
            "unknown role 'robot'; use one of system",
        ),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            "message 1 of messages has the unknown",
        ),
        ({"prompt": [ANSWER]}, "must end with the user's"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": [1, -2]}, "token 2 of prompt is -2; token ids are whole numbers"),
        ({"prompt": [1.0, 2.5]}, r"token 2 of prompt is 2\.5"),
        ({"prompt": [1, "a"]}, "token 2 of prompt is 'a'"),
        ({"prompt": [1, True]}, "token 2 of prompt is True"),
        ({"messages": [ANSWER]}, "holds no prompt"),
        ({"messages": [SYSTEM, ANSWER]}, "must end with the user's"),
    ],
)
def test_bad_prompts(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"p, row 1: .*{message}"):
        to_prompts([row], "p")


@pytest.mark.parametrize("convert", [to_demonstrations, to_preferences, to_prompts])
@pytest.mark.parametrize("rows", [None, "text", {"prompt": ["a"]}, pd.DataFrame({"prompt": ["a"]})])
def test_what_is_no_list_of_rows(convert: Any, rows: Any) -> None:
    with pytest.raises(DataError, match=r"data: the rows are (null|text|an object|a DataFrame); "):
        convert(rows)


def test_half_a_surrogate_pair_names_the_row() -> None:
    with pytest.raises(DataError, match="data, row 2: prompt holds half a surrogate pair"):
        to_prompts([{"prompt": "a"}, {"prompt": "\ud83d"}])
    silent = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud83d"}]
    with pytest.raises(DataError, match=r"data, row 1: the content of message 2 .* half a surr"):
        to_demonstrations([{"messages": silent}])
