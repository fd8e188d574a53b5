"""token_logprobs over sizes, dtypes, contents and layouts, against float64 and PyTorch's own.

The loops of float64_oracle.py would take minutes at these sizes, so float64 here is PyTorch's, and
the gradients have finite differences as their second witness.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    INTERPRETED,
    ROW_PRIMITIVES,
    backends_for,
    device_of,
    gradient_tolerance,
    normal,
    on_cpu,
    row_tolerance,
    within,
)
from torch import Tensor

from rlhf_kernels import backends, token_logprobs

BACKENDS = backends_for(*ROW_PRIMITIVES)
# The edges of a block of 512, one past a block of 4096, and a real model's vocabulary.
VOCABULARIES = [1, 2, 511, 512, 513, 4097, 151936]
ROWS = [0, 1, 3, 257]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONTENTS = ["random", "extreme", "masked", "equal"]
LAYOUTS = ["rows", "gaps", "expanded"]


def worthwhile(backend: str, vocabulary: int, rows: int, dtype: torch.dtype, content: str) -> bool:
    """Whether a combination shows what no other does, for the time that it takes."""
    first = dtype == torch.bfloat16 and content == "random"
    if rows == 0:
        return content == "random"
    if rows == 257 and vocabulary == 151936:
        # 39 million elements, each several times in float64: once, and never interpreted.
        return first and not (backend == "triton" and INTERPRETED)
    if backend == "triton" and INTERPRETED:
        # A row takes an interpreted program forward, and a block of it one backward, of
        # milliseconds each; 257 rows are 257 times the same, and so are 38 blocks of 151936.
        if rows == 257:
            return first and vocabulary == 513
        if vocabulary == 151936:
            return rows == 1 or first
    return True


def cases() -> Iterator[object]:
    for backend in BACKENDS:
        for vocabulary in VOCABULARIES:
            for rows in ROWS:
                for dtype in DTYPES:
                    for content in CONTENTS:
                        if worthwhile(backend, vocabulary, rows, dtype, content):
                            yield backend, vocabulary, rows, dtype, content


def make(vocabulary: int, rows: int, dtype: torch.dtype, content: str) -> tuple[Tensor, ...]:
    """Logits in one of the layouts, targets (a row ignored), temperatures of the rows."""
    seed = vocabulary + 7 * rows + CONTENTS.index(content)
    layout = LAYOUTS[(VOCABULARIES.index(vocabulary) + CONTENTS.index(content)) % len(LAYOUTS)]
    logits = normal(1 if layout == "expanded" else rows, vocabulary, seed=seed, scale=3.0)
    if content == "extreme":
        logits = logits + 1e4 * logits.sign()
    elif content == "masked":
        logits[:, 1::2] = -math.inf
    elif content == "equal":
        logits = torch.full_like(logits, 2.5)
    logits = logits.to(dtype)
    if layout == "gaps":
        memory = torch.zeros(2 * rows, vocabulary + 3, dtype=dtype)
        memory[::2, 3:] = logits
        logits = memory[::2, 3:]
    targets = torch.arange(rows) * 9998 % vocabulary // 2 * 2  # not a masked column
    if content != "masked":
        targets[:1] = vocabulary - 1
    if rows > 2:
        targets[1] = -100
    return logits.expand(rows, vocabulary), targets, 0.5 + torch.arange(rows) % 5 / 2


def expected_values(z: Tensor, targets: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """log-probabilities and entropies in the precision of z, as one would write them."""
    logp = (z / tau[:, None].to(z.dtype)).log_softmax(-1)
    ignored = targets == -100
    picked = logp.gather(1, torch.where(ignored, 0, targets)[:, None]).squeeze(1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(-1)
    return picked.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def expected_gradient(
    z: Tensor, targets: Tensor, tau: Tensor, g: Tensor, h: Tensor
) -> tuple[Tensor, ...]:
    leaf = z.detach().clone().requires_grad_()
    logprobs, entropy = expected_values(leaf, targets, tau)
    total = (logprobs * g.to(z.dtype)).sum() + (entropy * h.to(z.dtype)).sum()
    return logprobs.detach(), entropy.detach(), torch.autograd.grad(total, leaf)[0]


def run(
    backend: str, logits: Tensor, targets: Tensor, tau: Tensor, g: Tensor, h: Tensor
) -> tuple[Tensor, ...]:
    leaf = logits.detach().requires_grad_()
    logprobs, entropy = token_logprobs(
        leaf, targets, temperature=tau, return_entropy=True, backend=backend
    )
    (grad,) = torch.autograd.grad((logprobs, entropy), leaf, (g, h))
    return logprobs.detach(), entropy.detach(), grad


@pytest.mark.parametrize("backend, vocabulary, rows, dtype, content", list(cases()))
def test_no_worse_than_pytorch(backend, vocabulary, rows, dtype, content):
    """Errors are at most those of PyTorch in the same dtype, and a unit of its rounding.

    The unit is of the size of the largest result. As a relative error of p is an absolute one of
    log p, it is no smaller for log p and its mean, the entropy, than that of 1; and the gradient,
    which is made of p, has one for log p too. Besides, everything must keep the tolerances of
    float32 arithmetic, and a second run must give the same bits.
    """
    logits, targets, tau = make(vocabulary, rows, dtype, content)
    assert logits.shape == (rows, vocabulary) and logits.dtype == dtype
    g, h = normal(rows, seed=7), normal(rows, seed=8)
    ours = run(backend, logits, targets, tau, g, h)
    again = run(backend, logits, targets, tau, g, h)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))
    if rows == 0:
        assert [x.shape for x in ours] == [(0,), (0,), (0, vocabulary)]
        return
    on_host = [x.cpu() for x in (logits, targets, tau, g, h)]
    exact = expected_gradient(on_host[0].double(), *on_host[1:])
    eager = expected_gradient(*on_host)
    largest = [right.abs().amax() for right in exact]
    sizes = [1 + largest[0], 1 + largest[1], largest[2] * (1 + largest[1])]
    for mine, theirs, right, size in zip(ours, eager, exact, sizes):
        error, allowed = ((on_cpu(x) - right).abs().amax() for x in (mine, theirs))
        assert error <= allowed.nan_to_num(nan=math.inf) + torch.finfo(dtype).eps * size
    atol = row_tolerance(logits, tau)
    for mine, right in zip(ours[:2], exact):
        assert (on_cpu(mine) - right).abs().amax() <= atol
    if rows * vocabulary < 10**7:
        within(ours[2], exact[2], gradient_tolerance(logits, targets, tau, g, h))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("output", [0, 1])
def test_gradients_by_finite_differences(backend, vocabulary, output):
    """Of both outputs, by single logits: the target's, the first, the last and a few others."""
    logits, targets, tau = make(vocabulary, 3, torch.float32, "random")
    weights = [torch.zeros(3), torch.zeros(3)]
    weights[output] += 1.0
    grad = on_cpu(run(backend, logits, targets, tau, *weights)[2])
    bound = gradient_tolerance(logits, targets, tau, *weights)
    z, targets, tau = on_cpu(logits), targets.cpu(), tau.cpu()
    step = 1e-5
    columns = {0, vocabulary - 1, vocabulary // 3, *targets[targets >= 0].tolist()}
    for column in sorted(columns):
        ends = []
        for sign in (1, -1):
            moved = z.clone()
            moved[:, column] += sign * step
            ends.append(expected_values(moved, targets, tau)[output])
        slope = (ends[0] - ends[1]) / (2 * step)
        # The third derivative is below 1/tau^3 <= 8, and float64 keeps 1e-15 of values around 10.
        error = 8 * step**2 + 10 * 4e-16 / step
        assert ((grad[:, column] - slope).abs() <= bound[:, column] + error).all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_more_than_2_to_the_31_logits(backend):
    """Every one of them read and overwritten, in bfloat16: 4.3 GB."""
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip("interpreted, it would take days")
    rows, vocabulary, different = 14136, 151936, 19
    base = normal(different, vocabulary, seed=1, scale=3.0).bfloat16()
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    # Rows repeat; their targets do not.
    for start in range(0, rows, different):
        logits[start : start + different] = base[: rows - start]
    targets = torch.arange(rows) * 7919 % vocabulary
    targets[1::100] = -100
    chosen = backends.load(backend)
    logprobs, entropy, normalization = chosen.token_logprobs_forward(
        logits, targets, 0.7, -100, True
    )
    place = torch.arange(rows) % different
    logp = (on_cpu(base) / 0.7).log_softmax(-1)
    ignored = targets.cpu() == -100
    expected = logp[place.cpu(), targets.cpu().clamp(min=0)].masked_fill(ignored, 0.0)
    assert (on_cpu(logprobs) - expected).abs().amax() <= row_tolerance(base, 0.7)
    expected = -(logp.exp() * logp).sum(-1)[place.cpu()].masked_fill(ignored, 0.0)
    assert (on_cpu(entropy) - expected).abs().amax() <= row_tolerance(base, 0.7)

    g, h = normal(rows, seed=2), normal(rows, seed=3)
    chosen.token_logprobs_backward(
        g, h, logits, targets, 0.7, -100, normalization, entropy, out=logits
    )
    # As the same rows give alone; that those are right, the tests above say.
    for few in (slice(0, 19), slice(7068, 7087), slice(rows - 19, rows)):
        alone = chosen.token_logprobs_backward(
            *(g[few], h[few], base[place[few]], targets[few], 0.7, -100),
            *(normalization[few], entropy[few]),
        )
        assert torch.equal(logits[few], alone)
    # The gradient of every row sums up to 0, but for rounding each of its terms to bfloat16.
    for start in range(0, rows, 1024):
        part = logits[start : start + 1024].float()
        rounding = torch.finfo(torch.bfloat16).eps * part.abs().sum(-1)
        assert (part.sum(-1).abs() <= rounding + 1e-5).all()
        assert (part.abs().sum(-1) > 0).equal(targets[start : start + 1024] != -100)
