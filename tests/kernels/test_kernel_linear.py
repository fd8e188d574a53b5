"""linear_token_logprobs, linear_cross_entropy, linear_ppo_loss: chunks, dropped rows, dtypes."""

from __future__ import annotations

import math

import float64_oracle as oracle
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
    gradient_tolerance,
    normal,
    on_cpu,
    ppo_inputs,
    random_mask,
    row_tolerance,
    within,
)

from rlhf_kernels import (
    PPOLossConfig,
    linear_cross_entropy,
    linear_ppo_loss,
    linear_token_logprobs,
    ppo_loss,
    token_logprobs,
)
from rlhf_kernels.ops import chunks

pytestmark = pytest.mark.parametrize("backend", backends_for(*ROW_PRIMITIVES))


def case(rows=11, width=6, vocabulary=23, seed=0):
    targets = torch.arange(rows) * 7 % vocabulary
    if rows > 4:
        targets[[1, 4]] = -100
    return normal(rows, width, seed=seed), normal(vocabulary, width, seed=seed + 1), targets


def expected_gradients(hidden, weight, bias, targets, tau, g, h):
    """From the loops' gradient of the logits, in float64."""
    hidden, weight = on_cpu(hidden), on_cpu(weight)
    logits = hidden @ weight.T + (0 if bias is None else on_cpu(bias))
    logprobs, entropy, of_logits = oracle.token_logprobs(
        logits, targets, tau, grad_logprobs=oracle.array(g), grad_entropy=oracle.array(h)
    )
    of_logits = on_cpu(of_logits)
    return logprobs, entropy, (of_logits @ weight, of_logits.T @ hidden, of_logits.sum(0))


def product_error(hidden, weight):
    """How far float32 products may be off: a rounding for each term, at the size of the terms."""
    sizes = (hidden.abs() @ weight.abs().T).detach()
    return hidden.shape[1] * EPS * max(sizes.flatten().tolist(), default=0.0)


def gradient_tolerances(hidden, weight, bias, targets, tau, g, h=None, relative=0.0):
    """Errors allowed in the gradients of hidden, weight and bias.

    Those of the logits' gradient, of which `relative` is due to the upstream gradients, times the
    other factor, and a rounding for each term of the products.
    """
    hidden, weight = on_cpu(hidden), on_cpu(weight)
    logits = hidden @ weight.T + (0 if bias is None else on_cpu(bias))
    numbers = [None if x is None else oracle.array(x) for x in (g, h)]
    of_logits = on_cpu(
        oracle.token_logprobs(logits, targets, tau, -100, numbers[0], numbers[1])[2]
    ).abs()
    error = gradient_tolerance(logits, targets, tau, g, h, product_error(hidden, weight))
    rounding = EPS * max(len(hidden), len(weight))
    error = error + (relative + rounding) * of_logits
    return error @ weight.abs(), error.T @ hidden.abs(), error.sum(0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 9, 100, None])
def test_agrees_with_float64(backend, chunk_size, with_bias):
    hidden, weight, targets = case()
    bias = normal(23, seed=5) if with_bias else None
    tau = 0.5 + torch.arange(11) / 10
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logprobs, entropy = linear_token_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=tau,
        return_entropy=True,
        chunk_size=chunk_size,
        backend=backend,
    )
    g, h = normal(11, seed=6), normal(11, seed=7)
    gradients = torch.autograd.grad((logprobs * g + entropy * h).sum(), leaves)
    wanted = expected_gradients(hidden, weight, bias, targets, tau, g, h)
    logits = hidden.detach() @ weight.detach().T
    # Products of width 6 add 6 roundings at the size of the logits; gradients sum 23 or 11 terms.
    atol = 3 * row_tolerance(logits, tau)
    close(logprobs, wanted[0], atol)
    close(entropy, wanted[1], atol)
    bounds = gradient_tolerances(hidden, weight, bias, targets, tau, g, h)
    for actual, right, bound in zip(gradients, wanted[2], bounds):
        within(actual, right, bound)


@given(rows=st.integers(0, 9), chunk_size=st.integers(1, 10), dropped=st.integers(0, 2**9 - 1))
def test_any_rows_dropped(backend, rows, chunk_size, dropped):
    """Dropping rows and chunking never changes the numbers: the same as from whole logits."""
    hidden, weight, targets = case(rows)
    for i in range(rows):
        targets[i] = -100 if dropped >> i & 1 else i % 23
    ours = [hidden.requires_grad_(), weight.requires_grad_()]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    a = linear_token_logprobs(*ours, targets, chunk_size=chunk_size, backend=backend)
    b = token_logprobs(theirs[0] @ theirs[1].T, targets, backend="reference")
    close(a, b, 3 * row_tolerance(hidden @ weight.T))
    g = normal(rows, seed=3)
    for x, y, bound in zip(
        torch.autograd.grad((a * g).sum(), ours),
        torch.autograd.grad((b * g).sum(), theirs),
        gradient_tolerances(hidden, weight, None, targets, 1.0, g),
    ):
        within(x, y, bound)


def test_dropped_rows_may_hold_anything(backend):
    hidden, weight, targets = case()
    dropped = targets == -100
    hidden[dropped] = math.nan
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, targets, return_entropy=True, chunk_size=4, backend=backend
    )
    assert (logprobs[dropped] == 0).all() and (entropy[dropped] == 0).all()
    gradients = torch.autograd.grad((logprobs + entropy).sum(), (hidden, weight))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][dropped] == 0).all()


def test_all_rows_dropped(backend):
    hidden, weight, targets = case()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), backend=backend)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_gradients_only_where_required(backend, needed):
    hidden, weight, targets = case()
    leaves = {"hidden": hidden, "weight": weight, "bias": normal(23, seed=5)}
    whole = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    loss = linear_cross_entropy(**whole, targets=targets, chunk_size=4, backend=backend)
    expected = torch.autograd.grad(loss, whole[needed])[0]
    leaves[needed].requires_grad_()
    loss = linear_cross_entropy(**leaves, targets=targets, chunk_size=4, backend=backend)
    loss.backward()
    assert torch.equal(leaves[needed].grad, expected)
    assert all(x.grad is None for name, x in leaves.items() if name != needed)


def test_tied_weights(backend):
    """One parameter as embedding and as output layer gets both gradients."""
    ids = torch.tensor([3, 1, 4, 1, 5, 9])
    weight = normal(10, 6, seed=1)
    ours, theirs = weight.clone().requires_grad_(), weight.double().requires_grad_()
    a = linear_cross_entropy(ours[ids[:-1]], ours, ids[1:], chunk_size=2, backend=backend)
    b = torch.nn.functional.cross_entropy(theirs[ids[:-1]] @ theirs.T, ids[1:])
    a.backward()
    b.backward()
    mean = torch.full((5,), 0.2)
    of_hidden, bound, _ = gradient_tolerances(weight[ids[:-1]], weight, None, ids[1:], 1.0, mean)
    bound.index_add_(0, ids[:-1].cpu(), of_hidden)
    # A few more roundings: the mean's divisor, and the sum of both gradients.
    within(ours.grad, theirs.grad, bound + 4 * EPS * on_cpu(theirs.grad).abs())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_is_torchs(backend, reduction):
    hidden, weight, targets = case()
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, backend=backend)
    expected = torch.nn.functional.cross_entropy(
        hidden.double() @ weight.double().T, targets, reduction=reduction
    )
    # 9 terms of the row tolerance each.
    close(loss, expected, 9 * 3 * row_tolerance(hidden @ weight.T))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_cross_entropy_of_micro_batches_adds_up(backend, as_tensor):
    hidden, weight, targets = case()
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    whole = linear_cross_entropy(hidden, ours, targets, backend=backend)
    count = (targets != -100).sum()
    parts = sum(
        linear_cross_entropy(
            hidden[s],
            theirs,
            targets[s],
            normalizer=count if as_tensor else int(count),
            backend=backend,
        )
        for s in (slice(0, 1), slice(1, 2), slice(2, 11))
    )
    whole.backward()
    parts.backward()
    atol = 3 * row_tolerance(hidden @ weight.T)
    close(parts, whole, atol)
    close(theirs.grad, ours.grad, 4 * atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(backend, dtype):
    """Products in 16 bits: as torch's own product in that dtype, followed by the row kernel."""
    hidden, weight, targets = (x.to(dtype) if x.is_floating_point() else x for x in case(40))
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    a = linear_cross_entropy(*ours, targets, reduction="sum", chunk_size=7, backend=backend)
    b = linear_cross_entropy(*theirs, targets, reduction="sum", backend="reference")
    assert a.dtype == torch.float32
    logits = (theirs[0] @ theirs[1].T).detach()
    # Logits rounded to 16 bits: half an eps of the largest, in each of 38 rows, all one way.
    eps = torch.finfo(dtype).eps
    close(a, b.detach(), 38 * eps * float(logits.abs().max()))
    for x, y in zip(torch.autograd.grad(a, ours), torch.autograd.grad(b, theirs)):
        assert x.dtype == dtype
        # That error in p, times sums of up to 38 factors; then rounding of each chunk's result.
        close(x, y, 8 * eps * float(logits.abs().max()), rtol=2 * eps)


@pytest.mark.parametrize("operation", ["cross-entropy", "ppo"])
def test_float16_gradients_keep_what_the_loss_scale_saves(backend, operation):
    """Probabilities over the number of tokens are below float16's normal numbers; scaled, not."""
    if backend == "triton" and INTERPRETED:
        pytest.skip("a thousand interpreted rows; the order of steps is above the backends")
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 1024, 8).half(), (0.1 * torch.randn(2000, 8)).half()
    targets = torch.arange(1024)[None] % 10
    old, advantages = torch.full((1, 1024), -7.6), torch.ones(1, 1024)
    mask = torch.ones(1, 1024, dtype=torch.bool)
    found = []
    for dtype, name in ((torch.float16, backend), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        if operation == "ppo":
            loss, _ = linear_ppo_loss(*leaves, targets, old, advantages, mask, backend=name)
        else:
            loss = linear_cross_entropy(*leaves, targets, backend=name)
        scale = 2.0**14
        gradients = torch.autograd.grad(loss * scale, leaves)
        found.append([on_cpu(x) / scale for x in (*gradients, gradients[1][10:])])
    for actual, exact in zip(*found):
        # Logits and each chunk's gradient in 16 bits: a few units of rounding.
        assert (actual - exact).norm() <= 4 * torch.finfo(torch.float16).eps * exact.norm()


def test_a_16_bit_weight_gradient_in_parts(backend, monkeypatch):
    """The same whether its product with a chunk is taken whole or, for memory's sake, in parts."""
    hidden, weight, targets = case(9, vocabulary=600)
    grads = []
    for budget in (2**30, 1):  # whole; 256 rows, 256 and 88
        monkeypatch.setattr(chunks, "CPU_PRODUCT_BYTES", budget)
        monkeypatch.setattr(chunks, "GPU_PRODUCT_BYTES", budget)
        leaf = weight.bfloat16().requires_grad_()
        linear_cross_entropy(hidden.bfloat16(), leaf, targets, backend=backend).backward()
        grads.append(leaf.grad)
    # Products of other shapes may add up in another order, in float32, before they are rounded.
    eps = torch.finfo(torch.bfloat16).eps
    close(grads[1], grads[0], EPS * float(hidden.abs().max()), rtol=eps)
    assert (grads[0][[0, 300, 599]] != 0).all()


def test_weight_gradient_sums_chunks_in_float32(backend):
    """With bfloat16 sums, 512 equal parts would stop growing at 256 of them."""
    if backend == "triton" and INTERPRETED:
        pytest.skip("512 chunks of interpreted kernels; the sums are above the backends")
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long)
    loss = linear_cross_entropy(
        hidden, weight, targets, reduction="sum", chunk_size=1, backend=backend
    )
    loss.backward()
    assert weight.grad.flatten().tolist() == [-256.0, 256.0]


def test_autocast(backend):
    hidden, weight, targets = case()
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    same = linear_cross_entropy(*low, targets, backend=backend)
    assert torch.equal(loss, same)
    ours = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(same, low)
    assert all(x.dtype == torch.float32 for x in ours)
    # The gradients' last rounding to bfloat16 falls away.
    for x, y in zip(ours, theirs):
        close(x, y, 1e-6, rtol=torch.finfo(torch.bfloat16).eps)
    # A mixed pair is what autocast is for; without it, it is a mistake.
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        assert torch.equal(linear_cross_entropy(low[0], weight, targets, backend=backend), loss)
    with pytest.raises(TypeError, match="weight has dtype"):
        linear_cross_entropy(low[0], weight, targets, backend=backend)


def test_layouts(backend):
    hidden, weight, targets = case()
    expected = linear_token_logprobs(hidden, weight, targets, backend=backend)
    strided = linear_token_logprobs(
        hidden.t().contiguous().t(), weight.t().contiguous().t(), targets, backend=backend
    )
    atol = 3 * row_tolerance(hidden @ weight.T)
    close(strided, expected, atol)
    batch = linear_token_logprobs(
        hidden[:10].view(2, 5, 6), weight, targets[:10].view(2, 5), backend=backend
    )
    close(batch.flatten(), expected[:10], atol)
    same = linear_token_logprobs(
        hidden[:1].expand(4, 6), weight, targets[:1].expand(4), backend=backend
    )
    close(same, expected[:1].expand(4), atol)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_ppo_loss_is_that_of_whole_logits(backend, entropy_coef):
    mask = random_mask(5, 8)
    hidden = normal(5, 8, 6, seed=1)
    weight = normal(23, 6, seed=2)
    bias = normal(23, seed=3)
    targets = torch.arange(40).view(5, 8) % 23
    config = PPOLossConfig(entropy_coef=entropy_coef, dual_clip=2.0)
    theirs = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logprobs, entropy = token_logprobs(
        theirs[0] @ theirs[1].T + theirs[2],
        targets,
        temperature=0.8,
        return_entropy=True,
        backend="reference",
    )
    old = logprobs.detach().float() + normal(5, 8, seed=4, scale=0.3)
    advantages = ppo_inputs(5, 8)["advantages"]
    expected, wanted = ppo_loss(
        logprobs,
        old,
        advantages,
        mask,
        entropy=entropy,
        config=config,
        normalizer=30.0,
        backend="reference",
    )
    # Whatever stands at masked tokens, a target outside the vocabulary among it, plays no part.
    targets = torch.where(mask, targets, 10**6)
    hidden = torch.where(mask[..., None], hidden, math.nan)
    ours = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss, stats = linear_ppo_loss(
        ours[0],
        ours[1],
        targets,
        old,
        advantages,
        mask,
        bias=ours[2],
        temperature=0.8,
        config=config,
        normalizer=30.0,
        chunk_size=6,
        backend=backend,
    )
    # How far a log-probability or an entropy may be off moves the loss by its slope, the
    # statistics by at most the largest ratio, and the slopes, which are ratios, by that part.
    error = 3 * row_tolerance((theirs[0] @ theirs[1].T).flatten(0, 1), 0.8)
    g, h = torch.autograd.grad(expected, (logprobs, entropy), retain_graph=True)
    close(loss, expected, error * float(g.abs().sum() + h.abs().sum()) + 16 * EPS)
    close(torch.stack(stats), torch.stack(wanted), error * (1 + float(wanted.ratio_max)))
    gradients = torch.autograd.grad(loss, ours)
    assert (gradients[0][~mask] == 0).all()
    rows = theirs[0].detach()[mask]
    bounds = gradient_tolerances(
        rows, weight, bias, targets[mask], 0.8, g[mask], h[mask], relative=2 * error
    )
    actual = (gradients[0][mask], *gradients[1:])
    of_hidden, *right = torch.autograd.grad(expected, theirs)
    for x, y, bound in zip(actual, (of_hidden[mask], *right), bounds):
        within(x, y, bound)


def test_whole_logits_are_never_held(backend, monkeypatch):
    """No tensor of more rows than a chunk reaches the row kernel."""
    from rlhf_kernels import backends

    module = backends.load(backend)
    seen = []
    for primitive in ROW_PRIMITIVES:
        original = getattr(module, primitive)
        position = 0 if primitive.endswith("forward") else 2

        def spy(*args, _original=original, _position=position, **kwargs):
            seen.append(args[_position].shape[0])
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, primitive, spy)
    hidden, weight, targets = case()
    weight.requires_grad_()
    linear_token_logprobs(hidden, weight, targets, chunk_size=4, backend=backend).sum().backward()
    # 11 rows, 2 dropped: chunks of 4, 4 and 1, forward and again backward.
    assert seen == [4, 4, 1, 4, 4, 1]
    seen.clear()
    linear_cross_entropy(hidden, weight, targets, chunk_size=4, backend=backend).backward()
    # Here the gradient follows in the same chunk.
    assert seen == [4, 4, 4, 4, 1, 1]


def test_float32_precision_of_a_long_vocabulary(backend):
    """A vocabulary of the demo's model, few rows: the sums over V stay exact enough."""
    hidden, weight = normal(2, 8, seed=1), normal(49152, 8, seed=2)
    targets = torch.tensor([0, 49151])
    ours = linear_token_logprobs(hidden, weight, targets, backend=backend)
    logits = hidden.double() @ weight.double().T
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    close(ours, expected, row_tolerance(logits) + 8 * EPS * float(logits.abs().max()))
