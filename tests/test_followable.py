"""The trainer stays small, and docs/ppo.md follows it in the order of its code."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from rlhf import PPOConfig

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf"
PPO = PACKAGE / "ppo"
PAGE = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
SUPERVISED = [PACKAGE / f"{name}.py" for name in ("sft", "reward", "reward_model")]
FILES = sorted([*PPO.rglob("*.py"), *(PACKAGE / "engine").glob("*.py"), *SUPERVISED])


def body(path: Path, class_name: str, function: str) -> list[ast.stmt]:
    """The statements of a method, without its docstring."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == function:
                    return part.body[1:]
    raise AssertionError(f"{path} has no {class_name}.{function}")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_of_a_trainer_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize(
    ("path", "class_name"),
    [
        (PPO / "trainer.py", "PPOTrainer"),
        (PACKAGE / "engine" / "supervised.py", "SupervisedTrainer"),
    ],
)
def test_train_fits_a_screen(path: Path, class_name: str) -> None:
    statements = body(path, class_name, "train")
    assert (statements[-1].end_lineno or 0) - statements[0].lineno < 40


def test_an_update_is_the_pages_steps_in_the_pages_order() -> None:
    """Each step of the page names the file it is in, and the code calls them in that order."""
    section = PAGE.split("## One update")[1].split("\n## ")[0]
    numbers = [int(number) for number in re.findall(r"^\*\*(\d+)\. ", section, re.MULTILINE)]
    assert numbers == list(range(1, 10))
    named = re.findall(r"^\*\*\d+\. [^*]+\*\* \((`[^)]+)\)", section, re.MULTILINE)
    files = [name for names in named for name in re.findall(r"`([\w/]+(?:\.py)?)/?`", names)]
    assert len(files) >= 8
    for name in files:
        assert (PPO / name).exists(), name
    # sampling, scores, log-probabilities, (shaped) rewards and advantages; then optimizer steps
    rollout, update = (
        "\n".join(map(ast.unparse, body(PPO / "trainer.py", "PPOTrainer", name)))
        for name in ("rollout", "update")
    )
    calls = ["self._encode", "self._sample", "shared_scores", "make_experience", "estimate_adv"]
    places = [rollout.index(call) for call in calls]
    assert places == sorted(places)
    assert "run_epochs" in update and "kl_control.update" in update


@pytest.mark.parametrize("part", ["kl", "loss", "rewards", "sampling"])
def test_every_setting_of_an_update_is_on_the_page(part: str) -> None:
    settings = {field.name for field in dataclasses.fields(PPOConfig)}
    tree = ast.parse((PPO / "config" / f"{part}.py").read_text(encoding="utf-8"))
    own = {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    } & settings
    assert own
    assert {name for name in own if f"`{name}" not in PAGE} == set()
