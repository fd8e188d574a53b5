"""Frozen weights that lie in a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import ppo_with_a_reward_model
from tiny_models import tiny_llama
from torch import nn

from rlhf import PPOConfig
from rlhf.engine import Frozen, TrainingConfig
from rlhf.engine.parked import ParkedWeights
from rlhf.files import OutputError


def mib_in_memory() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_weights_and_buffers_are_bit_for_bit_the_same(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.BatchNorm1d(7), "c": nn.Linear(5, 0)})
    model["a"].bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ParkedWeights(model, tmp_path)
    after = model.state_dict()
    assert list(after) == list(before) and not list(tmp_path.iterdir())
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    ParkedWeights(model, tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_while_the_weights_are_read_alone(tmp_path: Path) -> None:
    model = nn.Linear(4096, 4096)  # 64 MiB
    frozen = Frozen(model, TrainingConfig(dtype="float32"), parked_in=tmp_path)
    before = mib_in_memory()
    inside = frozen.run(lambda layer: (layer.weight.sum(), mib_in_memory())[1])
    assert inside - before > 60
    assert mib_in_memory() - before < 8
    with pytest.raises(KeyError):
        frozen.run(lambda layer: {}[float(layer.weight.sum())])
    assert mib_in_memory() - before < 8


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_of_layers_one_at_a_time_is_in_memory(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 2048), nn.ModuleList(nn.Linear(2048, 2048) for _ in "abcd"))

    def run_layers(model: nn.Sequential) -> list[float]:
        x, found = model[0](torch.ones(1, 8)), []
        for layer in model[1]:  # 16 MiB each
            x = layer(x)
            found.append(mib_in_memory())
        return found

    def output(model: nn.Sequential) -> torch.Tensor:
        x = model[0](torch.ones(1, 8))
        for layer in model[1]:
            x = layer(x)
        return x

    expected = Frozen(model, TrainingConfig(dtype="float32")).run(output)
    frozen = Frozen(model, TrainingConfig(dtype="float32"), parked_in=tmp_path)
    frozen.run(run_layers)
    before = mib_in_memory()
    assert max(frozen.run(run_layers)) - before < 8
    assert torch.equal(frozen.run(output), expected)


def test_an_update_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    found = {}
    for on_disk in (False, True):
        trainer = ppo_with_a_reward_model(tmp_path / str(on_disk), frozen_on_disk=on_disk)
        experience = trainer.rollout(next(trainer.prompts))
        trainer.update(experience)
        found[on_disk] = [experience.scores, experience.ref_logprobs, *trainer.policy.parameters()]
    for plain, parked in zip(found[False], found[True], strict=True):
        assert torch.equal(plain, parked)


def test_a_full_disk_is_said_and_the_model_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    model = nn.Linear(3, 5)
    weight, address = model.weight.clone(), model.weight.data_ptr()
    monkeypatch.setattr("rlhf.engine.parked._append", full)
    with pytest.raises(OutputError, match=r"No space left.*frozen_on_disk off"):
        ParkedWeights(model, tmp_path)
    assert torch.equal(model.weight, weight) and model.weight.data_ptr() == address


def test_weights_on_a_gpu_are_not_parked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = Frozen(nn.Linear(3, 5), TrainingConfig(dtype="float32"))
    with pytest.raises(ValueError, match="frozen_on_disk"):
        frozen._park(torch.device("cuda"), tmp_path)


def test_a_word_is_no_setting() -> None:
    with pytest.raises(ValueError, match="frozen_on_disk='no' must be one of False, True"):
        PPOConfig(frozen_on_disk="no")  # type: ignore[arg-type]
