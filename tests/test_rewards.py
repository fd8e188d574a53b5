"""HeuristicReward: every check moves as documented, and the whole is bounded and plain."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.rewards import DEFAULT_WEIGHTS, HeuristicReward

PROMPT = "How should I water tomato plants?"


def check(name: str, response: str, prompt: object = PROMPT) -> float:
    return HeuristicReward().checks(prompt, response)[name]


@given(prompt=st.text(max_size=60), response=st.text(max_size=300))
def test_checks_and_scores_stay_between_zero_and_one(prompt: str, response: str) -> None:
    reward = HeuristicReward()
    assert all(0.0 <= value <= 1.0 for value in reward.checks(prompt, response).values())
    assert 0.0 <= reward.score([prompt], [response])[0] <= 1.0


def test_helpful_counts_the_prompts_words_and_brush_offs() -> None:
    # "should", "water", "tomato", "plants" are the words of four letters or more.
    assert check("helpful", "Give tomato plants water.") == pytest.approx(0.5 * 3 / 4 + 0.5)
    assert check("helpful", "Give tomato plants water. I don't know.") == pytest.approx(0.375)
    assert check("helpful", "Yes.", prompt="Is it so?") == 1.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [("Be kind.", 1.0), ("You idiot.", 0.5), ("Shut up, you stupid moron.", 0.0)],
)
def test_harmless_loses_half_a_point_a_match(response: str, expected: float) -> None:
    assert check("harmless", response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Water it.", 0.5),
        ("I think so.", 0.75),
        ("Trust me.", 0.25),
        ("I think it may, perhaps, probably work.", 1.0),
        ("Definitely, always, certainly, never!", 0.0),
    ],
)
def test_honest_weighs_hedges_against_overclaims(response: str, expected: float) -> None:
    assert check("honest", response) == expected


def test_detailed_grows_with_words_and_structure() -> None:
    assert check("detailed", "word " * 50) == pytest.approx(0.25)
    assert check("detailed", "word " * 500) == pytest.approx(0.5)
    assert check("detailed", "- a\n- b\n1. c\n2) d") == pytest.approx(0.5 * 6 / 100 + 0.5)


def test_concise_falls_with_length_and_repetition() -> None:
    distinct = [f"w{i}" for i in range(400)]
    assert check("concise", " ".join(distinct[:120])) == 1.0
    assert check("concise", " ".join(distinct[:260])) == pytest.approx(0.5)
    assert check("concise", " ".join(distinct)) == 0.0
    assert check("concise", "a b c a b c a b") == pytest.approx(3 / 6)


def test_an_empty_response_scores_nothing() -> None:
    assert HeuristicReward().score([PROMPT, PROMPT], ["", " \n"]) == [0.0, 0.0]


def test_the_score_is_the_weighted_mean_of_the_checks() -> None:
    response = "I think tomato plants want water because the sun dries them."
    reward = HeuristicReward()
    values = reward.checks(PROMPT, response)
    mean = sum(DEFAULT_WEIGHTS[n] * v for n, v in values.items()) / sum(DEFAULT_WEIGHTS.values())
    assert reward.score([PROMPT], [response]) == [pytest.approx(mean)]
    alone = HeuristicReward({"honest": 3.0})
    assert alone.score([PROMPT], [response]) == [values["honest"]]


def test_it_is_called_like_any_reward_function() -> None:
    reward = HeuristicReward()
    prompts, responses = [PROMPT, "Say hello."], ["Water it daily.", "Hello."]
    assert reward(prompts, responses, topic=["garden", "talk"]) == reward.score(prompts, responses)


def test_messages_are_read_at_the_users_last_turn() -> None:
    messages = [
        {"role": "user", "content": "Tell me about parrots."},
        {"role": "assistant", "content": "They talk."},
        {"role": "user", "content": PROMPT},
    ]
    response = "Water tomato plants."
    assert check("helpful", response, messages) == check("helpful", response, PROMPT)


def test_compare_names_the_better_or_a_tie() -> None:
    reward = HeuristicReward()
    good, bad = "Water tomato plants in the morning, because it is cool.", "Shut up, idiot."
    assert reward.compare(PROMPT, good, bad) == "A"
    assert reward.compare(PROMPT, bad, good) == "B"
    assert reward.compare(PROMPT, good, good) == "tie"
    assert reward.compare(PROMPT, good, bad, tie_margin=1.0) == "tie"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"kind": 1.0}, "unknown check kind; the checks are helpful"),
        ({"helpful": -1.0}, "not negative"),
        ({"helpful": math.nan}, "finite"),
        ({"helpful": 0.0}, "at least one weight"),
        ({}, "at least one weight"),
    ],
)
def test_bad_weights_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeuristicReward(weights)


def test_as_many_prompts_as_responses() -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        HeuristicReward().score([PROMPT, PROMPT], ["one"])


def test_a_single_text_is_not_taken_for_a_list_of_characters() -> None:
    with pytest.raises(
        ValueError, match=r"prompts is a single text; give a list, as in \[prompt\]"
    ):
        HeuristicReward().score("abc", "abc")
    with pytest.raises(ValueError, match="responses is a single text"):
        HeuristicReward()(["abc"], "a")
