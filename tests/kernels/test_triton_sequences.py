"""What only the Triton kernels of sequences do: one program for each block, and walks over blocks.

Runs on a GPU, or interpreted on the CPU (see `make test`).
"""

from __future__ import annotations

import math

import float64_oracle as oracle
import pytest
import torch
from kernel_cases import EPS, backends_for, close, normal, poisoned, ppo_inputs, random_mask

from rlhf_kernels import PPOLossConfig, gae, masked_whiten, ppo_loss, rollout_advantages

if "triton" not in backends_for("gae_forward"):
    pytest.skip("Triton cannot run here", allow_module_level=True)

from rlhf_kernels.backends import triton as kernels
from rlhf_kernels.backends.triton import launch_advantages, launch_ppo_loss

# For the fixture that places tensors on the backend's device, and for `-k triton`.
pytestmark = pytest.mark.parametrize("backend", ["triton"])
MASKED = pytest.mark.parametrize("masked", ["skip", "decay"])


@pytest.fixture
def divide(monkeypatch):
    """Says whether each block has a program; blocks are so small that sequences have several."""
    monkeypatch.setattr(launch_advantages, "BLOCK", 128)

    def set_to(divided: bool) -> None:
        monkeypatch.setattr(launch_advantages, "is_divided", lambda *sizes: divided)

    return set_to


def sequences(rows: int = 5, length: int = 300):
    """Full, padded on each side, empty, and one whose holes are longer than a block."""
    mask = random_mask(rows, length)
    mask[3, :90] = False
    mask[3, 200:] = False
    mask[4] = True
    mask[4, 70:270] = False
    return mask, *(normal(rows, length, seed=seed) for seed in (1, 2, 3))


@MASKED
@pytest.mark.parametrize("value_lam", [0.95, 1.0])
def test_divided_sequences_have_the_same_bits(backend, divide, masked, value_lam):
    mask, logprobs, reference, values = sequences()
    options = {"gamma": 0.99, "value_lam": value_lam, "bootstrap_values": normal(5, seed=4)}
    options |= {"masked": masked, "backend": backend, "kl_coef": 0.1, "kl_estimator": "k3"}
    results = []
    for divided in (False, True):
        divide(divided)
        results.append(
            rollout_advantages(
                normal(5, seed=5),
                *(poisoned(x, mask) for x in (logprobs, reference, values)),
                mask,
                whiten_advantages=False,
                **options,
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*results))
    expected = oracle.gae(
        *(results[0].rewards, values, mask),
        gamma=0.99,
        lam=0.95,
        **{name: options[name] for name in ("value_lam", "bootstrap_values", "masked")},
    )
    # Each of the steps that still count (λ = 1: 100 of them) rounds 4 times, as for `gae`.
    for actual, wanted in zip(results[0], expected):
        close(actual, wanted, 4 * EPS * 100 * (1 + abs(wanted).max()))
    valid = results[0].advantages[mask].double()
    close(results[0].advantage_mean, valid.mean(), 8 * EPS)
    close(results[0].advantage_std, valid.std(correction=0), 8 * EPS)


@MASKED
@pytest.mark.parametrize("divided", [False, True])
def test_padding_and_packing_change_no_bit(backend, divide, masked, divided):
    """Blocks are counted from the last valid place, wherever rows begin and end."""
    divide(divided)
    mask, rewards, values, _ = sequences()
    options = {"gamma": 0.99, "value_lam": 1.0, "masked": masked, "backend": backend}
    expected = gae(rewards, values, mask, **options)
    for left, right in ((0, 129), (7, 130)):
        wide = [torch.nn.functional.pad(x, (left, right), value=7.0) for x in (rewards, values)]
        padded = gae(*wide, torch.nn.functional.pad(mask, (left, right)), **options)
        for a, b in zip(padded, expected):
            assert torch.equal(a[:, left : left + 300], b)
            assert (a[:, :left] == 0).all() and (a[:, left + 300 :] == 0).all()
    lengths = [300, 290, 0, 251, 300]
    cut = [torch.cat([row[:n] for row, n in zip(x, lengths)]) for x in (rewards, values, mask)]
    kept = torch.cat([row[:n] for row, n in zip(mask, lengths)])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    mask[1, 290:] = False
    expected = gae(rewards, values, mask, **options)
    kept[300:590] = mask[1, :290]
    packed = gae(cut[0], cut[1], kept, cu_seqlens=cu_seqlens, **options)
    for a, b in zip(packed, expected):
        assert torch.equal(a, torch.cat([row[:n] for row, n in zip(b, lengths)]))


@pytest.mark.parametrize("divided", [False, True])
def test_packed_moments_count_every_block_once(backend, divide, divided):
    """Lengths around those of blocks, which padding cuts once more: there are places for all."""
    divide(divided)
    lengths = [1, 127, 128, 129, 130, 255, 256, 257, 258, 0, 0, 384, 2]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    total = sum(lengths)
    zeros, noise = torch.zeros(total), normal(total, seed=1)
    mask = torch.ones(total, dtype=torch.bool)
    mask[cu_seqlens[5::2] - 1] = False
    result = rollout_advantages(
        zeros[: len(lengths)],
        *(1000.0 + noise, zeros, zeros),
        mask,
        kl_coef=-1.0,
        gamma=0.0,
        cu_seqlens=cu_seqlens,
        whiten_advantages=False,
        backend=backend,
    )
    exact = (1000.0 + noise)[mask].double()
    assert torch.equal(result.advantages[mask], exact.float())
    close(result.advantage_mean, exact.mean(), EPS * 1000)
    close(result.advantage_std, exact.std(correction=0), 8 * EPS)


def test_a_valid_nan_reaches_what_comes_before_it(backend, divide):
    """And nothing else: not the places behind it, not another sequence."""
    mask = torch.ones(3, 300, dtype=torch.bool)
    rewards, values = normal(3, 300, seed=1), normal(3, 300, seed=2)
    rewards[1, 150] = math.nan
    for divided in (False, True):
        divide(divided)
        for result in gae(rewards, values, mask, backend=backend):
            assert result[1, :151].isnan().all() and not result[1, 151:].isnan().any()
            assert not result[[0, 2]].isnan().any()


def test_which_sequences_are_divided(backend):
    assert launch_advantages.is_divided(1, 128, 132)
    assert launch_advantages.is_divided(264, 8, 132)
    assert not launch_advantages.is_divided(265, 128, 132)
    assert not launch_advantages.is_divided(1, 7, 132)


@pytest.mark.parametrize("shape", [(7, 300), (3000,), (1, 1), (0, 5), (4, 0), (2, 3, 50)])
def test_moments_and_whitening(backend, shape):
    x = 1000.0 + normal(*shape, seed=1, scale=0.1)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2), device="cpu") < 0.7
    mask = mask.to(x.device)
    count, mean, squares = kernels.moments(poisoned(x, mask), mask).tolist()
    valid = x[mask].double()
    assert count == len(valid)
    if len(valid) > 0:
        # Of deviations (0.1) in float32, since sums are taken around one of the numbers.
        assert mean == pytest.approx(float(valid.mean()), abs=EPS)
        exact = float((valid - valid.mean()).square().sum())
        assert squares == pytest.approx(exact, rel=16 * EPS, abs=1e-12)
    for shift_mean in (True, False):
        result = masked_whiten(poisoned(x, mask), mask, shift_mean=shift_mean, backend=backend)
        # One rounding at the size of the mean, if it is added, and 8 of the whitened number's.
        size = 8 * float(result.abs().max()) if shift_mean and result.numel() else 2000.0
        close(result, oracle.whiten(x, mask, shift_mean), EPS * size)


def test_moments_with_gaps_between_rows(backend):
    x, mask = normal(6, 50, seed=1), random_mask(6, 50)
    plain = kernels.moments(x[:, :20].contiguous(), mask[:, :20].contiguous())
    close(kernels.moments(x[:, :20], mask[:, :20]), plain, 16 * EPS, rtol=16 * EPS)
    turned = masked_whiten(x.t(), mask.t(), backend=backend)
    close(turned.t(), masked_whiten(x, mask, backend=backend), 16 * EPS)
    equal = kernels.moments(torch.full((9, 500), 0.1), torch.ones(9, 500, dtype=torch.bool))
    assert equal.tolist() == [4500.0, float(torch.tensor(0.1)), 0.0]


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_the_loss_does_not_depend_on_how_tokens_are_divided(backend, monkeypatch, aggregation):
    """In blocks that end within rows, whole ones, rows with gaps, packed sequences."""
    config = PPOLossConfig(aggregation=aggregation)
    inputs, mask = ppo_inputs(9, 112), random_mask(9, 112)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    differentiable = [inputs[name] for name in ("logprobs", "values", "entropy")]
    wide = {n: torch.cat([x, x[:, :5]], dim=1)[:, :112] for n, x in inputs.items()}
    flat = {name: x.reshape(-1) for name, x in inputs.items()}
    packed = {"mask": mask.reshape(-1), "cu_seqlens": torch.arange(10) * 112}
    results = []
    for block in (1024, 64):
        monkeypatch.setattr(launch_ppo_loss, "BLOCK", block)
        monkeypatch.setattr(launch_ppo_loss, "COUNT_BLOCK", block)
        monkeypatch.setattr(launch_ppo_loss, "COUNT_PART", 2 * block)
        for series in ({**inputs, "mask": mask}, {**wide, "mask": mask}, {**flat, **packed}):
            loss, stats = ppo_loss(**series, config=config, backend=backend)
            gradients = torch.autograd.grad(loss, differentiable)
            results.append((torch.stack([loss, *stats]).detach(), *gradients))
    for numbers, *gradients in results[1:]:
        # Sums of terms of order 1, in another order.
        close(numbers, results[0][0], 32 * EPS * (1 + float(results[0][0].abs().max())))
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1:]))
