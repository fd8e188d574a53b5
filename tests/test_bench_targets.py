"""The target commands: every target judged by the right figures, or said to be unmeasured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import rollout, session, vocabulary
from benchmarks.targets import RESULTS, at_least, at_most, print_targets
from rlhf_kernels.bench import memory
from rlhf_kernels.bench.runner import Result
from rlhf_kernels.bench.timing import Comparison


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds a variant, and is PyTorch's to test."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_targets_are_met_missed_or_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = Comparison("", {"ours": [2.0, 2.0], "floor": [1.0, 1.0]}, {})
    result = Result([], comparison, ["floor"], absent={"trl": "not installed"})
    met = at_most("a", result, "ours", "floor", 2.0)
    missed = at_most("b", result, "ours", "floor", 1.9)
    absent = at_least("c", result, "trl selective_log_softmax", "ours", 4.0)
    assert (met.met, missed.met, absent.met) == (True, False, None)
    assert at_least("d", result, "ours", "floor", 2.1).met is False
    print_targets([met, missed, absent])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[2:4]] == ["met", "MET"] and "NOT MET" in lines[3]
    assert "not measured" in lines[4] and "not installed" in lines[4]


def test_the_target_command_judges_the_issues_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "in_a_fresh_process", lambda *_, **__: {})
    output = tmp_path / "vocabulary.json"
    arguments = ["vocabulary", "--device", "cpu", "--quick", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(session, "QUICK_SIZE", 64)
    vocabulary.main()
    targets = json.loads(output.read_text())["targets"]
    assert len(targets) == 26
    assert sorted({target["required"] for target in targets}) == [
        0.1,
        1.0,
        1.15,
        1.2,
        1.3,
        1.5,
        2.5,
        4.0,
    ]
    unmeasured = {t["what"].split(":")[1].strip() for t in targets if t["met"] is None}
    assert unmeasured <= {"TRL / ours", "extra memory, ours / eager"}


def test_gpu_targets_are_judged_by_the_read_bandwidth() -> None:
    samples = {"one read: sum(-1)": [3.0] * 2, "copy": [4.0] * 2, "ours": [6.0] * 2}
    result = Result([], Comparison("", samples, {}), ["copy", "one read: sum(-1)"])
    target = vocabulary._backward_share("x", result, "ours")
    assert (target.measured, target.met) == (1.0, True)  # twice the bytes in twice the time


def test_the_kept_figures_are_of_this_format() -> None:
    for path in [*RESULTS.glob("vocabulary*.json"), *RESULTS.glob("rollout*.json")]:
        content = json.loads(path.read_text())
        assert content["targets"] and content["rows"] and content["machine"]["torch"]


@pytest.mark.parametrize("judge", [vocabulary.token_logprobs_on_gpu, vocabulary.linear_on_gpu])
def test_gpu_targets_are_judged_by_the_same_names(
    judge: Callable[[session.Session], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "in_a_fresh_process", lambda *_, **__: {})
    monkeypatch.setattr(session, "QUICK_SIZE", 64)
    found = session.Session("cpu", quick=True)
    judge(found)
    unmeasured = {target.why.split(":")[0] for target in found.targets if target.met is None}
    here = {"rlhf_kernels cpu"}  # whose memory this process cannot see
    assert unmeasured <= {*vocabulary.PEERS, *here}
    assert len(found.targets) == (12 if judge is vocabulary.token_logprobs_on_gpu else 3)


def test_rollout_targets_are_those_of_the_issue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "QUICK_SIZE", 16)
    found = session.Session("cpu", quick=True)
    rollout.on_cpu(found)
    assert [(t.required, t.at_most) for t in found.targets] == [
        (100.0, False),
        (2.0, True),
        (100.0, False),
        (2.0, True),
        (1000.0, False),
        (50.0, False),
        (8.0, False),
        (2.0, False),
    ]
    assert all(target.met is not None for target in found.targets)


def test_rollout_targets_on_a_gpu_are_judged_by_names_that_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "QUICK_SIZE", 16)
    found = session.Session("cpu", quick=True)
    rollout.on_gpu(found)
    assert len(found.targets) == 6
    unmeasured = {target.why.split(":")[0] for target in found.targets if target.met is None}
    assert unmeasured == {rollout.LAUNCH}  # measured on GPUs alone
