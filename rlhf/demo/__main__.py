"""``python -m rlhf.demo``: fine-tuning, reward modelling and PPO on a real chat model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlhf.terminal import quiet_libraries, run_for_person


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.demo",
        description="Takes a 135M-parameter chat model through supervised fine-tuning, reward "
        "modelling and PPO in about ten minutes on two CPU cores, and shows what changed. The "
        "preferences come from simulated annotators, programs that favour warm answers. Run again, "
        "it keeps the stages that are finished.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for results")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--model", help="another causal model than SmolLM2: an id or a folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    return run_for_person(lambda: run(args), program="rlhf.demo", debug=args.debug)


def run(args: argparse.Namespace) -> None:
    quiet_libraries()
    from rlhf.demo.run import run_demo
    from rlhf.demo.settings import DemoSettings

    run_demo(args.output, DemoSettings(seed=args.seed), args.model)


if __name__ == "__main__":
    sys.exit(main())
