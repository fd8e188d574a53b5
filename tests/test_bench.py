"""The benchmark command: what it measures, what it says where it cannot, what it writes."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from pytest import approx

from rlhf_kernels.bench import cli, memory, operations, peers, plots, report
from rlhf_kernels.bench.operation import (
    BOTH,
    FORWARD,
    PASSES,
    Case,
    Operation,
    Plan,
    Work,
    buffer_sets,
    default_backend,
    ours,
)
from rlhf_kernels.bench.operations.sequences import COPY, LOOP, SequenceOperation
from rlhf_kernels.bench.operations.token_logprobs import BACKWARD
from rlhf_kernels.bench.progress import Progress
from rlhf_kernels.bench.runner import measure
from rlhf_kernels.bench.timing import Comparison, Variant, compare

ROOT = Path(__file__).resolve().parents[1]
LOGITS = Case("token_logprobs", FORWARD, {"N": 8, "V": 100}, "float32", "cpu")
HIDDEN = {"N": 8, "V": 100, "H": 16}
SEQUENCES = {"B": 4, "T": 16}


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds a variant, and is PyTorch's to test."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def cases() -> Iterator[Case]:
    for name in operations.OPERATIONS:
        operation = operations.load(name)
        sizes, dtypes = HIDDEN, ("float32", "bfloat16")
        if name == "token_logprobs":
            sizes = LOGITS.sizes
        elif isinstance(operation, SequenceOperation):
            sizes, dtypes = SEQUENCES, ("float32",)
        for direction in operation.passes:
            for dtype in dtypes:
                yield Case(name, direction, sizes, dtype, "cpu")


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.title)
def test_every_variant_of_every_operation_runs_and_agrees(case: Case) -> None:
    operation = operations.load(case.operation)
    plan = operation.plan(case)
    comparison = compare(case.title, plan.variants, turns=1, warmup=1)
    assert comparison.failures == {}
    assert {ours(default_backend(operation, case)), ours("reference")} <= set(comparison.samples)
    assert comparison.fastest(plan.floors()) is not None
    assert all(timing.median_ms > 0 for timing in comparison.timings)


def test_the_backward_alone_gives_the_gradient_again_and_again() -> None:
    case = replace(LOGITS, direction=BACKWARD)
    plan = operations.load(case.operation).plan(case)
    comparison = compare(case.title, plan.variants, turns=2, warmup=2)
    assert comparison.failures == {}


def variant(name: str, result: object = None, floor: bool = False) -> Variant:
    return Variant(name, lambda: lambda _: result, floor=floor)


def failing(name: str, at_call: int) -> Variant:
    calls = iter(range(100))

    def run(_: int) -> None:
        if next(calls) == at_call:
            raise RuntimeError("no\nluck")

    return Variant(name, lambda: run)


@dataclass
class Clock:
    """Stands still but for what the variants add."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    def variant(self, name: str, milliseconds: Sequence[float]) -> Variant:
        """Takes these times in turn, after one call of warm-up."""
        times = iter([0.0, *milliseconds])

        def run(_: int) -> None:
            self.now += next(times) / 1e3

        return Variant(name, lambda: run)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("rlhf_kernels.bench.timing.time", clock)
    return clock


def test_times_are_medians_and_ratios_are_medians_of_the_turns_own(clock: Clock) -> None:
    a, b = clock.variant("a", [1, 5, 2]), clock.variant("b", [10, 5, 6])
    found = compare("", [a, b], turns=3, warmup=1)
    assert found.samples == {"a": approx([1, 5, 2]), "b": approx([10, 5, 6])}
    timing = found.timing("a")
    assert (timing.lower_ms, timing.median_ms, timing.upper_ms) == approx((1.5, 2, 3.5))
    assert found.ratio("b", "a") == approx(3)  # the median of 10, 1 and 3
    assert found.fastest(["b", "a", "absent"]) == "a"


def test_a_turn_of_several_calls_counts_their_mean(clock: Clock) -> None:
    found = compare("", [clock.variant("a", [1, 3])], turns=1, warmup=1, calls_per_turn=2)
    assert found.timing("a").median_ms == approx(2)


def test_uncounted_calls_are_numbered_but_not_timed(clock: Clock) -> None:
    slow_first = clock.variant("a", [50, 2, 50, 4])
    found = compare("", [slow_first], turns=2, warmup=1, uncounted_calls=1)
    assert found.samples == {"a": approx([2, 4])}


def test_no_turn_begins_late_but_three_are_taken(clock: Clock) -> None:
    slow = clock.variant("a", [10] * 9)
    assert compare("", [slow], turns=9, warmup=1, seconds=0.005).timing("a").turns == 3
    slow = clock.variant("a", [10] * 9)
    assert compare("", [slow], turns=9, warmup=1, seconds=0.045).timing("a").turns == 5


def test_quartiles_stay_within_what_was_measured() -> None:
    found = Comparison("", {"x": [1.0, 9.0]}, {}).timing("x")
    assert 1 <= found.lower_ms <= found.median_ms <= found.upper_ms <= 9


def test_each_call_has_a_number_of_its_own_and_turns_start_with_another_variant() -> None:
    seen: list[tuple[str, int]] = []

    def logging(name: str) -> Variant:
        return Variant(name, lambda: lambda call: seen.append((name, call)))

    compare("", [logging("a"), logging("b")], turns=2, warmup=1, calls_per_turn=2)
    assert seen[2:] == [
        ("a", 0),
        ("a", 1),
        ("b", 2),
        ("b", 3),
        ("b", 4),
        ("b", 5),
        ("a", 6),
        ("a", 7),
    ]


@pytest.mark.parametrize("at_call", [0, 3])
def test_a_variant_that_raises_is_named_and_the_others_go_on(at_call: int) -> None:
    found = compare("", [failing("bad", at_call), variant("good")], turns=4)
    assert found.failures == {"bad": "RuntimeError: no luck"}
    assert found.timing("good").turns == 4


def test_no_turns_are_an_error() -> None:
    with pytest.raises(ValueError, match="turns is 0"):
        compare("", [variant("good")], turns=0)


def test_a_variant_that_cannot_be_built_is_named() -> None:
    def build() -> None:
        raise MemoryError

    found = compare("", [Variant("bad", build), variant("good")], turns=1)  # type: ignore[arg-type]
    assert found.failures == {"bad": "MemoryError"}
    assert list(found.samples) == ["good"]


def test_a_variant_that_computes_something_else_is_named() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    found = compare("", [variant("first", one), variant("other", (two,))], turns=1)
    assert "differs by 0.5" in found.failures["other"]
    found = compare("", [variant("floor", two, floor=True), variant("first", one)], turns=1)
    assert found.failures == {}


class Unfit(Operation):
    """An operation of one case that does not fit, or whose data cannot be made."""

    name, primitive = "unfit", "token_logprobs_forward"

    def __init__(self, needed: int) -> None:
        self.needed = needed

    def sizes(self, grid: object) -> Iterator[dict[str, int]]:
        yield LOGITS.sizes

    def plan(self, case: Case, rivals: Sequence[str] = ()) -> Plan:
        raise RuntimeError("no data")

    def work(self, case: Case) -> Work:
        return Work()

    def memory(self, case: Case) -> int:
        return self.needed


def test_a_case_that_does_not_fit_is_skipped_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = measure(Unfit(2**60), LOGITS, turns=1).rows
    assert re.match(r"skipped: needs 1073741824\.0 GiB, [\d.]+ GiB are available", row.status)
    assert "skipped" in capsys.readouterr().out


def test_a_case_whose_data_cannot_be_made_does_not_stop_the_run() -> None:
    (row,) = measure(Unfit(0), LOGITS, turns=1).rows
    assert row.status == "failed: RuntimeError: no data"


def test_rates_and_shares_are_those_of_the_times() -> None:
    operation = operations.load("token_logprobs")
    samples = {"one read": [1.0] * 3, "x": [4.0] * 3}
    found = Comparison("", samples, {"y": "no"})
    used = {"x": memory.Memory(peak=3 * 2**20, kept=2**20)}
    rows = report.rows(operation, LOGITS, found, ["one read"], {"z": "absent"}, used)
    floor, x, y, z = rows
    assert (x.median_ms, x.share, x.floor) == (4.0, 0.25, "one read")
    assert x.gb_per_s == approx(8 * 100 * 4 / 4e-3 / 1e9) and x.tflop_per_s is None
    assert (x.peak_mib, x.kept_mib, used["x"].extra) == (3.0, 1.0, 2 * 2**20)
    assert floor.share == 1.0 and floor.peak_mib is None
    assert (y.status, z.status) == ("failed: no", "missing: absent")


def test_work_counts_bytes_and_operations() -> None:
    token_logprobs = operations.load("token_logprobs")
    assert token_logprobs.work(LOGITS).bytes == 8 * 100 * 4
    assert token_logprobs.work(replace(LOGITS, direction=BOTH)).bytes == 3 * 8 * 100 * 4
    linear = operations.load("linear_cross_entropy")
    case = Case("linear_cross_entropy", BOTH, HIDDEN, "bfloat16", "cpu")
    assert linear.work(case).flops == 3 * 2 * 8 * 100 * 16


def test_buffers_add_up_to_more_than_the_cache() -> None:
    assert buffer_sets(2**40, "cpu") == 2
    assert buffer_sets(1, "cpu") == 16


MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# In a process of its own: a trainer that ran in this one has told malloc to keep what is freed.
ALLOCATES = """
import torch
from rlhf_kernels.bench import memory

def run(_):
    torch.ones(192 * 2**20 // 4)
    return torch.ones(64 * 2**20 // 4)

found = memory.resident_memory(run)
print(found.peak, found.kept)
"""


@linux
def test_memory_sees_what_a_call_allocates_and_what_it_leaves() -> None:
    command = [sys.executable, "-c", ALLOCATES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    peak, kept = (int(number) / MIB for number in done.stdout.split())
    assert 190 <= peak <= 200
    assert 62 <= kept <= 68


@linux
def test_memory_of_a_case_is_measured_in_a_fresh_process() -> None:
    case = Case("ppo_loss", BOTH, {"B": 512, "T": 4096}, "float32", "cpu")
    other = Case("gae", FORWARD, SEQUENCES, "float32", "cpu")
    own = ours(default_backend(operations.load(case.operation), case))
    found = memory.in_a_fresh_process([case, other], [own, "eager"])
    assert set(found) == {case.title, other.title} and set(found[other.title]) == {own}
    gradients = 3 * 512 * 4096 * 4
    kept = {name: used.kept / gradients for name, used in found[case.title].items()}
    assert kept == {own: approx(1, rel=0.1), "eager": approx(1, rel=0.1)}
    # The gradients are scaled in place: beyond them nothing large is needed.
    assert found[case.title]["eager"].extra > gradients > 10 * found[case.title][own].extra


@linux
def test_a_case_that_ends_the_measuring_process_costs_no_other(monkeypatch, capsys):
    first, second, third = (replace(LOGITS, sizes={"N": 8, "V": size}) for size in (10, 20, 30))
    asked = []

    def dies_at_the_second(request: str, _: float, take: Callable[[str], None]) -> str:
        asked.append([Case(**fields).title for fields in json.loads(request)["cases"]])
        take("a library's greeting\n")
        for title in asked[-1]:
            take(json.dumps({"case": title}) + "\n")
            if title == second.title:
                return "Killed"
            take(json.dumps({"case": title, "variant": "eager", "peak": 2, "kept": 1}) + "\n")
        return ""

    monkeypatch.setattr(memory, "_run_process", dies_at_the_second)
    found = memory.in_a_fresh_process([first, second, third])
    assert found == {case.title: {"eager": memory.Memory(2, 1)} for case in (first, third)}
    assert asked == [[first.title, second.title, third.title], [third.title]]
    shown = ["  token_logprobs", "memory: the measuring process ended early: Killed"]
    assert capsys.readouterr().out.splitlines() == [*shown, shown[0]]


@linux
def test_a_measuring_process_that_does_not_start_is_not_started_again(monkeypatch, capsys):
    monkeypatch.setattr(memory, "_run_process", lambda *_: "ImportError: no")
    assert memory.in_a_fresh_process([LOGITS, LOGITS]) == {}
    assert capsys.readouterr().out.count("ended early: ImportError: no") == 1


def test_the_command_writes_whole_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "in_a_fresh_process", lambda *_, **__: {})
    sizes = ["--vocabularies", "64", "100", "--rows", "8", "--dtypes", "float32", "--size", "small"]
    cli.main(["--op", "token_logprobs", *sizes, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "token_logprobs, forward, N=8 V=64, float32, cpu" in printed
    assert "median ms" in printed and "quartiles" in printed

    content = json.loads((tmp_path / "bench.json").read_text())
    assert {"torch", "processor", "peers", "backends", "date"} <= set(content["machine"])
    with (tmp_path / "bench.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(content["rows"][0]) == [f.name for f in fields(report.Row)]
    assert len(lines) == len(content["rows"])
    timed = [line for line in lines if line["status"] == "ok"]
    assert {(line["direction"], line["V"]) for line in timed} == {
        (direction, size) for direction in PASSES for size in ("64", "100")
    }
    assert all(float(line["median_ms"]) > 0 and float(line["share"]) > 0 for line in timed)
    assert not list(tmp_path.glob("*.partial"))


def test_plots_are_drawn_where_matplotlib_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = measure(operations.load("token_logprobs"), LOGITS, turns=1).rows
    (path,) = plots.write_plots(tmp_path, rows)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plots.unavailable_reason() is None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="matplotlib"):
        plots.write_plots(tmp_path, rows)
    assert "cannot be imported" in str(plots.unavailable_reason())


def test_the_wheel_holds_the_benchmark() -> None:
    from setuptools import find_packages

    found = find_packages(str(ROOT), include=["rlhf_kernels", "rlhf_kernels.*"])
    package = "rlhf_kernels.bench"
    assert {package, f"{package}.operations", f"{package}.peers"} <= set(found)


@pytest.mark.parametrize("option", ["--vocabularies", "--rows", "--hidden"])
def test_sizes_below_one_are_refused(option, capsys):
    for size in ("0", "1e3", "32k"):
        with pytest.raises(SystemExit):
            cli.main([option, size])
        assert f"'{size}' is no whole number from 1" in capsys.readouterr().err


def test_an_output_that_is_no_folder_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit):
            cli.main(["--output", str(output), "--size", "small"])
        assert f"--output {output}: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--op", "gaes"], "choose from"),
        (["--peers", "tlr"], "choose from"),
        (["--peers", "none", "trl"], "none goes with no other name"),
        (["--size", "huge"], "choose from"),
    ],
)
def test_a_name_that_is_none_is_refused_with_those_that_are(arguments, says, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    printed = capsys.readouterr().err
    assert arguments[0] in printed and says in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--device", "cuda"])
    assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err


def test_a_peer_asked_for_that_is_not_installed_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(peers, "unavailable_reason", lambda name, device: f"no {name} here")
    with pytest.raises(SystemExit):
        cli.main(["--peers", "trl"])
    assert "--peers trl: no trl here" in capsys.readouterr().err


def test_without_peers_none_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "in_a_fresh_process", lambda *_, **__: {})
    options = ["--op", "gae", "--peers", "none", "--size", "small", "--output", str(tmp_path)]
    cli.main(["--device", "cpu", *options])
    with (tmp_path / "bench.csv").open(newline="") as file:
        listed = {line["variant"] for line in csv.DictReader(file)}
    # A peer would have a row here, installed or not.
    assert {name for name in listed if not name.startswith(ours(""))} == {LOOP, COPY}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_rewrites_its_line_on_a_terminal_alone():
    shown, kept = Terminal(), io.StringIO()
    for stream in (shown, kept):
        progress = Progress(3, stream)
        progress.next_case()
        progress.tell("timing eager")
        progress.tell("")
    assert "[1/3, 0:00] timing eager" in shown.getvalue() and shown.getvalue().endswith("\r\033[K")
    assert kept.getvalue() == ""
