"""Where responses end: EOS, stop ids, stop strings, and the least length before them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, tiny_tokenizer
from tiny_policy import EOS_IDS, make_policy
from tiny_sampling import EOS, PROMPTS, rows, sample
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.ppo.generation import Ending, GenerationSettings

BACKENDS = ["generate", "continuous"]


def ending(
    tokenizer: Any = None, eos_ids: list[int] | int = EOS, size: int = 128, **options: Any
) -> Ending:
    policy = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=eos_ids),
        get_input_embeddings=lambda: torch.nn.Embedding(size, 1),
    )
    return Ending(policy, tokenizer or tiny_tokenizer(), GenerationSettings(**options))


def ids(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]


def byte_tokenizer() -> Any:
    """One token for each byte, and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<end>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.mark.parametrize(
    "response, length, ended",
    [([7, EOS, EOS], 2, True), ([EOS], 1, True), ([7, 8], 2, False), ([7, 9, EOS], 3, True)],
)
def test_a_response_goes_through_its_first_eos_also_when_eos_pads(
    response: list[int], length: int, ended: bool
) -> None:
    assert ending().cut(response) == (response[:length], ended)


def test_every_eos_id_ends_a_response() -> None:
    assert ending(eos_ids=[EOS, 9]).cut([7, 9, 1]) == ([7, 9], True)
    assert ending(eos_ids=[9]).cut([7, EOS, 1]) == ([7, EOS], True)  # the tokenizer's, too


def test_a_stop_id_ends_a_response_and_stays_in_its_text() -> None:
    rule = ending(stop_token_ids=ids("w5"))
    assert rule.cut(ids("w1 w5 w2")) == (ids("w1 w5"), True)
    assert rule.text(ids("w1 w5")) == "w1 w5"
    assert rule.text([*ids("w1 w2"), EOS]) == "w1 w2"


@pytest.mark.parametrize(
    "stops, text, cut, left",
    [
        (["w5 w6"], "w1 w5 w6 w7", "w1 w5 w6", "w1 "),
        (["w5 w6"], "w6 w5 w1", None, "w6 w5 w1"),
        (["5 w"], "w1 w15 w2 w3", "w1 w15 w2", "w1 w1"),  # parts of two tokens
        (["w9", "w5"], "w1 w5 w9", "w1 w5", "w1 "),
        (["w1"], "w2 w10 w3", "w2 w10", "w2 "),  # the rest of the token goes with it
        (["w10", "w1"], "w2 w10 w3", "w2 w10", "w2 "),
        (["w1"], "w1 w2", "w1", ""),
    ],
)
def test_a_stop_string_ends_ids_behind_it_and_the_text_before_it(
    stops: list[str], text: str, cut: str | None, left: str
) -> None:
    rule = ending(stop_strings=stops)
    found, ended = rule.cut(ids(text))
    assert (found, ended) == (ids(cut or text), cut is not None)
    assert rule.text(found) == left


def test_a_special_token_may_be_a_stop_string() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>"]})
    rule = ending(tokenizer, stop_strings=["<start>"])
    response = ids("w1 w2 <start> w3")
    assert rule.cut(response) == (response[:3], True)
    assert rule.text(response[:3]) == "w1 w2"


@pytest.mark.parametrize("before", ["", "naïve ", "€"])
def test_a_stop_string_of_characters_of_several_tokens(before: str) -> None:
    tokenizer = byte_tokenizer()
    rule = ending(tokenizer, eos_ids=256, size=257, stop_strings=["ö€"])
    response = tokenizer(before + "ö€ and on")["input_ids"]
    found, ended = rule.cut(response)
    assert ended
    assert len(found) == len((before + "ö€").encode())
    assert rule.text(found) == before


def test_stop_strings_of_a_real_tokenizer(stories_dir: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_dir)
    text = "Once upon a time, there was a dog. The End. And then"
    response = tokenizer(text, add_special_tokens=False)["input_ids"]
    rule = ending(tokenizer, eos_ids=2, size=512, stop_strings=["The End.", "zebra"])
    found, ended = rule.cut(response)
    assert ended
    assert tokenizer.decode(found).strip().endswith("The End.")
    assert rule.text(found).strip() == "Once upon a time, there was a dog."


def test_nothing_ends_before_min_new_tokens() -> None:
    rule = ending(stop_strings=["w5"], min_new_tokens=2)
    assert rule.cut(ids("w5 w5 w5 w5")) == (ids("w5 w5 w5"), True)
    assert rule.cut(ids("w5 w1 w2")) == (ids("w5 w1 w2"), False)
    assert rule.text(ids("w5 w5 w5")) == "w5 w5 "


def test_a_stop_id_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match=r"stop_token_ids has 128, .* ends at 127"):
        ending(stop_token_ids=[128])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_stops_at_stop_strings_and_ids(backend: str) -> None:
    """Compared with the same samples that go on: each row has random numbers of its own."""
    policy, prompts = make_policy(), PROMPTS * 3
    free = sample(policy, prompts, seed=2)
    words = [text.split() for text in free.texts]
    stop = f" {next(w[2] for w in words if len(w) > 4)}"
    token = next(r[1] for r in rows(free) if len(r) > 3 and r[1] not in EOS_IDS)
    made = sample(
        policy, prompts, seed=2,
        stop_strings=[stop], stop_token_ids=[token], generation_backend=backend,
    )  # fmt: skip
    rule = ending(eos_ids=EOS_IDS, stop_strings=[stop], stop_token_ids=[token])
    expected = [rule.cut(response) for response in rows(free)]
    assert rows(made) == [response for response, _ in expected]
    assert made.ended.tolist() == [ended for _, ended in expected]
    assert made.ended.sum() > free.ended.sum()
    assert all(stop not in text for text in made.texts)
    assert any(response[-1] == token for response in rows(made))


@pytest.mark.parametrize("backend", BACKENDS)
def test_responses_have_min_new_tokens_before_their_end(backend: str) -> None:
    policy = make_policy()
    made = sample(policy, PROMPTS * 3, seed=1, min_new_tokens=5, generation_backend=backend)
    lengths = made.response_mask.sum(1)
    assert min(lengths) == 6  # and not all are longer
    assert all(i not in EOS_IDS for response in rows(made) for i in response[:5])
    whole = sample(policy, PROMPTS * 3, min_new_tokens=8, generation_backend=backend)
    assert not whole.ended.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pad", ["<pad>", "<end>"])
def test_padding_may_be_a_stop_id_and_prompts_may_have_any_of_them(pad: str, backend: str) -> None:
    """Prompts with EOS, pad and stop ids in them; every one may also end a response."""
    policy, tokenizer = make_policy(), tiny_tokenizer(pad=pad)
    prompts = [[5, EOS, 7], [EOS], [9, 1, 11, EOS, 120], [1, 1]] * 3
    stops = [tokenizer.pad_token_id, 40]
    options: dict[str, Any] = {"seed": 6, "stop_token_ids": stops, "generation_backend": backend}
    made = sample(policy, prompts, tokenizer=tokenizer, **options)
    assert [p[m].tolist() for p, m in zip(made.prompt_ids, made.prompt_mask)] == prompts
    ends = {*EOS_IDS, *stops}
    for response, ended in zip(rows(made), made.ended.tolist()):
        assert not ends & set(response[:-1])
        assert (response[-1] in ends) == ended
        assert ended or len(response) == 8
    alone = [
        rows(sample(policy, [p], tokenizer=tokenizer, row_numbers=[row], **options))[0]
        for row, p in enumerate(prompts[:4])
    ]
    assert rows(made)[:4] == alone
    assert 0 < made.ended.sum() < len(made.ended)


def test_a_response_may_hold_the_padding_token() -> None:
    policy = tiny_llama()
    made = sample(policy, PROMPTS, sampler=lambda *a, **k: [[1], [1, 1, 5], [7, 1], [EOS]])
    assert rows(made) == [[1], [1, 1, 5], [7, 1], [EOS]]
    assert made.ended.tolist() == [False, False, False, True]
