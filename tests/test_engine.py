"""The engine: optimizer steps, schedules, failures, saving and tracking."""

from __future__ import annotations

import io
import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors import SafetensorError
from tiny_models import tiny_llama, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.engine import (
    MAX_SEED,
    Engine,
    NonFiniteError,
    OutputError,
    SkippedStepsError,
    Trackers,
    TrainingConfig,
    World,
    begin_training,
    discarding_on_error,
    ensure_writable,
    epoch_order,
    learning_rate_factor,
    micro_batches,
    rank_micro_batches,
    resolve_dtype,
    save_config,
    save_model,
    set_seed,
)
from rlhf.engine.engine import make_optimizer
from rlhf.engine.progress import ProgressBar, ProgressLines


def config(**options: Any) -> TrainingConfig:
    return TrainingConfig(**{"dtype": "float32", "lr_schedule": "constant", **options})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output_dir", " "),
        ("learning_rate", 0.0),
        ("learning_rate", "1e-5"),
        ("learning_rate", math.nan),
        ("weight_decay", -0.1),
        ("adam_beta2", 1.0),
        ("adam_eps", 0),
        ("max_grad_norm", -1.0),
        ("lr_schedule", "step"),
        ("warmup_ratio", 1.5),
        ("seed", -1),
        ("seed", 2**70),
        ("dtype", "float16"),
        ("micro_batch_size", 0),
        ("micro_batch_size", 2.5),
        ("micro_batch_size", True),
        ("log_every", 0),
        ("trackers", ["mlflow"]),
        ("trackers", "jsonl"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        TrainingConfig(**{field: value})
    if field != "output_dir":
        assert repr(value) in str(caught.value)


def test_a_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config(output_dir="~/runs/a").output_dir == str(tmp_path / "runs" / "a")
    assert config(output_dir=tmp_path / "b").output_dir == str(tmp_path / "b")


def test_no_clipping_is_a_valid_setting() -> None:
    assert TrainingConfig(max_grad_norm=None).max_grad_norm is None


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447, 0.0]),
    ],
)
def test_schedule(schedule: str, expected: list[float]) -> None:
    """Six steps, two of warmup; the seventh is beyond the end."""
    rates = [learning_rate_factor(schedule, step, 6, 1 / 3) for step in range(7)]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_steps_match_plain_adamw_with_clipping() -> None:
    """Micro-batches add up; clipping, decay and the schedule are those of a hand-written loop."""
    torch.manual_seed(1)
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    settings = config(learning_rate=0.1, weight_decay=0.1, max_grad_norm=0.1, lr_schedule="linear")
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    engine = Engine(ours, settings, total_steps=3)
    optimizer = torch.optim.AdamW(
        [
            {"params": [theirs.weight], "weight_decay": 0.1},
            {"params": [theirs.bias], "weight_decay": 0.0},
        ],
        lr=0.1,
    )
    for step in range(3):
        for part in (slice(0, 2), slice(2, 8)):
            engine.backward(((ours(x[part]) - y[part]) ** 2).sum() / 16)
        result = engine.step()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1 * (3 - step) / 3
        ((theirs(x) - y) ** 2).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert result["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert result["grad_norm"] > 0.1  # clipping was at work
        assert result["learning_rate"] == pytest.approx(0.1 * (3 - step) / 3)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-5, atol=1e-6)


def test_weight_decay_spares_vectors() -> None:
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(list(layer.parameters()), config(weight_decay=0.2), 0.1)
    decays = {len(g["params"][0].shape): g["weight_decay"] for g in optimizer.param_groups}
    assert decays == {2: 0.2, 1: 0.0}


def test_an_error_leaves_nothing_for_the_next_step() -> None:
    layer = nn.Linear(2, 1)
    engine = Engine(layer, config(), 5)
    with pytest.raises(KeyError), discarding_on_error(engine):
        engine.backward(layer(torch.ones(1, 2)).sum())
        engine.backward(layer(torch.full((1, 2), math.nan)).sum())
        raise KeyError
    assert all(parameter.grad is None for parameter in layer.parameters())
    engine.backward(layer(torch.ones(1, 2)).sum())
    assert engine.step()["grad_norm"] == pytest.approx(math.sqrt(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_skips_the_step_and_is_named(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    layer, other = nn.Linear(2, 1), nn.Linear(2, 1)
    engine = Engine(layer, config(max_skipped_steps=2), 5, name="the policy")
    before = layer.weight.detach().clone()

    def step(factor: float) -> float:
        value = other(torch.ones(1, 2)).sum()
        loss = factor * layer(torch.ones(1, 2)).sum() + value
        engine.backward(loss, terms={"policy loss": loss, "value loss": value})
        return engine.step()["skipped_step"]

    assert step(bad) == 1.0
    assert torch.equal(layer.weight, before)
    assert "the policy, optimizer step 1: skipped, since the policy loss became NaN" in caplog.text
    assert "value loss" not in caplog.text
    assert step(1.0) == 0.0  # nothing of the bad loss is left
    assert torch.isfinite(layer.weight).all() and not torch.equal(layer.weight, before)
    step(bad)
    with pytest.raises(SkippedStepsError, match=r"policy loss became .* \(2 in a row\)"):
        step(bad)


def test_a_bad_gradient_skips_the_step_and_the_third_in_a_row_raises(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = nn.Linear(2, 1)
    engine = Engine(layer, config(learning_rate=0.1), 10)
    before = layer.weight.detach().clone()

    def step(gradient: float) -> dict[str, float]:
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        return engine.step()

    for _ in range(2):
        assert step(math.nan) == {"grad_norm": 0.0, "learning_rate": 0.1, "skipped_step": 1.0}
    assert torch.equal(layer.weight, before)
    assert "skipped, since the gradient norm is nan; the weights are left as" in caplog.text
    assert "(2 in a row)" in caplog.text
    assert step(1.0)["skipped_step"] == 0.0  # a good step in between starts the count anew
    assert not torch.equal(layer.weight, before)
    after = layer.weight.detach().clone()
    step(math.inf)
    step(math.inf)
    with pytest.raises(SkippedStepsError, match="3 in a row"):
        step(math.inf)
    assert torch.equal(layer.weight, after)
    assert engine.steps_done == 5


def test_weights_must_be_float32_and_trainable() -> None:
    with pytest.raises(ValueError, match=r"weight is torch\.bfloat16"):
        Engine(nn.Linear(2, 1).bfloat16(), config(), 1)
    with pytest.raises(ValueError, match="the critic has no trainable"):
        Engine(nn.Linear(2, 1).requires_grad_(False), config(), 1, name="the critic")


def test_autocast_follows_dtype_and_weights_stay_float32() -> None:
    for dtype, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        engine = Engine(nn.Linear(2, 1), config(dtype=dtype), 1)
        with engine.autocast():
            out = engine.model(torch.ones(1, 2, device=engine.device))
        assert out.dtype == expected
        assert engine.model.weight.dtype == torch.float32


@pytest.mark.parametrize("feature", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_auto_dtype_follows_what_the_processor_can(
    monkeypatch: pytest.MonkeyPatch, feature: str
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cpu, feature, lambda: True)
    assert resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16
    assert resolve_dtype("float32", torch.device("cpu")) == torch.float32


def test_gradient_checkpointing_changes_no_gradient() -> None:
    ids = torch.arange(4, 12).unsqueeze(0)
    grads = []
    for checkpointing in (False, True):
        engine = Engine(tiny_llama(), config(gradient_checkpointing=checkpointing), 1)
        assert engine.model.is_gradient_checkpointing == checkpointing
        ids = ids.to(engine.device)
        engine.backward(engine.model(input_ids=ids, labels=ids).loss)
        grads.append([parameter.grad for parameter in engine.parameters])
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_world_of_one() -> None:
    world, tensor = World(), torch.ones(2)
    assert world.is_main and world.all_reduce_sum(tensor) is tensor


def test_set_seed_repeats() -> None:
    import random

    import numpy as np

    draws = []
    for _ in range(2):
        set_seed(3)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_every_epoch_is_another_seeded_partition() -> None:
    steps = epoch_order(37, 16, seed=1, epoch=0)
    assert [len(step) for step in steps] == [16, 16, 5]
    assert sorted(chain(*steps)) == list(range(37))
    assert steps == epoch_order(37, 16, seed=1, epoch=0)
    assert steps != epoch_order(37, 16, seed=1, epoch=1)
    assert steps != epoch_order(37, 16, seed=2, epoch=0)
    largest = [epoch_order(37, 16, seed=MAX_SEED, epoch=epoch) for epoch in (0, 1)]
    assert largest[0] != largest[1]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    size=st.integers(1, 8),
    tokens=st.none() | st.integers(1, 100),
    ranks=st.integers(1, 5),
)
def test_ranks_share_rows_in_equally_many_micro_batches(
    lengths: list[int], size: int, tokens: int | None, ranks: int
) -> None:
    rows = list(range(len(lengths)))[::-1]
    shares = [
        rank_micro_batches(rows, lengths, size=size, tokens=tokens, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    parts = [part for share in shares for part in share]
    assert sorted(chain(*parts)) == sorted(rows)
    counts = [sum(map(len, share)) for share in shares]
    assert max(counts) - min(counts) <= 1
    for part in parts:
        assert len(part) <= size
        assert (
            tokens is None or len(part) <= 1 or len(part) * max(lengths[r] for r in part) <= tokens
        )


def test_micro_batches_are_sorted_by_length() -> None:
    lengths = [5, 1, 4, 2, 3]
    assert micro_batches(range(5), lengths, size=2) == [[1, 3], [4, 2], [0]]
    assert micro_batches(range(5), lengths, size=5, tokens=6) == [[1, 3], [4], [2], [0]]


def test_unwritable_output_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match=r"cannot write to the output folder .*output_dir"):
        ensure_writable(file / "folder")
    with pytest.raises(OutputError):
        save_model(tiny_llama(), tiny_tokenizer(), file / "folder")


def test_saved_model_loads_and_saving_again_replaces_it(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    ensure_writable(folder)
    (folder / "metrics.jsonl").write_text("kept")
    (folder / "model-00001-of-00002.safetensors").write_text("stale")
    ids = torch.arange(4, 12).unsqueeze(0)
    for seed in (0, 1):
        model = tiny_llama(seed)
        save_model(model, tiny_tokenizer(), folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert AutoTokenizer.from_pretrained(folder)("w1 w2")["input_ids"] == [8, 9]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "metrics.jsonl"} <= names
    assert not names & {".partial", "model-00001-of-00002.safetensors"}


def test_an_interrupted_save_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny_llama(0), tiny_tokenizer(), tmp_path)
    broken = tiny_llama(1)

    def fail(folder: Path) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(broken, "save_pretrained", fail)
    with pytest.raises(OutputError, match="No space left"):
        save_model(broken, tiny_tokenizer(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, tiny_llama(0).lm_head.weight)
    assert not (tmp_path / ".partial").exists()


def test_a_full_disk_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OutputError, match=r"cannot save the model to .*No space left"):
        save_model(tiny_llama(), tiny_tokenizer(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_new_training_sets_an_earlier_model_aside(tmp_path: Path) -> None:
    save_model(tiny_llama(0), tiny_tokenizer(), tmp_path)
    (tmp_path / "stage.json").write_text("{}")
    begin_training(config(output_dir=str(tmp_path), seed=7), tmp_path / "absent")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json.earlier", "model.safetensors", "training_config.json"} <= names
    assert not names & {"config.json", "stage.json"}
    save_model(tiny_llama(1), tiny_tokenizer(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "config.json" in names and "config.json.earlier" not in names


def test_save_config(tmp_path: Path) -> None:
    save_config(config(seed=7), tmp_path)
    assert json.loads((tmp_path / "training_config.json").read_text())["seed"] == 7


def test_trackers_write_jsonl_and_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second run replaces the first
        with Trackers(["jsonl", "tensorboard"], tmp_path, 2) as trackers:
            trackers.log({"loss": 0.5}, 1)
            trackers.log({"loss": 0.25, "kl": 1.0}, 2)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 0.5), (2, 0.25)]
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_a_metric_that_is_not_a_number_is_an_error(tmp_path: Path) -> None:
    with (
        Trackers(["jsonl"], tmp_path) as trackers,
        pytest.raises(NonFiniteError, match="'kl' is nan at step 4"),
    ):
        trackers.log({"loss": 0.5, "kl": math.nan}, 4)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_metric_that_is_not_a_number_is_left_out_where_a_step_was_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    figures = {"return_mean": math.inf, "score": 0.5, "critic_skipped_step": 1.0}
    with Trackers(["jsonl"], tmp_path) as trackers:
        trackers.log(figures, 4)
        with pytest.raises(NonFiniteError, match="'eval_kl' is nan at step 5"):
            trackers.log({**figures, "eval_kl": math.nan}, 5)
        with pytest.raises(NonFiniteError, match="'return_mean' is inf at step 6"):
            trackers.log({**figures, "critic_skipped_step": 0.0}, 6)
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").open())
    assert {*record} == {"step", "time", "score", "critic_skipped_step"}
    assert "step 4: return_mean (inf) cannot be logged" in caplog.text


def test_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mlflow"):
        Trackers(["mlflow"], tmp_path)


def test_progress_without_a_terminal_is_plain_lines() -> None:
    stream = io.StringIO()
    progress = ProgressLines(Console(file=stream), "sft", 3, ["loss"])
    for step in (1, 2, 3):
        progress.log({"loss": 1 / step, "other": 5.0}, step)
    progress.close()
    assert stream.getvalue().splitlines() == ["sft 1/3  loss 1", "sft 3/3  loss 0.3333"]


def test_progress_bar_shows_key_figures() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    progress = ProgressBar(console, "sft", 3, ["loss"])
    progress.log({"loss": 0.125}, 3)
    progress.close()
    assert "3/3" in stream.getvalue() and "loss 0.125" in stream.getvalue()
