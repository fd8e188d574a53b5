"""Models and a tokenizer small enough to be made anew in every test."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<start> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)
# Of configs of transformers.
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 3,
}
WORDS = ["system", "user", "assistant", *[f"w{i}" for i in range(100)]]


def tiny_tokenizer(pad: str | None = "<pad>", chat: bool = True) -> Any:
    """Words w0 .. w99, separated by blanks; EOS is <end>."""
    special = ["<unk>", "<pad>", "<start>", "<end>"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    extra = {"pad_token": pad} if pad else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **extra)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(seed: int = 0, context: int = 64, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        pad_token_id=1,
        eos_token_id=3,
        bos_token_id=None,
        **options,
    )
    return LlamaForCausalLM(config)
