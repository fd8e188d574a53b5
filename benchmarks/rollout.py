"""The figures that the rollout and loss kernels must reach, on a CPU and, if there is one, a GPU.

    python -m benchmarks.rollout [--device cpu|cuda] [--quick] [--output PATH]

Prints tables, then met or NOT MET for each target, and writes benchmarks/results/rollout.json
(rollout-cuda.json), or PATH. Run it on a quiet machine; floors are measured in the same turns.
"""

from __future__ import annotations

from benchmarks.session import COMPILED, EAGER, Session
from benchmarks.targets import at_least, at_most
from rlhf_kernels.bench.operation import BOTH, FORWARD
from rlhf_kernels.bench.operations.rollout_advantages import TRL
from rlhf_kernels.bench.operations.sequences import COPY, LAUNCH, LOOP

SMALL, LARGE, LONG = {"B": 64, "T": 1024}, {"B": 512, "T": 8192}, {"B": 1, "T": 131072}
TRAINING = {"B": 512, "T": 1024}
TORCHRL = ("torchrl vec_gae", "torchrl gae")
VERL = ("verl", "verl gae, whitened")


def title(name: str, sizes: dict[str, int]) -> str:
    return f"{name} {sizes['B']}x{sizes['T']}"


def gae(session: Session, sizes: dict[str, int], turns: int, times: float) -> None:
    others = (LOOP, *TORCHRL, *VERL)
    result, own, _ = session.measure("gae", FORWARD, sizes, turns=turns, others=others)
    what = title("gae", sizes)
    session.targets.append(at_least(f"{what}: the loop / ours", result, LOOP, own, times))
    if sizes != LONG:
        session.targets.append(at_most(f"{what}: ours / copying", result, own, COPY, 2.0))


def on_cpu(session: Session) -> None:
    gae(session, SMALL, 15, 100.0)
    gae(session, LARGE, 5, 100.0)
    gae(session, LONG, 5, 1000.0)
    result, own, _ = session.measure(
        "rollout_advantages", FORWARD, SMALL, turns=15, others=(TRL, *VERL)
    )
    what = title("rollout_advantages", SMALL)
    session.targets.append(at_least(f"{what}: TRL's operations / ours", result, TRL, own, 50.0))
    others = (EAGER, COMPILED, "eager, no statistics", "openrlhf, no entropy", *VERL)
    result, own, _ = session.measure("ppo_loss", BOTH, TRAINING, turns=40, others=others)
    what = title("ppo_loss forward+backward", TRAINING)
    session.targets += [
        at_least(f"{what}: eager / ours", result, EAGER, own, 8.0),
        at_least(f"{what}: torch.compile / ours", result, COMPILED, own, 2.0),
    ]


def on_gpu(session: Session) -> None:
    for name in ("gae", "rollout_advantages"):
        others = (LOOP, TRL, *TORCHRL, *VERL)
        result, own, _ = session.measure(name, FORWARD, SMALL, turns=15, others=others)
        what = title(name, SMALL)
        session.targets.append(at_most(f"{what}: ours / an empty kernel", result, own, LAUNCH, 2.0))
        if name == "rollout_advantages":
            session.targets.append(at_least(f"{what}: TRL / ours", result, TRL, own, 500.0))
        result, own, _ = session.measure(name, FORWARD, LARGE, turns=15, others=())
        # The copy reads and writes what ours reads or writes: twice the bytes.
        share = at_least(
            f"{title(name, LARGE)}: copying / ours (a copy moves twice the bytes)",
            result,
            COPY,
            own,
            1.2,
        )
        session.targets.append(share)
    rivals = (EAGER, COMPILED, *VERL)
    result, own, _ = session.measure("ppo_loss", BOTH, TRAINING, turns=30, others=rivals)
    what = title("ppo_loss forward+backward", TRAINING)
    session.targets.append(at_least(f"{what}: torch.compile / ours", result, COMPILED, own, 1.0))


def main() -> None:
    session = Session.from_command_line(__doc__, "rollout")
    (on_cpu if session.device == "cpu" else on_gpu)(session)
    session.finish()


if __name__ == "__main__":
    main()
