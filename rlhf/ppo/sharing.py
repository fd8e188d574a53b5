"""Sampling and scoring on many ranks: each does a share of the rows, and all get all of them.

A batch of responses is small beside the models. With the whole of it on every rank, whatever is
worked out over a batch (whitening, groups, normalisers, figures) needs no further exchange, and
gives the same on any number of ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf.engine import Engine, NonFiniteError, World
from rlhf.engine.batching import share_out
from rlhf.ppo.generation import Generated, GenerationSettings, Sampler, generate
from rlhf.ppo.scoring import Reward, RewardError, reward_models, score_in_parts

Result = TypeVar("Result")


def check_share(count: int, world: World) -> None:
    """Raise ValueError unless there is a response for every rank."""
    if count < world.size:
        raise ValueError(
            f"a batch of {count} responses cannot be shared by {world.size} ranks; raise "
            "batch_size or start fewer processes"
        )


def shared_generation(
    policy: Engine,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    seed: int,
    sampler: Sampler | None = None,
) -> Generated:
    """``generate`` for a batch: the same responses, to rounding, on any number of ranks."""
    world = policy.world
    lengths = [len(ids) for ids in prompt_ids]
    share = sorted(share_out(range(len(lengths)), lengths, world.size)[world.rank])
    mine = share or [0]  # with fewer rows than ranks a filler: the others may wait for this rank
    part = together(
        world,
        lambda: policy.run_gathered(
            lambda model: generate(
                model,
                tokenizer,
                [prompt_ids[row] for row in mine],
                settings,
                seed=seed,
                row_numbers=mine,
                sampler=sampler,
            )
        ),
    )
    return part if world.size == 1 else join(world.gather((share, on_cpu(part))), policy.device)


def shared_scores(
    reward: Reward, rows: Sequence[dict[str, Any]], texts: Sequence[str], world: World
) -> tuple[Tensor, dict[str, Tensor]]:
    """``score_in_parts`` for a batch: each rank asks the reward for a share."""
    mine = list(range(world.rank, len(rows), world.size)) or [0]  # a filler, where rows are few
    if any(model.is_sharded for model in reward_models(reward)):
        # Each of its forward passes waits for all ranks: a filler where others have one more.
        mine += mine[:1] * (-(-len(rows) // world.size) - len(mine))
    shares = world.gather(
        together(
            world,
            lambda: score_in_parts(
                reward, [rows[row] for row in mine], [texts[row] for row in mine]
            ),
        )
    )

    def interleave(values: Sequence[Tensor]) -> Tensor:
        result = torch.zeros(len(rows))
        for rank, part in enumerate(values):
            places = result[rank :: world.size]
            places.copy_(part[: len(places)])
        return result

    total = interleave([scores for scores, _ in shares])
    return total, {name: interleave([parts[name] for _, parts in shares]) for name in shares[0][1]}


def together(world: World, action: Callable[[], Result]) -> Result:
    """``action()`` on every rank; if it fails on one, all of them raise, and none waits for it.

    Raises:
        Exception: What it raised here; else, with a rank where it failed, RewardError,
            NonFiniteError or RuntimeError.
    """
    if world.size == 1:
        return action()
    error: Exception | None = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    failures = world.gather(None if error is None else (type(error).__name__, str(error)))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            name, message = failure
            kind = {"RewardError": RewardError, "NonFiniteError": NonFiniteError}.get(name)
            raise (kind or RuntimeError)(f"{name} on rank {rank}: {message}")
    return result


def on_cpu(part: Generated) -> Generated:
    """With its tensors where they can be sent from."""
    tensors: dict[str, Any] = {k: v.cpu() for k, v in vars(part).items() if isinstance(v, Tensor)}
    return dataclasses.replace(part, **tensors)


def join(parts: Sequence[tuple[Sequence[int], Generated]], device: torch.device) -> Generated:
    """The ranks' parts, each with its row numbers, as one batch."""
    order = sorted(
        (row, rank, place) for rank, (rows, _) in enumerate(parts) for place, row in enumerate(rows)
    )
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Generated):
        values = [getattr(part, field.name) for _, part in parts]
        if isinstance(values[0], Tensor) and values[0].dim() == 2:
            width = max(value.shape[1] for value in values)
            left = field.name.startswith("prompt_")
            values = [widen(value, width, left=left) for value in values]
        ordered = [values[rank][place] for _, rank, place in order]
        is_tensor = isinstance(values[0], Tensor)
        found[field.name] = torch.stack(ordered).to(device) if is_tensor else ordered
    return Generated(**found)


def widen(rows: Tensor, width: int, *, left: bool) -> Tensor:
    """[B, T] padded with 0 to [B, width]: the masks are False there, and no id counts."""
    missing = width - rows.shape[1]
    return torch.nn.functional.pad(rows, (missing, 0) if left else (0, missing))
