"""A tiny model folder whose vocabulary has warm and hostile words, so that VADER can score it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WARM = ["happy", "love", "great", "wonderful", "kind", "joy"]
HOSTILE = ["hate", "terrible", "awful", "sad", "angry", "cruel"]
NEUTRAL = ["the", "a", "table", "walk", "is", "on", "house", "seven", "instruction", "response"]
SPECIAL = ["<unk>", "<pad>", "<end>"]
WORDS = [*SPECIAL, *WARM, *HOSTILE, *NEUTRAL]


def save_word_model(folder: Path, seed: int = 0) -> str:
    """Write a 2-layer Llama over ``WORDS`` with its tokenizer as a Hugging Face folder."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        pad_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def warmth(prompts: list[object], responses: list[str], **columns: object) -> list[float]:
    """A reward for tests: warm words minus hostile ones."""
    return [
        float(sum((word in WARM) - (word in HOSTILE) for word in text.split()))
        for text in responses
    ]
