"""Registration: opcheck, torch.compile without graph breaks, gradcheck in float64."""

from __future__ import annotations

import shutil

import pytest
import torch
from kernel_cases import (
    EPS,
    ROW_PRIMITIVES,
    backends_for,
    close,
    normal,
    ppo_inputs,
    random_mask,
)

import rlhf_kernels as kernels
from rlhf_kernels import PPOLossConfig

ROW_BACKENDS = backends_for(*ROW_PRIMITIVES)


def row_targets():
    """Made in the test, where the default device is the backend's."""
    return torch.tensor([0, 4, -100, 2])


@pytest.mark.parametrize("backend", ROW_BACKENDS)
@pytest.mark.parametrize("need_entropy", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("per_row", [False, True])
def test_opcheck_token_logprobs(backend, need_entropy, per_row, groups):
    tau = torch.tensor([0.5, 1.0, 2.0, 1.0]) if per_row else None
    logits = normal(groups, 4 // groups, 7, seed=1).requires_grad_()
    arguments = (logits, row_targets(), 0.7, tau, -100, need_entropy, backend)
    torch.library.opcheck(torch.ops.rlhf_kernels.token_logprobs.default, arguments)
    rows = normal(4, 7, seed=1)
    g, entropy = normal(4, seed=2), normal(4, seed=3).abs()
    normalization = torch.stack([rows.amax(1), (rows - rows.amax(1, True)).logsumexp(1)], 1)
    pair = (g, entropy) if need_entropy else (None, None)
    backward = (g, pair[0], row_targets(), 0.7, tau, -100, normalization, pair[1], backend)
    torch.library.opcheck(
        torch.ops.rlhf_kernels.token_logprobs_backward.default, (logits.detach(), *backward)
    )


@pytest.mark.parametrize("backend", ROW_BACKENDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck_linear(backend, with_bias):
    hidden, weight = normal(4, 3, seed=1), normal(7, 3, seed=2)
    bias = normal(7, seed=3) if with_bias else None
    tail = (torch.float32, 2, None, backend)
    leaves = [x if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]
    torch.library.opcheck(
        torch.ops.rlhf_kernels.linear_token_logprobs.default,
        (*leaves, row_targets(), 0.7, None, -100, True, *tail),
    )
    logits = hidden @ weight.T
    normalization = torch.stack([logits.amax(1), (logits - logits.amax(1, True)).logsumexp(1)], 1)
    g = normal(4, seed=4)
    torch.library.opcheck(
        torch.ops.rlhf_kernels.linear_token_logprobs_backward.default,
        (
            *(hidden, weight, bias, row_targets(), g, None, 0.7, None, -100, normalization, None),
            *tail,
            [True, True, with_bias],
        ),
    )


@pytest.mark.parametrize("backend", ROW_BACKENDS)
@pytest.mark.parametrize("needed", [[True, True, True], [True, False, False], [False] * 3])
def test_opcheck_linear_losses(backend, needed):
    leaves = [normal(4, 3, seed=1), normal(7, 3, seed=2), normal(7, seed=3)]
    for leaf, need in zip(leaves, needed):
        leaf.requires_grad_(need)
    tail = (torch.float32, 2, None, backend, needed)
    torch.library.opcheck(
        torch.ops.rlhf_kernels.linear_cross_entropy.default,
        (*leaves, row_targets(), -100, torch.tensor(3.0), True, *tail),
    )
    old, advantages = -normal(2, 2, seed=4).abs() - 2, normal(2, 2, seed=5)
    mask = (row_targets() != -100).view(2, 2)
    value, old_value, returns = (normal(2, 2, seed=seed) for seed in (6, 7, 8))
    ref, weights = -normal(2, 2, seed=9).abs() - 2, normal(2, 2, seed=10).abs()
    options = ("seq-mean-token-mean", 0.1, "k3")
    for values, others in (
        ([None] * 3, [None] * 3),
        ([value.requires_grad_(), old_value, returns], [ref, weights, None]),
    ):
        torch.library.opcheck(
            torch.ops.rlhf_kernels.linear_ppo_loss.default,
            (
                *(*leaves, values[0], row_targets(), old, advantages, mask, *values[1:], *others),
                *(0.7, None, -100, None, 0.2, None, None, 0.2, 0.5, 0.01, *options),
                *tail,
            ),
        )


@pytest.mark.parametrize("backend", backends_for("gae_forward"))
@pytest.mark.parametrize("with_bootstrap", [False, True])
def test_opcheck_gae(backend, with_bootstrap):
    bootstrap = normal(3, seed=3) if with_bootstrap else None
    rates = torch.rand(3, 3) if with_bootstrap else None
    series = [normal(3, 5, seed=seed) for seed in range(4)]
    mask, options = random_mask(3, 5), (0.9, 0.95, 1.0, "decay", rates, backend)
    operators = torch.ops.rlhf_kernels
    torch.library.opcheck(operators.gae.default, (*series[:2], mask, bootstrap, None, *options))
    arguments = (series[0][:, 0], *series[1:], mask, bootstrap, None, 0.1, "k3", *options)
    torch.library.opcheck(operators.rollout_advantages.default, arguments)
    flat = [x.flatten() for x in (*series[:2], mask)]
    cu_seqlens = torch.tensor([0, 4, 4, 15])
    torch.library.opcheck(operators.gae.default, (*flat, bootstrap, cu_seqlens, *options))


@pytest.mark.parametrize("backend", backends_for("whiten"))
def test_opcheck_whitening(backend):
    x, mask = normal(3, 5, seed=1), random_mask(3, 5)
    total = kernels.backends.reference.moments(x, mask)
    operators = torch.ops.rlhf_kernels
    torch.library.opcheck(operators.moments.default, (x, mask, backend))
    torch.library.opcheck(operators.whiten.default, (x, mask, total, False, 1e-8, backend))


@pytest.mark.parametrize("backend", backends_for("ppo_loss_forward"))
@pytest.mark.parametrize("with_all", [False, True])
def test_opcheck_ppo_loss(backend, with_all):
    inputs = ppo_inputs(3, 5)
    for name in ("logprobs", "values", "entropy"):
        inputs[name].requires_grad_()
    series = [
        inputs[name] if with_all or name in ("logprobs", "old_logprobs", "advantages") else None
        for name in (
            *("logprobs", "values", "entropy", "old_logprobs", "advantages"),
            *("old_values", "returns", "ref_logprobs", "importance_weights"),
        )
    ]
    series.insert(5, random_mask(3, 5))
    normalizer = torch.tensor(9.0) if with_all else None
    config = PPOLossConfig(clip_range_high=0.3, dual_clip=1.5).arguments()
    operator = torch.ops.rlhf_kernels.ppo_loss.default
    torch.library.opcheck(operator, (*series, None, normalizer, *config, backend))
    flat = [None if x is None else x.detach().flatten() for x in series]
    flat[0].requires_grad_()
    cu_seqlens = torch.tensor([0, 4, 4, 15])
    torch.library.opcheck(operator, (*flat, cu_seqlens, normalizer, *config, backend))


def programs(backend):
    """Whole calls, each a function of leaves that need gradients."""
    mask = random_mask(4, 6)
    inputs = ppo_inputs(4, 6)
    targets = torch.arange(24).view(4, 6) % 7
    scores = normal(4, seed=1)
    config = PPOLossConfig(dual_clip=2.0)

    def token_logprobs(logits):
        pair = kernels.token_logprobs(
            logits, targets, temperature=0.7, return_entropy=True, backend=backend
        )
        return pair[0].sum() + pair[1].square().sum()

    def cross_entropy(hidden, weight):
        labels = torch.where(mask, targets, -100)
        return kernels.linear_cross_entropy(hidden, weight, labels, chunk_size=5, backend=backend)

    def ppo(logprobs, values):
        options = {n: inputs[n] for n in ("old_values", "returns")}
        loss, stats = kernels.ppo_loss(
            logprobs,
            inputs["old_logprobs"],
            inputs["advantages"],
            mask,
            values=values,
            **options,
            config=config,
            normalizer=20.0,
            backend=backend,
        )
        return loss + 0 * stats.clip_fraction

    def linear_ppo(hidden, weight):
        # Made from the policy's side only: old log-probabilities stand in from the case.
        return kernels.linear_ppo_loss(
            hidden,
            weight,
            targets,
            inputs["old_logprobs"],
            inputs["advantages"],
            mask,
            config=config,
            backend=backend,
        )[0]

    def rollout(logprobs, values):
        result = kernels.rollout_advantages(
            scores,
            logprobs,
            inputs["old_logprobs"],
            values,
            mask,
            kl_coef=0.1,
            whiten_rewards=True,
            backend=backend,
        )
        return (result.advantages * logprobs).sum() + (result.returns * values).sum()

    pair = (inputs["logprobs"], inputs["values"])
    linear = (normal(4, 6, 3, seed=1), normal(7, 3, seed=2))
    return {
        "token_logprobs": (token_logprobs, (normal(4, 6, 7, seed=3),)),
        "linear_cross_entropy": (cross_entropy, linear),
        "ppo_loss": (ppo, pair),
        "linear_ppo_loss": (linear_ppo, linear),
        "rollout_advantages": (rollout, pair),
    }


NAMES = list(programs("reference"))


def value_and_gradients(function, leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


def check_compiled(name, backend, compiler):
    function, leaves = programs(backend)[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    eager, graph = value_and_gradients(function, leaves), value_and_gradients(compiled, leaves)
    # The operators are the same; what surrounds them may be fused and so rounded otherwise.
    close(graph[0], eager[0], 16 * EPS * (1 + float(eager[0].abs())))
    for a, b in zip(graph[1], eager[1]):
        close(a, b, 16 * EPS * (1 + float(b.abs().max())))


# What a program calls besides the row kernels.
CALLS = {"ppo_loss": "ppo_loss_forward", "rollout_advantages": "rollout_forward"}


@pytest.mark.parametrize(
    "name, backend",
    [(n, b) for n in NAMES for b in backends_for(CALLS.get(n, ROW_PRIMITIVES[0]))],
)
def test_compiles_without_graph_breaks(name, backend):
    check_compiled(name, backend, "aot_eager")


@pytest.mark.parametrize("name", ["kl_penalty", "shaped_rewards", "masked_mean", "masked_whiten"])
def test_elementwise_operations_compile(name):
    x, mask = normal(3, 4, seed=1), random_mask(3, 4)
    arguments = {
        "kl_penalty": (x, x + 1),
        "shaped_rewards": (x[:, 0], x, mask),
        "masked_mean": (x, mask),
        "masked_whiten": (x, mask),
    }[name]
    options = {"kl_coef": 0.1} if name == "shaped_rewards" else {}

    def function(*tensors):
        return getattr(kernels, name)(*tensors, **options)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), function(*arguments))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor on CPU needs a C++ compiler")
def test_compiles_with_inductor():
    """With the default backend, whichever it is here, and few fused loops, which g++ compiles."""
    # Its cache knows the operators by name only, not what they were when it was filled.
    with torch._inductor.config.patch(force_disable_caches=True):
        check_compiled("token_logprobs", None, "inductor")


def test_compiled_lengths_do_not_recompile_each_time():
    """Batches of many lengths are one graph: at most one static and one dynamic compilation."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(kernels.token_logprobs, fullgraph=True, backend=counter)
    for rows in (5, 6, 7, 9, 12):
        compiled(normal(rows, 7, seed=1), torch.zeros(rows, dtype=torch.long))
    assert counter.frame_count <= 2


def test_fake_tensors_give_shapes_without_numbers():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out = kernels.token_logprobs(torch.empty(3, 5, 7), torch.zeros(3, 5, dtype=torch.long))
        assert out.shape == (3, 5) and out.dtype == torch.float32
        x, mask = torch.empty(3, 5), torch.ones(3, 5, dtype=torch.bool)
        assert kernels.gae(x, x, mask)[0].shape == (3, 5)
        assert kernels.ppo_loss(x, x, x, mask)[0].shape == ()


@pytest.mark.parametrize("name", NAMES[:4])
def test_gradcheck(name):
    """The reference backend in float64, against finite differences, through the public calls."""
    function, leaves = programs("reference")[name]
    doubles = [leaf.double().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(function, doubles, fast_mode=False)


def test_numbers_may_change_between_compiled_calls():
    """From its second value on a number is traced as a symbol, which checks must stand."""
    x, mask = normal(3, 4, seed=1), random_mask(3, 4)
    logits, targets = normal(3, 7, seed=2), torch.tensor([0, 4, 2])

    def function(number):
        return (
            kernels.token_logprobs(logits, targets, temperature=number),
            kernels.ppo_loss(x, x + 0.1, x, mask, normalizer=number)[0],
            kernels.gae(x, x, mask, gamma=number, lam=number)[0],
        )

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for number in (0.5, 0.6, 0.7):
        for a, b in zip(compiled(number), function(number)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("tracer", ["make_fx", "jit.trace"])
def test_other_tracers_record_the_operators(tracer):
    """What was traced computes again: nothing is baked in, or left uninitialized."""
    from torch.fx.experimental.proxy_tensor import make_fx

    mask = random_mask(3, 5)

    def function(rewards, values):
        advantages, returns = kernels.gae(rewards, values, mask)
        loss = kernels.ppo_loss(rewards, values, advantages, mask)[0]
        logprobs = kernels.token_logprobs(values, torch.tensor([0, 4, 2]))
        return advantages, returns, loss, logprobs

    first = (normal(3, 5, seed=1), normal(3, 5, seed=2))
    traced = make_fx(function)(*first) if tracer == "make_fx" else torch.jit.trace(function, first)
    for seed in (1, 7):
        again = (normal(3, 5, seed=seed), normal(3, 5, seed=seed + 1))
        for a, b in zip(traced(*again), function(*again)):
            assert torch.equal(a, b)


def test_make_fx_records_the_backward():
    from torch.fx.experimental.proxy_tensor import make_fx

    targets = torch.tensor([0, 4, 2])

    def gradient(logits):
        leaf = logits.requires_grad_()
        return torch.autograd.grad(kernels.token_logprobs(leaf, targets).sum(), leaf)[0]

    traced = make_fx(gradient)(normal(3, 7, seed=1))
    other = normal(3, 7, seed=2)
    assert torch.equal(traced(other.clone()), gradient(other.clone()))


def test_function_transforms():
    """vmap hands over batched tensors, which hold no numbers at their address."""
    x = normal(2, 3, 5, seed=1)
    mask = torch.ones(3, 5, dtype=torch.bool)
    advantages, _ = torch.vmap(lambda one: kernels.gae(one, one, mask))(x)
    for one, result in zip(x, advantages):
        assert torch.equal(result, kernels.gae(one, one, mask)[0])


LOGITS = normal(3, 5, seed=1)
PICKED = torch.tensor([0, 1, 2])
DIFFERENTIABLE = {
    "token_logprobs": lambda x: kernels.token_logprobs(x, PICKED).sum(),
    "linear_token_logprobs": lambda x: kernels.linear_token_logprobs(x, LOGITS, PICKED).sum(),
    "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(x, LOGITS, PICKED),
    "ppo_loss": lambda x: kernels.ppo_loss(x, LOGITS, LOGITS, LOGITS < 9)[0],
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_raises(name):
    """Also where the upstream gradient is a constant, and it could pass for one of zero."""
    x = LOGITS.clone().requires_grad_()
    value = DIFFERENTIABLE[name](x)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} has first derivatives only"):
        (value + first.square().sum()).backward()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad"])
def test_derivatives_of_torch_func_raise(name, transform):
    """They do not see an operator's backward: a silent zero would be the other outcome."""
    function, grad = DIFFERENTIABLE[name], torch.func.grad(DIFFERENTIABLE[name])
    with pytest.raises(NotImplementedError, match=f"{name} has no derivative under torch.func"):
        if transform == "grad":
            grad(LOGITS)
        elif transform == "jvp":
            torch.func.jvp(function, (LOGITS,), (LOGITS,))
        else:
            torch.func.vmap(grad)(LOGITS[None])
