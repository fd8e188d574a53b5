"""Layers of Llama-like transformers: against float64, shapes, strides, and transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import EPS, backends_for, normal, on_cpu, within
from torch.autograd import forward_ad

from rlhf_kernels.backends import UnsupportedOperationError
from rlhf_kernels.ops.rms_norm import rms_norm
from rlhf_kernels.ops.rotary import rotary
from rlhf_kernels.ops.swiglu import swiglu, swiglu_backward

pytestmark = pytest.mark.parametrize("backend", backends_for("swiglu_forward"))

TINY = torch.finfo(torch.float32).smallest_normal
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.tuples(st.integers(0, 5), st.integers(0, 70))


def plain_swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up


def check_swiglu(gate, up, grad, backend):
    """Roundings at the size of each product: 2 of exp, at most 8 others.

    Below the smallest normal float, sigmoid is off by that much.
    """
    leaves = [x.detach().requires_grad_() for x in (gate, up)]
    hidden = swiglu(*leaves, backend=backend)
    grads = torch.autograd.grad(hidden, leaves, grad)
    exact = [on_cpu(x).requires_grad_() for x in (gate, up)]
    expected = plain_swiglu(*exact)
    expected_grads = torch.autograd.grad(expected, exact, on_cpu(grad))
    g, u, h = (on_cpu(x) for x in (gate, up, grad))
    sigmoid = g.sigmoid()
    tiny = TINY * (1 + g.abs()) * (1 + u.abs()) * (1 + h.abs())
    slope = sigmoid * (1 + g.abs() * (-g).sigmoid())
    bounds = [x.abs() * 10 * EPS + tiny for x in (u * g * sigmoid, h * u * slope, h * g * sigmoid)]
    again = swiglu_backward(gate, up, grad, backend=backend)
    for ours in ((hidden, *grads), (again[2], *again[:2])):
        for one, other, bound in zip(ours, (expected.detach(), *expected_grads), bounds):
            assert one.dtype == gate.dtype and one.is_contiguous()
            within(one, other, bound)


@DTYPES
@pytest.mark.parametrize("shape", [(3, 100), (2, 3, 67), (1,), (9000, 5), (3, 40000)])
def test_swiglu_agrees_with_float64(backend, dtype, shape):
    gate, up, grad = (normal(*shape, seed=s, scale=3.0).to(dtype) for s in range(3))
    check_swiglu(gate, up, grad, backend)


@given(shape=SHAPES)
def test_swiglu_shapes(backend, shape):
    check_swiglu(*(normal(*shape, seed=s) for s in range(3)), backend)


@DTYPES
def test_swiglu_strides(backend, dtype):
    """Halves of one product, a transposed tensor, an expanded gradient."""
    gate, up = normal(5, 2, 134, seed=1).to(dtype).chunk(2, dim=-1)
    check_swiglu(gate, up, normal(67, seed=2).to(dtype).expand(5, 2, 67), backend)
    check_swiglu(gate.transpose(0, 2), up.transpose(0, 2), gate.transpose(0, 2), backend)


def test_swiglu_over_the_whole_range(backend):
    gate = torch.cat([torch.linspace(-200, 200, 1001), torch.tensor([-1e30, 1e30, -0.0])])
    check_swiglu(gate, torch.full_like(gate, 3.0), torch.full_like(gate, -2.0), backend)


@DTYPES
def test_swiglu_lets_special_values_through(backend, dtype):
    """As in float64; vectors and their tails alike."""
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0])
    gate, up, grad = (x.flatten() for x in torch.meshgrid(special, special, special, indexing="ij"))
    ours = swiglu_backward(*(x.to(dtype) for x in (gate, up, grad)), backend=backend)
    exact = [on_cpu(x).requires_grad_() for x in (gate, up)]
    hidden = plain_swiglu(*exact)
    expected = [*torch.autograd.grad(hidden, exact, on_cpu(grad)), hidden.detach()]
    for one, other in zip(ours, expected):
        assert torch.equal(one.isnan().cpu(), other.isnan())
        assert torch.equal(on_cpu(one).isposinf(), other.isposinf())
        assert torch.equal(on_cpu(one).isneginf(), other.isneginf())


def check_float64(backend, function, *inputs):
    """Only the reference computes in it."""
    leaves = [x.double().requires_grad_() for x in inputs]
    if backend == "reference":
        assert torch.autograd.gradcheck(function, leaves)
    else:
        with pytest.raises(UnsupportedOperationError):
            function(*leaves)


def test_swiglu_in_float64(backend):
    check_float64(
        backend,
        lambda gate, up: swiglu(gate, up, backend=backend),
        *(normal(3, 5, seed=s) for s in range(2)),
    )


def test_swiglu_is_checked(backend):
    x = normal(2, 4, seed=1)
    with pytest.raises(ValueError, match="up has shape"):
        swiglu(x, x[:, :3], backend=backend)
    with pytest.raises(TypeError, match="up has dtype"):
        swiglu(x, x.bfloat16(), backend=backend)
    with pytest.raises(TypeError, match="gate has dtype"):
        swiglu(x.int(), x.int(), backend=backend)
    with pytest.raises(ValueError, match="gate has shape"):
        swiglu(x[0, 0], x[0, 0], backend=backend)


def test_swiglu_is_that_of_transformers(backend):
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    layer = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=50, num_attention_heads=4))
    x = normal(3, 7, 24, seed=1).cpu()
    hidden = swiglu(layer.gate_proj(x), layer.up_proj(x), backend=backend)
    torch.testing.assert_close(layer.down_proj(hidden), layer(x))


def check_compiled(function, *inputs):
    """Without graph breaks, with the same bits, and with gradients."""
    torch.compiler.reset()
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = run(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_swiglu_operators(backend):
    gate, up, grad = (normal(3, 5, seed=s) for s in range(3))
    operators = torch.ops.rlhf_kernels
    leaves = [x.clone().requires_grad_() for x in (gate, up)]
    torch.library.opcheck(operators.swiglu.default, (*leaves, backend))
    for need_hidden in (False, True):
        arguments = (gate, up, grad, need_hidden, backend)
        torch.library.opcheck(operators.swiglu_backward.default, arguments)
    check_compiled(lambda g, u: swiglu(g, u, backend=backend), gate, up)


def check_threads(backend, compute):
    """The kernel gives the same bits for any number of threads; PyTorch need not."""
    if backend != "cpu":
        pytest.skip("has no threads of its own")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    for several in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], several))


def test_swiglu_for_any_number_of_threads(backend):
    gate, up, grad = (normal(300, 333, seed=s) for s in range(3))
    check_threads(backend, lambda: swiglu_backward(gate, up, grad, backend=backend))


def plain_rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def check_rms_norm(x, weight, grad, backend, eps=1e-5):
    """A sum of N terms rounds like sqrt(N), and a few more roundings come at the size of each term.

    The mean in the gradient of x may be off by a share of its terms' magnitudes, and the gradient
    of the weight is a sum over the rows.
    """
    leaves = [v.detach().requires_grad_() for v in (x, weight)]
    out = rms_norm(*leaves, eps, backend=backend)
    grads = torch.autograd.grad(out, leaves, grad)
    exact = [on_cpu(v).requires_grad_() for v in (x, weight)]
    expected = plain_rms_norm(*exact, eps)
    expected_grads = torch.autograd.grad(expected, exact, on_cpu(grad))
    wide, w, g = (on_cpu(v) for v in (x, weight, grad))
    columns = x.shape[-1]
    error = EPS * (math.sqrt(columns) + 12)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    z = (wide * rstd).abs()
    mean = (w * g * z).abs().mean(-1, keepdim=True)
    by_rows = (g * z).abs().reshape(-1, columns)
    bounds = [
        error * z * w.abs() + TINY,
        error * rstd * ((w * g).abs() + z * mean) + TINY,
        (error + EPS * math.sqrt(by_rows.shape[0])) * by_rows.sum(0) + TINY,
    ]
    assert out.dtype == grads[0].dtype == x.dtype and grads[1].dtype == weight.dtype
    assert out.is_contiguous() and grads[0].is_contiguous()
    for ours, theirs, bound in zip((out, *grads), (expected.detach(), *expected_grads), bounds):
        within(ours, theirs, bound)


@DTYPES
@pytest.mark.parametrize("shape", [(3, 100), (2, 3, 67), (1,), (5000, 5), (33, 5000)])
def test_rms_norm_agrees_with_float64(backend, dtype, shape):
    x, grad = (normal(*shape, seed=s, scale=3.0).to(dtype) for s in range(2))
    check_rms_norm(x, normal(shape[-1], seed=2).to(dtype), grad, backend)


@given(shape=st.tuples(st.integers(0, 5), st.integers(1, 70)))
def test_rms_norm_shapes(backend, shape):
    x, grad = (normal(*shape, seed=s) for s in range(2))
    check_rms_norm(x, normal(shape[-1], seed=2), grad, backend)


@DTYPES
def test_rms_norm_strides(backend, dtype):
    """Some of the columns, a transposed tensor, an expanded gradient, weights of another type."""
    x = normal(5, 2, 134, seed=1).to(dtype)[..., 3:70]
    grad = normal(67, seed=2).to(dtype).expand(5, 2, 67)
    check_rms_norm(x, normal(67, seed=3), grad, backend)
    check_rms_norm(
        x.transpose(0, 2), normal(10, seed=3)[::2].bfloat16(), x.transpose(0, 2), backend
    )


def test_rms_norm_of_zeros_and_large_numbers(backend):
    x = torch.stack([torch.zeros(40), torch.full((40,), 1e18), torch.full((40,), 1e-15)])
    check_rms_norm(x, torch.ones(40), torch.ones(3, 40), backend)


def test_rms_norm_without_columns(backend):
    x, weight = torch.zeros(3, 0).requires_grad_(), torch.zeros(0).requires_grad_()
    rms_norm(x, weight, backend=backend).sum().backward()
    assert x.grad.shape == (3, 0) and weight.grad.shape == (0,)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_rms_norm_lets_special_values_through(backend, special):
    """Each reaches its row and the weight's gradient, and no other row."""
    x = normal(3, 37, seed=1)
    x[1, 36] = special
    x.requires_grad_()
    weight = normal(37, seed=2).requires_grad_()
    exact = [on_cpu(v).requires_grad_() for v in (x, weight)]
    ours, theirs = rms_norm(x, weight, backend=backend), plain_rms_norm(*exact, 1e-6)
    results = [ours, *torch.autograd.grad(ours.sum(), (x, weight))]
    expected = [theirs, *torch.autograd.grad(theirs.sum(), exact)]
    for one, other in zip(results, expected):
        assert torch.equal(one.isnan().cpu(), other.isnan())


def test_rms_norm_in_float64(backend):
    check_float64(
        backend,
        lambda x, weight: rms_norm(x, weight, backend=backend),
        normal(3, 5, seed=1),
        normal(5, seed=2),
    )


def test_rms_norm_with_a_frozen_weight_or_input(backend):
    x, weight = normal(70, 9, seed=1), normal(9, seed=2)
    leaves = [v.clone().requires_grad_() for v in (x, weight)]
    both = torch.autograd.grad(rms_norm(*leaves, backend=backend).square().sum(), leaves)
    of_x = rms_norm(leaves[0], weight, backend=backend).square().sum()
    assert torch.equal(torch.autograd.grad(of_x, leaves[0])[0], both[0])
    of_weight = rms_norm(x, leaves[1], backend=backend).square().sum()
    assert torch.equal(torch.autograd.grad(of_weight, leaves[1])[0], both[1])


def test_rms_norm_is_checked(backend):
    x = normal(2, 4, seed=1)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x, x[0, :3], backend=backend)
    with pytest.raises(TypeError, match="x has dtype"):
        rms_norm(x.int(), x[0], backend=backend)
    with pytest.raises(ValueError, match="x has shape"):
        rms_norm(x[0, 0], x[0], backend=backend)
    for eps in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps is"):
            rms_norm(x, x[0], eps, backend=backend)


def test_rms_norm_is_that_of_transformers(backend):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layer = LlamaRMSNorm(50, eps=1e-5)
    torch.nn.init.normal_(layer.weight)
    x = normal(3, 7, 50, seed=1).cpu()
    ours = rms_norm(x, layer.weight, layer.variance_epsilon, backend=backend)
    torch.testing.assert_close(ours, layer(x))


def test_rms_norm_operators(backend):
    x, weight, grad = normal(2, 3, 5, seed=1), normal(5, seed=2), normal(2, 3, 5, seed=3)
    operators = torch.ops.rlhf_kernels
    leaves = [v.clone().requires_grad_() for v in (x, weight)]
    torch.library.opcheck(operators.rms_norm.default, (*leaves, 1e-6, backend))
    rstd = torch.rsqrt(x.square().mean(-1).flatten() + 1e-6)
    for need_weight in (False, True):
        arguments = (grad, x, weight, rstd, need_weight, backend)
        torch.library.opcheck(operators.rms_norm_backward.default, arguments)
    check_compiled(lambda x, w: rms_norm(x, w, 1e-6, backend=backend), x, weight)


def test_rms_norm_for_any_number_of_threads(backend):
    x, weight = normal(500, 333, seed=1).requires_grad_(), normal(333, seed=2).requires_grad_()

    def compute():
        out = rms_norm(x, weight, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), (x, weight))]

    check_threads(backend, compute)


def plain_rotary(x, cos, sin):
    lower, upper = x.chunk(2, dim=-1)
    turned = torch.cat([-upper, lower], dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def check_rotary(x, cos, sin, grad, backend):
    """Two products and their sum round once each."""
    leaf = x.detach().requires_grad_()
    out = rotary(leaf, cos, sin, backend=backend)
    (grad_x,) = torch.autograd.grad(out, leaf, grad)
    exact = on_cpu(x).requires_grad_()
    cos, sin = on_cpu(cos), on_cpu(sin)
    expected = plain_rotary(exact, cos, sin)
    (expected_grad,) = torch.autograd.grad(expected, exact, on_cpu(grad))
    by_steps = x.stride(1) < x.stride(2)
    for result in (out, grad_x):
        assert result.dtype == x.dtype
        assert (result.transpose(1, 2) if by_steps else result).is_contiguous()
    half = x.shape[-1] // 2
    wide, wide_grad, cos, sin = (v.abs() for v in (on_cpu(x), on_cpu(grad), cos, sin))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    terms = wide * cos + wide.roll(half, -1) * sin
    within(out, expected.detach(), 2 * EPS * terms + TINY)
    terms = wide_grad * cos + (wide_grad * sin).roll(half, -1)
    within(grad_x, expected_grad, 2 * EPS * terms + TINY)


def heads(batch, steps, number, width, seed):
    """A transposed view, as layers have it."""
    return normal(batch, steps, number, width, seed=seed).transpose(1, 2)


@DTYPES
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "batch, steps, number, width", [(2, 70, 9, 64), (3, 5, 2, 46), (1, 1, 1, 2)]
)
def test_rotary_agrees_with_float64(backend, dtype, table, batch, steps, number, width):
    x, grad = (heads(batch, steps, number, width, s).to(dtype) for s in range(2))
    for tables in (1, batch):
        cos, sin = (normal(tables, steps, width, seed=s).to(table) for s in (2, 3))
        check_rotary(x, cos, sin, grad, backend)


@given(shape=st.tuples(*[st.integers(0, 3)] * 3, st.integers(0, 40)), shared=st.booleans())
def test_rotary_shapes(backend, shape, shared):
    batch, steps, number, half = shape
    x, grad = (heads(batch, steps, number, 2 * half, s) for s in range(2))
    tables = 1 if shared else batch
    cos, sin = (normal(tables, steps, 2 * half, seed=s) for s in (2, 3))
    check_rotary(x, cos, sin, grad, backend)


def test_rotary_strides(backend):
    """A part of one product, heads without gaps, gaps everywhere, what is expanded."""
    cos, sin = (normal(1, 6, 34, seed=s) for s in (2, 3))
    queries = normal(2, 5, 3, 3 * 34, seed=1)[..., 34:68].transpose(1, 2)[..., :5, :]
    grad = normal(34, seed=4).expand(2, 3, 5, 34)
    check_rotary(queries, cos[:, 1:], sin[:, :5], grad, backend)
    check_rotary(queries.contiguous(), cos[:, 1:], sin[:, 1:], grad, backend)
    gaps = normal(4, 6, 68, 10, seed=1).transpose(2, 3)[::2, ::2, ::2, ::2]
    check_rotary(gaps, cos[:, :5], sin[:, :5].expand(1, 5, 34), gaps, backend)
    check_rotary(gaps, cos[:, :1].expand(2, 5, 34), sin[:, :5].expand(2, 5, 34), gaps, backend)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_rotary_lets_special_values_through(backend, special):
    x = heads(1, 2, 3, 38, seed=1)
    x[0, 1, 1, 37] = special
    x.requires_grad_()
    cos, sin = (normal(1, 2, 38, seed=s) for s in (2, 3))
    ours = on_cpu(rotary(x, cos, sin, backend=backend))
    expected = plain_rotary(*(on_cpu(v) for v in (x, cos, sin)))
    assert torch.equal(ours.isfinite(), expected.isfinite())
    assert torch.equal(ours.isnan(), expected.isnan())


def test_rotary_in_float64(backend):
    cos, sin = (normal(1, 3, 6, seed=s).double() for s in (2, 3))
    x = heads(2, 3, 2, 6, seed=1)
    check_float64(backend, lambda x: rotary(x, cos, sin, backend=backend), x)


def test_rotary_is_checked(backend):
    x, cos = normal(2, 3, 4, 6, seed=1), normal(1, 4, 6, seed=2)
    with pytest.raises(ValueError, match="x has shape"):
        rotary(x[0], cos, cos, backend=backend)
    with pytest.raises(ValueError, match="expected an even last dimension"):
        rotary(x[..., :5], cos[..., :5], cos[..., :5], backend=backend)
    with pytest.raises(ValueError, match="cos has shape"):
        rotary(x, cos[:, :3], cos, backend=backend)
    with pytest.raises(ValueError, match="sin has shape"):
        rotary(x, cos, cos[:, :3], backend=backend)
    with pytest.raises(TypeError, match="x has dtype"):
        rotary(x.int(), cos, cos, backend=backend)


def test_rotary_is_that_of_transformers(backend):
    from transformers.models.llama.modeling_llama import (
        LlamaConfig,
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    embedding = LlamaRotaryEmbedding(LlamaConfig(hidden_size=96, num_attention_heads=4))
    queries, keys = (heads(2, 7, number, 24, seed=1).cpu() for number in (4, 2))
    cos, sin = embedding(queries, torch.arange(7)[None])
    ours = [rotary(x, cos, sin, backend=backend) for x in (queries, keys)]
    for one, other in zip(ours, apply_rotary_pos_emb(queries, keys, cos, sin)):
        torch.testing.assert_close(one, other)


def test_rotary_operators(backend):
    x = heads(2, 3, 4, 6, seed=1)
    cos, sin = (normal(1, 3, 6, seed=s) for s in (2, 3))
    operator = torch.ops.rlhf_kernels.rotary.default
    for adjoint in (False, True):
        for by_steps in (False, True):
            leaf = x.clone().requires_grad_()
            torch.library.opcheck(operator, (leaf, cos, sin, adjoint, by_steps, backend))
    check_compiled(lambda x: rotary(x, cos, sin, backend=backend), x)


def test_rotary_for_any_number_of_threads(backend):
    x = heads(4, 50, 9, 64, seed=1).requires_grad_()
    cos, sin = (normal(1, 50, 64, seed=s) for s in (2, 3))

    def compute():
        out = rotary(x, cos, sin, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), x)]

    check_threads(backend, compute)


@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_is_refused_not_ignored(backend: str, gradients: bool) -> None:
    """PyTorch's error, also where the operator is called without its autograd function."""
    x, tangent = normal(2, 8, seed=1), normal(2, 8, seed=2)
    with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
        dual = forward_ad.make_dual(x, tangent)
        with pytest.raises(NotImplementedError, match="jvp"):
            rms_norm(dual, torch.ones(8), backend=backend)
