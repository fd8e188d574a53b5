"""Pairs of sampled responses to each prompt, compared by the simulated annotators."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.data import PreferenceDataset, agreement_stats
from rlhf.demo.annotators import SIMULATED_ANNOTATORS, annotate, gold_scores
from rlhf.demo.sampling import sample
from rlhf.demo.settings import DemoSettings

TRAIN, HELD_OUT = "train.jsonl", "heldout.jsonl"


def make_comparisons(
    policy: Path, prompts: Sequence[str], folder: Path, settings: DemoSettings
) -> dict[str, Any]:
    """Sample, compare and write ``train.jsonl`` and ``heldout.jsonl`` into ``folder``.

    Pairs that hold nothing to compare (an empty response, or twice the same) are left out.

    Returns:
        Counts and the agreement of the simulated annotators.
    """
    count = settings.pairs_per_prompt
    texts = sample(policy, prompts, 2 * count, settings.generation(), settings.seed).texts
    asked = [prompt for prompt in prompts for _ in range(count)]
    pairs = [
        (prompt, a, b)
        for prompt, a, b in zip(asked, texts[::2], texts[1::2], strict=True)
        if a.strip() and b.strip() and a.strip() != b.strip()
    ]
    labels, majority = annotate(
        gold_scores([a for _, a, _ in pairs]),
        gold_scores([b for _, _, b in pairs]),
        settings.seed,
    )
    comparisons = PreferenceDataset()
    for (prompt, a, b), row, preference in zip(pairs, labels, majority, strict=True):
        comparisons.add_comparison(prompt, a, b, preference, simulated_annotators=row)
    split = len(comparisons) - settings.heldout_pairs
    # Pairs of one prompt stay on one side.
    while split > 0 and comparisons[split - 1].prompt == comparisons[split].prompt:
        split -= 1
    if split < 1:
        raise ValueError(
            f"only {len(comparisons)} comparisons were decided, "
            f"too few to hold {settings.heldout_pairs} out for the reward model's accuracy"
        )
    PreferenceDataset(comparisons.pairs[:split]).save(folder / TRAIN)
    PreferenceDataset(comparisons.pairs[split:]).save(folder / HELD_OUT)
    stats = agreement_stats(labels)
    return {
        "simulated_annotators": [annotator.name for annotator in SIMULATED_ANNOTATORS],
        "compared": len(pairs),
        "ties": len(comparisons.ties),
        "training_pairs": split,
        "heldout_pairs": len(comparisons) - split,
        "agreement": str(stats),
        "unanimous_rate": stats.unanimous_rate,
        "fleiss_kappa": stats.fleiss_kappa,
        "krippendorff_alpha": stats.krippendorff_alpha,
    }
