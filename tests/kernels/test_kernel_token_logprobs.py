"""token_logprobs against float64 loops: values, entropies, gradients, and the awkward rows."""

from __future__ import annotations

import math

import float64_oracle as oracle
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    EPS,
    INTERPRETED,
    ROW_PRIMITIVES,
    backends_for,
    close,
    device_of,
    gradient_tolerance,
    here,
    normal,
    on_cpu,
    row_tolerance,
    within,
)

from rlhf_kernels import backends, token_logprobs

BACKENDS = backends_for(*ROW_PRIMITIVES)
pytestmark = pytest.mark.parametrize("backend", BACKENDS)

# Around the widths of vector registers (4, 8, 16) and twice them with their tails; 1000 runs
# unrolled loops more than once, and 5003 (prime) is longer than any block a kernel keeps.
VOCABULARIES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 1000, 5003]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(rows: int, vocabulary: int, dtype: torch.dtype, seed: int = 0):
    logits = normal(rows, vocabulary, seed=seed, scale=3.0).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    targets = here(torch.randint(0, vocabulary, (rows,), generator=generator, device="cpu"))
    if rows > 2:
        targets[1] = -100
    return logits, targets


def check(logits, targets, temperature, backend, need_entropy=True):
    """Values and gradients of one call, with uneven upstream gradients for both outputs."""
    logits = logits.detach().requires_grad_()
    rows = logits.shape[0]
    g, h = normal(rows, seed=7), normal(rows, seed=8)
    result = token_logprobs(
        logits, targets, temperature=temperature, return_entropy=need_entropy, backend=backend
    )
    logprobs, entropy = result if need_entropy else (result, None)
    assert logprobs.dtype == torch.float32 and logprobs.shape == targets.shape
    expected = oracle.token_logprobs(
        logits,
        targets,
        temperature,
        grad_logprobs=oracle.array(g),
        grad_entropy=oracle.array(h) if need_entropy else None,
    )
    atol = row_tolerance(logits, temperature)
    close(logprobs, expected[0], atol)
    total = (logprobs * g).sum()
    if entropy is not None:
        close(entropy, expected[1], atol)
        total = total + (entropy * h).sum()
    (grad,) = torch.autograd.grad(total, logits)
    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    bound = gradient_tolerance(logits, targets, temperature, g, h if need_entropy else None)
    within(grad, expected[2], bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_agrees_with_float64(backend, dtype, vocabulary):
    check(*case(4, vocabulary, dtype), 1.0, backend)


@pytest.mark.parametrize("need_entropy", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1, 2.5, "per row"])
def test_temperature(backend, temperature, need_entropy):
    logits, targets = case(5, 37, torch.float32)
    tau = torch.tensor([0.5, 1.0, 0.7, 3.0, 1.5]) if temperature == "per row" else temperature
    check(logits, targets, tau, backend, need_entropy)


@given(
    rows=st.integers(0, 5),
    vocabulary=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 100),
)
def test_any_shape(backend, rows, vocabulary, dtype, temperature, seed):
    if rows == 0:
        logits = torch.zeros(0, vocabulary, dtype=dtype, requires_grad=True)
        out, entropy = token_logprobs(
            logits, torch.zeros(0, dtype=torch.long), return_entropy=True, backend=backend
        )
        assert out.shape == entropy.shape == (0,)
        (grad,) = torch.autograd.grad(out.sum() + entropy.sum(), logits)
        assert grad.shape == (0, vocabulary)
    else:
        check(*case(rows, vocabulary, dtype, seed), temperature, backend)


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e5])
def test_extreme_logits(backend, offset):
    logits, targets = case(3, 40, torch.float32)
    check(logits + offset, targets, 1.0, backend)
    logits = torch.zeros(2, 5)
    logits[:, 2] = offset
    check(logits, torch.tensor([2, 4]), 1.0, backend)


def test_the_ends_of_the_range(backend):
    """Differences beyond the largest float, within a block and from one to the next."""
    logits = torch.full((1, 5003), -3e38)
    logits[0, 4000] = 3e38
    for target, tau in ((4000, 1.0), (4000, 0.5)):
        pair = token_logprobs(
            logits, torch.tensor([target]), temperature=tau, return_entropy=True, backend=backend
        )
        assert pair[0] == 0 and pair[1] == 0
    # All as low as can be, which z/tau would take to minus infinity.
    leaves = [torch.full((1, 40), low) for low in (torch.finfo(torch.float32).min, 0.0)]
    results = []
    for leaf in leaves:
        pair = token_logprobs(
            leaf.requires_grad_(),
            torch.tensor([3]),
            temperature=0.5,
            return_entropy=True,
            backend=backend,
        )
        results.append((*pair, torch.autograd.grad(pair[0] + pair[1], leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_per_row_temperatures_keep_float64(backend):
    if backend != "reference":
        pytest.skip("float64 is the reference backend's")
    logits, targets = case(4, 9, torch.float32)
    tau = torch.full((4,), 0.1, dtype=torch.float64)
    per_row = token_logprobs(logits.double(), targets, temperature=tau, backend=backend)
    number = token_logprobs(logits.double(), targets, temperature=0.1, backend=backend)
    assert torch.equal(per_row, number)


def test_minus_infinity_masks_columns(backend):
    logits, targets = case(4, 33, torch.float32)
    allowed = torch.arange(33) % 3 == 0
    targets = torch.where(targets == -100, -100, targets // 3 * 3)
    masked = torch.where(allowed, logits, -math.inf).requires_grad_()
    logprobs, entropy = token_logprobs(masked, targets, return_entropy=True, backend=backend)
    columns = torch.where(targets == -100, -100, targets // 3)
    expected = oracle.token_logprobs(logits[:, allowed], columns)
    close(logprobs, expected[0], row_tolerance(logits))
    close(entropy, expected[1], row_tolerance(logits))
    (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), masked)
    assert grad.isfinite().all() and (grad[:, ~allowed] == 0).all()


def test_a_row_of_minus_infinity_is_nan_alone(backend):
    logits, targets = case(5, 20, torch.float32)
    expected = token_logprobs(logits, targets, return_entropy=True, backend=backend)
    logits[3] = -math.inf
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, targets, return_entropy=True, backend=backend)
    (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    others = torch.arange(5) != 3
    assert logprobs[3].isnan() and entropy[3].isnan() and grad[3].isnan().all()
    assert torch.equal(logprobs[others], expected[0][others])
    assert torch.equal(entropy[others], expected[1][others])
    assert grad[others].isfinite().all()


def test_nan_logits_are_not_hidden(backend):
    logits, targets = case(4, 20, torch.float32)
    logits[2, 5] = math.nan
    logprobs, entropy = token_logprobs(logits, targets, return_entropy=True, backend=backend)
    assert logprobs[2].isnan() and entropy[2].isnan()
    assert logprobs[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [-math.inf, -40.0, 0.0])
@pytest.mark.parametrize("step", [0.5, 4.0, 40.0, 8000.0])
def test_the_maximum_grows_along_the_row(backend, first, step, dtype):
    """From one block of a kernel to the next, by little or by more than e^x can hold."""
    logits = normal(2, 5003, seed=5)
    logits[:, :2100] += first
    for column in (2200, 4100, 4999):
        logits[:, column:] += step
    logits[1, -1] = logits[1, 300] = math.nan if first == 0 else -math.inf
    targets = torch.tensor([2300, 5001])
    check(logits[:1].to(dtype), targets[:1], 1.0, backend)
    logprobs = token_logprobs(logits.to(dtype), targets, backend=backend)
    assert logprobs[1].isnan() == (first == 0)


@pytest.mark.parametrize("place", [100, 3000, 12000])
def test_a_confident_row_is_no_worse_than_pytorch(backend, place):
    """The maximum's own term is exactly 1, wherever it stands; the rest is the others' sum."""
    if backend == "triton" and INTERPRETED:
        pytest.skip("a hundred rows of many blocks; it refers to each block's maximum")
    logits = torch.full((100, 12500), -100.0)
    logits[:, 0] = 0.0
    logits[:, place] = 3 + 0.02 * torch.arange(100)
    targets = torch.full((100,), place)
    result = token_logprobs(logits, targets, return_entropy=True, backend=backend)
    z = on_cpu(logits).log_softmax(-1)
    expected = z[:, place], -(z.exp() * z).sum(-1)
    eager = on_cpu(logits.log_softmax(-1)[:, place])
    # One unit of the result's own size.
    unit = EPS * expected[0].abs().max()
    assert (on_cpu(result[0]) - expected[0]).abs().max() <= unit + (eager - expected[0]).abs().max()
    close(result[1], expected[1], 8 * EPS * float(expected[1].max()))


@pytest.mark.parametrize("number", [0.0, -1.0, 1e-50, 1e39, math.inf, math.nan])
def test_temperatures_that_float32_cannot_hold(backend, number):
    with pytest.raises(ValueError, match="temperature is"):
        token_logprobs(torch.zeros(1, 3), torch.tensor([0]), temperature=number, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_upstream_stays_nan(backend, dtype):
    """Also one whose lower bits are set, which rounding to 16 bits would carry into the sign."""
    logits, targets = case(4, 70, dtype)
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    for output in (0, 1):
        leaf = logits.detach().requires_grad_()
        pair = token_logprobs(leaf, targets.abs() % 70, return_entropy=True, backend=backend)
        (grad,) = torch.autograd.grad(pair[output], leaf, nan.view(torch.float32))
        assert grad.isnan().all()


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_rows_give_zero_whatever_they_hold(backend, ignore_index):
    logits, _ = case(6, 17, torch.float32)
    targets = torch.tensor([1, ignore_index, 16, ignore_index, ignore_index, 0])
    dropped = targets == ignore_index
    logits[1], logits[3], logits[4] = math.nan, math.inf, -math.inf
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(
        logits, targets, return_entropy=True, ignore_index=ignore_index, backend=backend
    )
    upstream = torch.where(dropped, math.nan, 1.0)
    (grad,) = torch.autograd.grad((logprobs, entropy), logits, (upstream, upstream))
    assert (logprobs[dropped] == 0).all() and (entropy[dropped] == 0).all()
    assert (grad[dropped] == 0).all() and grad[~dropped].isfinite().all()
    assert (logprobs[~dropped] < 0).all() and (grad[~dropped] != 0).any()


@pytest.mark.parametrize("layout", ["columns", "rows", "expanded", "transposed", "batch"])
def test_layouts(backend, layout):
    """The same numbers through strides give the same results, and gradients in their places."""
    base = normal(6, 12, 40, seed=3)
    view = {
        "columns": lambda x: x[0, :6, 5:30],
        "rows": lambda x: x[0, ::2],
        "expanded": lambda x: x[0, :1].expand(6, 40),
        "transposed": lambda x: x[0].t(),
        "batch": lambda x: x[:, 1:4, 3:20],
    }[layout]
    through = base.clone().requires_grad_()
    plain = base.clone().requires_grad_()
    shape = view(base).shape
    targets = torch.arange(math.prod(shape[:-1])).reshape(shape[:-1]) % shape[-1]
    a = token_logprobs(view(through), targets, backend=backend)
    b = token_logprobs(view(plain).contiguous(), targets, backend=backend)
    weights = normal(*targets.shape, seed=4)
    (of_view,) = torch.autograd.grad((a * weights).sum(), through)
    (of_copy,) = torch.autograd.grad((b * weights).sum(), plain)
    if backend == "triton":  # sums up what stands between 16-byte boundaries first
        atol = 2 * row_tolerance(base)
        close(a, b, atol)
        # Of probabilities, relative to them; up to 6 rows share an element.
        close(of_view, of_copy, atol * 6 * float(weights.abs().max()))
    else:
        assert torch.equal(a, b) and torch.equal(of_view, of_copy)


@pytest.mark.parametrize("layout", ["whole", "slice", "expanded"])
def test_rows_with_gaps_are_not_copied(backend, layout, monkeypatch):
    """The kernel reads the caller's memory: a copy of logits is what users run out of memory by."""
    logits = normal(4, 6, 40, seed=3)
    view = {
        "whole": lambda x: x,
        "slice": lambda x: x[:, :-1],  # what predicts the next token
        "expanded": lambda x: x[:1].expand(4, 6, 40)[:, 1:4],
    }[layout](logits)
    module = backends.load(backend)
    addresses = []
    original = module.token_logprobs_forward

    def spy(rows, *arguments):
        addresses.append(rows.data_ptr())
        return original(rows, *arguments)

    monkeypatch.setattr(module, "token_logprobs_forward", spy)
    targets = torch.arange(math.prod(view.shape[:2])).reshape(view.shape[:2])
    logprobs = token_logprobs(view, targets, temperature=targets / 9 + 0.5, backend=backend)
    rows = view[:1] if layout == "whole" else view
    assert addresses == [part.data_ptr() for part in rows]
    expected = (view / (targets[..., None] / 9 + 0.5)).double().log_softmax(-1)
    close(logprobs, expected.gather(2, targets[..., None])[..., 0], row_tolerance(view, 0.5))


def test_a_target_out_of_range_is_named_by_its_row_among_all(backend):
    if device_of(backend) != "cpu":
        pytest.skip("a GPU does not look")
    targets = torch.zeros(4, 5, dtype=torch.long)
    targets[2, 3] = 40
    with pytest.raises(ValueError, match="40 at flat row 13"):
        token_logprobs(normal(4, 6, 40, seed=3)[:, :-1], targets, backend=backend)


def test_leading_dimensions(backend):
    logits, targets = case(6, 11, torch.float32)
    flat = token_logprobs(logits, targets, backend=backend)
    shaped = token_logprobs(logits.view(2, 3, 11), targets.view(2, 3), backend=backend)
    assert torch.equal(flat.view(2, 3), shaped)
    assert torch.equal(flat[0], token_logprobs(logits[0], targets[0], backend=backend))


def test_integer_targets_of_any_width(backend):
    logits, targets = case(4, 11, torch.float32)
    expected = token_logprobs(logits, targets, backend=backend)
    assert torch.equal(expected, token_logprobs(logits, targets.int(), backend=backend))


@pytest.mark.parametrize("bad", [-1, 11, 2**40])
def test_target_out_of_range(backend, bad):
    if device_of(backend) != "cpu":
        pytest.skip("looking at the targets would make the host wait for the GPU")
    logits, targets = case(4, 11, torch.float32)
    targets[2] = bad
    with pytest.raises(ValueError, match=rf"{bad}.*row 2"):
        token_logprobs(logits, targets, backend=backend)


def test_only_one_output_is_used(backend):
    """The gradient of one output alone, whichever it is."""
    logits, targets = case(4, 13, torch.float32)
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, targets, return_entropy=True, backend=backend)
    one, zero = np.ones(4), np.zeros(4)
    for output, (g, h) in ((logprobs, (one, zero)), (entropy, (zero, one))):
        (grad,) = torch.autograd.grad(output.sum(), logits, retain_graph=True)
        expected = oracle.token_logprobs(logits, targets, grad_logprobs=g, grad_entropy=h)[2]
        within(grad, expected, gradient_tolerance(logits, targets, 1.0, g, h))


def test_second_derivative_raises(backend):
    logits, targets = case(3, 7, torch.float32)
    logits.requires_grad_()
    total = token_logprobs(logits, targets, backend=backend).sum()
    (grad,) = torch.autograd.grad(total, logits, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


def test_rows_do_not_depend_on_their_batch(backend):
    logits, targets = case(9, 300, torch.float32)
    whole = token_logprobs(logits, targets, return_entropy=True, backend=backend)
    for i in range(9):
        alone = token_logprobs(
            logits[i : i + 1], targets[i : i + 1], return_entropy=True, backend=backend
        )
        for part, all_rows in zip(alone, whole):
            close(part, all_rows[i : i + 1], row_tolerance(logits))


@pytest.mark.parametrize("rows, vocabulary", [(132, 65536), (132 * 4096, 16)])
def test_a_gradient_on_new_pages(backend, rows, vocabulary):
    """33 MiB, which a kernel may have the system provide ahead of writing; wide or narrow rows."""
    if backend == "triton" and INTERPRETED:
        pytest.skip("half a million interpreted programs, and no pages of their own")
    logits = normal(rows, vocabulary, seed=1).requires_grad_()
    targets = torch.arange(rows) % vocabulary
    logprobs = token_logprobs(logits, targets, backend=backend)
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    expected = -logits.detach().double().softmax(-1)
    expected[torch.arange(rows), targets] += 1
    within(grad, expected, gradient_tolerance(logits, targets, 1.0, torch.ones(rows)))


def test_more_than_2_to_the_31_elements(backend):
    """Every row is ignored but the last: 4.3 GB of addresses, whose memory is never touched."""
    if backend == "reference":
        pytest.skip("the reference backend reads ignored rows")
    if backend == "triton" and INTERPRETED:
        pytest.skip("65539 interpreted programs; test_triton_rows.py reaches as far with two rows")
    logits = torch.empty(65539, 32768, dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    logits[-1] = 0
    logits[-1, 32767] = 5
    targets = torch.full((65539,), -100)
    targets[-1] = 32767
    logprobs, entropy = token_logprobs(logits, targets, return_entropy=True, backend=backend)
    alone = token_logprobs(logits[-1:], targets[-1:], return_entropy=True, backend="reference")
    atol = row_tolerance(logits[-1:])
    close(logprobs[-1:], alone[0], atol)
    close(entropy[-1:], alone[1], atol)
    assert logprobs[-1] < -1 and (logprobs[:-1] == 0).all() and (entropy[:-1] == 0).all()


def test_the_operator_takes_any_strides(backend):
    """Below the function, which makes columns contiguous, is an operator that anyone can call."""
    logits, targets = normal(9, 5, seed=1), torch.tensor([0, 8, 3, -100, 5])
    operator = torch.ops.rlhf_kernels.token_logprobs
    backward = torch.ops.rlhf_kernels.token_logprobs_backward
    g = normal(5, seed=2)
    results: list[tuple[torch.Tensor, ...]] = []
    for rows in (logits.t()[None], logits.t()[None].contiguous()):
        out = operator(rows, targets, 1.0, None, -100, True, backend)
        tail = (g, targets, 1.0, None, -100, out[2], out[1], backend)
        results.append((*out, backward(rows, g, *tail)))
    for a, b in zip(*results):
        # PyTorch's sums may take another order; the results are of order 1.
        close(a, b, 4 * row_tolerance(logits))
