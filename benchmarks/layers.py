"""Layers of Llama-like transformers beside transformers' own modules, on a CPU.

    python -m benchmarks.layers [--turns N]

The shapes are those of SmolLM2-135M with 8 sequences of 63 tokens. Prints microseconds a call, how
many times longer transformers takes, and the floor: the time to copy as many bytes as a call that
keeps nothing in between must move.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rlhf_kernels.bench.machine import machine, print_machine
from rlhf_kernels.bench.timing import Run, Variant, compare, warn_if_busy
from rlhf_kernels.ops.rms_norm import rms_norm
from rlhf_kernels.ops.rotary import rotary
from rlhf_kernels.ops.swiglu import swiglu

BATCH, STEPS, HEADS, HEAD_WIDTH = 8, 63, 9, 64
TOKENS, WIDTH, INNER = BATCH * STEPS, HEADS * HEAD_WIDTH, 1536
COPIES = 6  # sets of tensors that calls take in turn: no call finds all of its own in a cache
CALLS = 24


class Layer(NamedTuple):
    """A layer two ways, the inputs that take a gradient, and the numbers an element must move."""

    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    inputs: Callable[[], list[Tensor]]
    forward: int
    both: int


def layers(dtype: torch.dtype) -> list[Layer]:
    norm = LlamaRMSNorm(WIDTH).to(dtype)
    cos, sin = (torch.randn(1, STEPS, HEAD_WIDTH).to(dtype) for _ in range(2))

    def tensors(*shape: int, count: int = 1) -> list[Tensor]:
        return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(count)]

    def heads() -> list[Tensor]:
        (x,) = tensors(BATCH, STEPS, HEADS, HEAD_WIDTH)
        return [x.detach().transpose(1, 2).requires_grad_()]

    def their_rotary(x: Tensor) -> Tensor:
        # Of queries and keys: no keys, so that the work is the same.
        return apply_rotary_pos_emb(x, x[:, :0], cos, sin)[0]

    return [
        Layer(
            "swiglu",
            swiglu,
            lambda gate, up: torch.nn.functional.silu(gate) * up,
            lambda: tensors(TOKENS, INNER, count=2),
            3,
            3 + 5,
        ),
        Layer(
            "rms_norm",
            lambda x, weight: rms_norm(x, weight, norm.variance_epsilon),
            lambda x, weight: norm(x),
            lambda: [*tensors(TOKENS, WIDTH), norm.weight],
            2,
            2 + 3,
        ),
        Layer("rotary", lambda x: rotary(x, cos, sin), their_rotary, heads, 2, 2 + 2),
    ]


def calling(function: Callable[..., Tensor], layer: Layer, backward: bool) -> Run:
    sets = [layer.inputs() for _ in range(COPIES)]
    with torch.no_grad():
        grads = [torch.randn_like(function(*inputs)) for inputs in sets]

    def run(call: int) -> object:
        inputs = sets[call % COPIES]
        if not backward:
            with torch.no_grad():
                return function(*inputs)
        return torch.autograd.grad(function(*inputs), inputs, grads[call % COPIES])

    return run


def moving(layer: Layer, numbers: int) -> Run:
    first = layer.inputs()[0]
    half = numbers * first.nbytes // 2
    sets = [[torch.ones(half, dtype=torch.int8) for _ in range(2)] for _ in range(COPIES)]
    return lambda call: sets[call % COPIES][1].copy_(sets[call % COPIES][0])


def report(layer: Layer, dtype: torch.dtype, backward: bool, turns: int) -> None:
    numbers = layer.both if backward else layer.forward
    variants = [  # their inputs are drawn anew, so the results differ
        Variant("ours", lambda: calling(layer.ours, layer, backward), comparable=False),
        Variant("theirs", lambda: calling(layer.theirs, layer, backward), comparable=False),
        Variant("copy", lambda: moving(layer, numbers), floor=True),
    ]
    comparison = compare(layer.name, variants, turns=turns, calls_per_turn=CALLS)
    if comparison.failures:
        raise RuntimeError(str(comparison.failures))
    kind = "forward + backward" if backward else "forward"
    times = [1e3 * comparison.timing(variant.name).median_ms for variant in variants]
    print(
        f"{layer.name:<9}{str(dtype).removeprefix('torch.'):<9} {kind:<19}"
        f"ours {times[0]:6.0f} us   transformers {times[1]:6.0f} us"
        f" ({comparison.ratio('theirs', 'ours'):4.1f}x)   floor {times[2]:5.0f} us"
        f" ({comparison.ratio('ours', 'copy'):4.1f}x)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    turns = parser.parse_args().turns
    print_machine(machine())
    warn_if_busy()
    print()
    for dtype in (torch.float32, torch.bfloat16):
        for layer in layers(dtype):
            for backward in (False, True):
                report(layer, dtype, backward, turns)


if __name__ == "__main__":
    main()
