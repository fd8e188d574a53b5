"""Causal attention over rows one behind the other on a CPU: the kernel and PyTorch's attention.

    python -m benchmarks.row_attention [--turns N]

Prints milliseconds a call, forward and with the backward, for rows of equal lengths (PyTorch takes
them as a batch) and of varied ones (it takes them one by one), with 9 heads of 64 and 3 of keys and
values. Beside them the floor: the products of the causal half, at 32 operations a cycle and core at
3.7 GHz, as two cores of Zen 4 do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_kernels.bench.machine import machine, print_machine
from rlhf_kernels.bench.timing import Comparison, Run, Variant, compare, warn_if_busy
from rlhf_kernels.ops.row_attention import row_attention

HEADS, KV_HEADS, SIZE = 9, 3, 64
VARIED = [8, 14, 20, 26, 31, 37, 42, 46, 50, 53, 56, 58, 60, 61, 62, 63]
ROWS = {
    "8 of 63": [63] * 8,
    "16 of 63": [63] * 16,
    "16 of 8 to 63": VARIED,
    "4 of 256": [256] * 4,
    "2 of 1024": [1024] * 2,
}
OPERATIONS_OF_A_CORE = 32 * 3.7e9  # a second
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def kernel(lengths: list[int]) -> Attention:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return lambda query, key, value: row_attention(query, key, value, starts)


def pytorch(lengths: list[int]) -> Attention:
    """A batch where the lengths are equal."""

    def attend(*tensors: Tensor) -> Tensor:
        if len(set(lengths)) == 1:
            return causal(*(x.unflatten(0, (len(lengths), -1)) for x in tensors)).flatten(0, 1)
        rows = zip(*(x.split(lengths) for x in tensors))
        return torch.cat([causal(*(x[None] for x in row))[0] for row in rows])

    return attend


def causal(*batch: Tensor) -> Tensor:
    """[rows, tokens, heads, size]."""
    query, key, value = (x.transpose(1, 2) for x in batch)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2)


def running(attend: Attention, tokens: int, dtype: torch.dtype, backward: bool) -> Run:
    generator = torch.Generator().manual_seed(0)
    query, key, value, upstream = (
        torch.randn(tokens, heads, SIZE, generator=generator).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )

    def forward(_: int) -> Tensor:
        return attend(query, key, value)

    def both(_: int) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out = attend(*leaves)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    return both if backward else forward


def comparison(lengths: list[int], dtype: torch.dtype, backward: bool, turns: int) -> Comparison:
    def variant(name: str, attend: Attention) -> Variant:
        return Variant(name, lambda: running(attend, sum(lengths), dtype, backward))

    variants = [variant("kernel", kernel(lengths)), variant("PyTorch", pytorch(lengths))]
    return compare("row attention", variants, turns=turns, calls_per_turn=20, uncounted_calls=1)


def operations(lengths: list[int], backward: bool) -> float:
    """A forward's two products with the causal half, and the backward's five."""
    products = 7 if backward else 2
    return products * HEADS * SIZE * float(sum(length * (length + 1) for length in lengths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    turns = parser.parse_args().turns
    print_machine(machine())
    warn_if_busy()
    rate = torch.get_num_threads() * OPERATIONS_OF_A_CORE
    print(f"\n{torch.get_num_threads()} threads; the best of {turns} turns, and the median ratio")
    print(f"{'rows':<15}{'type':<10}{'':<10}{'kernel':>8}{'PyTorch':>9}{'ratio':>7}{'floor':>8}")
    for rows, lengths in ROWS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (False, True):
                found = comparison(lengths, dtype, backward, turns)
                ours, theirs = (min(found.samples[name]) for name in ("kernel", "PyTorch"))
                print(
                    f"{rows:<15}{str(dtype)[6:]:<10}{'with grad' if backward else 'forward':<10}"
                    f"{ours:8.2f}{theirs:9.2f}{found.ratio('PyTorch', 'kernel'):7.1f}"
                    f"{operations(lengths, backward) / rate * 1e3:8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
