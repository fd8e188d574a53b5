"""A vocabulary split over two processes gives what one process gives; FSDP2 and DDP around it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kernel_cases import (
    EPS,
    ROW_PRIMITIVES,
    backends_for,
    close,
    gradient_tolerance,
    normal,
    random_mask,
    row_tolerance,
    within,
)
from torch import Tensor, nn

from rlhf_kernels import (
    PPOLossConfig,
    checks,
    linear_cross_entropy,
    linear_ppo_loss,
    linear_token_logprobs,
)
from rlhf_kernels.backends import load, unavailable_reason

WORLD = 2
WIDTH, VOCABULARY, FIRST = 6, 23, 15  # rank 0 has 15 columns, rank 1 has 8
SHAPE = (4, 5)
BACKEND_NAMES = [name for name in ("reference", "cpu") if unavailable_reason(name) is None]


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    mask = random_mask(*SHAPE)
    targets = torch.arange(20).view(SHAPE) * 5 % VOCABULARY
    return {
        "hidden": normal(*SHAPE, WIDTH, seed=1).to(dtype),
        "weight": normal(VOCABULARY, WIDTH, seed=2).to(dtype),
        "bias": normal(VOCABULARY, seed=3).to(dtype),
        "targets": torch.where(mask, targets, -100),
        "old": -normal(*SHAPE, seed=4).abs() - 2,
        "advantages": normal(*SHAPE, seed=5),
        "mask": mask,
        "temperature": normal(*SHAPE, seed=6).abs() + 0.5,
    }


def compute(backend: str, x: dict[str, Tensor], group: Any = None) -> dict[str, Tensor]:
    """Values and gradients of all three operations."""
    leaves = [x[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    shared = {"bias": bias, "chunk_size": 3, "group": group, "backend": backend}
    logprobs, entropy = linear_token_logprobs(
        hidden,
        weight,
        x["targets"],
        temperature=x["temperature"],
        return_entropy=True,
        **shared,
    )
    cross_entropy = linear_cross_entropy(hidden, weight, x["targets"], **shared)
    ppo, stats = linear_ppo_loss(
        hidden,
        weight,
        x["targets"],
        x["old"],
        x["advantages"],
        x["mask"],
        config=PPOLossConfig(entropy_coef=0.1),
        **shared,
    )
    found = {
        "logprobs": logprobs,
        "entropy": entropy,
        "cross_entropy": cross_entropy,
        "ppo": ppo,
        "stats": torch.stack(stats),
    }
    both = (logprobs * x["advantages"] + entropy * x["old"]).sum()
    for name, value in (("logprobs", both), ("cross_entropy", cross_entropy), ("ppo", ppo)):
        gradients = torch.autograd.grad(value, leaves)
        for leaf, gradient in zip(("hidden", "weight", "bias"), gradients, strict=True):
            found[f"{name} by {leaf}"] = gradient
    return {name: value.detach() for name, value in found.items()}


def part(x: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    mine = slice(0, FIRST) if rank == 0 else slice(FIRST, None)
    return {**x, "weight": x["weight"][mine], "bias": x["bias"][mine]}


LOWEST = torch.finfo(torch.float32).min
# What stands in all columns of rank 1, and the options of the call.
AWKWARD: dict[str, tuple[float, dict[str, Any]]] = {
    "impossible": (-torch.inf, {}),
    "nearly impossible": (LOWEST, {"temperature": 0.7}),
    "nan": (torch.nan, {}),
    "ignored 0": (0.0, {"ignore_index": 0}),
    "ignored 2": (0.0, {"ignore_index": 2}),
    f"ignored {FIRST}": (0.0, {"ignore_index": FIRST}),
}


def awkward(name: str) -> dict[str, Tensor]:
    x = inputs()
    x["bias"][FIRST:] += AWKWARD[name][0]
    x["targets"] = x["targets"].clamp(min=0)
    return x


def compute_awkward(
    name: str, backend: str, x: dict[str, Tensor], group: Any = None
) -> dict[str, Tensor]:
    leaves = [x[leaf].clone().requires_grad_() for leaf in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    options = {"bias": bias, "return_entropy": True, "group": group, "backend": backend}
    pair = linear_token_logprobs(hidden, weight, x["targets"], **options, **AWKWARD[name][1])
    # What float32 may call -inf and float64 not has no part in the loss.
    total = sum(torch.where(x < -1e30, 0.0, x).sum() for x in pair)
    gradients = torch.autograd.grad(total, leaves)
    found = {"results": torch.stack(pair).detach()}
    return found | {f"by {n}": g for n, g in zip(("hidden", "weight", "bias"), gradients)}


def without_rows(x: dict[str, Tensor], rank: int, group: Any) -> str:
    """Rank 1 has no part of the vocabulary."""
    weight = x["weight"] if rank == 0 else x["weight"][:0]
    try:
        linear_cross_entropy(x["hidden"], weight, x["targets"].clamp(max=0), group=group)
    except ValueError as error:
        return str(error)
    return ""


def run_group(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    found: dict[str, Any] = {}
    for backend in BACKEND_NAMES:
        found[backend] = compute(backend, part(inputs(), rank), dist.group.WORLD)
        found[f"{backend} bfloat16"] = compute(
            backend, part(inputs(torch.bfloat16), rank), dist.group.WORLD
        )
        for name in AWKWARD:
            x = part(awkward(name), rank)
            found[f"{backend} {name}"] = compute_awkward(name, backend, x, dist.group.WORLD)
    found["without rows"] = without_rows(inputs(), rank, dist.group.WORLD)
    found["float64"] = compute("reference", part(inputs(torch.float64), rank), dist.group.WORLD)
    found["compiled"] = compiled_cross_entropy(part(inputs(), rank), dist.group.WORLD)
    found["out of range"] = out_of_range(part(inputs(), rank), dist.group.WORLD)
    found["fsdp"], found["fsdp error"] = with_fsdp(rank)
    found["ddp"] = with_ddp(rank)
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def compiled_cross_entropy(x: dict[str, Tensor], group: Any) -> Tensor:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, x["targets"], bias=x["bias"], group=group)

    hidden = x["hidden"].clone().requires_grad_()
    return torch.autograd.grad(loss(hidden, x["weight"]), hidden)[0]


def out_of_range(x: dict[str, Tensor], group: Any) -> str:
    targets = x["targets"].clone()
    targets[0, 1] = VOCABULARY
    try:
        linear_cross_entropy(x["hidden"], x["weight"], targets, bias=x["bias"], group=group)
    except ValueError as error:
        return str(error)
    return ""


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(inputs()["weight"])

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, self.lm_head.weight, targets, reduction="sum")


def own_rows(rank: int) -> tuple[Tensor, Tensor]:
    x = inputs()
    return x["hidden"][rank::WORLD], x["targets"][rank::WORLD]


def with_fsdp(rank: int) -> tuple[list[Tensor], str]:
    """The gradients of a sharded lm_head, gathered, inside its module's forward and by hand; and
    what a weight not gathered raises."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial

    model = Head()
    fully_shard(model)
    hidden, targets = own_rows(rank)
    try:
        linear_cross_entropy(hidden, model.lm_head.weight, targets)
        message = ""
    except TypeError as error:
        message = str(error)
    model(hidden, targets).backward()
    inside = model.lm_head.weight.grad.full_tensor()
    model.reshard()
    model.lm_head.weight.grad = None
    whole = model.lm_head.weight.full_tensor(grad_placements=[Partial("avg")])
    linear_cross_entropy(hidden, whole, targets, reduction="sum").backward()
    return [inside, model.lm_head.weight.grad.full_tensor()], message


def with_ddp(rank: int) -> Tensor:
    model = nn.parallel.DistributedDataParallel(Head())
    model(*own_rows(rank)).backward()
    return model.module.lm_head.weight.grad


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_group, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def whole_of(ranks: list[dict[str, Any]], case: str, name: str) -> Tensor:
    """What belongs to weight and bias is in parts; all else every rank has, to the bit."""
    parts = [found[case][name] for found in ranks]
    if name.endswith(("by weight", "by bias")):
        return torch.cat(parts)
    torch.testing.assert_close(*parts, rtol=0.0, atol=0.0, equal_nan=True)
    return parts[0]


def test_float64_is_the_unsplit_result(ranks):
    expected = compute("reference", inputs(torch.float64))
    for name, value in expected.items():
        # Sums of up to 23 terms, and products of up to 20, of about unit size.
        close(whole_of(ranks, "float64", name), value, 1e3 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_float32_is_the_unsplit_result(ranks, backend):
    x = inputs()
    expected = compute("reference", inputs(torch.float64))
    logits = (x["hidden"] @ x["weight"].T + x["bias"]).flatten(0, 1)
    tau = x["temperature"].flatten()
    error = 4 * row_tolerance(logits, tau)
    for name in ("logprobs", "entropy"):
        close(whole_of(ranks, backend, name), expected[name], error)
    # Sums over the 20 rows of terms of that error, weighed by advantages, probabilities and
    # hidden states or weights, none of which is above 4; ratios are off by the same relative part.
    scale = 20 * 4 * 4 * (1 + float(expected["stats"].abs().max()))
    for name in expected:
        close(whole_of(ranks, backend, name), expected[name], scale * error)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_bfloat16_is_the_unsplit_result(ranks, backend):
    x = inputs(torch.bfloat16)
    expected = compute(backend, x)
    # The same products of the same numbers: splitting moves float32 roundings alone, which can move
    # a rounding to bfloat16 by one unit of the logits', their gradient's and the result's.
    eps = torch.finfo(torch.bfloat16).eps
    for name, value in expected.items():
        close(whole_of(ranks, f"{backend} bfloat16", name), value, 4 * eps, rtol=2 * eps)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_awkward_parts(ranks, backend, name):
    """Columns without weight add nothing, NaN is not hidden, and an ignored target is a number of
    the whole vocabulary."""
    x = awkward(name)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in x.items()}
    expected = compute_awkward(name, "reference", wide)
    found = {n: whole_of(ranks, f"{backend} {name}", n) for n in expected}
    logits = (x["hidden"] @ x["weight"].T).flatten(0, 1)
    error = 4 * row_tolerance(logits, AWKWARD[name][1].get("temperature", 1.0))
    finite = torch.where(expected["results"] < -1e30, -torch.inf, expected["results"])
    close(torch.where(found["results"] < -1e30, -torch.inf, found["results"]), finite, error)
    assert finite.isnan().all() == (name == "nan")
    if name != "nan":
        # Sums over 20 rows of such errors, by hidden states and weights of at most 4.
        for n in ("by hidden", "by weight", "by bias"):
            close(found[n], expected[n], 20 * 4 * 4 * error)


def test_a_rank_without_rows_stops_all_ranks(ranks):
    for found in ranks:
        assert "weight has no rows on rank 1 of the group" in found["without rows"]


def test_compiles(ranks):
    expected = compute("reference", inputs(torch.float64))["cross_entropy by hidden"]
    for found in ranks:
        close(found["compiled"], expected, 64 * EPS)


def test_a_target_outside_the_whole_vocabulary_is_named(ranks):
    for found in ranks:
        assert f"targets holds {VOCABULARY} at flat row 1" in found["out of range"]
        assert f"[0, {VOCABULARY})" in found["out of range"]


def test_under_fsdp2_and_ddp(ranks):
    """Both average over ranks: half of the sum of the losses of all rows."""
    x = inputs()
    weight = x["weight"].double().requires_grad_()
    linear_cross_entropy(x["hidden"].double(), weight, x["targets"], reduction="sum").backward()
    logits = (x["hidden"].double() @ x["weight"].double().T).flatten(0, 1)
    ones = torch.ones(20)
    of_logits = gradient_tolerance(logits, x["targets"].flatten(), 1.0, ones)
    sizes = x["hidden"].flatten(0, 1).abs().double()
    bound = of_logits.T @ sizes + 24 * EPS * sizes.sum(0)
    for found in ranks:
        for gradient in (*found["fsdp"], found["ddp"]):
            within(gradient, weight.grad / WORLD, bound)
        assert "weight is a DTensor" in found["fsdp error"]


@pytest.mark.parametrize("name", backends_for(*ROW_PRIMITIVES))
def test_rows_whose_target_is_elsewhere(name):
    """Their softmax counts, no column is the target's, and the log-probability is 0."""
    kernels, logits = load(name), normal(3, 11, seed=7)
    targets = torch.tensor([4, checks.ELSEWHERE, -100])
    g, h = normal(3, seed=8), normal(3, seed=9)
    placeholder = torch.tensor([4, 0, -100])
    logprobs, entropy, normalization = kernels.token_logprobs_forward(
        logits, targets, 0.7, -100, True
    )
    same = kernels.token_logprobs_forward(logits, placeholder, 0.7, -100, True)
    assert logprobs[1] == 0 and torch.equal(logprobs[[0, 2]], same[0][[0, 2]])
    assert torch.equal(entropy, same[1]) and torch.equal(normalization, same[2])
    arguments = (g, h, logits)
    rest = (0.7, -100, normalization, entropy)
    gradient = kernels.token_logprobs_backward(*arguments, targets, *rest)
    with_target = kernels.token_logprobs_backward(*arguments, placeholder, *rest)
    assert torch.equal(gradient[:, 1:], with_target[:, 1:])
    assert torch.equal(gradient[[0, 2]], with_target[[0, 2]])
    # What the target adds to its column is g/τ.
    close(gradient[1, 0] + g[1] / 0.7, with_target[1, 0], 4 * EPS * float(g[1].abs()) / 0.7)
