"""OpenRLHF's functions on our kernels, values and gradients, against two peers in float64.

One is what they mean, written below token by token; the other is OpenRLHF itself where it is
installed (`pip install --no-deps openrlhf==0.11.2`, and what its modules import). flash-attn and
vLLM, which need a GPU, are stood in for where they are missing: nothing compared here uses them.

Ours compute in float32 (float64 for float64) and round once; tolerances count those roundings.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_kernels.integrations import openrlhf

SEEDS = st.integers(0, 50)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
WHOLE_BATCH: dict[str, Any] = {"dp_size": 2, "batch_num_tokens": 31.0, "global_batch_size": 7.0}
AS_TENSORS = {
    name: torch.tensor(number) if isinstance(number, float) else number
    for name, number in WHOLE_BATCH.items()
}
OF_BATCHES = st.sampled_from([{}, WHOLE_BATCH, AS_TENSORS])


# What the functions mean. Everything is float64; a scalar is a 0-dim tensor.


def clip(x: Tensor, low: float, high: float) -> Tensor:
    return x.clamp(low, high)


def valid(x: Tensor, mask: Tensor | None) -> list[list[Tensor]]:
    """The entries of each row where the mask is not 0."""
    flags = torch.ones(x.shape) if mask is None else mask
    return [[e for e, m in zip(row, kept) if m != 0] for row, kept in zip(x, flags)]


def mean(numbers: list[Tensor]) -> Tensor:
    return torch.stack(numbers).mean() if numbers else torch.tensor(math.nan, dtype=torch.float64)


def aggregated(
    terms: Tensor,
    mask: Tensor | None,
    token_level: bool,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> Tensor:
    rows = [row for row in valid(terms, mask) if row]
    if token_level:
        summands, whole = [entry for row in rows for entry in row], batch_num_tokens
    else:
        summands, whole = [mean(row) for row in rows], global_batch_size
    if whole is None:
        return mean(summands)
    return sum(summands, torch.zeros((), dtype=torch.float64)) * dp_size / float(whole)


def per_token(function: Callable[..., Tensor], *series: Tensor) -> Tensor:
    rows = [torch.stack([function(*each) for each in zip(*row)]) for row in zip(*series)]
    return torch.stack(rows)


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1]) / temperature
    found = [
        row[label] - row.max() - (row - row.max()).exp().sum().log()
        for row, label in zip(rows, labels.reshape(-1))
    ]
    return torch.stack(found).view(labels.shape)


def compute_entropy(logits: Tensor) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    found = []
    for row in rows:
        p = (row - row.max()).exp() / (row - row.max()).exp().sum()
        found.append(-(p * p.log()).sum())
    return torch.stack(found).view(logits.shape[:-1])


def compute_approx_kl(
    new: Tensor,
    base: Tensor,
    old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    estimates: dict[str, Callable[[Tensor], Tensor]] = {
        "k1": lambda r: r,
        "k2": lambda r: r * r / 2,
        "k3": lambda r: torch.expm1(-r) + r if r > -10 else r * 0 + 10,
    }
    value = per_token(lambda n, b: clip(estimates[kl_estimator](n - b), -10, 10), new, base)
    if not unbiased_gradient:
        return value
    weights = torch.ones_like(new) if old is None else (new - old).exp().clamp(max=10)
    slope = weights.detach() * (new - base).square() / 2
    return value.detach() + slope - slope.detach()


def policy_loss(
    settings: dict[str, Any],
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    rollout: Tensor | None = None,
    **whole: Any,
) -> tuple[Tensor | None, ...]:
    options = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "dual_clip": None, **settings}
    level = options.get("is_correction_level", "off")
    gspo = options.get("policy_loss_type") == "gspo"
    if gspo:
        behind = old if level == "off" else rollout
        means = [mean(row) if row else new.new_zeros(()) for row in valid(new - behind, mask)]
        ratios = torch.stack(means).exp()[:, None].expand_as(new)
    else:
        ratios = clip(new - old, -20, 20).exp()

    def clipped_ratio(ratio: Tensor) -> Tensor:
        return clip(ratio, 1 - options["clip_eps_low"], 1 + options["clip_eps_high"])

    def term(ratio: Tensor, advantage: Tensor) -> Tensor:
        loss = -min(ratio * advantage, clipped_ratio(ratio) * advantage)
        if options["dual_clip"] is not None and advantage < 0:
            # Unlike min(), which may leave only numbers, it has a gradient in any case.
            loss = torch.minimum(loss, -options["dual_clip"] * advantage)
        return loss

    terms = per_token(term, ratios, advantages)
    worse = per_token(lambda r, a: (clipped_ratio(r) * a < r * a).double(), ratios, advantages)
    kl = filtered = None
    if level != "off" and not gspo:
        weights, outside = correction(options, old, rollout, mask)
        terms = weights * terms
        filtered = outside.mean() if level == "seq" else aggregated(outside, mask, True)
        kl = aggregated(rollout - old, mask, True)
    token_level = options.get("token_level_loss", True) and not gspo
    return (
        aggregated(terms, mask, token_level, **whole),
        aggregated(worse, mask, True),
        aggregated(old - new, mask, True).detach(),
        kl,
        filtered,
    )


def gates(
    options: dict[str, Any], old: Tensor, rollout: Tensor, mask: Tensor | None
) -> list[list[Tensor]]:
    """What is compared with the threshold, per token, or one a row; NaN for an empty row."""
    gating = options.get("is_correction_gating", "ratio")

    def gate(o: Tensor, r: Tensor) -> Tensor:
        if gating == "ratio":
            return o - r
        p, q = (clip(each.exp(), 1e-6, 1 - 1e-6) for each in (r, o))
        if gating == "tv":
            return abs(p - q)
        return sum(a * (a.log() - b.log()) for a, b in ((p, q), (1 - p, 1 - q)))

    found = per_token(gate, old, rollout)
    rows = list(found) if options["is_correction_level"] == "token" else None
    if rows is None:
        rows = [mean(row).expand(1) for row in valid(found, mask)]
    return [[each.exp() if gating == "ratio" else each for each in row] for row in rows]


def correction(
    options: dict[str, Any], old: Tensor, rollout: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    low, high = options.get("is_correction_threshold", (0.5, 5.0))
    found = torch.stack([torch.stack(row) for row in gates(options, old, rollout, mask)])
    outside = ~((low <= found) & (found <= high))
    if options.get("is_correction_mode") == "clip":
        return found.clamp(low, high), outside.double()
    return (old - rollout).exp().where(~outside, 0.0), outside.double()


def value_loss(
    settings: dict[str, Any],
    values: Tensor,
    old: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    **whole: Any,
) -> Tensor:
    eps = settings.get("clip_eps")

    def term(value: Tensor, before: Tensor, target: Tensor) -> Tensor:
        error = (value - target).square()
        if eps is None:
            return error / 2
        return max(error, (before + clip(value - before, -eps, eps) - target).square()) / 2

    terms = per_token(term, values, old, returns)
    return aggregated(terms, mask, settings.get("token_level_loss", True), **whole)


def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """A_t = Σ_k (γλ)^k δ_{t+k} over every place; masked ones have no reward and no value."""
    kept = torch.ones_like(values) if mask is None else mask != 0
    rewards, values = rewards.where(kept != 0, 0.0), values.where(kept != 0, 0.0)
    length = values.shape[1]
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * following - values
    advantages = torch.stack(
        [
            sum((gamma * lambd) ** (k - t) * deltas[:, k] for k in range(t, length))
            for t in range(length)
        ],
        dim=1,
    )
    return advantages, advantages + values


DEFINITIONS = SimpleNamespace(
    log_probs_from_logits=log_probs_from_logits,
    compute_entropy=compute_entropy,
    compute_approx_kl=compute_approx_kl,
    PolicyLoss=lambda **settings: functools.partial(policy_loss, settings),
    ValueLoss=lambda **settings: functools.partial(value_loss, settings),
    get_advantages_and_returns=get_advantages_and_returns,
)


# OpenRLHF itself

NEED_A_GPU = {
    "flash_attn": ["flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"],
    "vllm": ["vllm.inputs", "vllm.utils"],
}
MODULES = {
    "utils": "openrlhf.models.utils",
    "loss": "openrlhf.models.loss",
    "experience_maker": "openrlhf.trainer.ppo_utils.experience_maker",
}


def stand_in(name: str) -> ModuleType:
    module = MagicMock(name=name)
    module.__spec__, module.__path__ = ModuleSpec(name, None), []
    return module


@pytest.fixture(scope="module")
def real() -> SimpleNamespace:
    """Its modules, and its functions as they are unpatched; skips where one cannot be imported."""
    if importlib.util.find_spec("openrlhf") is None:
        pytest.skip("OpenRLHF is not installed: pip install --no-deps openrlhf==0.11.2")
    missing = [name for name in NEED_A_GPU if importlib.util.find_spec(name) is None]
    names = [each for name in missing for each in (name, *NEED_A_GPU[name])]
    sys.modules.update({name: stand_in(name) for name in names})
    try:
        modules = {name: importlib.import_module(path) for name, path in MODULES.items()}
    except ImportError as error:
        pytest.skip(f"OpenRLHF is installed, but not all that it imports: {error}")
    finally:
        for name in names:
            del sys.modules[name]
    utils, loss, experience_maker = modules.values()
    return SimpleNamespace(
        log_probs_from_logits=utils.log_probs_from_logits,
        compute_entropy=utils.compute_entropy.__wrapped__,  # before it is compiled
        compute_approx_kl=utils.compute_approx_kl,
        PolicyLoss=loss.PolicyLoss,
        ValueLoss=loss.ValueLoss,
        get_advantages_and_returns=(
            experience_maker.RemoteExperienceMaker.get_advantages_and_returns
        ),
        **modules,
    )


@pytest.fixture(scope="module", params=["definitions", "openrlhf"])
def peer(request: pytest.FixtureRequest) -> SimpleNamespace:
    if request.param == "definitions":
        return DEFINITIONS
    return request.getfixturevalue("real")


# How they are compared


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Holes, empty rows, padding on both sides; bool, int64 or float32; not all masked."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor(draw(st.lists(flags, min_size=rows, max_size=rows)))
    assume(bool(mask.any()))
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


Call = Callable[..., tuple[Tensor | None, ...]]


def leaves(tensors: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [tensor.to(dtype or tensor.dtype, copy=True).requires_grad_() for tensor in tensors]


def check(
    call: Callable[[Any], Call],
    peer: SimpleNamespace,
    inputs: tuple[Tensor, ...],
    tolerances: tuple[float, ...],
    of_gradient: float,
) -> None:
    """`call` gives a module's function of the inputs: first what has gradients, then metrics.

    The gradients are compared under an upstream one that differs from place to place. OpenRLHF
    itself is also given the inputs as they are, for its dtypes.
    """
    own, wide = leaves(inputs), leaves(inputs, torch.float64)
    actual, expected = call(openrlhf)(*own), call(peer)(*wide)
    kinds = expected if peer is DEFINITIONS else call(peer)(*leaves(inputs))
    for found, meant, kind, tolerance in zip(actual, expected, kinds, tolerances, strict=True):
        if found is None or meant is None:
            assert found is meant
            continue
        assert found.shape == meant.shape
        assert peer is DEFINITIONS or found.dtype == kind.dtype
        close(found, meant, tolerance)
    first, exact = actual[0], expected[0]
    assert first is not None and exact is not None
    upstream = torch.linspace(0.5, 1.5, first.numel()).view(first.shape).to(first.dtype)
    gradients = torch.autograd.grad(first, own, upstream)
    for found, meant, leaf in zip(
        gradients, torch.autograd.grad(exact, wide, upstream.to(exact.dtype)), own
    ):
        assert found.dtype == leaf.dtype
        close(found, meant, of_gradient)


# Rows of logits


@given(
    shape=st.sampled_from([(3,), (2, 3)]),
    vocabulary=st.integers(1, 70),
    temperature=st.sampled_from([1.0, 0.7]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_log_probs_from_logits(
    peer: SimpleNamespace,
    shape: tuple[int, ...],
    vocabulary: int,
    temperature: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    logits = normal(*shape, vocabulary, seed=seed, dtype=dtype, scale=4.0)
    labels = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))

    def call(module: Any) -> Call:  # of a copy, which OpenRLHF's overwrites
        return lambda x: (module.log_probs_from_logits(x.clone(), labels, temperature),)

    size = float(1 + logits.abs().max()) / temperature
    tolerance = (16 + math.sqrt(vocabulary)) * eps(dtype) * size
    check(call, peer, (logits,), (tolerance,), tolerance / temperature)


def test_the_logits_stay_at_any_temperature() -> None:
    logits = normal(2, 3, 5, seed=0, dtype=torch.float32)
    before = logits.clone()
    openrlhf.log_probs_from_logits(logits, torch.zeros(2, 3, dtype=torch.int64), 0.5)
    assert torch.equal(logits, before)


@given(
    shape=st.sampled_from([(3,), (2, 3)]), vocabulary=st.integers(1, 70), dtype=DTYPES, seed=SEEDS
)
def test_entropy(
    peer: SimpleNamespace, shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype, seed: int
) -> None:
    logits = normal(*shape, vocabulary, seed=seed, dtype=dtype, scale=4.0)
    size = float(1 + logits.abs().max())
    tolerance = (16 + math.sqrt(vocabulary)) * eps(dtype) * size
    check(
        lambda module: lambda x: (module.compute_entropy(x),),
        *(peer, (logits,), (tolerance,), tolerance * size),
    )


# The KL divergence


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7)),
    scale=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    weighted=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_approx_kl(
    peer: SimpleNamespace,
    estimator: str,
    unbiased: bool,
    shape: tuple[int, int],
    scale: float,
    weighted: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    new = normal(*shape, seed=seed, dtype=dtype, scale=scale)
    base = normal(*shape, seed=seed + 1, dtype=dtype, scale=scale)
    old = new + normal(*shape, seed=seed + 2, dtype=dtype)

    def call(module: Any) -> Call:
        return lambda new, base: (
            module.compute_approx_kl(
                *(new, base, old.to(new.dtype) if weighted else None),
                kl_estimator=estimator,
                unbiased_gradient=unbiased,
            ),
        )

    # OpenRLHF's is float32 whatever it is given, its way to the unbiased gradient adds the square
    # and takes it away again, and k3's exponential, cut off at 10, goes up to e^2.5 in size.
    size = float((new.double() - base.double()).abs().max())
    straight_through = 10 * size**2 if unbiased and peer is not DEFINITIONS else 0.0
    assume(size**2 < 1e6)
    # It casts float64 first, and a difference is then off by the rounding of its two numbers.
    largest = max(float(each.abs().max()) for each in (new, base, old))
    cast = largest if dtype == torch.float64 and peer is not DEFINITIONS else 0.0
    tolerance = 16 * eps(torch.float32) * (32 + size + straight_through + cast)
    of_gradient = 16 * eps(torch.float32) * (32 + 10 * size + (1 + size) * cast)
    check(call, peer, (new, base), (tolerance,), of_gradient)


def test_an_unknown_estimator_is_an_error_as_in_openrlhf(peer: SimpleNamespace) -> None:
    for function in (openrlhf.compute_approx_kl, peer.compute_approx_kl):
        with pytest.raises((ValueError, KeyError)):
            function(torch.zeros(1, 1), torch.zeros(1, 1), kl_estimator="k4")


# The policy's loss

PLAIN: list[dict[str, Any]] = [
    {},
    {"token_level_loss": False},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 2.5},
    {"policy_loss_type": "gspo"},
    {"policy_loss_type": "gspo", "dual_clip": 1.5, "is_correction_level": "token"},
]
CORRECTED: list[dict[str, Any]] = [
    {"is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_mode": "clip", "dual_clip": 2.5},
    {"is_correction_level": "seq", "token_level_loss": False},
    *(
        {
            "is_correction_level": level,
            "is_correction_gating": gating,
            "is_correction_threshold": [0.0, 0.1],
        }
        for level, gating in itertools.product(("token", "seq"), ("binary_kl", "tv"))
    ),
]


def named(settings: dict[str, Any]) -> str:
    return " ".join(str(each) for each in settings.values()) or "defaults"


@pytest.mark.parametrize("settings", PLAIN + CORRECTED, ids=named)
@given(
    mask=masks(),
    whole=OF_BATCHES,
    scale=st.sampled_from([0.0, 0.3, 1.5, 30.0]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_policy_loss(
    peer: SimpleNamespace,
    settings: dict[str, Any],
    mask: Tensor,
    whole: dict[str, Any],
    scale: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    old = (-0.05 - normal(*mask.shape, seed=seed, dtype=torch.float32).abs()).to(dtype)
    new = old + normal(*mask.shape, seed=seed + 1, dtype=dtype, scale=scale)
    advantages = normal(*mask.shape, seed=seed + 2, dtype=dtype)
    rollout = old + normal(*mask.shape, seed=seed + 3, dtype=dtype, scale=0.7)
    if settings in CORRECTED:
        assume(away_from_the_threshold(settings, old, rollout, mask))

    def call(module: Any) -> Call:
        def of(new: Tensor) -> tuple[Tensor | None, ...]:
            fixed = [each.to(new.dtype) for each in (old, advantages)]
            return module.PolicyLoss(**settings)(new, *fixed, mask, rollout.to(new.dtype), **whole)

        return of

    # A log-ratio's rounding is as much, times its size, in the ratio, and so in a term.
    log_ratios = clip(new.double() - old.double(), -20, 20)
    if settings.get("policy_loss_type") == "gspo":
        behind = rollout if "is_correction_level" in settings else old
        log_ratios = new.double() - behind.double()
        log_ratios = log_ratios.abs().max(dim=1, keepdim=True).values.expand_as(log_ratios)
        assume(float(log_ratios.max()) < 80)  # e to the power of it overflows float32
    weights = (old.double() - rollout.double()).exp() if settings in CORRECTED else 1.0
    sizes = (1 + log_ratios.exp()) * advantages.double().abs() * weights
    size = 1 + float((new.double() - old.double()).abs().max())
    token_level = settings.get("token_level_loss", True) and "policy_loss_type" not in settings
    terms = float(aggregated(sizes, mask, token_level, **whole))
    assume(terms < torch.finfo(dtype).max)
    rounding = (64 + math.sqrt(mask.numel())) * eps(dtype) * size
    metric = 64 * eps(dtype) * size
    check(
        *(call, peer, (new,), (rounding * terms, metric, metric, metric, metric)),
        rounding * terms,
    )


def away_from_the_threshold(
    settings: dict[str, Any], old: Tensor, rollout: Tensor, mask: Tensor
) -> bool:
    """Where rounding cannot move a gate to its other side."""
    found = gates(settings, old.double(), rollout.double(), mask)
    bounds = settings.get("is_correction_threshold", (0.5, 5.0))
    bounds = [bound for bound in bounds if bound > 0]
    pairs = itertools.product(itertools.chain(*found), bounds)
    return all(not abs(float(gate) - bound) < 1e-4 for gate, bound in pairs)


@pytest.mark.parametrize("settings", PLAIN + CORRECTED, ids=named)
def test_masked_places_have_no_effect(settings: dict[str, Any]) -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
    series = [-normal(3, 4, seed=seed, dtype=torch.float32).abs() for seed in range(4)]

    def outcome() -> list[Tensor | None]:
        (new,) = leaves((series[0],))
        loss, *metrics = openrlhf.PolicyLoss(**settings)(new, *series[1:3], mask, series[3])
        return [loss, *torch.autograd.grad(loss, new), *metrics]

    before = outcome()
    for each in series:
        each[mask == 0] = math.nan
    for found, expected in zip(outcome(), before, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or expected is None or torch.equal(found, expected)


@pytest.mark.parametrize("token_level", [True, False])
def test_an_empty_mask_is_nan_as_in_openrlhf(peer: SimpleNamespace, token_level: bool) -> None:
    zeros, mask = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    for module in (openrlhf, peer):
        policy = module.PolicyLoss(token_level_loss=token_level)
        assert all(each.isnan() for each in policy(zeros, zeros, zeros, mask)[:3])
        assert module.ValueLoss(token_level_loss=token_level)(zeros, zeros, zeros, mask).isnan()
        # The whole batch's count makes it 0; the metrics know this call's tokens alone.
        loss, clipped, *_ = policy(zeros, zeros, zeros, mask, **WHOLE_BATCH)
        assert loss == 0 and clipped.isnan()


def test_an_overflowing_ratio_beside_an_advantage_of_zero_is_zero(peer: SimpleNamespace) -> None:
    for module in (openrlhf, peer):
        new = torch.full((1, 2), 200.0, requires_grad=True)
        zeros = torch.zeros(1, 2)
        loss, _, kl, *_ = module.PolicyLoss()(new, zeros, zeros, torch.ones(1, 2))
        assert loss == 0 and (torch.autograd.grad(loss, new)[0] == 0).all()
        assert kl == -200.0


def test_without_a_mask_all_is_valid(peer: SimpleNamespace) -> None:
    new, old, advantages = (normal(3, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    everywhere = torch.ones(3, 4)
    for token_level in (True, False):
        policy = openrlhf.PolicyLoss(token_level_loss=token_level)
        value = openrlhf.ValueLoss(0.5, token_level)
        for loss in (policy, value):
            without, found = loss(new, old, advantages), loss(new, old, advantages, everywhere)
            torch.testing.assert_close(without, found, rtol=0, atol=0)
    # OpenRLHF's own needs one for the others.
    expected = peer.PolicyLoss()(new, old, advantages)
    for found, meant in zip(openrlhf.PolicyLoss()(new, old, advantages)[:3], expected[:3]):
        close(found, meant, 64 * eps(torch.float64))


@pytest.mark.parametrize(
    "settings",
    [
        {"dual_clip": 1.0},
        {"is_correction_level": "batch"},
        {"is_correction_mode": "drop"},
        {"is_correction_gating": "kl"},
        {"is_correction_level": "seq", "is_correction_mode": "clip"},
        {"is_correction_mode": "clip", "is_correction_gating": "tv"},
        {"is_correction_level": "token", "is_correction_gating": "binary_kl"},
    ],
    ids=named,
)
def test_settings_that_do_not_fit_are_errors_as_in_openrlhf(
    real: SimpleNamespace, settings: dict[str, Any]
) -> None:
    kind = AssertionError if "dual_clip" in settings else ValueError
    for module in (openrlhf, real):
        with pytest.raises(kind):
            module.PolicyLoss(**settings)


def test_errors_of_the_policy_loss() -> None:
    zeros = torch.zeros(1, 2)
    with pytest.raises(AssertionError, match="dual_clip"):
        openrlhf.PolicyLoss(dual_clip=0.5)
    with pytest.raises(ValueError, match="is_correction_mode"):
        openrlhf.PolicyLoss(is_correction_level="seq", is_correction_mode="clip")
    with pytest.raises(ValueError, match="is_correction_threshold"):
        openrlhf.PolicyLoss(is_correction_level="seq", is_correction_gating="tv")
    with pytest.raises(ValueError, match="policy_loss_type is 'grpo'"):
        openrlhf.PolicyLoss(policy_loss_type="grpo")(zeros, zeros, zeros)
    with pytest.raises(TypeError, match="rollout_log_probs is None"):
        openrlhf.PolicyLoss(is_correction_level="token")(zeros, zeros, zeros)


# The critic's loss


@given(
    mask=masks(),
    whole=OF_BATCHES,
    clip_eps=st.sampled_from([None, 0.3]),
    token_level=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_value_loss(
    peer: SimpleNamespace,
    mask: Tensor,
    whole: dict[str, Any],
    clip_eps: float | None,
    token_level: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    values, old, returns = (normal(*mask.shape, seed=seed + i, dtype=dtype) for i in range(3))
    settings = {"clip_eps": clip_eps, "token_level_loss": token_level}

    def call(module: Any) -> Call:
        loss = module.ValueLoss(**settings)
        return lambda new: (loss(new, old.to(new.dtype), returns.to(new.dtype), mask, **whole),)

    sizes = (values.double().abs() + returns.double().abs() + old.double().abs() + 0.3).square()
    terms = float(aggregated(sizes, mask, token_level, **whole))
    rounding = (32 + math.sqrt(mask.numel())) * eps(dtype)
    check(call, peer, (values,), (rounding * terms,), rounding * (1 + terms))


# GAE


@given(
    mask=masks(),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    lambd=st.sampled_from([1.0, 0.95, 0.0]),
    masked=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_gae(
    peer: SimpleNamespace,
    mask: Tensor,
    gamma: float,
    lambd: float,
    masked: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    values = normal(*mask.shape, seed=seed, dtype=dtype)
    rewards = normal(*mask.shape, seed=seed + 1, dtype=dtype)
    rates = (mask if masked else None, gamma, lambd)
    found = openrlhf.get_advantages_and_returns(None, values, rewards, *rates)
    call = peer.get_advantages_and_returns
    expected = call(None, values.double(), rewards.double(), *rates)
    if peer is not DEFINITIONS:
        same_type = call(None, values, rewards, *rates)
        assert [each.dtype for each in found] == [each.dtype for each in same_type]
    # Each step rounds four times, at the size of what has been summed at most.
    summed = float((rewards.double().abs() + 2 * values.double().abs()).sum(1).max())
    for one, other in zip(found, expected):
        assert not one.requires_grad
        close(one, other, 4 * mask.shape[1] * eps(dtype) * summed)


def test_gae_ignores_what_stands_at_masked_places() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    values, rewards = (normal(3, 4, seed=seed, dtype=torch.float32) for seed in range(2))
    expected = openrlhf.get_advantages_and_returns(None, values, rewards, mask, 0.9, 0.8)
    values[mask == 0] = rewards[mask == 0] = math.nan
    found = openrlhf.get_advantages_and_returns(None, values, rewards, mask, 0.9, 0.8)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


# Patching


def held() -> dict[str, Any]:
    """What every name of every OpenRLHF module is, and of its classes every attribute."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "openrlhf":
            continue
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{each}": own for each, own in vars(value).items()}
    return found


def changed(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    assert before.keys() == now.keys()
    return {name for name in before if before[name] is not now[name]}


def test_patching_openrlhf_and_undoing_it(real: SimpleNamespace) -> None:
    before, seed = held(), torch.random.get_rng_state()
    actor = sys.modules["openrlhf.models.actor"]
    earlier = real.PolicyLoss()
    with openrlhf.patched() as places:
        assert torch.equal(torch.random.get_rng_state(), seed)
        assert actor.log_probs_from_logits is openrlhf.log_probs_from_logits
        assert actor.compute_entropy is openrlhf.compute_entropy
        assert real.experience_maker.compute_approx_kl is openrlhf.compute_approx_kl
        assert earlier.forward.__func__ is openrlhf.PolicyLoss.forward
        assert changed(before, held()) == set(places)
    assert changed(before, held()) == set()


def test_patching_by_hand_and_twice(real: SimpleNamespace) -> None:
    before = held()
    places = openrlhf.patch()
    try:
        with pytest.raises(openrlhf.PatchError, match="patched already"):
            openrlhf.patch()
    finally:
        assert sorted(openrlhf.unpatch()) == sorted(places)
    assert changed(before, held()) == set()


def test_openrlhf_with_another_signature_is_refused(
    real: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real.loss.ValueLoss, "forward", lambda self, x: x)
    before = held()
    with pytest.raises(openrlhf.PatchError, match=r"ValueLoss\.forward takes \(self, x\)"):
        openrlhf.patch()
    assert changed(before, held()) == set()


def test_a_bound_that_has_changed_is_refused(
    real: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real.utils, "KL_IS_WEIGHT_CLIP", 2.0)
    with pytest.raises(openrlhf.PatchError, match=r"compute_approx_kl and ours are"):
        openrlhf.patch()


def test_its_experience_maker_gives_the_same_advantages(real: SimpleNamespace) -> None:
    maker = object.__new__(real.experience_maker.RemoteExperienceMaker)
    maker.advantage_estimator = "gae"
    maker.kl_ctl = SimpleNamespace(value=0.1)
    maker.strategy = SimpleNamespace(args=arguments())
    maker.args = maker.strategy.args

    def advantages() -> list[Tensor]:
        found = maker.compute_advantages_and_returns(experiences())
        return [each for one in found for each in (one.advantages, one.returns)]

    expected = advantages()
    with openrlhf.patched():
        found = advantages()
    for one, other in zip(found, expected, strict=True):
        close(one, other, 64 * eps(torch.float32) * float(1 + other.abs().max()))


def arguments() -> Any:
    advantage = SimpleNamespace(estimator="gae", gamma=0.99, lambd=0.95, no_std_norm=False)
    return SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(
            clip_range=(-10, 10),
            overlong_buffer_len=None,
            overlong_penalty_factor=1.0,
            stop_properly_penalty_coef=None,
        ),
        rollout=SimpleNamespace(n_samples_per_prompt=1),
    )


def experiences() -> list[Any]:
    """Two batches of other widths, one with holes."""
    masks = [[[1, 1, 1, 0], [1, 0, 1, 1]], [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]]
    found = []
    for number, rows in enumerate(masks):
        mask = torch.tensor(rows, dtype=torch.bool)
        values, kl = (
            normal(*mask.shape, seed=2 * number + i, dtype=torch.float32) for i in range(2)
        )
        found.append(
            SimpleNamespace(
                index=[2 * number, 2 * number + 1],
                rewards=torch.tensor([0.5, -1.0]),
                values=values,
                kl=kl,
                action_mask=mask,
                info={},
            )
        )
    return found


def test_importing_the_adapters_imports_nothing_of_openrlhf() -> None:
    script = "import sys, rlhf_kernels.integrations.openrlhf; sys.exit('openrlhf' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_where_openrlhf_is_missing_the_refusal_says_so() -> None:
    if importlib.util.find_spec("openrlhf") is not None:
        pytest.skip("OpenRLHF is installed")
    with pytest.raises(openrlhf.PatchError, match=r"openrlhf is not installed.*>=0\.11,<0\.12"):
        openrlhf.patch()
    assert not [name for name in sys.modules if name.partition(".")[0] == "openrlhf"]
