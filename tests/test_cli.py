"""The ``rlhf`` command as its user meets it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from word_models import HOSTILE, NEUTRAL, WARM, save_word_model

from rlhf.cli import build_parser, main, with_underscores
from rlhf.commands import COMMANDS
from rlhf.data import DataError
from rlhf.sources import load_reward
from rlhf.yaml_settings import has_settings

QUIET = ["--trackers", "[jsonl]", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data files."""
    folder = tmp_path_factory.mktemp("cli")
    save_word_model(folder / "base")
    rows = {
        "demos": [{"prompt": f"the {n}", "completion": f"{WARM[0]} {n}"} for n in NEUTRAL],
        "pairs": [
            {"prompt": f"a {n}", "chosen": f"{w} {n}", "rejected": f"{h} {n}"}
            for n in NEUTRAL
            for w, h in zip(WARM, HOSTILE)
        ],
        "prompts": [{"prompt": f"{n} is"} for n in NEUTRAL],
    }
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    (folder / "words.py").write_text(
        "def length(prompts, responses):\n    return [len(r) for r in responses]\n"
        "def broken(prompts, responses):\n    return [float('nan') for r in responses]\n"
    )
    return folder


# Help


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out and c.summary in out for name, c in COMMANDS.items())


def test_help_and_a_typing_error_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from rlhf.cli import main; main(['--help']); main(['pipelin'])\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_option_of_every_command_has_a_help_text(name: str) -> None:
    parser = build_parser(name)
    silent = [a.dest for a in parser._actions if not (a.help or "").strip()]
    assert not silent


@pytest.mark.parametrize("name", list(COMMANDS))
def test_command_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"examples:\n  rlhf {name} " in capsys.readouterr().out


def test_a_mistyped_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewrad"]) == 2
    assert "Did you mean 'reward'?" in capsys.readouterr().err


# Options


def test_dashes_and_underscores_mean_the_same() -> None:
    assert with_underscores("--learning-rate=1e-5") == "--learning_rate=1e-5"
    assert with_underscores("--ppo.kl-coef") == "--ppo.kl_coef"
    assert with_underscores("-1e-5") == "-1e-5"
    assert with_underscores("my-file.jsonl") == "my-file.jsonl"


def test_yaml_with_overrides(folder: Path) -> None:
    (folder / "ppo.yaml").write_text("policy: base\nkl_coef: 0.2\nepochs: 3\n")
    args = build_parser("ppo").parse_args(
        [
            *("--config", str(folder / "ppo.yaml"), "--prompts", "p.jsonl[:5]"),
            *("--reward", "heuristic", "--epochs", "1"),
        ]
    )
    assert (args.policy, args.kl_coef, args.epochs) == ("base", 0.2, 1)
    assert args.prompts == "p.jsonl[:5]"
    assert args.clip_range == 0.2  # a default


def test_nested_yaml_with_overrides_for_the_pipeline(folder: Path) -> None:
    (folder / "run.yaml").write_text(
        "model: base\nsft_data: 'd.jsonl[:3]'\npreference_data: p.jsonl\nprompts: q.jsonl\n"
        "sft: {learning_rate: 0.1, epochs: 2}\n"
    )
    parser = build_parser("pipeline")
    args = parser.parse_args(["--config", str(folder / "run.yaml"), "--sft.epochs", "5"])
    config = parser.instantiate(args)
    assert (config.sft.learning_rate, config.sft.epochs) == (0.1, 5)
    assert config.sft_data == "d.jsonl[:3]"
    assert config.ppo.clip_range == 0.2


def test_a_dash_in_a_yaml_name_is_explained(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "dash.yaml"
    for command, text in (("sft", "learning-rate: 1"), ("pipeline", "sft: {learning-rate: 1}")):
        path.write_text(text + "\n")
        assert main([command, "--config", str(path)]) == 2
        assert "learning_rate, with underscores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("learning_rate: 1e-5\nepochs: 2\nlearning_rate: 1e-2\n", (3, 1)),
        ("sft:\n  epochs: 2\n  learning_rate: 1\n  'learning_rate': 2\n", (4, 3)),
    ],
)
def test_a_setting_that_a_file_has_twice_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str, lines: tuple[int, int]
) -> None:
    path = folder / "twice.yaml"
    path.write_text(text)
    command = "pipeline" if text.startswith("sft") else "sft"
    assert main([command, "--config", str(path)]) == 2
    again, first = lines
    expected = rf"twice\.yaml, line {again}: learning_rate .* second time \(first in line {first}\)"
    assert re.search(expected, capsys.readouterr().err)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_an_empty_file_of_settings_changes_none(folder: Path, text: str) -> None:
    (folder / "empty.yaml").write_text(text)
    options = ["--policy", "base", "--prompts", "p.jsonl", "--reward", "heuristic"]
    args = build_parser("ppo").parse_args(["--config", str(folder / "empty.yaml"), *options])
    assert (args.policy, args.clip_range) == ("base", 0.2)
    assert has_settings("&again {sft: *again}")  # read once only


def test_what_is_no_yaml_is_still_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("learning_rate: [1", "- a\n- b\n"):
        (folder / "bad.yaml").write_text(text)
        assert main(["sft", "--config", str(folder / "bad.yaml")]) == 2
        assert "config" in capsys.readouterr().err
    assert main(["sft", "--config", str(folder / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


# Runs


def test_sft_reward_ppo_and_best_of_n_work_one_after_the_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = "--trackers [jsonl] --dtype float32"
    demos, pairs, prompts = (folder / f"{name}.jsonl" for name in ("demos", "pairs", "prompts"))
    output = folder / "best.jsonl"

    def rlhf(command: str) -> str:
        assert main(command.split()) == 0
        return capsys.readouterr().out

    out = rlhf(
        f"sft --model {folder}/base --data {demos} --eval_data {demos}[-3:] "
        f"--output-dir {folder}/sft {quiet}"
    )
    assert "eval_loss" in out
    out = rlhf(
        f"reward --model {folder}/sft --data {pairs}[:40] --eval_data {pairs}[40:] "
        f"--output_dir {folder}/reward --learning_rate=1e-2 {quiet}"
    )
    figures = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert float(figures["eval_pairs"]) == 20
    assert float(figures["eval_accuracy_low"]) <= float(figures["eval_accuracy"]) <= 1
    rlhf(
        f"ppo --policy {folder}/sft --prompts {prompts} --reward {folder}/reward "
        f"--output_dir {folder}/ppo --total_updates 1 --batch_size 4 --minibatch_size 4 "
        f"--epochs 1 --max_new_tokens 4 {quiet}"
    )
    assert (folder / "ppo" / "model.safetensors").exists()
    rlhf(
        f"best-of-n --policy {folder}/ppo --prompts {prompts} --reward {folder}/words.py:length "
        f"--n 3 --max_new_tokens 4 --output {output}"
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == len(NEUTRAL)
    for row in rows:
        assert len(row["candidates"]) == 3
        assert row["best_score"] == max(c["score"] for c in row["candidates"]) == len(row["best"])


def test_pipeline_from_yaml_and_describe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "pipeline.yaml"
    config.write_text(
        f"model: {folder / 'base'}\n"
        f"sft_data: {folder / 'demos.jsonl'}\n"
        f"preference_data: {folder / 'pairs.jsonl'}\n"
        f"prompts: {folder / 'prompts.jsonl'}\n"
        f"output_dir: {folder / 'run'}\n"
        "sft: {dtype: float32, trackers: [jsonl]}\n"
        "reward: {dtype: float32, trackers: [jsonl]}\n"
        "ppo: {dtype: float32, trackers: [jsonl], total_updates: 1, batch_size: 2,"
        " minibatch_size: 2, epochs: 1, max_new_tokens: 3}\n"
    )
    assert main(["pipeline", "--config", str(config), "--describe"]) == 0
    assert capsys.readouterr().out.count("(to do)") == 3
    assert main(["pipeline", "--config", str(config)]) == 0
    capsys.readouterr()
    assert main(["pipeline", "--config", str(config), "--ppo.kl-coef", "0.5"]) == 2
    assert "ppo.kl_coef: 0.1 before, 0.5 now" in capsys.readouterr().err


# Errors


def options(folder: Path, **changes: str) -> list[str]:
    values = {
        "policy": str(folder / "base"),
        "prompts": str(folder / "prompts.jsonl"),
        "reward": "heuristic",
        "output_dir": str(folder / "errors"),
        "total_updates": "1",
        "batch_size": "2",
        "minibatch_size": "2",
        "max_new_tokens": "3",
        **changes,
    }
    return ["ppo", *[part for key, value in values.items() for part in (f"--{key}", value)], *QUIET]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "/nowhere/p.jsonl"}, "there is no such file"),
        ({"prompts": "{folder}/prompts.jsonl[50:]"}, "holds none of the 10 rows"),
        ({"policy": "{folder}"}, "no config.json"),
        ({"reward": "{folder}/heuristik"}, "file.py:function or package.module:function), an http"),
        ({"reward": "{folder}/words.py:nothing"}, "has no function 'nothing'"),
        ({"reward": "{folder}/absent.py:length"}, "there is no file"),
        ({"reward": "no_such_module:length"}, "there is no module 'no_such_module'"),
        ({"reward": "{folder}/words.py:broken"}, "it must be a finite number"),
        ({"learning_rate": "-1"}, "learning_rate"),
        ({"clip_range": "-0.1"}, "clip_range"),
        ({"output_dir": "{folder}/words.py/out"}, "cannot write to the output folder"),
        ({"learning_rat": "1"}, "learning_rat"),
        ({"epochs": "many"}, "epochs"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    folder: Path, changes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {key: value.format(folder=folder) for key, value in changes.items()}
    assert main(options(folder, **changes)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["sft --model absent --data absent.jsonl", "ppo"])
def test_a_wrong_kernel_backend_is_said_before_anything_is_loaded(
    folder: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "nope")
    given = options(folder, policy="absent") if command == "ppo" else command.split()
    assert main([*given, "--output_dir", str(folder / "errors")]) == 2
    assert "RLHF_KERNELS_BACKEND asks for the backend 'nope'" in capsys.readouterr().err


def test_debug_shows_the_traceback(folder: Path) -> None:
    with pytest.raises(DataError):
        main([*options(folder, prompts="/nowhere/p.jsonl"), "--debug"])


def test_best_of_n_checks_its_output_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        f"best-of-n --policy absent --prompts absent.jsonl --reward heuristic --output {folder}"
    )
    code = main(command.split())
    assert code == 2
    assert "is a folder; --output names a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "sft --data {folder}/demos.jsonl[4:] --max_length 2 --eval_fraction 0",
            "demos.jsonl, row 5",
        ),
        (
            "sft --data {folder}/demos.jsonl --eval_data {folder}/pairs.jsonl",
            "pairs.jsonl: the col",
        ),
        (
            "reward --data {folder}/pairs.jsonl[7:] --max_length 2 --eval_fraction 0",
            "s.jsonl, row 8",
        ),
        ("reward --data {folder}/same.jsonl[1:]", "same.jsonl, row 2: chosen and rejected are id"),
    ],
)
def test_errors_name_the_file_and_its_row(
    folder: Path, command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "same.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
        '{"prompt": "a", "chosen": "b", "rejected": "b"}\n'
    )
    parts = command.format(folder=folder).split()
    assert main([*parts, "--model", f"{folder}/base", "--output_dir", f"{folder}/out", *QUIET]) == 2
    assert message in capsys.readouterr().err


def test_best_of_n_says_first_that_its_output_cannot_be_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "best-of-n --policy absent --prompts absent.jsonl --reward heuristic "
        f"--output {folder}/words.py/below/best.jsonl"
    )
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert f"cannot write to the output folder {folder}/words.py/below: Not a directory" in err


# Rewards


def test_rewards_by_name(folder: Path) -> None:
    assert load_reward(f"{folder / 'words.py'}:length")(["p"], ["four"]) == [4]
    assert load_reward("word_models:warmth")(["p"], ["love hate kind"]) == [1.0]
    assert len(load_reward("heuristic")(["p"], ["text"])) == 1


def test_a_reward_file_may_define_dataclasses_and_import_its_neighbours(
    tmp_path: Path,
) -> None:
    (tmp_path / "neighbour_of_rewards.py").write_text("POINTS = 3\n")
    (tmp_path / "json.py").write_text(  # the name of an installed module
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from neighbour_of_rewards import POINTS\n"
        "@dataclass\nclass Points:\n    n: int = POINTS\n    most: ClassVar[int] = 9\n"
        "def points(prompts, responses):\n    return [Points().n for _ in responses]\n"
    )
    before = list(sys.path)
    assert load_reward(f"{tmp_path / 'json.py'}:points")(["p"], ["r"]) == [3]
    assert sys.path == before
    assert sys.modules["json"] is json


def test_a_reward_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text("raise RuntimeError('from the file')\n")
    before = list(sys.path), set(sys.modules)
    with pytest.raises(RuntimeError, match="from the file"):
        load_reward(f"{tmp_path / 'failing.py'}:score")
    assert (list(sys.path), set(sys.modules)) == before


def test_an_interrupted_run_is_resumed_by_the_same_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = tmp_path / "stopping.py"
    flag = tmp_path / "stopped"
    reward.write_text(
        "import os, pathlib, signal\n"
        "calls = []\n"
        "def score(prompts, responses):\n"
        "    calls.append(1)\n"
        f"    flag = pathlib.Path({str(flag)!r})\n"
        "    if len(calls) == 2 and not flag.exists():\n"
        "        flag.touch()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [len(r) for r in responses]\n"
    )
    given = options(
        folder, output_dir=str(tmp_path / "run"), reward=f"{reward}:score", total_updates="3"
    )
    assert main(given) == 128 + signal.SIGTERM
    message = capsys.readouterr().err
    assert "SIGTERM at step 1: saved to" in message and "--resume" in message
    assert main(given) == 2  # nothing is run over
    assert "has checkpoints of an earlier training" in capsys.readouterr().err
    assert main([*given, "--resume"]) == 0
    assert (tmp_path / "run" / "config.json").exists()
    changed = [*given, "--resume", "--total_updates", "4", "--seed", "5"]
    assert main(changed) == 2
    assert "--resume_allow '[seed, total_updates]'" in capsys.readouterr().err
    assert main([*changed, "--resume_allow", "[seed,total_updates]"]) == 0


def test_a_recipe_is_a_starting_point(capsys: pytest.CaptureFixture[str]) -> None:
    required = ["--policy", "p", "--prompts", "q", "--reward", "heuristic", "--print_config"]
    assert main(["ppo", *required, "--preset", "ziegler2019", "--kl_target", "3"]) == 0
    shown = capsys.readouterr().out
    assert "kl_coef: 0.15" in shown and "kl_target: 3" in shown
    assert main(["ppo", *required, "--preset", "best"]) == 2
    assert "'ziegler2019', 'tldr'" in capsys.readouterr().err
