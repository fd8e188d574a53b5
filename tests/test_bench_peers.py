"""The peers of the benchmark: named where they are missing, called as their signatures are."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.bench import operations, peers
from rlhf_kernels.bench.operation import BOTH, FORWARD, Case
from rlhf_kernels.bench.runner import measure
from rlhf_kernels.ops.chunks import default_chunk_size

LOGITS = Case("token_logprobs", FORWARD, {"N": 8, "V": 100}, "float32", "cpu")
HIDDEN = {"N": 8, "V": 100, "H": 16}


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds a variant, and is PyTorch's to test."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """Every peer has this version, or is not installed, whatever this environment holds."""
    monkeypatch.setattr(peers, "_version", lambda distribution: version)


@pytest.mark.parametrize(
    ("version", "why"),
    [(None, r"not installed \(pip install trl\)"), ("1.16", r"ModuleNotFoundError: .*\btrl\b.*")],
    ids=["not installed", "broken"],
)
def test_a_missing_peer_is_named_with_the_reason(
    version: str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, version)
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "trl.kernels", None)
    offers, missing = peers.offers("token_logprobs", "cpu")
    assert offers == []
    assert re.fullmatch(why, missing["trl"])
    assert missing["liger"] == "runs on cuda alone"
    rows = measure(operations.load("token_logprobs"), LOGITS, turns=1).rows
    (row,) = [row for row in rows if row.variant == "trl"]
    assert re.fullmatch(f"missing: {why}", row.status) and row.median_ms is None


@pytest.mark.parametrize("name", peers.PEERS)
def test_adapters_import_nothing_before_they_are_asked(name: str) -> None:
    adapter = __import__(f"rlhf_kernels.bench.peers.{name}", fromlist=["x"])
    assert set(operations.OPERATIONS) >= adapter.OPERATIONS
    assert isinstance(adapter, ModuleType) and {"cpu", "cuda"} >= adapter.DEVICES
    assert re.fullmatch(r"[a-z-]+", adapter.DISTRIBUTION)


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), MagicMock())
    for key, function in functions.items():
        setattr(sys.modules[name], key, function)


def test_adapters_of_gpu_peers_call_them_as_their_signatures_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stand-ins with the signatures of the real ones, which need a GPU."""

    def flash(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, None]:
        return F.cross_entropy(logits, labels, reduction="none"), None

    def cut(e: Tensor, c: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(e @ c.t(), targets, reduction=reduction)

    def quack(x: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(x, target, reduction=reduction)

    def quack_linear(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.t(), target)

    stub(monkeypatch, "flash_attn.ops.triton.cross_entropy", cross_entropy_loss=flash)
    stub(monkeypatch, "cut_cross_entropy", linear_cross_entropy=cut)
    stub(monkeypatch, "quack.cross_entropy", cross_entropy=quack)
    stub(monkeypatch, "quack.linear_cross_entropy", chunked_linear_cross_entropy=quack_linear)
    tested = ("flash_attn", "cut_cross_entropy", "quack")
    installed(monkeypatch, "1.0")
    for name in tested:
        monkeypatch.setattr(f"rlhf_kernels.bench.peers.{name}.DEVICES", {"cpu"})
    timed = set()
    for name in ("token_logprobs", "linear_token_logprobs", "linear_cross_entropy"):
        sizes = LOGITS.sizes if name == "token_logprobs" else HIDDEN
        case = Case(name, BOTH, sizes, "float32", "cpu")
        result = measure(operations.load(name), case, turns=1, rivals=tested)
        assert result.absent == {}
        timed |= {row.variant.split()[0] for row in result.rows}
    assert {"flash-attn", "cut-cross-entropy", "quack"} <= timed


@pytest.mark.skipif(
    peers.unavailable_reason("torch_chunked", "cpu") is not None, reason="PyTorch is older"
)
@pytest.mark.parametrize(("device", "like_ours"), [("cpu", True), ("meta", False)])
def test_pytorchs_chunks_are_as_large_as_ours_on_a_cpu_alone(
    device: str, like_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(
        F, "linear_cross_entropy", lambda *_, options: taken.append(options.batch_chunk_size)
    )
    (offer,), _ = peers.offers("linear_cross_entropy", "cpu", ["torch_chunked"])
    rows, weight = torch.empty(8, 16, device=device), torch.empty(100, 16, device=device)
    offer.function(rows, weight, torch.zeros(8, dtype=torch.long, device=device))
    assert taken == [default_chunk_size(100, torch.float32, "cpu") if like_ours else None]
