"""What is special to losses that form their gradient in the forward: the chunk loop around them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from kernel_cases import EPS, ROW_PRIMITIVES, backends_for, close, normal, random_mask
from torch.utils.checkpoint import checkpoint

from rlhf_kernels import (
    PPOLossConfig,
    linear_cross_entropy,
    linear_ppo_loss,
    linear_token_logprobs,
    ppo_loss,
)
from rlhf_kernels.ops import chunks
from rlhf_kernels.ppo_types import AGGREGATIONS

WIDTH, VOCABULARY = 6, 23
MASK = random_mask(3, 7)
TARGETS = torch.arange(21).view(3, 7) % VOCABULARY


def leaves(bias=True):
    tensors = [normal(3, 7, WIDTH, seed=1), normal(VOCABULARY, WIDTH, seed=2)]
    tensors += [normal(VOCABULARY, seed=3)] if bias else []
    return [x.requires_grad_() for x in tensors]


def cross_entropy(hidden, weight, bias=None, backend=None):
    targets = torch.where(MASK, TARGETS, -100)
    return linear_cross_entropy(hidden, weight, targets, bias=bias, chunk_size=4, backend=backend)


def ppo(hidden, weight, bias=None, backend=None):
    loss, _ = linear_ppo_loss(
        hidden,
        weight,
        TARGETS,
        -normal(3, 7, seed=4).abs() - 2,
        normal(3, 7, seed=5),
        MASK,
        bias=bias,
        chunk_size=4,
        backend=backend,
    )
    return loss


LOSSES = pytest.mark.parametrize("loss_of", [cross_entropy, ppo])
BACKENDS = pytest.mark.parametrize("backend", backends_for(*ROW_PRIMITIVES))


@pytest.mark.parametrize("backend", backends_for(*ROW_PRIMITIVES, "ppo_loss_forward"))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_all_terms_are_those_of_ppo_loss(backend, aggregation, packed):
    """Together in one call as from log-probabilities: the same numbers, up to the sums' order."""
    config = PPOLossConfig(aggregation=aggregation, kl_loss_coef=0.3)
    old, ref = (-normal(3, 7, seed=seed).abs() - 2 for seed in (4, 10))
    given = {"old_logprobs": old, "ref_logprobs": ref, "mask": MASK}
    given["importance_weights"] = normal(3, 7, seed=9).abs()
    for seed, name in enumerate(("advantages", "old_values", "returns"), start=5):
        given[name] = normal(3, 7, seed=seed)
    value, targets, shape = normal(3, 7, seed=8), TARGETS, (3, 7)
    cu_seqlens = torch.tensor([0, 5, 5, 21]) if packed else None
    if packed:
        given, shape = {name: x.flatten() for name, x in given.items()}, (21,)
        value, targets = value.flatten(), targets.flatten()
    ends = []
    for linear in (False, True):
        inputs = [*leaves(), value.clone().requires_grad_()]
        hidden, weight, bias, values = inputs
        hidden = hidden.view(*shape, WIDTH)
        shared = {**given, "values": values, "cu_seqlens": cu_seqlens}
        shared |= {"config": config, "backend": backend}
        head = {"bias": bias, "chunk_size": 4}
        if linear:
            loss, stats = linear_ppo_loss(hidden, weight, targets, **shared, **head)
        else:
            logprobs, entropy = linear_token_logprobs(
                hidden,
                weight,
                torch.where(given["mask"], targets, -100),
                return_entropy=True,
                backend=backend,
                **head,
            )
            loss, stats = ppo_loss(logprobs, entropy=entropy, **shared)
        ends.append((loss, torch.stack(stats), torch.autograd.grad(loss, inputs)))
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])
    for x, y in zip(ends[0][2], ends[1][2], strict=True):
        # The weights of the tokens come in before or after a product: a rounding or two of each
        # term, of which the gradients of weight and bias add up 21.
        close(x, y, 2 * EPS * 21 * float(y.abs().max()))


@BACKENDS
@LOSSES
def test_a_second_backward_forms_the_gradient_again(backend, loss_of):
    inputs = leaves()
    loss = 3.0 * loss_of(*inputs, backend=backend)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c), "the second backward wrote over what the first gave away"


@LOSSES
def test_the_upstream_factor_is_not_rounded_to_16_bits(loss_of):
    """0.1 is 0.10009765625 in bfloat16: 0.1% more."""
    inputs = [x.detach().bfloat16().requires_grad_() for x in leaves()]
    plain = torch.autograd.grad(loss_of(*inputs), inputs)
    scaled = torch.autograd.grad(0.1 * loss_of(*inputs), inputs)
    for x, y in zip(scaled, plain, strict=True):
        assert torch.equal(x, (y.float() * 0.1).bfloat16())


@BACKENDS
@LOSSES
def test_a_parameter_changed_after_the_first_backward_is_noticed(backend, loss_of):
    inputs = leaves()
    loss = loss_of(*inputs, backend=backend)
    loss.backward(retain_graph=True)
    with torch.no_grad():
        inputs[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@BACKENDS
@LOSSES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(backend, loss_of, use_reentrant):
    expected = leaves()
    loss_of(*expected, backend=backend).backward()
    inputs = leaves()
    loss = checkpoint(lambda *x: loss_of(*x, backend=backend), *inputs, use_reentrant=use_reentrant)
    loss.backward()
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(x.grad, y.grad)


@BACKENDS
@LOSSES
def test_gradients_add_up_over_backwards(backend, loss_of):
    """As under accumulation: what a backward gave away stays as it is."""
    inputs = leaves()
    for _ in range(2):
        loss_of(*inputs, backend=backend).backward()
    once = leaves()
    loss_of(*once, backend=backend).backward()
    for x, y in zip(inputs, once, strict=True):
        assert torch.equal(x.grad, 2 * y.grad)


@LOSSES
def test_the_weights_gradient_is_not_copied(loss_of):
    """The buffer the forward filled becomes `weight.grad` itself."""
    inputs = leaves()
    loss = loss_of(*inputs)
    address = loss.grad_fn.formed[1].data_ptr()
    loss.backward()
    assert inputs[1].grad.data_ptr() == address


@LOSSES
def test_gradients_die_with_the_graph(loss_of):
    loss = loss_of(*leaves())
    formed = weakref.ref(loss.grad_fn.formed[1])
    del loss
    gc.collect()
    assert formed() is None


@LOSSES
def test_three_products_where_all_gradients_are_needed(loss_of, monkeypatch):
    """One a chunk forward, and one for each of hidden and weight; none for what is frozen."""
    calls = count_products(monkeypatch)
    inputs = leaves(bias=False)
    loss_of(*inputs).backward()
    rows = int(MASK.sum())
    parts = -(-rows // 4)
    assert len(calls) == 3 * parts
    # Masked rows take part in none of them.
    assert sum(min(shape) for shape in calls[:parts]) <= rows * WIDTH
    for frozen, products in ((inputs[1], 2), (inputs[0], 1)):
        frozen.requires_grad_(False)
        calls.clear()
        loss_of(*inputs)
        assert len(calls) == products * parts


def count_products(monkeypatch):
    """Shapes of the first factors of the matrix products."""
    calls = []
    original = chunks.torch.mm

    def mm(left, right, **options):
        calls.append(left.shape)
        return original(left, right, **options)

    monkeypatch.setattr(chunks.torch, "mm", mm)
    of_weight = chunks._add_product

    def add_product(total, left, right):
        calls.append(left.shape)
        total.addmm_(left, right)

    monkeypatch.setattr(chunks, "_add_product", add_product)
    assert of_weight is not add_product
    return calls


@pytest.mark.parametrize(
    "device, budget", [("cpu", chunks.CPU_CHUNK_BYTES), ("cuda", chunks.GPU_CHUNK_BYTES)]
)
@pytest.mark.parametrize("by_onednn", [False, True])
def test_chunks_stay_near_their_budget(device, budget, by_onednn, monkeypatch):
    monkeypatch.setattr(chunks, "onednn_is_faster", lambda: by_onednn)
    for vocabulary in (2, 49152, 151936, 10**7):
        for dtype in (torch.float32, torch.bfloat16):
            two = by_onednn and device == "cpu" and dtype == torch.float32
            rows = chunks.default_chunk_size(vocabulary, dtype, device)
            row = vocabulary * dtype.itemsize * (2 if two else 1)
            assert rows * row <= budget or rows == 16
            assert rows * row > budget // 2 or rows * 2 * row > budget
