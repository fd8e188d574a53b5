"""transformers' continuous batching: a response that has ended makes room for the next at once.

Its own sampling draws from a global generator, in an order that depends on timing. Here a processor
of logits draws instead, for every request from the numbers of its row, so that responses are those
of the other backend, up to rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.utils import WorkloadHints

from rlhf.engine import resolve_dtype
from rlhf.ppo.generation.ending import Ending
from rlhf.ppo.generation.processors import (
    draw,
    not_finite,
    only,
    shaping,
    uniform_numbers,
    unusable,
)
from rlhf.ppo.generation.settings import GenerationSettings

INSTEAD = "set generation_backend='generate'"


def sample_continuously(
    policy: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    ending: Ending,
    seed: int,
    row_numbers: Sequence[int],
) -> list[list[int]]:
    """A ``Sampler``: at most ``settings.batch_size`` responses at any time.

    Stop strings are found afterwards, since the engine knows ids alone: a response goes on behind
    one until it ends otherwise. Matrix products run in the type of the policy's weights.

    Raises:
        ValueError: The engine cannot run this model or in this precision.
        NonFiniteError: The model's logits are NaN or infinite.
    """
    device = next(policy.parameters()).device
    check_can_run(policy, settings, device)
    uniforms = uniform_numbers(seed, row_numbers, settings.max_new_tokens).to(device)
    drawing = DrawForRequests(settings, ending.ids, uniforms)
    with running(policy, prompt_ids, settings, drawing) as manager:
        for row, ids in enumerate(prompt_ids):
            manager.add_request(
                list(ids),
                request_id=str(row),
                max_new_tokens=settings.max_new_tokens,
                eos_token_id=ending.ids or None,
                row=row,
            )
        responses = collect(manager, len(prompt_ids))
    drawing.require_finite()
    return responses


def check_can_run(policy: Any, settings: GenerationSettings, device: torch.device) -> None:
    """Raise ValueError, saying what to do, where it is known that the engine cannot."""
    if not hasattr(policy, "init_continuous_batching"):
        raise ValueError(
            f"transformers has no continuous batching for {type(policy).__name__}; {INSTEAD}"
        )
    wanted = resolve_dtype(settings.dtype, device)
    if settings.dtype != "auto" and wanted != policy.dtype:
        raise ValueError(
            f"continuous batching runs in the type of the weights, {policy.dtype}, and dtype is "
            f"{settings.dtype!r}; {INSTEAD}, or load weights of that type (a trainer's "
            "weights='bfloat16'), or set dtype='auto'"
        )


@contextmanager
def running(
    policy: Any,
    prompt_ids: Sequence[Sequence[int]],
    settings: GenerationSettings,
    drawing: DrawForRequests,
) -> Iterator[Any]:
    """The engine's manager, running in a thread of its own, with this processor of logits.

    The policy gets back its mode and attention, and the global generators, which the engine seeds,
    their states.
    """
    device = next(policy.parameters()).device
    longest, rows = max(map(len, prompt_ids)), len(prompt_ids)
    was_training, was_attention = policy.training, policy.config._attn_implementation
    manager = None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            try:
                manager = policy.init_continuous_batching(
                    GenerationConfig(do_sample=False, eos_token_id=-1),
                    engine_config(settings, longest, rows, device),
                    WorkloadHints(longest, settings.max_new_tokens, rows),
                )
                manager.logit_processor = ContinuousBatchingLogitsProcessorList(
                    LogitsProcessorList([drawing])
                )
                manager.logit_processor.tensors_required = 1
                manager.warmup()
            except Exception as error:  # whatever a model or an attention kernel lacks
                raise ValueError(
                    f"continuous batching cannot start ({error}); {INSTEAD}"
                ) from error
            manager.start()
            yield manager
        finally:
            if manager is not None and manager.is_running():
                manager.stop(block=True, hard_stop=True)
                manager.destroy()
            if policy.config._attn_implementation != was_attention:
                policy.set_attn_implementation(was_attention)
            policy.train(was_training)


def engine_config(
    settings: GenerationSettings, longest_prompt: int, rows: int, device: torch.device
) -> Any:
    """The engine's config: on a GPU it finds out by itself how many tokens have room."""
    side_by_side = min(rows, settings.batch_size)
    config = ContinuousBatchingConfig(
        max_requests_per_batch=side_by_side,
        # Prepared while its predecessor runs, a batch would not know the step of its requests.
        use_async_batching=False,
        seed=0,  # of numbers that nobody looks at
        **settings.generation_options,
    )
    if device.type != "cuda":
        # Up to transformers 5.17 a page was called a block.
        page: Any = getattr(config, "page_size", None) or config.block_size
        blocks = side_by_side * ceil((longest_prompt + settings.max_new_tokens + 1) / page)
        config.num_blocks = config.num_blocks or blocks
        config.max_batch_tokens = config.max_batch_tokens or max(256, side_by_side)
    return config


def collect(manager: Any, rows: int) -> list[list[int]]:
    """All responses, by row.

    Raises:
        RuntimeError: The engine failed.
    """
    responses: list[list[int]] = [[] for _ in range(rows)]
    for _ in range(rows):
        result = None
        while result is None:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                cause = manager.background_thread_status.fatal_error
                raise RuntimeError(f"continuous batching stopped ({cause}); {INSTEAD}") from cause
        if result.error is not None:
            raise RuntimeError(f"continuous batching failed ({result.error}); {INSTEAD}")
        responses[int(result.request_id)] = list(result.generated_tokens)
    return responses


class DrawForRequests(ContinuousBatchingLogitsProcessor):
    """Chooses the next token of each request and leaves it the only possible one.

    The engine carries one number a request to the device: here it says which of the uniform numbers
    is to be used. A request names its row when it is added.

    Args:
        settings: How to sample.
        end_ids: Not to be chosen in the first ``settings.min_new_tokens`` steps.
        uniforms: fp64 [B, T], the number for each row and step.
    """

    def __init__(
        self, settings: GenerationSettings, end_ids: Sequence[int], uniforms: Tensor
    ) -> None:
        self.supported_kwargs = {"row": int}
        self.ignored_kwargs = ()
        self.settings = settings
        self.shaping = shaping(settings)
        self.uniforms = uniforms
        self.end_ids = torch.tensor(list(end_ids), dtype=torch.long, device=uniforms.device)
        self.unusable = torch.zeros((), dtype=torch.long, device=uniforms.device)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """-1 where there is no request."""
        int32_tensor.fill_(-1)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """int32, for each request the place of its number in ``uniforms``."""
        steps = self.uniforms.shape[1]
        places = []
        for request in requests_with_new_token:
            state = request.state
            row = state.logit_processor_kwargs.get("row")
            # Of a request that had to give up its memory, the tokens so far are in its prompt.
            given = len(state.initial_tokens)
            earlier = given - (state._true_initial_tokens or given)
            places.append(-1 if row is None else row * steps + earlier + state.generated_len())
        return torch.tensor(places, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        place = tensor_arg[: len(scores)].long()
        # Counted on the device and looked at in the end: a captured graph cannot stop to ask.
        self.unusable += (unusable(scores) & (place >= 0)).sum()
        place = place.clamp(min=0)
        if self.settings.min_new_tokens and len(self.end_ids):
            early = place % self.uniforms.shape[1] < self.settings.min_new_tokens
            banned = torch.zeros_like(scores).index_fill_(1, self.end_ids, -torch.inf)
            scores = torch.where(early[:, None], scores + banned, scores)
        if self.settings.greedy:
            return scores
        for processor in self.shaping:
            scores = processor(None, scores)
        return only(draw(scores, self.uniforms.flatten()[place]), scores)

    def require_finite(self) -> None:
        """Raise NonFiniteError if a token had to be chosen from logits that are no numbers."""
        count = int(self.unusable)
        if count:
            raise not_finite(f"for {count} of the tokens that continuous batching chose")
