"""Models and tokenizers from an id, a folder or an object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


class ModelError(ValueError):
    """A model or tokenizer cannot be loaded, or does not have the form that is needed."""


def load_causal_lm(
    name_or_model: str | Path | nn.Module, dtype: torch.dtype = torch.float32
) -> Any:
    """A causal language model from a hub id, a folder, or an object, which is converted in place.

    Raises:
        ModelError: It cannot be loaded; the message names it.
    """
    if isinstance(name_or_model, nn.Module):
        return name_or_model.to(dtype)
    return load(AutoModelForCausalLM, name_or_model, "causal language model", dtype=dtype)


def load_tokenizer(name_or_tokenizer: Any) -> Any:
    """A tokenizer from a hub id, a folder, or an object, which is returned as it is."""
    if not isinstance(name_or_tokenizer, str | Path):
        return name_or_tokenizer
    return load(AutoTokenizer, name_or_tokenizer, "tokenizer")


def load(auto_class: Any, name: str | Path, what: str, **options: Any) -> Any:
    """``auto_class.from_pretrained``, with an error that says what to do."""
    path = Path(name).expanduser()
    is_folder = path.is_dir()
    if is_folder and not (path / "config.json").exists():
        raise ModelError(
            f"the folder {name} has no config.json, so it holds no finished {what}. "
            "Give a Hugging Face folder or a model id."
        )
    try:
        return auto_class.from_pretrained(str(path) if is_folder else str(name), **options)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"cannot load a {what} from {str(name)!r}: {lines[0]} "
            "Give an existing Hugging Face folder or a model id."
        ) from error


def context_length(model: Any) -> int | None:
    """The most positions the model was built for, or None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def length_limit(model: Any, max_length: int | None) -> int:
    """The longest sequence to train on: ``max_length``, or the model's context if that is None.

    Raises:
        ValueError: ``max_length`` is beyond the context, or neither is known.
    """
    context = context_length(model)
    if max_length is None and context is None:
        raise ValueError(f"max_length is not set and {model_name(model)} names no context; set it")
    if max_length is None:
        return int(context or 0)
    if context is not None and max_length > context:
        raise ValueError(
            f"max_length={max_length} is longer than the context of {model_name(model)}: {context}"
        )
    return max_length


def model_name(model: Any) -> str:
    """What to call a model in messages: where it came from, else its class."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__
