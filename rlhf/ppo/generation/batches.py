"""The default backend: transformers' ``generate``, a batch of prompts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, StoppingCriteriaList

from rlhf.data import pad_left
from rlhf.engine import resolve_dtype
from rlhf.engine.precision import autocast
from rlhf.models.decoding import attending_in_float32
from rlhf.ppo.generation.ended_rows import EndedRows, leaving_out
from rlhf.ppo.generation.ending import Ending, StopAtStrings
from rlhf.ppo.generation.options import WARPERS
from rlhf.ppo.generation.processors import logits_processors, uniform_numbers
from rlhf.ppo.generation.settings import GenerationSettings
from rlhf_kernels.fast_rotary import fast_rotary
from rlhf_kernels.fast_sampling import fast_sampling


def sample_in_batches(
    policy: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    ending: Ending,
    seed: int,
    row_numbers: Sequence[int],
) -> list[list[int]]:
    """A ``Sampler``: prompts sorted by length, longest first, ``settings.batch_size`` at a time.

    A batch goes on until all its responses have ended.
    """
    device = next(policy.parameters()).device
    pad_id = padding_id(tokenizer)
    uniforms = uniform_numbers(seed, row_numbers, settings.max_new_tokens).to(device)
    order = sorted(range(len(prompt_ids)), key=lambda row: -len(prompt_ids[row]))
    responses: list[list[int]] = [[] for _ in prompt_ids]
    config = generation_config(settings, ending, pad_id)
    with (
        generating(policy, config),
        fast_sampling(policy, settings.batch_size),
        attending_in_float32(policy),
        fast_rotary(policy),
        autocast(resolve_dtype(settings.dtype, device), device),
    ):
        for start in range(0, len(order), settings.batch_size):
            chunk = order[start : start + settings.batch_size]
            ids, mask = pad_left([list(prompt_ids[row]) for row in chunk], pad_id)
            ids, mask = ids.to(device), mask.to(device)
            at_strings = StopAtStrings(ending, prompt_width=ids.shape[1])
            ended = EndedRows(ending.ids, ids, at_strings if ending.stop_strings else None)
            with leaving_out(ended, inner_model(policy)):
                output = policy.generate(
                    input_ids=ids,
                    attention_mask=mask.long(),
                    logits_processor=logits_processors(settings, uniforms[chunk], mask),
                    stopping_criteria=StoppingCriteriaList([ended]),
                )
            for place, response in enumerate(output[:, ids.shape[1] :].tolist()):
                # Padding may follow an end; one at an EOS or stop id is found in the ids alone.
                responses[chunk[place]] = response[: at_strings.lengths.get(place)]
    return responses


def generation_config(
    settings: GenerationSettings, ending: Ending, pad_id: int
) -> GenerationConfig:
    """What of the settings transformers does by itself, before the processors given to it.

    Greedy for transformers: sampling, where it is asked for, is the last of those processors.
    """
    options = {k: v for k, v in settings.generation_options.items() if k not in WARPERS}
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens or None,
        eos_token_id=ending.ids or None,
        pad_token_id=pad_id,
        **options,
    )


def padding_id(tokenizer: Any) -> int:
    """An id to fill padding with; masks say where it is, so any id will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


@contextmanager
def generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """The model in eval mode, with this generation config as its own.

    Eval mode, because a KV cache and gradient checkpointing exclude each other. Its own config,
    because transformers fills whatever a given config leaves open from it, and a repetition penalty
    there would sample from another distribution than the one whose log-probabilities PPO trains. Of
    a model with adapters (peft) that holds for the model inside, too.
    """
    inner = inner_model(model)
    models = [model] if inner is model else [model, inner]
    was_training, was_configs = model.training, [each.generation_config for each in models]
    model.eval()
    for each in models:
        each.generation_config = config
    try:
        yield
    finally:
        model.train(was_training)
        for each, was_config in zip(models, was_configs):
            each.generation_config = was_config


def inner_model(model: Any) -> Any:
    """A model itself, without the adapters (peft) around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
