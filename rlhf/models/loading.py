"""Models and tokenizers from an id, a folder or an object."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf.engine.world import World


class ModelError(ValueError):
    """A model or tokenizer cannot be loaded, or does not have the form that is needed."""


def load_causal_lm(
    name_or_model: str | Path | nn.Module, dtype: torch.dtype = torch.float32
) -> Any:
    """A causal language model from a hub id, a folder, or an object.

    What is loaded comes onto this rank's device; an object is converted where it is.

    Raises:
        ModelError: It cannot be loaded, lacks weights (its head, say), or is a model of another
            kind, such as a reward model; the message names it.
    """
    if isinstance(name_or_model, nn.Module):
        refuse_other_kinds([type(name_or_model).__name__], model_name(name_or_model))
        return name_or_model.to(dtype)
    causal_config(name_or_model)
    model = load_model(AutoModelForCausalLM, name_or_model, "causal language model", dtype=dtype)
    return model.to(World().device)


def causal_config(name: str | Path) -> Any:
    """The config of a causal language model, by id or folder.

    Raises:
        ModelError: It cannot be loaded, or is of a model of another kind.
    """
    config = load(AutoConfig, name, "causal language model")
    refuse_other_kinds(config.architectures or [], str(name))
    return config


def refuse_other_kinds(classes: list[str], name: str) -> None:
    """Raise ModelError if a class of transformers is made for something else than writing text.

    transformers would load its folder all the same, with a head that is random or, where the head
    is the embedding, with a trunk that was trained to do something else.
    """
    for class_name in classes:
        if re.search(r"For(?!CausalLM|ConditionalGeneration)[A-Z]\w*$", class_name):
            raise ModelError(
                f"{name} is no causal language model: it is a {class_name}"
                + (" (a reward model or critic)" if "SequenceClass" in class_name else "")
                + ". Give a model that writes text, such as a folder of `rlhf sft`."
            )


def load_tokenizer(name_or_tokenizer: Any, model: Any = None) -> Any:
    """A tokenizer from a hub id, a folder, or an object, which is returned as it is.

    Args:
        name_or_tokenizer: Which one; None: the one that lies with ``model``.
        model: An id or folder; a model object has no tokenizer with it.

    Raises:
        ModelError: It cannot be loaded, is no tokenizer, or is None beside a model object.
    """
    if name_or_tokenizer is None and isinstance(model, str | Path):
        name_or_tokenizer = model
    if isinstance(name_or_tokenizer, str | Path):
        return load(AutoTokenizer, name_or_tokenizer, "tokenizer")
    if name_or_tokenizer is None:
        raise ModelError(
            "no tokenizer is given, and the model is an object that has none with it. Give "
            "tokenizer=, an id, a folder or a tokenizer."
        )
    if not (callable(name_or_tokenizer) and hasattr(name_or_tokenizer, "eos_token_id")):
        raise ModelError(
            f"the tokenizer is a {type(name_or_tokenizer).__name__}; give an id, a folder or a "
            "transformers tokenizer."
        )
    return name_or_tokenizer


def load(auto_class: Any, name: str | Path, what: str, **options: Any) -> Any:
    """``auto_class.from_pretrained``, with an error that says what to do."""
    if not isinstance(name, str | Path):
        raise ModelError(
            f"a {type(name).__name__} is no {what}; give a Hugging Face folder, a model id or a "
            "transformers model."
        )
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


def load_model(auto_class: Any, name: str | Path, what: str, *, dtype: torch.dtype) -> Any:
    """As ``load``; weights that the files do not have are an error, not drawn at random.

    Raises:
        ModelError: It cannot be loaded, or weights are missing; they are named.
    """
    model, info = load(auto_class, name, what, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])  # without tied ones, which are stored once
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        raise ModelError(
            f"{name} is no whole {what}: it lacks the weights {listed}, which would be random. "
            "Give the folder of one that was saved with them."
        )
    return model


def refuse_adapters(model: Any, what: str) -> None:
    """Raise ModelError if a model to be trained comes with peft's adapters, as one of its models or
    inside an ordinary one: they could not be told from those of ``lora_rank``, nor saved by
    themselves.
    """
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"{what} comes with adapters of peft. Merge them first (of a PeftModel: "
            "model.merge_and_unload().requires_grad_(True)), or give the model without them; "
            "PPO's lora_rank and critic_lora_rank add new ones."
        )


def check_token_ids(
    sequences: Iterable[Sequence[int]], model: nn.Module, what: str = "the model"
) -> None:
    """Check that a model knows the token ids that a tokenizer gave.

    Raises:
        ModelError: One is beyond its embedding; the tokenizer belongs to another model.
    """
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    largest = max((max(ids, default=0) for ids in sequences), default=0)
    if largest >= size:
        raise ModelError(
            f"the tokenizer gives the token id {largest}, and {what} knows {size}, 0 to {size - 1}."
            " Give the tokenizer that lies with the model, or make its embedding larger: "
            "model.resize_token_embeddings(len(tokenizer))."
        )


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
