"""Options passed through to a backend, and those that are not, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    TopHLogitsWarper,
    TypicalLogitsWarper,
)

# transformers makes these only for its own sampling, so here they are made by hand, in its order.
WARPERS = {
    "top_h": TopHLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}

PASSED_ON = {
    # Fields of transformers' GenerationConfig.
    "generate": frozenset(
        [
            *WARPERS,
            "bad_words_ids",
            "begin_suppress_tokens",
            "cache_implementation",
            "disable_compile",
            "exponential_decay_length_penalty",
            "forced_eos_token_id",
            "no_repeat_ngram_size",
            "prefill_chunk_size",
            "sequence_bias",
            "suppress_tokens",
            "use_cache",
        ]
    ),
    # Fields of its ContinuousBatchingConfig.
    "continuous": frozenset(
        [
            "allow_block_sharing",
            "auto_switch_to_flash",
            "block_size",
            "cpu_offload_space",
            "cpu_offload_space_safety_threshold",
            "kv_padding_interval_size",
            "max_batch_tokens",
            "max_blocks_per_request",
            "max_memory_percent",
            "num_blocks",
            "page_size",
            "q_padding_interval_size",
            "safety_margin",
            "scheduler_type",
            "use_cuda_graph",
        ]
    ),
}

_OWN = "set the setting of that name instead"
_BEAMS = "a beam search does not sample from the policy"
_SPECULATION = "speculative decoding draws random numbers of its own"
_OUTPUT = "only token ids are used"
REFUSED = {
    **dict.fromkeys(
        [
            "max_new_tokens",
            "min_new_tokens",
            "min_p",
            "repetition_penalty",
            "stop_strings",
            "temperature",
            "top_k",
            "top_p",
        ],
        _OWN,
    ),
    "do_sample": "responses are sampled unless the setting greedy of GenerationSettings is true",
    "max_length": "set max_new_tokens, which does not count the prompt",
    "min_length": "set min_new_tokens, which does not count the prompt",
    "max_requests_per_batch": "set the generation's batch size instead",
    "eos_token_id": "set stop_token_ids, which are added to the EOS ids of model and tokenizer",
    "pad_token_id": "it is the tokenizer's, and never looked at",
    "num_return_sequences": "set responses_per_prompt, or num_return of generate",
    "seed": "random numbers follow from the setting seed of the trainer",
    "max_time": "where a response ends would depend on the machine's speed",
    "remove_invalid_values": "logits that are NaN must end the run, not be hidden",
    "token_healing": "it changes the prompt",
    "guidance_scale": "its distribution is of two passes of the policy; one is trained",
    "watermarking_config": "it changes the distribution differently at each token",
    "renormalize_logits": "sampling normalises already",
    "use_async_batching": "with it, the random numbers of a response depend on timing",
    **dict.fromkeys(
        [
            "constraints",
            "diversity_penalty",
            "dola_layers",
            "early_stopping",
            "force_words_ids",
            "length_penalty",
            "num_beam_groups",
            "num_beams",
            "penalty_alpha",
        ],
        _BEAMS,
    ),
    **dict.fromkeys(
        ["assistant_early_exit", "num_assistant_tokens", "prompt_lookup_num_tokens", "use_mtp"],
        _SPECULATION,
    ),
    **dict.fromkeys(
        [
            "output_attentions",
            "output_hidden_states",
            "output_logits",
            "output_scores",
            "return_dict_in_generate",
            "return_logprobs",
        ],
        _OUTPUT,
    ),
}


def check_generation_options(options: Mapping[str, Any], backend: str) -> None:
    """Raise ValueError for an option that the backend does not have, or that may not be given."""
    for name in options:
        if name in PASSED_ON[backend]:
            continue
        where = f"generation_options: {name!r}"
        if name in REFUSED:
            raise ValueError(f"{where} cannot be given here: {REFUSED[name]}")
        other = next((b for b, names in PASSED_ON.items() if name in names), None)
        if other is not None:
            raise ValueError(
                f"{where} is an option of generation_backend={other!r}, and it is {backend!r}"
            )
        close = get_close_matches(str(name), PASSED_ON[backend], n=1)
        hint = f"did you mean {close[0]!r}?" if close else ""
        known = ", ".join(sorted(PASSED_ON[backend]))
        raise ValueError(f"{where} is not passed on; {hint or f'these are: {known}'}")


def warpers(options: Mapping[str, Any]) -> list[LogitsProcessor]:
    """The processors of the options that transformers would make only for its own sampling."""
    return [make(options[name]) for name, make in WARPERS.items() if options.get(name) is not None]
