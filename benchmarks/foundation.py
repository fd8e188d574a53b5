"""The figures that the kernels of the foundation must reach on a CPU.

    python -m benchmarks.foundation [--quick] [--output PATH]

Prints a table and writes benchmarks/results/foundation.json, or PATH. Run it on a quiet machine:
the floor, one read of the logits by `logits.sum(-1)`, is measured in the same turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from benchmarks import formulas
from benchmarks.harness import (
    RESULTS,
    Comparison,
    Target,
    Variant,
    compare,
    machine,
    print_report,
    write_json,
)
from rlhf_kernels.backends import cpu

ROWS, VOCABULARY = 2048, 49152  # SmolLM2's vocabulary; 403 MB, past any cache
BATCH, STEPS = 64, 1024


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def logprobs_forward(turns: int) -> Comparison:
    # Two sets of logits in turn: what one variant leaves in a cache is of no use to the next.
    logits = [torch.randn(ROWS, VOCABULARY) * 3 for _ in range(2)]
    targets = torch.randint(VOCABULARY, (ROWS,))
    compiled = _compiled(formulas.token_logprobs)

    def ours(call: int) -> object:
        return rk.token_logprobs(logits[call % 2], targets, backend="cpu")

    def ours_entropy(call: int) -> object:
        return rk.token_logprobs(logits[call % 2], targets, return_entropy=True, backend="cpu")

    variants = [
        Variant("floor: logits.sum(-1)", lambda call: logits[call % 2].sum(-1)),
        Variant("cpu backend", ours),
        Variant("cpu backend, with entropy", ours_entropy),
        Variant("torch.compile", lambda call: compiled(logits[call % 2], targets)),
        Variant("eager", lambda call: formulas.token_logprobs(logits[call % 2], targets)),
    ]
    with torch.no_grad():
        title = f"token_logprobs forward, {ROWS}x{VOCABULARY} float32"
        return compare(title, variants, turns=turns)


def logprobs_backward(turns: int) -> Comparison:
    logits = _leaves(*[torch.randn(ROWS, VOCABULARY) * 3 for _ in range(2)])
    targets = torch.randint(VOCABULARY, (ROWS,))
    upstream = torch.randn(ROWS)
    compiled = _compiled(formulas.token_logprobs)

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], None]:
        def run(call: int) -> None:
            leaf = logits[call % 2]
            function(leaf, targets).backward(upstream)
            leaf.grad = None

        return run

    variants = [
        Variant("cpu backend", step(lambda x, y: rk.token_logprobs(x, y, backend="cpu"))),
        Variant("torch.compile", step(compiled)),
        Variant("eager", step(formulas.token_logprobs)),
    ]
    title = f"token_logprobs forward and backward, {ROWS}x{VOCABULARY} float32"
    return compare(title, variants, turns=turns)


def gae(turns: int) -> Comparison:
    rewards, values = torch.randn(BATCH, STEPS), torch.randn(BATCH, STEPS)
    lengths = torch.randint(STEPS // 2, STEPS + 1, (BATCH, 1))
    mask = torch.arange(STEPS) < lengths
    variants = [
        Variant("floor: reading rewards and values", lambda _: (rewards.sum(), values.sum())),
        Variant("cpu backend", lambda _: rk.gae(rewards, values, mask, backend="cpu")),
        Variant("Python loop over T", lambda _: formulas.gae(rewards, values, mask, 1.0, 0.95)),
    ]
    title = f"gae, {BATCH}x{STEPS} float32"
    return compare(title, variants, turns=turns, calls_per_turn=5)


def ppo_loss(turns: int) -> Comparison:
    shape = (BATCH, STEPS)
    old_logprobs, old_values = -torch.rand(shape) * 3, torch.randn(shape)
    advantages, returns = torch.randn(shape), torch.randn(shape)
    mask = torch.rand(shape) > 0.1
    logprobs, values, entropy = _leaves(
        old_logprobs + 0.1 * torch.randn(shape),
        old_values + 0.1 * torch.randn(shape),
        torch.rand(shape),
    )
    config = rk.PPOLossConfig()
    fixed = (old_logprobs, advantages, mask, values, old_values, returns, entropy, config)

    def step(loss_of: Callable[[], Tensor]) -> Callable[[int], None]:
        def run(_: int) -> None:
            loss_of().backward()
            logprobs.grad = values.grad = entropy.grad = None

        return run

    def ours() -> Tensor:
        loss, _ = rk.ppo_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            values=values,
            old_values=old_values,
            returns=returns,
            entropy=entropy,
            config=config,
            backend="cpu",
        )
        return loss

    inputs = (logprobs, old_logprobs, advantages, values, old_values, returns, entropy)
    variants = [
        Variant("floor: reading the seven inputs", lambda _: [x.detach().sum() for x in inputs]),
        Variant("cpu backend", step(ours)),
        Variant("eager", step(lambda: formulas.ppo_loss(logprobs, *fixed)[0])),
        Variant("eager, no statistics", step(lambda: formulas.ppo_loss_only(logprobs, *fixed))),
    ]
    title = f"ppo_loss forward and backward with statistics, {BATCH}x{STEPS} float32"
    return compare(title, variants, turns=turns, calls_per_turn=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns; JSON only with --output")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    quick = arguments.quick
    output = arguments.output or (None if quick else RESULTS / "foundation.json")
    torch.manual_seed(0)
    about = {**machine(), "cpu_backend": cpu.describe()}
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    forward = logprobs_forward(5 if quick else 15)
    both = logprobs_backward(3 if quick else 9)
    advantages = gae(10 if quick else 40)
    loss = ppo_loss(20 if quick else 80)
    floor = forward.timings[0].name
    targets = [
        Target(
            "token_logprobs forward / reading once",
            forward.ratio("cpu backend", floor),
            required=1.6,
            at_most=True,
        ),
        Target(
            "token_logprobs forward, over torch.compile",
            forward.ratio("torch.compile", "cpu backend"),
            required=2.5,
        ),
        Target(
            "token_logprobs forward and backward, over torch.compile",
            both.ratio("torch.compile", "cpu backend"),
            required=2.0,
        ),
        Target(
            "gae, over the Python loop",
            advantages.ratio("Python loop over T", "cpu backend"),
            required=50.0,
        ),
        Target(
            "ppo_loss forward and backward, over eager",
            loss.ratio("eager", "cpu backend"),
            required=5.0,
        ),
    ]
    comparisons = [forward, both, advantages, loss]
    print_report(comparisons, targets)
    if output is not None:
        write_json(output, about, comparisons, targets)
        print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
