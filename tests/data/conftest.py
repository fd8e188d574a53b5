"""A small byte-level tokenizer with the templates that the tests need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|start|>system\nBe kind.<|end|>\n{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "<|start|>", "<|end|>"]
# Trained so that line breaks and letters merge across the borders that templates make.
CORPUS = ["\n\n\n\nhello\nhello\n\nworld", "water the plants\n\n", "a b c\nd e f\n"] * 20


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Makes a tokenizer of 300 tokens; keyword arguments as for ``PreTrainedTokenizerFast``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def make(chat_template: str | None = CHATML, **options: Any) -> Any:
        tokenizer = Tokenizer(models.BPE(unk_token=None))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        options = {"eos_token": "<|end|>", "unk_token": "<unk>", **options}
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
        made.chat_template = chat_template
        return made

    return make


@pytest.fixture
def chat_tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """With a ChatML template that adds a system message when none is given."""
    return make_tokenizer()


@pytest.fixture
def plain_tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """Without a chat template."""
    return make_tokenizer(chat_template=None)
