"""TRL 1.12.0's PPOTrainer with and without our patch: metrics, seconds, peak memory.

    python -m benchmarks.integrations.trl [--cases NAME ...] [--turns N] [--updates N] [--quick]
                                          [--output PATH]

Three updates in float32 from the same seeds, on SmolLM2-135M and on a tiny model with a vocabulary
of 131072. Every run is a process of its own in TRL's environment; patched and unpatched take turns.
Prints every metric's largest deviation, a table, then met or NOT MET for each target, and writes
benchmarks/results/integrations_trl.json, or PATH. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from benchmarks.integrations.agreement import RELATIVE, Deviation, deviations
from benchmarks.integrations.training import Trained, Training
from benchmarks.ppo_trainer.inputs import KEPT, ROOT, models, trl_python
from benchmarks.ppo_trainer.work import Work
from benchmarks.targets import RESULTS, Target, print_targets
from rlhf.demo.model import convert_smollm2
from rlhf_kernels.bench.machine import machine, print_machine
from rlhf_kernels.bench.report import write_whole
from rlhf_kernels.bench.timing import warn_if_busy

VOCABULARY = 131072


@dataclass(frozen=True)
class Case:
    """A training, how many times as fast the patched one must be, and its share of the memory."""

    name: str
    training: Training
    faster: float
    memory: float | None = None


@dataclass(frozen=True)
class Outcome:
    """Of a case: what each turn's process reported."""

    case: Case
    theirs: list[Trained]
    ours: list[Trained]

    @property
    def deviations(self) -> list[Deviation]:
        """Of the first turn; the same seeds give the same numbers in each."""
        theirs = self.theirs[0]
        return deviations(theirs.metrics, self.ours[0].metrics, theirs.logit_size)

    @property
    def targets(self) -> list[Target]:
        case = self.case
        outside = sum(not each.within for each in self.deviations)
        ratios = [_median([a]) / _median([b]) for a, b in zip(self.theirs, self.ours)]
        found = [
            Target(f"{case.name}: metrics beyond {RELATIVE:g}", outside, 0, at_most=True, unit=""),
            Target(f"{case.name}: seconds, TRL / patched", statistics.median(ratios), case.faster),
        ]
        if case.memory is not None:
            used = _peak(self.ours) / _peak(self.theirs)
            what = f"{case.name}: memory, patched / TRL"
            found.append(Target(what, used, case.memory, at_most=True))
        return found


def cases(quick: bool, updates: int) -> list[Case]:
    smollm2 = Work(str(models(tiny=quick)), updates=updates - 1)
    if quick:
        smollm2 = replace(smollm2, batch=4, micro_batch=2, prompt=8, response=8)
    vocabulary = replace(smollm2, models=str(_models_of_a_large_vocabulary()))
    return [
        Case("smollm2", Training(smollm2, 1e-5, patched=False), 1.3),
        Case("vocabulary", Training(vocabulary, 1e-4, patched=False), 1.5, memory=0.6),
    ]


def _described(case: Case) -> dict[str, object]:
    """A case for the record, without the folder that its models are in here."""
    found = asdict(case)
    del found["training"]["work"]["models"]
    return found


def _models_of_a_large_vocabulary() -> Path:
    """Two small layers drawn at random; SmolLM2's tokenizer, which uses a part of the tokens."""
    folder, smollm2 = KEPT / f"vocabulary-{VOCABULARY}", KEPT / "smollm2" / "policy"
    if not (folder / "reward" / "config.json").exists():
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(
            convert_smollm2(smollm2),
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
        AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder / "policy")
        reward = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
        reward.save_pretrained(folder / "reward")
    return folder


def train(training: Training) -> Trained:
    """Do it in a process of its own.

    Raises:
        RuntimeError: It failed; the message has the end of what it printed.
    """
    ended = subprocess.run(
        [str(trl_python()), "-m", "benchmarks.integrations.trl_side", json.dumps(asdict(training))],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        },
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        raise RuntimeError(f"the training failed:\n{ended.stderr[-3000:]}")
    return Trained(**json.loads(ended.stdout.splitlines()[-1]))


def take_turns(case: Case, turns: int) -> Outcome:
    """Patched and unpatched once in each turn; each turn begins with the other one."""
    found: dict[bool, list[Trained]] = {False: [], True: []}
    for turn in range(turns):
        for patched in (False, True) if turn % 2 == 0 else (True, False):
            trained = train(replace(case.training, patched=patched))
            found[patched].append(trained)
            print(
                f"turn {turn + 1}: {case.name}, {'patched' if patched else 'TRL'}: "
                f"{_median([trained]):.2f} s, {trained.peak_mib:.0f} MiB",
                flush=True,
            )
    return Outcome(case, found[False], found[True])


def print_outcome(outcome: Outcome) -> None:
    print(f"\n{outcome.case.name}")
    print(f"  {'metric':<28}{'update':>7}{'TRL':>15}{'patched':>15}{'relative':>10}")
    for each in outcome.deviations:
        verdict = "" if each.relative <= RELATIVE else " rounding" if each.within else " BEYOND"
        print(
            f"  {each.metric:<28}{each.update:>7}{each.theirs:>15.6g}{each.ours:>15.6g}"
            f"{each.relative:>10.1e}{verdict}"
        )
    print(f"  {'':<28}{'s/update':>9}{'peak MiB':>10}")
    for name, trained in (("TRL", outcome.theirs), ("patched", outcome.ours)):
        print(f"  {name:<28}{_median(trained):>9.2f}{_peak(trained):>10.0f}")


def _median(trained: Sequence[Trained]) -> float:
    return statistics.median(second for each in trained for second in each.seconds)


def _peak(trained: Sequence[Trained]) -> float:
    return statistics.median(each.peak_mib for each in trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["smollm2", "vocabulary"]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"of {', '.join(names)}; both unless given")  # fmt: skip
    parser.add_argument("--turns", type=int, default=2, help="processes of each (2)")
    parser.add_argument("--updates", type=int, default=3, help="at least 2, the first untimed (3)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to try it out; JSON only with --output"
    )
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    if options.updates < 2 or options.turns < 1:
        parser.error("--updates must be at least 2 and --turns at least 1")
    output = options.output or (None if options.quick else RESULTS / "integrations_trl.json")
    about = machine()
    print_machine(about)
    trl_python()
    chosen = [case for case in cases(options.quick, options.updates) if case.name in options.cases]
    warn_if_busy()
    outcomes = [take_turns(case, options.turns) for case in chosen]
    for outcome in outcomes:
        print_outcome(outcome)
    targets = [target for outcome in outcomes for target in outcome.targets]
    print_targets(targets)
    if output is not None:
        content = {
            "machine": about,
            "targets": [{**asdict(target), "met": target.met} for target in targets],
            "cases": [
                {
                    "case": _described(outcome.case),
                    "deviations": [
                        {**asdict(each), "within": each.within} for each in outcome.deviations
                    ],
                    "trl": [asdict(each) for each in outcome.theirs],
                    "patched": [asdict(each) for each in outcome.ours],
                }
                for outcome in outcomes
            ],
        }
        write_whole(output, json.dumps(content, indent=2) + "\n")
        print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
