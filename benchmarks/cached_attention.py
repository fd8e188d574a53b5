"""Attention of a step of sampling on a CPU: the kernel and PyTorch's attention.

    python -m benchmarks.cached_attention [--turns N]

Prints milliseconds a call for 16 rows with 9 heads of 64 and 3 of keys and values: by the kernel,
by PyTorch in the cache's type, by PyTorch in float32 with the copies that it takes, and the floor,
the cache read once. Each call has the cache of another layer, of 30, as a model's step does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rlhf_kernels.bench.machine import machine, print_machine
from rlhf_kernels.bench.timing import Run, Variant, compare, warn_if_busy
from rlhf_kernels.ops.cached_attention import cached_attention

ROWS, HEADS, KV_HEADS, SIZE, LAYERS = 16, 9, 3, 64, 30
KEYS = (32, 64, 256, 1024)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return cached_attention(query, key, value, mask)


def pytorch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query.unsqueeze(2), key, value, attn_mask=mask[:, None, None], enable_gqa=True
    ).squeeze(2)


def in_float32(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return pytorch(query.float(), key.float(), value.float(), mask).to(query.dtype)


def reading(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """As numbers that PyTorch adds up as fast as memory gives them."""
    return key.view(torch.float32).sum() + value.view(torch.float32).sum()


VARIANTS = {"kernel": kernel, "PyTorch": pytorch, "in float32": in_float32, "floor": reading}


def running(attend: Attention, keys: int, dtype: torch.dtype) -> Run:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS, HEADS, SIZE, generator=generator).to(dtype)
    cache = torch.randn(LAYERS, 2, ROWS, KV_HEADS, keys, SIZE, generator=generator).to(dtype)
    mask = torch.ones(ROWS, keys, dtype=torch.bool)
    mask[: ROWS // 2, : keys // 4] = False  # padding before shorter prompts

    def run(call: int) -> Tensor:
        key, value = cache[call % LAYERS]
        return attend(query, key, value, mask)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    turns = parser.parse_args().turns
    print_machine(machine())
    warn_if_busy()
    print(f"\n{torch.get_num_threads()} threads; the best of {turns} turns, in milliseconds")
    print(f"{'keys':>5} {'type':<9}" + "".join(f"{name:>12}" for name in VARIANTS))
    for keys in KEYS:
        for dtype in (torch.float32, torch.bfloat16):
            variants = [
                Variant(name, partial(running, attend, keys, dtype), comparable=False)
                for name, attend in VARIANTS.items()
            ]
            found = compare(
                "cached attention", variants, turns=turns, calls_per_turn=60, uncounted_calls=1
            )
            times = "".join(f"{min(found.samples[name]):12.3f}" for name in VARIANTS)
            print(f"{keys:>5} {str(dtype)[6:]:<9}{times}", flush=True)


if __name__ == "__main__":
    main()
