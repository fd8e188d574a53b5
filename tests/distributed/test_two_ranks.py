"""Two processes under torchrun: the three trainers give what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stories_on_ranks
import torch
from safetensors.torch import load_file
from small_trainings import TRAININGS
from train_8bit_on_ranks import TRAININGS_8BIT, held

from rlhf.engine import CheckpointError
from rlhf.engine.eight_bit_codes import join

HERE = Path(__file__).parent
STRATEGIES = ["ddp", "fsdp", "hybrid"]
# They depend on the clock.
TIMES = ("seconds/", "tokens_per_second")


def torchrun(script: str, *arguments: str) -> list[str]:
    """The command that runs a script beside this one in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*command, str(HERE / script), *arguments]


def environment() -> dict[str, str]:
    paths = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run_on_two_ranks(script: str, folder: Path, *arguments: str) -> Path:
    """Run a script beside this one in two processes; its folder of results."""
    folder.mkdir()
    command = torchrun(script, *arguments, str(folder))
    subprocess.run(command, env=environment(), check=True, timeout=600)
    return folder


@pytest.fixture(scope="module", params=STRATEGIES)
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks made under one strategy."""
    folder = tmp_path_factory.mktemp("ranks") / request.param
    return run_on_two_ranks("train_on_ranks.py", folder, request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, float]]]:
    """What one process makes, and its figures."""
    folder = tmp_path_factory.mktemp("one")
    return folder, {name: make(folder / name).train() for name, make in TRAININGS.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", list(TRAININGS))
@pytest.mark.parametrize("how", ["", "_halved"])
def test_two_ranks_match_one_process_also_when_resumed(
    one: Any, two: Path, name: str, how: str
) -> None:
    folder, figures = one
    found = json.loads((two / "figures.json").read_text())[name + how]
    expected = {k: v for k, v in figures[name].items() if not k.startswith(TIMES)}
    found = {k: v for k, v in found.items() if not k.startswith(TIMES)}
    # Float32 sums in another order, through a few optimizer steps.
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    has_critic = name.startswith("ppo") and name != "ppo_without_critic"
    parts = ["", "critic"] if has_critic else [""]
    for part in parts:
        theirs, ours = weights(two / (name + how) / part), weights(folder / name / part)
        assert theirs.keys() == ours.keys()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", list(TRAININGS))
def test_a_halved_run_on_two_ranks_equals_the_whole_one_bit_for_bit(two: Path, name: str) -> None:
    whole, halved = weights(two / name), weights(two / f"{name}_halved")
    assert all(torch.equal(value, halved[key]) for key, value in whole.items())
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if not k.startswith(("time", *TIMES))}
            for line in (two / run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (name, f"{name}_halved")
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("name", list(TRAININGS))
def test_a_checkpoint_of_two_ranks_loads_in_one_process(
    one: Any, two: Path, name: str, tmp_path: Path
) -> None:
    folder, figures = one
    checkpoint = two / f"{name}_halved" / "checkpoints" / "step-00000002"
    trainer = TRAININGS[name](tmp_path / name)
    with pytest.raises(CheckpointError, match="world_size: 2 before, 1 now"):
        trainer.resume(checkpoint)
    trainer.resume(checkpoint, allow=["world_size", "parallel"])
    metrics = trainer.train()
    for key, value in figures[name].items():
        if not key.startswith(TIMES):
            assert metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    for key, value in weights(folder / name).items():
        torch.testing.assert_close(weights(tmp_path / name)[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_match_one_process_on_a_real_model(
    tmp_path: Path, stories_dir: Path, parallel: str
) -> None:
    """Figures (the losses among them), the first step's gradients, and the policy afterwards."""
    one = tmp_path / "one"
    one.mkdir()
    stories_on_ranks.train(str(stories_dir), "ddp", one)
    two = run_on_two_ranks("stories_on_ranks.py", tmp_path / "two", str(stories_dir), parallel)
    expected, found = (json.loads((at / "figures.json").read_text()) for at in (one, two))
    for ours, theirs in zip(expected, found, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if not name.startswith(TIMES):
                assert theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert expected[0]["kl"] < 1e-3 < expected[1]["kl"]  # the second batch is of another policy
    gradients, others = (torch.load(at / "gradients.pt") for at in (one, two))
    for model in ("policy", "critic"):
        assert gradients[model].keys() == others[model].keys()
        largest = max(gradient.abs().max().item() for gradient in gradients[model].values())
        for name, gradient in gradients[model].items():
            torch.testing.assert_close(others[model][name], gradient, rtol=0, atol=1e-5 * largest)
    ours, theirs = weights(one / "run"), weights(two / "run")
    start = weights(stories_dir)
    for name, value in ours.items():
        # Eight steps of 5e-4 at most; rounding may move a weight by a small share of one.
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=5e-5)
        assert (value - start[name]).abs().max() > 5e-4


def test_a_reward_that_fails_on_one_rank_ends_both_and_loses_nothing(tmp_path: Path) -> None:
    """No checkpoint was asked for; both write one together when the reward fails."""
    folder = run_on_two_ranks("fail_on_a_rank.py", tmp_path / "out")
    assert "the judge is away" in (folder / "rank1").read_text()
    assert "RewardError on rank 1: the reward raised Conn" in (folder / "rank0").read_text()
    trainer = TRAININGS["ppo"](folder / "run")
    trainer.resume(allow=["world_size"])
    assert trainer.step == 1
    trainer.train()


@pytest.fixture(scope="module")
def two_8bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks made under DDP with bfloat16 weights and 8-bit moments."""
    return run_on_two_ranks("train_8bit_on_ranks.py", tmp_path_factory.mktemp("ranks") / "8bit")


def of_24_bits(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All weights in one vector."""
    names = [key.removesuffix(" remainder") for key in tensors if key.endswith(" remainder")]
    pairs = [(tensors[f"{name} weight"], tensors[f"{name} remainder"]) for name in names]
    return torch.cat([join(*pair).view(-1) for pair in pairs]).double()


@pytest.mark.parametrize("name", list(TRAININGS_8BIT))
def test_8bit_both_ranks_hold_the_same_bits_also_when_resumed(two_8bit: Path, name: str) -> None:
    first, *others = (
        torch.load(two_8bit / f"{name}{part}.pt") for part in ("0", "1", "_halved0", "_halved1")
    )
    assert any(key.endswith(" remainder") for key in first)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in first.items())


@pytest.mark.parametrize("name", list(TRAININGS_8BIT))
def test_8bit_two_ranks_go_where_one_process_goes(
    two_8bit: Path, name: str, tmp_path: Path
) -> None:
    trainer = TRAININGS_8BIT[name](tmp_path)
    before = of_24_bits(held(trainer)).clone()
    trainer.train()
    one, two = of_24_bits(held(trainer)), of_24_bits(torch.load(two_8bit / f"{name}0.pt"))
    # Gradients are added up in bfloat16, a dozen of them at most and in another order: 12 · 2^-9 of
    # the largest, and a change is the quotient of two means of them.
    assert (two - one).norm() < 2 * 12 * 2**-9 * (one - before).norm()
