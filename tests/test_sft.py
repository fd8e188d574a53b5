"""Supervised fine-tuning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data import ChatFormat, DataError, Demonstration, load_rows
from rlhf.engine import NonFiniteError, OutputError, SkippedStepsError
from rlhf.models import ModelError
from rlhf.sft import SFTConfig, SFTTrainer


def rows(count: int = 24) -> list[dict[str, Any]]:
    """Answers of 1 to 7 times the same word: easy to learn, of all lengths."""
    return [
        {"prompt": f"w{i} w{i + 1}", "completion": " ".join(["w1"] * (1 + i % 7))}
        for i in range(count)
    ]


def config(folder: Path, **options: Any) -> SFTConfig:
    return SFTConfig(
        **{
            "output_dir": str(folder),
            "learning_rate": 3e-3,
            "batch_size": 8,
            "micro_batch_size": 4,
            "dtype": "float32",
            "trackers": ["jsonl"],
            **options,
        }
    )


def trainer(folder: Path, data: Any = None, **options: Any) -> SFTTrainer:
    return SFTTrainer(config(folder, **options), tiny_llama(), tiny_tokenizer(), data or rows())


def plain_loss(model: Any, chat_format: ChatFormat, examples: list[dict[str, Any]]) -> torch.Tensor:
    """The definition, one sequence at a time: mean over completion tokens of -log p."""
    losses = []
    for row in examples:
        ids, mask = chat_format.encode(row["prompt"], row["completion"])
        logits = model(torch.tensor([ids])).logits[0]
        logprobs = torch.log_softmax(logits[:-1], -1)[torch.arange(len(ids) - 1), ids[1:]]
        losses.append(-logprobs[torch.tensor(mask[1:]).bool()])
    return torch.cat(losses).mean()


def test_evaluation_is_the_mean_loss_per_completion_token(tmp_path: Path) -> None:
    sft = SFTTrainer(config(tmp_path), tiny_llama(), tiny_tokenizer(), rows(), rows(9))
    expected = plain_loss(tiny_llama(), ChatFormat(tiny_tokenizer()), rows(9)).item()
    metrics = sft.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_a_step_is_one_batch_however_it_is_cut(tmp_path: Path, micro_batch_size: int) -> None:
    """Gradients of the accumulated step against autograd on the whole batch's mean."""
    sft = trainer(
        tmp_path,
        rows(8),
        eval_fraction=0,
        micro_batch_size=micro_batch_size,
        max_grad_norm=None,
    )
    grads: list[torch.Tensor] = []
    step = sft.engine.step

    def record() -> dict[str, float]:
        grads.extend(parameter.grad.clone() for parameter in sft.engine.parameters)
        return step()

    sft.engine.step = record  # type: ignore[method-assign]
    metrics = sft.train()
    model = tiny_llama()
    loss = plain_loss(model, ChatFormat(tiny_tokenizer()), rows(8))
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for found, parameter in zip(grads, model.parameters()):
        # Sums of the same float32 terms in another order.
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)


def test_training_lowers_the_held_out_loss_and_writes_everything(tmp_path: Path) -> None:
    sft = trainer(tmp_path, epochs=6)
    metrics = sft.train()
    # 24 rows, 2 held out: 22 in batches of 8 make 3 steps an epoch.
    assert sft.engine.steps_done == sft.total_steps == 18
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.3
    assert metrics["epoch"] == 6.0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    evaluations = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    assert [step for step, _ in evaluations] == [0, 3, 6, 9, 12, 15, 18]
    assert evaluations[-1][1] == pytest.approx(metrics["eval_loss"])
    trained = [r for r in records if "loss" in r]
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second"} <= set(trained[0])
    assert json.loads((tmp_path / "training_config.json").read_text())["epochs"] == 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    held_out = SFTTrainer(config(tmp_path / "x"), model, tokenizer, rows(8), rows(4)).evaluate()
    again = SFTTrainer(config(tmp_path / "y"), sft.model, tokenizer, rows(8), rows(4)).evaluate()
    assert held_out == again


def test_same_seed_same_result(tmp_path: Path) -> None:
    results = []
    for seed in (1, 1, 2):
        sft = trainer(tmp_path, seed=seed, eval_fraction=0, max_steps=2)
        sft.train()
        results.append(torch.cat([p.detach().flatten() for p in sft.model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_max_steps_and_log_every(tmp_path: Path) -> None:
    sft = trainer(tmp_path, epochs=9, max_steps=5, log_every=2, eval_fraction=0)
    metrics = sft.train()
    assert sft.engine.steps_done == 5
    assert "eval_loss" not in metrics
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [r["step"] for r in records] == [2, 4, 5]


def test_data_as_path_and_as_demonstrations(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    demonstrations = [
        Demonstration(r["prompt"], r["completion"], row=i) for i, r in enumerate(rows())
    ]
    for data in (path, str(path), load_rows(path), demonstrations):
        assert len(trainer(tmp_path / "out", data).train_examples) == 22


def test_model_and_tokenizer_by_folder(tmp_path: Path) -> None:
    trainer(tmp_path / "first", max_steps=1).train()
    second = SFTTrainer(config(tmp_path / "second"), str(tmp_path / "first"), None, rows())
    assert second.tokenizer.eos_token == "<end>"


def test_pad_that_is_eos_still_trains_eos(tmp_path: Path) -> None:
    """Masks come from lengths, so the last token is trained whatever pads."""
    apart = SFTTrainer(config(tmp_path), tiny_llama(), tiny_tokenizer(), rows(), rows(9))
    with pytest.warns(UserWarning, match="EOS pads"):
        same = SFTTrainer(config(tmp_path), tiny_llama(), tiny_tokenizer("<end>"), rows(), rows(9))
    assert same.tokenizer.pad_token_id == same.tokenizer.eos_token_id
    assert same.evaluate() == apart.evaluate()


def test_bad_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        SFTTrainer(config(tmp_path), tiny_llama(), tiny_tokenizer(), [])
    long = [*rows(4), {"prompt": "w1 " * 80, "completion": "w2"}]
    with pytest.raises(DataError, match=r"row 5: the prompt alone fills max_length=64"):
        trainer(tmp_path, long, eval_fraction=0)
    with pytest.raises(ValueError, match="max_length=100 is longer than the context"):
        trainer(tmp_path, max_length=100)
    with pytest.raises(DataError, match=r"cannot hold out.*set eval_fraction=0"):
        trainer(tmp_path, rows(1))
    with pytest.raises(ModelError, match="no tokenizer is given"):
        SFTTrainer(config(tmp_path), tiny_llama(), None, rows())
    with pytest.raises(ModelError, match=r"has no config\.json"):
        SFTTrainer(config(tmp_path), tmp_path, tiny_tokenizer(), rows())
    for field, value in (
        ("epochs", 0),
        ("batch_size", 0),
        ("eval_fraction", 1.0),
        ("max_steps", 0),
    ):
        with pytest.raises(ValueError, match=f"{field}={value}"):
            config(tmp_path, **{field: value})
    with pytest.raises(ValueError, match="template='chatml'"):
        config(tmp_path, template="chatml")


def test_unwritable_output_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to the output folder"):
        SFTTrainer(config(tmp_path / "file" / "out"), "no/such-model", None, rows())


def test_a_model_that_breaks_stops_the_training(tmp_path: Path) -> None:
    sft = trainer(tmp_path, eval_fraction=0)
    with torch.no_grad():
        sft.model.lm_head.weight[0, 0] = math.nan
    message = r"sft model, optimizer step 3: skipped, since the loss became NaN.*Step 2 is saved"
    with pytest.raises(SkippedStepsError, match=message):
        sft.train()
    assert not (tmp_path / "config.json").exists()


def test_a_training_that_breaks_off_leaves_no_earlier_model(tmp_path: Path) -> None:
    trainer(tmp_path, eval_fraction=0, max_steps=1).train()
    second = trainer(tmp_path, eval_fraction=0, max_steps=1)
    with torch.no_grad():
        second.model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        second.train()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        SFTTrainer(config(tmp_path / "x"), tmp_path, tiny_tokenizer(), rows())


def test_a_finished_training_is_not_begun_again(tmp_path: Path) -> None:
    sft = trainer(tmp_path, eval_fraction=0, max_steps=1)
    sft.train()
    written = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(RuntimeError, match="all 1 optimizer steps are done"):
        sft.train()
    assert (tmp_path / "metrics.jsonl").read_text() == written
    assert (tmp_path / "config.json").exists()


def test_real_model_learns_real_instructions(
    tmp_path: Path, shared_dir: Path, stories_dir: Path
) -> None:
    data = load_rows(f"{shared_dir}/data/alpaca-en-demo.json[:160]")
    settings = config(tmp_path, learning_rate=1e-3, max_length=256, batch_size=16, epochs=1)
    short = [row for row in data if len(row["instruction"] + row["input"]) < 120]
    with pytest.warns(UserWarning, match="lost their end"):
        sft = SFTTrainer(settings, str(stories_dir), None, short)
    metrics = sft.train()
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.2


def test_adapters_inside_a_model_are_refused(tmp_path: Path) -> None:
    """They would be trained, and a folder without weights would be saved."""
    from peft import LoraConfig

    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="the model comes with adapters of peft"):
        SFTTrainer(config(tmp_path), model, tiny_tokenizer(), rows())
