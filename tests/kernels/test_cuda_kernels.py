"""What is the cuda backend's own: divided sequences, reductions, and that no barrier is missing.

On a GPU, or emulated: RLHF_KERNELS_EMULATE_CUDA=1.
"""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import EMULATED
from kernel_cases import EPS, backends_for, close, normal, poisoned, ppo_inputs, random_mask

from rlhf_kernels import PPOLossConfig, backends, gae, masked_whiten, ppo_loss, rollout_advantages
from rlhf_kernels.backends import cuda, reference

CUDA = [name for name in backends_for("gae_forward") if name == "cuda"]
pytestmark = pytest.mark.parametrize("backend", CUDA)

# Around a chunk of 1024 steps, and enough of them to be divided.
LENGTHS = [1023, 1024, 1025, 4096, 9000, 10240]


def masks_of(length: int) -> list[torch.Tensor]:
    """Full, padded left and right, with holes, whole chunks masked, one token, none."""
    mask = torch.ones(6, length, dtype=torch.bool)
    mask[1, : length // 5], mask[1, -length // 3 :] = False, False
    mask[2] = random_mask(4, length)[3]
    mask[3, length // 4 : length // 2] = False
    mask[3, ::3] = False
    mask[4], mask[4, length // 2] = False, True
    mask[5] = False
    return list(mask.unbind())


def divided_in(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    monkeypatch.setattr(cuda, "parts_of_sequences", lambda *sizes: parts)


@pytest.mark.parametrize("masked", ["skip", "decay"])
@pytest.mark.parametrize("length", LENGTHS)
def test_parts_change_no_bit(backend, monkeypatch, length, masked):
    rewards, values = normal(6, length, seed=1), normal(6, length, seed=2)
    mask = torch.stack(masks_of(length))
    options = {"gamma": 0.999, "lam": 0.99, "value_lam": 1.0, "bootstrap_values": normal(6, seed=3)}

    def run() -> tuple[torch.Tensor, ...]:
        series = poisoned(rewards, mask), poisoned(values, mask)
        return gae(*series, mask, **options, masked=masked, backend=backend)

    whole = run()
    # Steps of γ·λ < 1 still count 1 / (1 − γ·λ) later, those of the returns 1000; each rounds 4
    # times at the size of the sum.
    expected = reference.gae_forward(
        *(torch.where(mask, x, 0.0).double() for x in (rewards, values)),
        mask,
        options["bootstrap_values"].double(),
        None,
        reference.GAEConfig(0.999, 0.99, 1.0, masked),
        None,
    )
    for actual, wanted in zip(whole, expected):
        close(actual, wanted, 4 * EPS * min(length, 1000) * float(1 + wanted.abs().max()))
    for parts in (2, 3, 7, 16):
        divided_in(monkeypatch, parts)
        assert all(torch.equal(a, b) for a, b in zip(whole, run())), f"{parts} parts"


@pytest.mark.parametrize("masked", ["skip", "decay"])
def test_divided_packed_sequences(backend, monkeypatch, masked):
    rows = [mask[:n] for mask, n in zip(masks_of(5000), (5000, 1, 4097, 0, 3000, 1024))]
    cu_seqlens = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    mask, n = torch.cat(rows), sum(map(len, rows))
    rewards, values = normal(n, seed=1), normal(n, seed=2)
    options = {"masked": masked, "cu_seqlens": cu_seqlens, "backend": backend}
    whole = gae(rewards, values, mask, **options)
    divided_in(monkeypatch, 3)
    divided = gae(rewards, values, mask, **options)
    for i, row in enumerate(rows):
        at = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        alone = gae(rewards[None, at], values[None, at], row[None], masked=masked, backend=backend)
        for a, b, c in zip(whole, divided, alone):
            assert torch.equal(a[at], b[at]) and torch.equal(a[at], c[0])


def test_divided_rollouts(backend, monkeypatch):
    mask = torch.stack(masks_of(3000))
    series = [poisoned(normal(6, 3000, seed=seed), mask) for seed in (1, 2, 3)]
    options = {"kl_coef": 0.1, "kl_estimator": "k3", "gamma": 0.99, "backend": backend}
    whole = rollout_advantages(normal(6, seed=4), *series, mask, **options)
    divided_in(monkeypatch, 4)
    divided = rollout_advantages(normal(6, seed=4), *series, mask, **options)
    # Of the moments, which are float64, no more than the last bits may differ.
    for a, b in zip(whole, divided):
        close(b, a, 2 * EPS * float(1 + a.abs().max()))
    assert torch.equal(whole.returns, divided.returns) and torch.equal(whole.kl, divided.kl)


def test_how_many_parts(backend):
    assert cuda.parts_of_sequences(0, 0, 132) == 1
    assert cuda.parts_of_sequences(512, 512 * 131072, 132) == 1
    assert cuda.parts_of_sequences(4, 4 * 1024, 132) == 1
    assert cuda.parts_of_sequences(1, 131072, 132) == 128
    assert cuda.parts_of_sequences(8, 8 * 131072, 132) == 33


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 0), (3, 5, 7), (2000,), (3, 2049)])
def test_moments_and_whitening(backend, shape):
    x, flat = normal(*shape, seed=1, scale=0.1) + 1000.0, random_mask(1, 6147)[0].roll(5)
    mask = flat[: x.numel()].reshape(shape) if x.numel() > 1 else torch.ones(shape).bool()
    total = backends.load(backend).moments(poisoned(x, mask), mask)
    exact = reference.moments(x.double(), mask)
    close(total, exact, 0.0, 1e-12)
    result = masked_whiten(poisoned(x, mask), mask, backend=backend)
    wanted = reference.whiten(x.double(), mask, exact, True, 1e-8)
    close(result, wanted, 2 * EPS * float(1 + wanted.abs().max()) if x.numel() else 0.0)
    assert (result[~mask] == 0).all()


def test_moments_of_many_blocks(backend):
    """More places than the largest grid takes in one go: 1024 blocks of 256 threads."""
    x, mask = normal(3, 200_000, seed=1), torch.ones(3, 200_000, dtype=torch.bool)
    mask[:, ::7] = False
    close(backends.load(backend).moments(x, mask), reference.moments(x.double(), mask), 1e-6, 1e-12)


def test_strided_and_expanded_rows(backend):
    x, mask = normal(4, 60, seed=1), random_mask(4, 60)
    wide = torch.empty(4, 100)[:, 20:80].copy_(x)
    assert torch.equal(
        masked_whiten(wide, mask, backend=backend), masked_whiten(x, mask, backend=backend)
    )
    both = x[:1].expand(4, 60), mask[:1].expand(4, 60)
    plain = (both[0].contiguous(), both[1].contiguous())
    for a, b in zip(
        rollout_advantages(x[:, 0], *(both[0],) * 3, both[1], kl_coef=0.1, backend=backend),
        rollout_advantages(x[:, 0], *(plain[0],) * 3, plain[1], kl_coef=0.1, backend=backend),
    ):
        assert torch.equal(a, b)


def test_the_loss_of_many_blocks(backend):
    """More tokens than the largest grid takes in one go, with sequences across its blocks."""
    inputs, mask = ppo_inputs(100, 3000), random_mask(100, 3000)
    config = PPOLossConfig(aggregation="seq-mean-token-mean", dual_clip=2.0)
    loss, stats = ppo_loss(mask=mask, **inputs, config=config, backend=backend)
    wide = {name: x.double() for name, x in inputs.items()}
    exact, exact_stats = ppo_loss(mask=mask, **wide, config=config, backend="reference")
    # Each term rounds some ten times; sums are float64.
    close(loss, exact, 16 * EPS)
    for a, b in zip(stats, exact_stats):
        close(a, b, 16 * EPS * (1 + abs(float(b))))


def test_equal_returns_explain_exactly_nothing(backend):
    inputs, mask = ppo_inputs(9, 700), random_mask(9, 700)
    inputs["returns"] = torch.full((9, 700), 0.1)
    assert ppo_loss(mask=mask, **inputs, backend=backend)[1].explained_variance == 0


def results(backend: str) -> list[torch.Tensor]:
    mask = torch.stack(masks_of(2500))
    inputs = ppo_inputs(6, 2500)
    x, leaves = inputs["returns"], [inputs[n].requires_grad_() for n in ("logprobs", "values")]
    given = (x[:, 0], *(inputs[n].detach() for n in ("logprobs", "old_logprobs", "values")))
    options = {"kl_coef": 0.1, "value_lam": 1.0, "backend": backend}
    found = [*rollout_advantages(*given, mask, **options)]
    found += rollout_advantages(*given, mask, **options, masked="decay")
    config = PPOLossConfig(aggregation="seq-mean-token-mean")
    loss, stats = ppo_loss(mask=mask, **inputs, config=config, backend=backend)
    return [*found, loss, *stats, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("parts", [1, 2])
def test_run_to_run(backend, monkeypatch, parts):
    divided_in(monkeypatch, parts)
    assert all(torch.equal(a, b) for a, b in zip(results(backend), results(backend)))


@pytest.mark.skipif(not EMULATED, reason="the order in which threads run can be chosen emulated")
@pytest.mark.parametrize("parts", [1, 2])
def test_the_order_of_threads_changes_no_bit(backend, monkeypatch, parts):
    divided_in(monkeypatch, parts)
    monkeypatch.delenv("RK_EMULATION_ORDER", raising=False)
    ascending = results(backend)
    monkeypatch.setenv("RK_EMULATION_ORDER", "descending")
    assert all(torch.equal(a, b) for a, b in zip(ascending, results(backend)))


@pytest.mark.skipif(EMULATED, reason="a graph needs a GPU")
@pytest.mark.parametrize("parts", [1, 3])
def test_a_cuda_graph_replays_them(backend, monkeypatch, parts):
    divided_in(monkeypatch, parts)
    mask, static = random_mask(6, 9000), [normal(6, 9000, seed=seed) for seed in (1, 2, 3)]

    def run() -> list[torch.Tensor]:
        rollout = rollout_advantages(static[0][:, 0], *static, mask, kl_coef=0.1, backend=backend)
        options = {"returns": rollout.returns, "values": static[2], "old_values": static[2]}
        loss, stats = ppo_loss(*static[:2], rollout.advantages, mask, **options, backend=backend)
        return [*rollout, loss, *stats]

    run()  # what is loaded on first use is loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor, seed in zip(static, (4, 5, 6)):
        tensor.copy_(normal(6, 9000, seed=seed))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run()))


@pytest.mark.skipif(EMULATED, reason="streams need a GPU")
def test_the_current_stream_is_used(backend):
    """Work queued before on the same stream comes first, without any wait on the host."""
    x, mask = normal(64, 4096, seed=1), torch.ones(64, 4096, dtype=torch.bool)
    expected = gae(2 * x, x, mask, backend=backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        late = x.clone()
        torch.cuda._sleep(100_000_000)
        late *= 2
        actual = gae(late, x, mask, backend=backend)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
