"""The figures that the vocabulary kernels must reach, on a CPU and, where there is one, on a GPU.

    python -m benchmarks.vocabulary [--device cpu|cuda] [--quick] [--output PATH]

Prints tables, then met or NOT MET for each target, and writes benchmarks/results/vocabulary.json
(vocabulary-cuda.json), or PATH. Run it on a quiet machine; floors are measured in the same turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.session import COMPILED, EAGER, Session
from benchmarks.targets import Target, absence, at_least, at_most
from rlhf_kernels.bench.operation import BOTH, FORWARD
from rlhf_kernels.bench.operations.token_logprobs import BACKWARD, ENTROPY
from rlhf_kernels.bench.runner import Result

TRL = "trl selective_log_softmax"
# Those that targets speak of, beside ours; the others are in `python -m rlhf_kernels.bench`.
PEERS = ("liger cross_entropy", TRL, "flash-attn cross_entropy_loss", "quack cross_entropy")
MIB = 2**20


def token_logprobs_on_cpu(session: Session, dtype: str) -> None:
    sizes = {"N": 2048, "V": 49152}
    others = (COMPILED, EAGER, TRL)
    result, own, floor = session.measure(
        "token_logprobs", FORWARD, sizes, dtype, turns=15, others=others
    )
    what = f"token_logprobs forward, {dtype}"
    session.targets += [
        at_most(f"{what}: ours / {floor}", result, own, floor, 1.5),
        at_least(f"{what}: torch.compile / ours", result, COMPILED, own, 2.5),
        at_least(f"{what}: TRL / ours", result, TRL, own, 4.0),
        at_most(f"{what}: with entropy / without", result, own + ENTROPY, own, 1.3),
    ]
    result, own, floor = session.measure(
        "token_logprobs", BOTH, sizes, dtype, turns=9, others=others
    )
    what = f"token_logprobs forward+backward, {dtype}"
    session.targets += [
        at_most(f"{what}: ours / {floor}", result, own, floor, 1.5),
        at_least(f"{what}: torch.compile / ours", result, COMPILED, own, 2.5),
    ]


def linear_on_cpu(session: Session, dtype: str, turns: int, others: Sequence[str]) -> None:
    sizes = {"N": 2048, "V": 49152, "H": 576}
    result, own, floor = session.measure(
        "linear_token_logprobs", FORWARD, sizes, dtype, turns=2 * turns, others=others
    )
    what = f"linear_token_logprobs without grad, {dtype}: ours / one bare product"
    session.targets.append(at_most(what, result, own, floor, 1.15))
    for operation in ("linear_cross_entropy", "linear_ppo_loss"):
        result, own, floor = session.measure(
            operation, BOTH, sizes, dtype, turns=turns, others=others, with_memory=True
        )
        what = f"{operation} forward+backward, {dtype}"
        session.targets += [
            at_most(f"{what}: ours / three bare products", result, own, floor, 1.2),
            at_least(f"{what}: eager / ours", result, EAGER, own, 1.0),
            _memory_ratio(f"{what}: extra memory, ours / eager", result, own, 0.1),
        ]


def token_logprobs_on_gpu(session: Session) -> None:
    sizes = {"N": 8192, "V": 151936}
    rivals = (*PEERS, COMPILED)
    what = "token_logprobs {}, 8192x151936 bfloat16"
    for direction in (FORWARD, BACKWARD, BOTH):
        others = () if direction == BACKWARD else (*rivals, EAGER)
        result, own, floor = session.measure(
            "token_logprobs", direction, sizes, "bfloat16", turns=30, others=others
        )
        name = what.format(direction)
        if direction == FORWARD:
            target = at_least(f"{name}: share of the read bandwidth", result, floor, own, 0.9)
            session.targets.append(target)
        elif direction == BACKWARD:
            session.targets.append(_backward_share(name, result, own))
        if direction != BACKWARD:
            for rival in rivals:
                session.targets.append(at_least(f"{name}: {rival} / ours", result, rival, own, 1.0))


def linear_on_gpu(session: Session) -> None:
    sizes = {"N": 8192, "V": 151936, "H": 4096}
    result, own, floor = session.measure(
        "linear_token_logprobs", FORWARD, sizes, "bfloat16", turns=9, others=(EAGER,)
    )
    what = "linear_token_logprobs without grad, bfloat16: ours / one bare product"
    session.targets.append(at_most(what, result, own, floor, 1.15))
    result, own, floor = session.measure(
        "linear_ppo_loss",
        BOTH,
        sizes,
        "bfloat16",
        turns=9,
        others=(EAGER, "liger GRPO, no entropy"),
        with_memory=True,
    )
    what = "linear_ppo_loss forward+backward, bfloat16"
    session.targets += [
        at_most(f"{what}: ours / three bare products", result, own, floor, 1.15),
        _extra_memory(f"{what}: extra memory", result, own, 1024),
    ]


def _backward_share(what: str, result: Result, own: str) -> Target:
    """The backward reads and writes once: twice the bytes of the read that it is compared with."""
    reads = [name for name in result.floors if name.startswith("one read")]
    read = None if result.comparison is None else result.comparison.fastest(reads)
    target = at_least(f"{what}: share of the read bandwidth", result, read, own, 0.85)
    return replace(target, measured=None if target.measured is None else 2 * target.measured)


def _memory_ratio(what: str, result: Result, own: str, limit: float) -> Target:
    """Of what is needed beyond the results and gradients, which all variants leave."""
    for name in (own, EAGER):
        if name not in result.memory:
            return Target(what, None, limit, True, why=absence(result, name))
    ratio = result.memory[own].extra / max(1, result.memory[EAGER].extra)
    return Target(what, ratio, limit, True)


def _extra_memory(what: str, result: Result, own: str, limit: float) -> Target:
    if own not in result.memory:
        return Target(what, None, limit, True, " MiB", absence(result, own))
    return Target(what, result.memory[own].extra / MIB, limit, True, " MiB")


def main() -> None:
    session = Session.from_command_line(__doc__, "vocabulary")
    if session.device == "cpu":
        token_logprobs_on_cpu(session, "float32")
        token_logprobs_on_cpu(session, "bfloat16")
        linear_on_cpu(session, "float32", 5, (COMPILED, EAGER))
        # Slow for everybody on a CPU without bfloat16 units; few turns.
        linear_on_cpu(session, "bfloat16", 3, (EAGER,))
    else:
        token_logprobs_on_gpu(session)
        linear_on_gpu(session)
    session.finish()


if __name__ == "__main__":
    main()
