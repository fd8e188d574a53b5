"""verl's functions on our kernels against verl's own, values and gradients.

What is expected is what verl's function gives for the same numbers in float64. Ours compute in
float32 (float64 for float64) and round once to the dtype that verl's has; tolerances count those
roundings.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_kernels.integrations import verl

algorithms = pytest.importorskip("verl.trainer.ppo.core_algos")
functional = pytest.importorskip("verl.utils.torch_functional")

SEEDS = st.integers(0, 50)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
MODES = [
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]
WHOLE_BATCH: dict[str, Any] = {
    "dp_size": 2,
    "batch_num_tokens": 31,
    "global_batch_size": 7,
    "loss_scale_factor": 5,
}
OF_BATCHES = st.sampled_from([{}, WHOLE_BATCH])


@st.composite
def masks(draw: st.DrawFn, valid: int = 1) -> Tensor:
    """Holes, empty rows, padding on both sides; bool, int64 or float32."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor(draw(st.lists(flags, min_size=rows, max_size=rows)))
    assume(int(mask.sum()) >= valid)
    return mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32])))


def normal(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def eps(dtype: torch.dtype) -> float:
    """Of the arithmetic."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def close(actual: Tensor, expected: Tensor, arithmetic: float) -> None:
    """Within the arithmetic's error, and half an eps (or subnormal) where it is stored."""
    info = torch.finfo(actual.dtype)
    stored = info.smallest_normal * info.eps
    torch.testing.assert_close(
        actual.detach().double(),
        expected.detach().double(),
        atol=arithmetic + stored,
        rtol=info.eps,
        equal_nan=True,
    )


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def gradients(output: Tensor, upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, upstream.to(output.dtype))


Call = Callable[..., Tensor]


def check(
    ours: Call, theirs: Call, inputs: list[Tensor], tolerance: float, of_gradient: float, seed: int
) -> None:
    """Both take the inputs; gradients are compared under a random upstream one."""
    own, peers = leaves(*inputs), leaves(*inputs)
    wide = leaves(*(tensor.double() for tensor in inputs))
    actual, same_type, expected = ours(*own), theirs(*peers), theirs(*wide)
    assert (actual.dtype, actual.shape) == (same_type.dtype, same_type.shape)
    close(actual, expected, tolerance)
    upstream = normal(*expected.shape, seed=seed + 99, dtype=actual.dtype)
    found = gradients(actual, upstream, *own)
    for one, other, leaf in zip(found, gradients(expected, upstream, *wide), own):
        assert one.dtype == leaf.dtype
        close(one, other, of_gradient * float(1 + upstream.abs().max()))


# Rows of logits


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 4),
    vocabulary=st.integers(1, 70),
    flat=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
@pytest.mark.parametrize("name", ["logprobs", "entropy", "entropy in chunks"])
def test_rows(
    name: str,
    rows: int,
    length: int,
    vocabulary: int,
    flat: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    shape = (rows * length,) if flat or name == "entropy in chunks" else (rows, length)
    logits = normal(*shape, vocabulary, seed=seed, dtype=dtype, scale=4.0)
    labels = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    arithmetic = torch.float32 if name == "entropy in chunks" else dtype  # verl's is, always
    tolerance = (16 + math.sqrt(vocabulary)) * eps(arithmetic) * float(1 + logits.abs().max())
    calls: dict[str, tuple[Call, Call]] = {
        "logprobs": (
            lambda x: verl.logprobs_from_logits(x, labels),
            lambda x: functional.logprobs_from_logits(x, labels),
        ),
        "entropy": (verl.entropy_from_logits, functional.entropy_from_logits),
        "entropy in chunks": (
            verl.entropy_from_logits_with_chunking,
            lambda x: functional.entropy_from_logits_with_chunking(x, chunk_size=2),
        ),
    }
    check(*calls[name], [logits], tolerance, tolerance, seed)


def test_what_cannot_be_sampled_adds_nothing_to_the_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    close(verl.entropy_from_logits(logits), torch.tensor([math.log(2)]), 1e-6)
    assert functional.entropy_from_logits(logits).isnan().all()


def test_logprobs_are_float32_where_flash_attention_gives_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, labels = torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 2])
    monkeypatch.setattr(functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    assert verl.logprobs_from_logits(logits, labels).dtype == torch.float32
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    assert verl.logprobs_from_logits(logits, labels).dtype == torch.bfloat16


# Masked statistics


@given(mask=masks(valid=0), axis=st.sampled_from([None, -1, 0, (0, 1)]), dtype=DTYPES, seed=SEEDS)
def test_masked_mean(mask: Tensor, axis: Any, dtype: torch.dtype, seed: int) -> None:
    x = normal(*mask.shape, seed=seed, dtype=dtype)
    # In verl as here the sum is taken, and rounded, in this dtype.
    summed = torch.promote_types(dtype, mask.dtype) if mask.is_floating_point() else dtype
    tolerance = 4 * mask.numel() * torch.finfo(summed).eps
    check(
        lambda x: verl.masked_mean(x, mask, axis),
        lambda x: functional.masked_mean(x, mask, axis),
        [x],
        tolerance,
        tolerance,
        seed,
    )


def test_masked_mean_weighs_by_the_mask() -> None:
    x, weights = torch.tensor([1.0, 2.0, math.nan]), torch.tensor([0.5, 2.0, 0.0])
    close(verl.masked_mean(x, weights), functional.masked_mean(x, weights), 1e-6)


# verl takes n/(n - 1), of two integers, in float32 whatever the numbers are.
BESSEL = 2 * torch.finfo(torch.float32).eps


def spread(x: Tensor, mask: Tensor) -> float:
    """How much whitening enlarges an error of the numbers."""
    return float(1 / (x.double()[mask.bool()].var() + 1e-8).sqrt())


@given(
    mask=masks(valid=2),
    shift_mean=st.booleans(),
    dtype=DTYPES,
    with_gradient=st.booleans(),
    seed=SEEDS,
)
def test_masked_whiten(
    mask: Tensor, shift_mean: bool, dtype: torch.dtype, with_gradient: bool, seed: int
) -> None:
    x = normal(*mask.shape, seed=seed, dtype=dtype)
    # 16 roundings of numbers, divided by the deviation, which they move in turn.
    size = 1 + float(x.abs().max()) * spread(x, mask)
    tolerance = 16 * eps(dtype) * size**2 + BESSEL * size
    if with_gradient:
        check(
            lambda x: verl.masked_whiten(x, mask, shift_mean),
            lambda x: functional.masked_whiten(x, mask, shift_mean),
            [x],
            tolerance,
            tolerance * size * mask.numel(),
            seed,
        )
    else:
        expected = functional.masked_whiten(x.double(), mask, shift_mean)
        actual = verl.masked_whiten(x, mask, shift_mean)
        assert actual.dtype == functional.masked_whiten(x, mask, shift_mean).dtype
        close(actual, expected, tolerance)


@pytest.mark.parametrize("valid", [0, 1])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_too_few_to_whiten_is_an_error_as_in_verl(valid: int, requires_grad: bool) -> None:
    x = torch.zeros(2, 3, requires_grad=requires_grad)
    mask = torch.arange(6).view(2, 3) < valid
    for function in (verl.masked_whiten, functional.masked_whiten):
        with pytest.raises(ValueError):
            function(x, mask)
    with pytest.raises(ValueError):
        verl.compute_gae_advantage_return(x, x, mask, 1.0, 1.0)


# GAE


@given(
    mask=masks(valid=2),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    padded=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_gae(
    mask: Tensor, gamma: float, lam: float, padded: bool, dtype: torch.dtype, seed: int
) -> None:
    if padded:  # on the right alone, which takes a shorter way
        mask = mask.sort(dim=1, descending=True).values
    rewards = normal(*mask.shape, seed=seed, dtype=dtype)
    values = normal(*mask.shape, seed=seed + 1, dtype=dtype)
    theirs = mask.long() if mask.dtype == torch.bool else mask  # verl's takes no bool
    call = algorithms.compute_gae_advantage_return
    expected, returns = call(rewards.double(), values.double(), theirs, gamma, lam)
    found, found_returns = verl.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    same_type = call(rewards, values, theirs, gamma, lam)
    assert [found.dtype, found_returns.dtype] == [each.dtype for each in same_type]
    # Each step rounds four times, at the size of what has been summed at most.
    length = mask.shape[1]
    summed = float((rewards.double().abs() + 2 * values.double().abs()).sum(1).max())
    error = 4 * length * eps(dtype) * summed
    close(found_returns, returns, error)
    raw = returns - values.double()
    enlarged = 1 + float(raw.abs().max()) * spread(raw, mask)
    tolerance = (error * spread(raw, mask) + 16 * eps(dtype) * enlarged) * enlarged
    close(found, expected, tolerance + BESSEL * enlarged)


def test_gae_ignores_what_stands_at_masked_places() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]])
    rewards = normal(2, 4, seed=0, dtype=torch.float32)
    values = normal(2, 4, seed=1, dtype=torch.float32)
    expected, _ = verl.compute_gae_advantage_return(rewards, values, mask, 0.9, 0.8)
    rewards[mask == 0] = values[mask == 0] = math.nan
    found, _ = verl.compute_gae_advantage_return(rewards, values, mask, 0.9, 0.8)
    assert torch.equal(found, expected)


# Losses


@given(mask=masks(), mode=st.sampled_from(MODES), whole=OF_BATCHES, dtype=DTYPES, seed=SEEDS)
def test_agg_loss(
    mask: Tensor, mode: str, whole: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    x = normal(*mask.shape, seed=seed, dtype=dtype)
    terms = algorithms.agg_loss(x.double().abs(), mask, mode, **whole)
    summed = torch.promote_types(dtype, mask.dtype) if mask.is_floating_point() else dtype
    rounding = 4 * (2 + math.sqrt(mask.numel())) * torch.finfo(summed).eps
    check(
        lambda x: verl.agg_loss(x, mask, mode, **whole),
        lambda x: algorithms.agg_loss(x, mask, mode, **whole),
        [x],
        rounding * float(terms),
        rounding,
        seed,
    )


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "token-sum"])
def test_an_empty_mask_is_nan_as_in_verl(mode: str) -> None:
    zeros, mask = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    for module in (verl, algorithms):
        assert module.agg_loss(zeros, mask, mode).isnan()
        assert module.compute_value_loss(zeros, zeros, zeros, mask, 0.5, mode)[0].isnan()
        policy, _ = module.compute_policy_loss_vanilla(
            zeros, zeros, zeros, mask, mode, actor_config({})
        )
        assert policy.isnan()


def test_modes_and_counts_that_do_not_fit_are_errors_as_in_verl() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for module in (verl, algorithms):
        with pytest.raises(ValueError):
            module.agg_loss(x, mask, "mean")
        for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean"):
            with pytest.raises(ValueError):
                module.agg_loss(x, mask, mode, dp_size=2)


def actor_config(whole: dict[str, Any]) -> Any:
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.2,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=2.5,
    )
    config.global_batch_info.update(whole)
    return config


@given(
    mask=masks(),
    mode=st.sampled_from(MODES),
    whole=OF_BATCHES,
    weighted=st.booleans(),
    dtype=DTYPES,
    scale=st.sampled_from([0.0, 0.3, 1.5, 30.0]),
    seed=SEEDS,
)
def test_policy_loss(
    mask: Tensor,
    mode: str,
    whole: dict[str, Any],
    weighted: bool,
    dtype: torch.dtype,
    scale: float,
    seed: int,
) -> None:
    old = normal(*mask.shape, seed=seed, dtype=dtype)
    new = old + normal(*mask.shape, seed=seed + 1, dtype=dtype, scale=scale)
    advantages = normal(*mask.shape, seed=seed + 2, dtype=dtype)
    weights = normal(*mask.shape, seed=seed + 3, dtype=dtype).exp() if weighted else None
    config = actor_config(whole)

    def call(module: Any, new: Tensor, metrics: dict[str, Any] | None = None) -> Tensor:
        fixed = [
            None if each is None else each.to(new.dtype) for each in (old, advantages, weights)
        ]
        loss, found = module.compute_policy_loss_vanilla(
            fixed[0], new, fixed[1], mask, mode, config, fixed[2]
        )
        if metrics is not None:
            metrics.update(found)
        return loss

    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    call(verl, new, ours), call(algorithms, new.double(), theirs)
    assert ours.keys() == theirs.keys()
    log_ratios = (new.double() - old.double()).abs().clamp(max=20)
    size = 1 + float(log_ratios.max())
    for name, number in ours.items():
        # verl counts what was clipped in float32, also where the losses are float64.
        rounding = max(eps(dtype), eps(torch.float32) if "clipfrac" in name else 0)
        assert number == pytest.approx(theirs[name], abs=64 * rounding * size)
    # A term is at most the dual clip's, and a log-ratio's rounding that much in its ratio.
    bound = 2.5 * advantages.double().abs() * (1 if weights is None else weights.double())
    terms = float(algorithms.agg_loss(bound * (1 + log_ratios.clamp(max=1)), mask, mode, **whole))
    rounding = (64 + math.sqrt(mask.numel())) * eps(dtype)
    check(
        lambda new: call(verl, new),
        lambda new: call(algorithms, new),
        [new],
        rounding * terms,
        rounding * terms,
        seed,
    )


def test_an_overflowing_ratio_beside_an_advantage_of_zero_is_zero() -> None:
    new, old = torch.full((1, 2), 200.0, requires_grad=True), torch.zeros(1, 2)
    for module in (verl, algorithms):
        loss, metrics = module.compute_policy_loss_vanilla(
            old, new, old, torch.ones(1, 2), config=actor_config({})
        )
        (gradient,) = torch.autograd.grad(loss, new)
        assert loss == 0 and (gradient == 0).all()
        assert metrics["actor/ppo_kl"] == -20.0


@given(mask=masks(), mode=st.sampled_from(MODES), whole=OF_BATCHES, dtype=DTYPES, seed=SEEDS)
def test_value_loss(
    mask: Tensor, mode: str, whole: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    new, returns, old = (normal(*mask.shape, seed=seed + i, dtype=dtype) for i in range(3))

    def call(module: Any, new: Tensor, fractions: list[Tensor] | None = None) -> Tensor:
        series = (new, returns.to(new.dtype), old.to(new.dtype), mask)
        loss, clipped = module.compute_value_loss(*series, 0.3, mode, **whole)
        if fractions is not None:
            fractions.append(clipped)
        return loss

    fractions: list[Tensor] = []
    call(verl, new, fractions), call(algorithms, new.double(), fractions)
    close(fractions[0], fractions[1], 8 * torch.finfo(torch.float32).eps)
    assert not fractions[0].requires_grad
    sizes = (new.double().abs() + returns.double().abs() + old.double().abs() + 0.3).square()
    terms = float(algorithms.agg_loss(sizes, mask, mode, **whole))
    rounding = (32 + math.sqrt(mask.numel())) * eps(dtype)
    check(
        lambda new: call(verl, new),
        lambda new: call(algorithms, new),
        [new],
        rounding * terms,
        rounding * (1 + terms),
        seed,
    )


ESTIMATORS = ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 9)),
    scale=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    dtype=DTYPES,
    seed=SEEDS,
)
@pytest.mark.parametrize("estimator", [*ESTIMATORS, *(f"{name}+" for name in ESTIMATORS)])
def test_kl_penalty(
    estimator: str, shape: tuple[int, int], scale: float, dtype: torch.dtype, seed: int
) -> None:
    new = normal(*shape, seed=seed, dtype=dtype, scale=scale)
    reference = normal(*shape, seed=seed + 1, dtype=dtype, scale=scale)
    assume(not (dtype == torch.float16 and scale > 100))  # a square overflows
    size = float((new.double() - reference.double()).abs().max()) if new.numel() else 0.0
    # k3 is cut off at 10, so no exponential above 31 takes part.
    tolerance = 8 * eps(dtype) * (32 + size + size**2)
    if new.numel() == 0:
        assert verl.kl_penalty(new, reference, estimator).shape == shape
        return
    check(
        lambda new, reference: verl.kl_penalty(new, reference, estimator),
        lambda new, reference: algorithms.kl_penalty(new, reference, estimator),
        [new, reference],
        tolerance,
        tolerance,
        seed,
    )


@pytest.mark.parametrize("estimator", ["full", "k4", ""])
def test_an_unknown_estimator_is_an_error_as_in_verl(estimator: str) -> None:
    for function in (verl.kl_penalty, algorithms.kl_penalty):
        with pytest.raises(NotImplementedError):
            function(torch.zeros(1, 1), torch.zeros(1, 1), estimator)


# Patching


def held() -> dict[str, Any]:
    """What every name of every verl module is, and every entry of its registries."""
    names = {
        f"{name}.{key}": value
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "verl"
        for key, value in vars(module).items()
    }
    for registry in ("POLICY_LOSS_REGISTRY", "ADV_ESTIMATOR_REGISTRY"):
        entries = getattr(algorithms, registry).items()
        names |= {f"{registry}[{key}]": entry for key, entry in entries}
    return names


def changed(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    assert before.keys() == now.keys()
    return {name for name in before if before[name] is not now[name]}


def test_patching_verl_and_undoing_it() -> None:
    losses = pytest.importorskip("verl.workers.utils.losses")
    before, seed = held(), torch.random.get_rng_state()
    with verl.patched() as places:
        assert torch.equal(torch.random.get_rng_state(), seed)
        assert algorithms.get_policy_loss_fn("vanilla") is verl.compute_policy_loss_vanilla
        assert algorithms.get_adv_estimator_fn("gae") is verl.compute_gae_advantage_return
        assert losses.agg_loss is algorithms.agg_loss is verl.agg_loss
        assert losses.kl_penalty is verl.kl_penalty
        assert algorithms.verl_F.masked_whiten is verl.masked_whiten
        of_registries = [place for place in places if "REGISTRY" in place]
        assert len(of_registries) == 2
        assert len(changed(before, held())) == len(places)
    assert changed(before, held()) == set()


def test_patching_by_hand_and_twice() -> None:
    before = held()
    places = verl.patch()
    try:
        with pytest.raises(verl.PatchError, match="patched already"):
            verl.patch()
    finally:
        assert sorted(verl.unpatch()) == sorted(places)
    assert changed(before, held()) == set()


def test_other_losses_of_verl_run_on_what_was_replaced() -> None:
    series = [normal(3, 5, seed=seed, dtype=torch.float32) for seed in range(3)]
    mask = torch.ones(3, 5, dtype=torch.bool)

    def gspo() -> Tensor:
        function = algorithms.get_policy_loss_fn("gspo")
        return function(*series, mask, "seq-mean-token-mean", actor_config({}))[0]

    expected = gspo()
    with verl.patched():
        close(gspo(), expected, 1e-6)


def test_verl_may_change_the_loss_in_place() -> None:
    new = torch.zeros(1, 2, requires_grad=True)
    old, mask = torch.zeros(1, 2), torch.ones(1, 2)
    for whole in ({}, WHOLE_BATCH):
        loss, _ = verl.compute_policy_loss_vanilla(
            old, new, old + 1, mask, config=actor_config(whole)
        )
        loss -= 0.1 * new.sum()
        loss.backward()
        assert new.grad is not None


@pytest.mark.parametrize("name", ["agg_loss", "kl_penalty"])
def test_verl_with_another_signature_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, name, lambda x: x)
    before = held()
    with pytest.raises(verl.PatchError, match=rf"core_algos\.{name} takes \(x\)"):
        verl.patch()
    assert changed(before, held()) == set()


def test_importing_the_adapters_imports_nothing_of_verl() -> None:
    import subprocess

    script = "import sys, rlhf_kernels.integrations.verl; sys.exit('verl' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
