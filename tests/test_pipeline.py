"""Stages that run once, and the pipeline made of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from word_models import HOSTILE, NEUTRAL, WARM, save_word_model

from rlhf.data import DataError
from rlhf.engine import OutputError
from rlhf.engine.resume import differences, fingerprint
from rlhf.models import ModelError
from rlhf.pipeline import PipelineConfig, RLHFPipeline
from rlhf.ppo import PPOConfig
from rlhf.reward import RewardConfig
from rlhf.sft import SFTConfig, SFTTrainer
from rlhf.stages import Stage, StageError, StageRunner

DEMONSTRATIONS = [
    {"prompt": f"the {noun}", "completion": f"{word} {noun}"}
    for noun in NEUTRAL
    for word in WARM[:2]
]
PAIRS = [
    {"prompt": f"a {noun}", "chosen": f"{warm} {noun}", "rejected": f"{hostile} {noun}"}
    for noun in NEUTRAL
    for warm, hostile in zip(WARM[:2], HOSTILE)
]
LONG = {"prompt": "the table " * 100}
PROMPTS = [{"prompt": f"{noun} is"} for noun in NEUTRAL]


def make_config(folder: Path, **changes: Any) -> PipelineConfig:
    quiet: dict[str, Any] = {"trackers": ["jsonl"], "dtype": "float32"}
    values: dict[str, Any] = {
        "model": str(folder / "base"),
        "sft_data": DEMONSTRATIONS,
        "preference_data": PAIRS,
        "prompts": PROMPTS,
        "output_dir": str(folder / "run"),
        "sft": SFTConfig(batch_size=10, learning_rate=1e-3, **quiet),
        "reward": RewardConfig(batch_size=10, learning_rate=1e-3, **quiet),
        "ppo": PPOConfig(
            batch_size=4,
            minibatch_size=2,
            total_updates=2,
            epochs=1,
            max_new_tokens=5,
            learning_rate=1e-3,
            **quiet,
        ),
    }
    return PipelineConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with a base model and a finished run, and what the run said."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_word_model(folder / "base")
    said: list[str] = []
    RLHFPipeline(make_config(folder), say=said.append).run()
    return folder, said


def modified(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_each_stage_leaves_a_folder_that_transformers_loads(
    finished: tuple[Path, list[str]],
) -> None:
    run = finished[0] / "run"
    AutoModelForCausalLM.from_pretrained(run / "sft")
    AutoModelForCausalLM.from_pretrained(run / "ppo")
    reward = AutoModelForSequenceClassification.from_pretrained(run / "reward")
    assert reward.config.num_labels == 1


def test_the_stages_are_announced_in_order(finished: tuple[Path, list[str]]) -> None:
    headings = [line.split(":")[0] for line in finished[1] if line.startswith("[")]
    assert headings == ["[1/3] sft", "[2/3] reward", "[3/3] ppo"]


def test_a_second_run_redoes_nothing_and_says_so(finished: tuple[Path, list[str]]) -> None:
    folder = finished[0]
    before = modified(folder / "run")
    said: list[str] = []
    results = RLHFPipeline(make_config(folder), say=said.append).run()
    assert modified(folder / "run") == before
    assert ["already done" in line for line in said] == [True] * 3
    assert set(results) == {"sft", "reward", "ppo"}
    assert "eval_accuracy" in results["reward"]


def test_a_changed_setting_is_named_with_what_depends_on_it(
    finished: tuple[Path, list[str]],
) -> None:
    folder = finished[0]
    before = modified(folder / "run")
    config = make_config(folder)
    config.reward = dataclasses.replace(config.reward, learning_rate=5e-4)
    with pytest.raises(StageError) as caught:
        RLHFPipeline(config).run()
    message = str(caught.value)
    assert "reward.learning_rate: 0.001 before, 0.0005 now" in message
    assert f"rm -r {folder / 'run' / 'reward'} {folder / 'run' / 'ppo'}" in message
    assert "sft" not in message.split("rm -r")[1]
    assert modified(folder / "run") == before


@pytest.mark.parametrize("name", ["trackers", "log_every", "micro_batch_size"])
def test_settings_without_effect_on_results_may_change(
    finished: tuple[Path, list[str]], name: str
) -> None:
    config = make_config(finished[0])
    new: dict[str, Any] = {"trackers": [], "log_every": 7, "micro_batch_size": 3}
    config.sft = dataclasses.replace(config.sft, **{name: new[name]})
    said: list[str] = []
    RLHFPipeline(config, say=said.append).run()
    assert all("already done" in line for line in said)


def test_changed_content_of_a_data_file_is_noticed(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(DEMONSTRATIONS[0]) + "\n")
    before = fingerprint(str(data))
    data.write_text(json.dumps(DEMONSTRATIONS[1]) + "\n")
    assert fingerprint(str(data)) != before


def test_a_change_in_a_home_or_a_folder_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    file = folder / "deep" / "rows.jsonl"
    seen = set()
    for content in ("a", "b", "longer"):
        file.write_text(content)
        os.utime(file, ns=(len(seen), len(seen)))
        seen |= {fingerprint("~/data"), fingerprint("~/data/deep/rows.jsonl")}
        assert fingerprint("~/data") == fingerprint(folder) == fingerprint(str(folder))
    file.rename(folder / "other.jsonl")
    seen.add(fingerprint(folder))
    assert len(seen) == 7


def test_another_base_model_in_the_same_folder_is_noticed(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "copy")
    base = tmp_path / "copy" / "base"
    config = make_config(finished[0], model=str(base))
    before = RLHFPipeline(config).runner.stages[0].settings["model content"]
    os.utime(base / "model.safetensors", ns=(1, 1))
    assert RLHFPipeline(config).runner.stages[0].settings["model content"] != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": [{"prompt": "a"}, {"prompt": ""}]},
            "prompts: prompts, row 2: prompt is empty",
        ),
        ({"prompts": "{folder}/absent.jsonl"}, "prompts: .*absent.jsonl: there is no such file"),
        (
            {"preference_eval_data": "{folder}/bad.jsonl[1:]"},
            "preference_eval_data: .*d.jsonl, row 2",
        ),
        ({"preference_data": [{"prompt": "a"}]}, "preference_data: data: the columns are prompt"),
        ({"sft_eval_data": PAIRS}, "sft_eval_data: data: the columns are"),
        ({"prompts": [LONG]}, "prompts: .*row 1: the prompt has 2.. tokens"),
        ({"preference_data": [{**PAIRS[0], **LONG}]}, "preference_data: data, row 1: the prompt a"),
        ({"ppo": PPOConfig(max_new_tokens=128)}, "prompts: .*leaves 0 beside max_new_tokens=128"),
        ({"ppo": PPOConfig(max_new_tokens=120)}, "prompts: .*row 1.*max_new_tokens=120"),
    ],
)
def test_data_of_every_stage_is_read_before_the_first_is_run(
    finished: tuple[Path, list[str]], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    good, bad = json.dumps(PAIRS[0]), json.dumps({**PAIRS[0], "chosen": ""})
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{bad}\n")
    given = {
        name: value.format(folder=tmp_path) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    said: list[str] = []
    config = make_config(finished[0], output_dir=str(tmp_path / "run"), **given)
    with pytest.raises(DataError, match=message):
        RLHFPipeline(config, say=said.append).run()
    assert said == []
    assert list((tmp_path / "run").iterdir()) == []


def test_a_training_outside_the_run_undoes_its_stage(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    config = make_config(finished[0], output_dir=str(tmp_path / "run"))
    base, folder = config.model, tmp_path / "run" / "sft"
    settings = dataclasses.replace(config.sft, output_dir=str(folder), max_steps=1)
    SFTTrainer(settings, base, None, DEMONSTRATIONS).train()
    assert not (folder / "stage.json").exists()
    with pytest.raises(StageError, match="made from a sft stage that is no longer there"):
        RLHFPipeline(config).run()


def test_the_model_is_looked_at_before_the_first_stage(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    for model, message in (("absent/model", "absent/model"), ("reward", "no causal language")):
        name = model if "/" in model else str(finished[0] / "run" / model)
        config = make_config(finished[0], output_dir=str(tmp_path / "run"), model=name)
        with pytest.raises(ModelError, match=message):
            RLHFPipeline(config).run()
        assert list((tmp_path / "run").iterdir()) == []


def test_a_missing_tracker_is_said_before_the_first_stage(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config(finished[0], output_dir=str(tmp_path / "run"))
    config.ppo.trackers = ["wandb"]
    with pytest.raises(ImportError, match="pip install wandb"):
        RLHFPipeline(config).run()
    assert not list((tmp_path / "run").iterdir())


def test_describe_says_what_is_done(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    said: list[str] = []
    text = RLHFPipeline(make_config(finished[0]), say=said.append).describe()
    assert said == [text]
    assert [text.count(word) for word in ("(done)", "(to do)", "takes", "gives")] == [3, 0, 3, 3]
    fresh = RLHFPipeline(
        make_config(finished[0], output_dir=str(tmp_path / "new")), say=said.append
    )
    assert fresh.describe().count("(to do)") == 3
    assert not (tmp_path / "new").exists()


def test_a_redone_stage_makes_later_ones_out_of_date(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "run" / "sft")
    with pytest.raises(StageError, match="made from a sft stage that is no longer there"):
        RLHFPipeline(make_config(finished[0], output_dir=str(folder / "run"))).run()


def test_stage_settings_that_the_pipeline_owns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ppo\.output_dir is set by the pipeline"):
        make_config(tmp_path, ppo=PPOConfig(output_dir="elsewhere"))
    with pytest.raises(ValueError, match=r"sft\.template is set by the pipeline"):
        make_config(tmp_path, sft=SFTConfig(template="none"))


def test_an_unwritable_folder_is_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = make_config(tmp_path, output_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(OutputError, match="cannot write"):
        RLHFPipeline(config).run()


# Stages by themselves


def make_runner(folder: Path, log: list[str], fail: bool = False, **settings: Any) -> StageRunner:
    def first(path: Path) -> dict[str, Any]:
        log.append("first")
        return {"value": 1}

    def second(path: Path) -> dict[str, Any]:
        log.append("second")
        if fail:
            raise RuntimeError("broken off")
        return {"value": 2}

    stages = [
        Stage("first", "do one", "nothing", "one", settings, first),
        Stage("second", "do two", "one", "two", {}, second, needs=("first",)),
    ]
    return StageRunner(folder, stages, say=lambda line: None)


def test_an_interrupted_stage_is_run_again_and_the_finished_one_is_not(tmp_path: Path) -> None:
    log: list[str] = []
    with pytest.raises(RuntimeError):
        make_runner(tmp_path, log, fail=True).run()
    assert not (tmp_path / "second" / "stage.json").exists()
    assert make_runner(tmp_path, log).run() == {"first": {"value": 1}, "second": {"value": 2}}
    assert log == ["first", "second", "second"]


def test_a_stage_made_from_an_earlier_one_is_out_of_date(tmp_path: Path) -> None:
    make_runner(tmp_path, []).run()
    kept = (tmp_path / "second" / "stage.json").read_text()
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "second")
    make_runner(tmp_path, []).run()
    (tmp_path / "second" / "stage.json").write_text(kept)
    with pytest.raises(StageError, match="made from an earlier first stage"):
        make_runner(tmp_path, []).run()


def test_a_damaged_marker_is_an_error(tmp_path: Path) -> None:
    make_runner(tmp_path, []).run()
    (tmp_path / "first" / "stage.json").write_text("{")
    with pytest.raises(StageError, match=r"stage\.json is damaged"):
        make_runner(tmp_path, []).run()


def test_differences_are_named_by_their_path() -> None:
    before = {"a": 1, "b": {"c": 2, "d": [1]}, "gone": None}
    now = {"a": 1, "b": {"c": 3, "d": [1]}, "new": "x"}
    assert differences(before, now) == [
        "b.c: 2 before, 3 now",
        "gone: None before, '(not set)' now",
        "new: '(not set)' before, 'x' now",
    ]
