"""What the demo shows at its end: a table, examples and curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Panels of the figure: title, stage, metrics.
PANELS = (
    ("SFT: loss", "sft", ("loss", "eval_loss")),
    ("reward model: accuracy", "reward", ("accuracy", "eval_accuracy")),
    ("reward model: loss", "reward", ("loss", "eval_loss")),
    ("PPO: reward-model score", "ppo", ("score", "reward")),
    ("PPO: KL to the SFT policy (nats per response)", "ppo", ("kl",)),
    ("PPO: entropy (nats per token)", "ppo", ("entropy",)),
    ("PPO: approximate KL of an update", "ppo", ("approx_kl",)),
    ("PPO: clip fraction", "ppo", ("clip_fraction", "value_clip_fraction")),
    ("PPO: value loss", "ppo", ("value_loss",)),
    ("PPO: explained variance", "ppo", ("explained_variance",)),
    ("PPO: response length (tokens)", "ppo", ("response_length",)),
    ("PPO: share of responses that end", "ppo", ("eos_rate",)),
)


def print_report(console: Console, evaluation: dict[str, Any]) -> None:
    """The table of scores and the examples."""
    console.print(score_table(evaluation))
    gain = evaluation["gold_gain"]
    console.print(
        f"Gold score gained by PPO: {gain['mean']:+.3f} "
        f"(standard error {gain['standard_error']:.3f}, {evaluation['prompts']} held-out prompts)"
    )
    for example in evaluation["examples"]:
        console.print(f"\n[bold]{escape(example['prompt'])}[/]")
        for when in ("before", "after"):
            text, gold = escape(example[when]), example[f"gold_{when}"]
            console.print(f"  {when:6} PPO (gold {gold:+.2f}): {text}")


def score_table(evaluation: dict[str, Any]) -> Table:
    """Gold and reward-model score, KL, length and EOS rate of each way to answer."""
    best = evaluation["best_of_n"]
    table = Table(title=f"{evaluation['prompts']} held-out prompts")
    table.add_column("responses of")
    for heading in ("gold score\n(VADER)", "reward\nmodel", "KL to SFT\n(nats)", "tokens", "ended"):
        table.add_column(heading, justify="right")
    for name, row in (
        ("SFT policy (before PPO)", evaluation["before"]),
        ("policy after PPO", evaluation["after"]),
        (f"SFT policy, best of {best['n']}", best),
    ):
        shape = (f"{row['length']:.1f}", f"{row['eos_rate']:.0%}") if "length" in row else ("", "")
        scores = (f"{row['gold']:+.3f}", f"{row['reward']:+.3f}", f"{row['kl']:.2f}")
        table.add_row(name, *scores, *shape)
    return table


def draw_curves(folder: Path, path: Path) -> None:
    """Draw the metrics that the trainers logged under ``folder`` as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logs = {stage: read_log(folder / stage / "metrics.jsonl") for stage in ("sft", "reward", "ppo")}
    figure, axes = plt.subplots(4, 3, figsize=(14, 13), layout="constrained")
    for axis, (title, stage, names) in zip(axes.flat, PANELS, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in logs[stage] if name in row]
            if points:
                axis.plot(*zip(*points), marker=".", label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update" if stage == "ppo" else "step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    temporary = path.with_name("." + path.name)  # keeps the suffix, which names the format
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def escape(text: str) -> str:
    """Text on one line whose brackets rich leaves alone."""
    from rich.markup import escape as escape_markup

    return escape_markup(" ".join(text.split()))
