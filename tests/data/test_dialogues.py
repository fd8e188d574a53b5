"""Dialogue texts and the prompt that two conversations share."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.data import DataError, load_rows, to_preferences
from rlhf.data.dialogues import is_dialogue, parse_dialogue, split_shared_prompt


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages from "u: ..." and "a: ..."."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[text[0]], "content": text[3:]} for text in contents]


def test_parse() -> None:
    text = "\n\nHuman: one\ntwo\n\nthree \n\nAssistant: 4\n\nHuman: five\n\nAssistant:"
    assert parse_dialogue(text) == turns("u: one\ntwo\n\nthree", "a: 4", "u: five", "a: ")
    assert parse_dialogue("Human: a\n\nAssistant: b") == turns("u: a", "a: b")


def test_names_inside_a_line_are_no_turns() -> None:
    text = "\n\nHuman: What is a Human: a plant?\nAssistant: or not\n\nAssistant: No."
    assert parse_dialogue(text) == turns(
        "u: What is a Human: a plant?\nAssistant: or not", "a: No."
    )


def test_neighbouring_turns_of_one_speaker_are_joined() -> None:
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d"
    assert parse_dialogue(text) == turns("u: a\n\nb", "a: c\n\nd")


@pytest.mark.parametrize(
    "text", ["hello", "", "Hi.\n\nHuman: a\n\nAssistant: b", "Human said", None]
)
def test_what_is_no_dialogue(text: str | None) -> None:
    assert not is_dialogue(text)


def test_shared_prompt_ends_where_the_answers_part() -> None:
    opening = turns("s: S", "u: a", "a: b", "u: c")
    chosen, rejected = turns("a: yes"), turns("a: no", "u: why", "a: so")
    assert split_shared_prompt(opening + chosen, opening + rejected) == (opening, chosen, rejected)


def test_answers_that_begin_alike_are_not_split() -> None:
    prompt, chosen, rejected = split_shared_prompt(
        turns("u: a", "a: well yes"), turns("u: a", "a: well no")
    )
    assert (prompt, chosen, rejected) == (turns("u: a"), turns("a: well yes"), turns("a: well no"))


def test_parting_at_a_users_turn_goes_back_to_the_last_shared_one() -> None:
    chosen, rejected = turns("u: a", "a: b", "u: c", "a: d"), turns("u: a", "a: b", "u: e", "a: f")
    assert split_shared_prompt(chosen, rejected) == (chosen[:1], chosen[1:], rejected[1:])


def test_one_conversation_that_goes_on_where_the_other_ends() -> None:
    short, long = turns("u: a", "a: b"), turns("u: a", "a: b", "u: c", "a: d")
    assert split_shared_prompt(short, long) == (short[:1], short[1:], long[1:])


def test_no_shared_prompt() -> None:
    with pytest.raises(DataError, match="share no user turn"):
        split_shared_prompt(turns("s: S", "u: a", "a: b"), turns("s: S", "u: c", "a: d"))


def test_real_dialogues(shared_dir: Path) -> None:
    rows = load_rows(shared_dir / "data" / "hh-rlhf-harmless-base-test.jsonl.gz")
    with pytest.warns(UserWarning, match=r"4 dialogues .*\(rows 87, 517, 926, 1104\)"):
        pairs = to_preferences(rows, "hh")
    assert len(pairs) == 2312
    for row, pair in zip(rows, pairs):
        for name in ("chosen", "rejected"):
            messages = [*pair.prompt, *getattr(pair, name)]
            kept = "".join(message["content"] for message in messages)
            said = row[name].replace("\n\nHuman:", "").replace("\n\nAssistant:", "")
            assert "".join(kept.split()) == "".join(said.split())
