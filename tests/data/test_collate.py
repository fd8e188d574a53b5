"""Encoding within a length, padding, pad tokens and held-out parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf.data import (
    ChatFormat,
    DataError,
    Demonstration,
    PreferencePair,
    encode_demonstrations,
    encode_preferences,
    load_rows,
    pad_left,
    pad_right,
    prepare_tokenizer,
    split_holdout,
)

LONG = "a prompt of rather more letters"
MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "water"},
    {"role": "assistant", "content": "plants"},
]


@pytest.fixture
def chat(chat_tokenizer: Any) -> ChatFormat:
    return ChatFormat(chat_tokenizer)


def test_demonstrations_are_encoded_as_the_format_says(chat: ChatFormat) -> None:
    demos = [Demonstration("hello", "world"), Demonstration(messages=MESSAGES)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short, long = encode_demonstrations(demos, chat, 1000)
    assert (short.input_ids, short.loss_mask) == chat.encode("hello", "world")
    assert (long.input_ids, long.loss_mask) == chat.encode_messages(MESSAGES)
    assert not short.truncated and not long.truncated


def test_long_demonstrations_lose_their_end_and_are_counted(chat: ChatFormat) -> None:
    ids, mask = chat.encode("hello", "a b c d e f g h")
    demos = [Demonstration("hello", "a b c d e f g h"), Demonstration("hello", "a")]
    with pytest.warns(UserWarning, match=r"d: 1 of 2 sequences were longer than max_length="):
        first, second = encode_demonstrations(demos, chat, len(ids) - 3, "d")
    assert (first.input_ids, first.loss_mask) == (ids[:-3], mask[:-3])
    assert first.truncated and not second.truncated


def test_a_mask_that_comes_out_empty_names_the_row(chat: ChatFormat) -> None:
    length = len(chat.prompt_ids(LONG))
    long = Demonstration(LONG, "a", row=7)
    with pytest.warns(UserWarning, match="1 of 1 sequences"):
        assert sum(encode_demonstrations([long], chat, length + 1)[0].loss_mask) == 1
    demos = [Demonstration("hello", "a", row=4), long]
    with pytest.raises(DataError, match=f"d, row 7: the prompt alone fills max_length={length}"):
        encode_demonstrations(demos, chat, length, "d")


def test_pairs_are_encoded_and_cut(chat: ChatFormat) -> None:
    pair = PreferencePair("hello", "a b c d e f", "no")
    whole = encode_preferences([pair], chat, 1000)[0]
    assert (whole.chosen.input_ids, whole.chosen.loss_mask) == chat.encode("hello", pair.chosen)
    assert (whole.rejected.input_ids, whole.rejected.loss_mask) == chat.encode("hello", "no")
    length = len(whole.chosen.input_ids) - 2
    with pytest.warns(UserWarning, match="data: 1 of 2 sequences"):
        cut = encode_preferences([pair], chat, length)[0]
    assert cut.chosen.input_ids == whole.chosen.input_ids[:length]
    assert cut.chosen.truncated and not cut.rejected.truncated


def test_pairs_that_do_not_fit_name_the_row(chat: ChatFormat) -> None:
    length = len(chat.prompt_ids(LONG))
    good = PreferencePair("hello", "b", "c", row=1)
    message = f"p, row 5: the prompt alone has {length} tokens and max_length is {length}"
    with pytest.raises(DataError, match=message):
        encode_preferences([good, PreferencePair(LONG, "b", "c", row=5)], chat, length, "p")
    alike = PreferencePair(LONG, "xxxxx1", "xxxxx2")
    with pytest.raises(DataError, match="p, row 2: chosen and rejected are the same within"):
        encode_preferences([good, alike], chat, length + 3, "p")


def test_errors_of_the_template_name_the_row(make_tokenizer: Callable[..., Any]) -> None:
    chat = ChatFormat(make_tokenizer(chat_template="{{ raise_exception('not today') }}"))
    with pytest.raises(DataError, match=r"d, row 3: .*not today"):
        encode_demonstrations([Demonstration("a", "b", row=3)], chat, 10, "d")
    with pytest.raises(DataError, match=r"p, row 1: .*not today"):
        encode_preferences([PreferencePair("a", "b", "c")], chat, 10, "p")


@pytest.mark.filterwarnings("error")
def test_texts_that_spell_special_tokens_are_counted(chat: ChatFormat) -> None:
    demos = [Demonstration("a", "b"), Demonstration("a", "b<|end|>", row=4)]
    with pytest.warns(UserWarning, match=r"d: 1 rows, .* row 4, hold '<\|end\|>' in .* ordinary"):
        assert (
            encode_demonstrations(demos, chat, 1000, "d")[1].input_ids.count(
                chat.tokenizer.eos_token_id
            )
            == 3
        )
    talk = [{"role": "user", "content": "<s>"}, {"role": "assistant", "content": "b"}]
    with pytest.warns(UserWarning, match="'<s>'"):
        encode_demonstrations([Demonstration(messages=talk)], chat, 1000)
    with pytest.warns(UserWarning, match=r"p: 1 rows, .* row 1, hold '<s>', '<\|end\|>'"):
        encode_preferences([PreferencePair("<|end|>", "b", "c<s>")], chat, 1000, "p")


def test_padding() -> None:
    ids, mask = pad_right([[1, 2, 3], [4]], 0)
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    ids, mask = pad_left([[1, 2, 3], [4]], 0)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_the_mask_comes_from_lengths_not_from_the_pad_id(pad: Any) -> None:
    assert pad([[7, 7], [7]], 7)[1].sum() == 3
    assert pad([[]], 7)[0].shape == (1, 0)
    with pytest.raises(ValueError, match="nothing to pad"):
        pad([], 7)


def test_pad_equal_to_eos_is_replaced(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(pad_token="<|end|>")
    prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<unk>"
    tokenizer = make_tokenizer(unk_token=None)
    prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad_me>"]})
    tokenizer.pad_token = None
    prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<pad_me>"


def test_a_pad_token_of_its_own_stays(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(pad_token="<|start|>")
    prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<|start|>"


def test_no_other_special_token_warns() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")
    with pytest.warns(UserWarning, match="no special token besides EOS, so EOS pads"):
        prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_holdout() -> None:
    items = list(range(20))
    train, held_out = split_holdout(items, 0.25, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    assert sorted(train + held_out) == items
    assert train == sorted(train) and held_out == sorted(held_out)
    assert split_holdout(items, 5, seed=3) == (train, held_out)
    assert split_holdout(items, 5, seed=4) != (train, held_out)
    assert len(split_holdout(items, 0.01, seed=0)[1]) == 1
    rows = load_rows([{"prompt": "a"}, {"prompt": "b"}])
    assert sorted(row["prompt"] for part in split_holdout(rows, 1, seed=0) for row in part) == [
        "a",
        "b",
    ]


@pytest.mark.parametrize("size", [0, 2, -1, 0.0, 1.0, 1.5, 0.9])
def test_holdouts_that_leave_a_part_empty(size: float) -> None:
    with pytest.raises(DataError, match=r"fraction is|cannot hold out"):
        split_holdout(["a", "b"], size, seed=0)
