"""What the conformance tests share: backends, tolerances, random inputs, mask strategies.

Tolerances come from the precision of the arithmetic (float32, eps = 2^-23), never from what a
backend happened to give; each helper says how.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from rlhf_kernels import backends

EPS = torch.finfo(torch.float32).eps
ROW_PRIMITIVES = ("token_logprobs_forward", "token_logprobs_backward")


# Whether Triton's kernels are interpreted, on CPU tensors: see `make test`.
INTERPRETED = "cpu" in (backends.BACKENDS["triton"].devices or ())


def device_of(backend: str | None) -> str:
    """Where the tests of a backend have their tensors; None: the default backend."""
    devices = None if backend is None else backends.BACKENDS[backend].devices
    return "cpu" if devices is None or "cpu" in devices else "cuda"


def here(tensor: Tensor) -> Tensor:
    """A CPU tensor, random so that it is the same everywhere, on the device of the test."""
    return tensor.to(torch.empty(0).device)


def on_cpu(numbers: Tensor | np.ndarray | float) -> Tensor:
    """In float64, to be compared."""
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().cpu()
    return torch.as_tensor(numbers, dtype=torch.float64, device="cpu")


def backends_for(*primitives: str) -> list[str]:
    """Every backend of this machine that implements all of these primitives."""
    return [
        name
        for name in backends.BACKENDS
        if backends.unavailable_reason(name) is None
        and set(primitives) <= backends.load(name).PRIMITIVES
    ]


def row_tolerance(logits: Tensor, temperature: float | Tensor = 1.0) -> float:
    """Absolute error allowed in a log-probability, an entropy or an unscaled gradient.

    Dividing by the temperature, subtracting the maximum and adding the log-sum-exp each round at
    the size of the scaled logits (4 roundings); exp and log are good to a few ulp, and a sum of V
    positive terms by S running sums rounds V/S times, about sqrt(V) in effect.
    """
    finite = torch.nan_to_num(on_cpu(logits), neginf=0.0, posinf=0.0)
    if isinstance(temperature, Tensor):
        finite = finite / on_cpu(temperature).reshape(-1, 1)
    else:
        finite = finite / temperature
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return EPS * (4 * size + math.sqrt(logits.shape[-1]) + 16)


def gradient_tolerance(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    grad_logprobs: Tensor | np.ndarray,
    grad_entropy: Tensor | np.ndarray | None = None,
    logit_error: float = 0.0,
) -> Tensor:
    """Absolute error allowed in each element of the gradient of the logits [N, V], in float32.

    With d_j = (z_j - max)/tau, log p_j = d_j - log Σ e^d. Difference, quotient (by an inverse) and
    the last subtraction round d_j four times at most; exp and log are good to a few ulp, and the
    sum of V positive terms by 4 running sums or more rounds like sqrt(V/4). The entropy's sum
    weighs these by |d|. All that, `error`, is a relative error of p_j and an absolute one of
    log p_j and H, so p_j·(g + h·(log p_j + H))/tau is off by `error` times
    p_j·(|g| + |h|·(|log p_j + H| + 2))/tau. A few more roundings come at the result's size, and
    p_j below the smallest normal float is 0. `logit_error` is how far the logits themselves may be
    off, which moves z_j and the sum.
    """
    z, targets = on_cpu(logits), targets.cpu()
    tau = temperature if not isinstance(temperature, Tensor) else on_cpu(temperature)[:, None]
    g = on_cpu(grad_logprobs).abs()[:, None]
    h = torch.zeros_like(g) if grad_entropy is None else on_cpu(grad_entropy)
    h = h.abs().reshape(-1, 1)
    logp = (z / tau).log_softmax(-1)
    p = logp.exp()
    d = torch.where(p > 0, (z - z.amax(-1, keepdim=True)) / tau, 0.0).abs()
    logp = torch.where(p > 0, logp, 0.0)
    weighted = (p * d).sum(-1, keepdim=True)
    entropy = -(p * logp).sum(-1, keepdim=True)
    sums = (math.sqrt(z.shape[-1]) / 2 + 8) * (1 + weighted)
    error = EPS * (4 * d + 4 * weighted + sums) + 2 * logit_error / tau
    slope = (logp + entropy).abs()
    target = torch.zeros_like(p)
    target.scatter_(1, torch.where(targets == -100, 0, targets)[:, None], 1.0)
    size = p * (g + h * slope) + g * (target - p).abs()
    underflow = torch.finfo(torch.float32).smallest_normal * (1 + (g + h * (slope + 2)) / tau)
    bound = error * p * (g + h * (slope + 2)) / tau + 4 * EPS * size / tau + underflow
    return torch.where((targets == -100)[:, None], 0.0, bound)


def close(
    actual: Tensor, expected: Tensor | np.ndarray | float, atol: float, rtol: float = 0.0
) -> None:
    torch.testing.assert_close(
        on_cpu(actual), on_cpu(expected), atol=atol, rtol=rtol, equal_nan=True
    )


def within(actual: Tensor, expected: Tensor | np.ndarray, bound: Tensor) -> None:
    """Each element within its own bound; storing in a 16-bit type rounds once on top."""
    expected, bound = on_cpu(expected), bound.cpu()
    if actual.dtype in (torch.bfloat16, torch.float16):
        info = torch.finfo(actual.dtype)
        # Half an eps of what was computed, or half the smallest subnormal.
        bound = bound + info.eps / 2 * (expected.abs() + bound) + info.smallest_normal * info.eps
    error = (on_cpu(actual) - expected).abs()
    worst = (error / bound.clamp(min=1e-300)).nan_to_num(nan=math.inf)
    assert (error <= bound).all(), f"an element is off by {float(worst.max()):.3g} times its bound"


def random_mask(rows: int, length: int, seed: int = 0) -> Tensor:
    """Holes, left and right padding, a full row and (from three rows on) an empty one."""
    generator = torch.Generator().manual_seed(seed)
    mask = here(torch.rand(rows, length, generator=generator, device="cpu") < 0.7)
    if rows >= 1:
        mask[0] = True
    if rows >= 2:
        mask[1, : length // 3] = False
    if rows >= 3:
        mask[2] = False
    return mask


@st.composite
def masks(draw: st.DrawFn, max_rows: int = 4, max_length: int = 9) -> Tensor:
    """Any mask: empty batches and rows, holes, padding on both sides."""
    rows = draw(st.integers(0, max_rows))
    length = draw(st.integers(1, max_length))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    content = draw(st.lists(flags, min_size=rows, max_size=rows))
    return torch.tensor(content, dtype=torch.bool).reshape(rows, length)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return here(scale * torch.randn(*shape, generator=generator, device="cpu"))


def ppo_inputs(rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Log-ratios and value steps wide enough that every clip takes effect somewhere."""
    old = -normal(rows, length, seed=seed).abs()
    old_values = normal(rows, length, seed=seed + 1)
    return {
        "logprobs": old + normal(rows, length, seed=seed + 2, scale=0.5),
        "old_logprobs": old,
        "advantages": normal(rows, length, seed=seed + 3),
        "values": old_values + normal(rows, length, seed=seed + 4, scale=0.4),
        "old_values": old_values,
        "returns": normal(rows, length, seed=seed + 5),
        "entropy": normal(rows, length, seed=seed + 6).abs(),
        "ref_logprobs": old + normal(rows, length, seed=seed + 7, scale=0.5),
        "importance_weights": normal(rows, length, seed=seed + 8).abs(),
    }


def packed(mask: Tensor, *padded: Tensor) -> tuple[Tensor, ...]:
    """cu_seqlens, then mask and tensors without padding before and behind; holes stay."""
    spans, lengths = [], []
    for row in mask:
        valid = row.nonzero().flatten().tolist()
        spans.append(slice(valid[0], valid[-1] + 1) if valid else slice(0, 0))
        lengths.append(spans[-1].stop - spans[-1].start)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    flat = [
        torch.cat([x[0:0].flatten(), *(r[s] for r, s in zip(x, spans))]) for x in (mask, *padded)
    ]
    return cu_seqlens, *flat


def poisoned(tensor: Tensor, mask: Tensor) -> Tensor:
    """NaN, inf and -inf at the masked places."""
    junk = torch.tensor([math.nan, math.inf, -math.inf])
    places = torch.arange(mask.numel()).reshape(mask.shape) % 3
    return torch.where(mask, tensor, junk[places].to(tensor.dtype))
