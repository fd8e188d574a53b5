"""Losses and gradients of micro-batches and of ranks add up to those of the whole batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kernel_cases import (
    EPS,
    backends_for,
    close,
    here,
    normal,
    packed,
    ppo_inputs,
    random_mask,
)
from torch import Tensor

from rlhf_kernels import PPOLossConfig, linear_ppo_loss, ppo_loss
from rlhf_kernels.ppo_types import AGGREGATIONS

BATCH, STEPS, WIDTH, VOCABULARY = 9, 12, 5, 11
LEAVES = ("logprobs", "values", "entropy")
# The second part holds no valid token.
PARTS = (slice(0, 2), slice(2, 3), slice(3, BATCH))
MASK = random_mask(BATCH, STEPS)
MASK[2] = False


def precisions() -> list[Any]:
    """(backend, dtype, eps): float64 on the reference, float32 on every backend."""
    found = [("reference", torch.float64, torch.finfo(torch.float64).eps)]
    found += [(name, torch.float32, EPS) for name in backends_for("ppo_loss_forward")]
    return [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in found]


def count(aggregation: str, mask: Tensor) -> Tensor:
    return mask.sum() if aggregation == "token-mean" else mask.any(dim=1).sum()


def config_of(aggregation: str) -> PPOLossConfig:
    return PPOLossConfig(aggregation=aggregation, dual_clip=1.5, kl_loss_coef=0.2)


def of_rows(dtype: torch.dtype, rows: slice, pack: bool, **options: Any) -> dict[str, Tensor]:
    """Loss, its two parts, and the gradients at the valid tokens of these rows."""
    series = {name: x[rows].to(dtype) for name, x in ppo_inputs(BATCH, STEPS).items()}
    mask = here(MASK)[rows]
    if pack:
        cu_seqlens, mask, *flat = packed(mask, *series.values())
        series = dict(zip(series, flat), cu_seqlens=cu_seqlens)
    leaves = [series[name].requires_grad_() for name in LEAVES]
    loss, stats = ppo_loss(mask=mask, **series, **options)
    gradients = torch.autograd.grad(loss, leaves)
    found = {"loss": loss, "policy": stats.policy_loss, "value": stats.value_loss}
    return found | {name: x[mask] for name, x in zip(LEAVES, gradients)}


@pytest.mark.parametrize("backend, dtype, eps", precisions())
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("pack", [False, True])
def test_micro_batches_add_up(backend, dtype, eps, aggregation, pack):
    options = {"config": config_of(aggregation), "backend": backend}
    whole = of_rows(dtype, slice(None), False, **options)
    options["normalizer"] = count(aggregation, here(MASK))
    parts = [of_rows(dtype, rows, pack, **options) for rows in PARTS]
    for name in ("loss", "policy", "value"):
        # The terms are of order 1, divided by their number; sqrt(n) roundings of the sum.
        close(sum(part[name] for part in parts), whole[name], eps * (16 + math.sqrt(MASK.numel())))
    for name in LEAVES:
        joined = torch.cat([part[name] for part in parts])
        # The divisor is rounded once more where it is given.
        close(joined, whole[name], 4 * eps * float(whole[name].abs().max()))


def linear_loss(dtype: torch.dtype, rows: slice, **options: Any) -> dict[str, Tensor]:
    """Loss and gradients of the head's weight and bias."""
    x = {name: series[rows].to(dtype) for name, series in ppo_inputs(BATCH, STEPS).items()}
    hidden = normal(BATCH, STEPS, WIDTH, seed=1)[rows].to(dtype)
    weight, bias = normal(VOCABULARY, WIDTH, seed=2).to(dtype), normal(VOCABULARY, seed=3).to(dtype)
    targets = (torch.arange(BATCH * STEPS).view(BATCH, STEPS) % VOCABULARY)[rows]
    given = {name: x[name] for name in x if name not in ("logprobs", "entropy")}
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    loss, _ = linear_ppo_loss(
        hidden, weight, targets, mask=MASK[rows], bias=bias, **given, **options
    )
    gradients = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach()} | dict(zip(("weight", "bias"), gradients))


def _on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        rows = slice(0, 4) if rank == 0 else slice(4, BATCH)
        found = {}
        for name, dtype in (("reference", torch.float64), (None, torch.float32)):
            for aggregation in AGGREGATIONS:
                divisor = count(aggregation, MASK[rows])
                dist.all_reduce(divisor)
                options = {"config": config_of(aggregation), "backend": name}
                sums = linear_loss(dtype, rows, normalizer=divisor, **options)
                for tensor in sums.values():
                    dist.all_reduce(tensor)
                found[f"{dtype} {aggregation}"] = sums
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_ranks_add_up(tmp_path: Path):
    torch.multiprocessing.spawn(_on_a_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, dtype in (("reference", torch.float64), (None, torch.float32)):
        eps = torch.finfo(dtype).eps
        for aggregation in AGGREGATIONS:
            options = {"config": config_of(aggregation), "backend": name}
            whole = linear_loss(dtype, slice(None), **options)
            for rank in ranks:
                for key, tensor in rank[f"{dtype} {aggregation}"].items():
                    # Terms of order 1, of which sqrt(n) roundings count.
                    bound = (
                        eps * (16 + math.sqrt(MASK.numel())) * (1 + float(whole[key].abs().max()))
                    )
                    close(tensor, whole[key], bound)
