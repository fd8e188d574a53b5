"""PPO with a plain Python function as the reward, on a language model of 260,000 parameters.

The model writes tiny stories; the function likes stories in which somebody is happy, up to twice.
On two CPU cores it takes about a minute:

    python examples/stories_ppo.py PATH/TO/stories260k --output runs/stories
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from rlhf import PPOConfig, PPOTrainer

PROMPTS = [
    "Once upon a time",
    "One day, Lily",
    "Tom and his dog",
    "The little girl",
    "A boy named Tim",
    "There was a big tree",
    "Mom and Dad",
    "In the park,",
]


def happiness(prompts: list[str], responses: list[str]) -> list[float]:
    """How often a response says "happy", counted up to two."""
    return [min(2.0, len(re.findall(r"\bhappy\b", text))) for text in responses]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of the stories260k model")
    parser.add_argument("--output", default="runs/stories", help="where the results go")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_config(output: str, updates: int, seed: int) -> PPOConfig:
    """Learning rates far above those of large models, since this one is so small.

    The critic's is higher: it starts from nothing and must soon tell luck from skill.
    """
    return PPOConfig(
        output_dir=output,
        template="none",  # a model of plain text, not of conversations
        total_updates=updates,
        batch_size=64,
        minibatch_size=32,
        micro_batch_size=32,
        epochs=2,
        max_new_tokens=40,
        learning_rate=3e-4,
        critic_learning_rate=1e-3,
        warmup_ratio=0.2,
        kl_coef=0.15,
        entropy_coef=0.0,
        dtype="float32",
        seed=seed,
    )


def main() -> None:
    arguments = parse_arguments()
    config = make_config(arguments.output, arguments.updates, arguments.seed)
    trainer = PPOTrainer(config, arguments.model, arguments.model, PROMPTS, happiness)
    before = trainer.rollout(PROMPTS * 32)
    trainer.train()
    after = trainer.rollout(PROMPTS * 32)
    for name, experience in {"before": before, "after": after}.items():
        report(name, experience)
    print(f"The trained model is in {arguments.output}.")


def report(name: str, experience: Any) -> None:
    """The mean score with its standard error, the KL divergence, and a few stories."""
    scores = experience.scores
    error = scores.std() / len(scores) ** 0.5
    kl = experience.kl.sum(1).mean()
    print(f"\n{name}: score {scores.mean():.3f} ± {error:.3f}, KL to the reference {kl:.2f} nats")
    for row, text in list(zip(experience.prompts, experience.texts))[:3]:
        print("  " + (row["prompt"] + text).replace("\n", " "))


if __name__ == "__main__":
    main()
