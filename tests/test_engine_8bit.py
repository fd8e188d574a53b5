"""AdamW with 8-bit moments, by itself and in the engine."""

from __future__ import annotations

import io
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_trainings import ppo
from tiny_models import tiny_llama
from torch import Tensor, nn

from rlhf.engine import Engine, Interrupted, TrainingConfig
from rlhf.engine import eight_bit_codes as code
from rlhf.engine.adamw_8bit import AdamW8bit
from rlhf.engine.gradient_norm import gradient_norm

# A code's step relative to its value, and what float16 rounds before.
STEP = 1 / 8 + 2**-11


def config(**options: Any) -> TrainingConfig:
    settings = {"dtype": "float32", "lr_schedule": "constant", "optimizer": "adamw_8bit"}
    return TrainingConfig(**{**settings, **options})


def values_of_many_sizes(blocks: int, signed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** (6 * torch.rand(blocks, code.BLOCK, generator=generator) - 6)
    sizes *= 10 ** torch.arange(-blocks, 0.0).unsqueeze(1)  # of each block another
    signs = torch.randint(0, 2, sizes.shape, generator=generator) * 2 - 1
    return (sizes * signs if signed else sizes).view(-1)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_within_a_step_and_right_on_average(signed: bool) -> None:
    values = values_of_many_sizes(6, signed)
    encode = code.encode_signed if signed else code.encode_unsigned
    decode = code.decode_signed if signed else code.decode_unsigned
    limit = code.SIGNED_LIMIT if signed else code.UNSIGNED_LIMIT
    codes = torch.empty(values.shape, dtype=torch.int8 if signed else torch.uint8)
    scale = torch.empty(6)
    largest = values.abs().view(6, -1).amax(1, keepdim=True).expand(-1, code.BLOCK).reshape(-1)
    bound = STEP * values.abs() + 2**-17 * largest / limit
    total = torch.zeros(values.shape, dtype=torch.float64)
    for level in range(128):  # each way to round, once
        encode(values, torch.full(values.shape, level, dtype=torch.int16), codes, scale)
        decoded = decode(codes, scale)
        assert ((decoded - values).abs() <= bound).all()
        total += decoded
    # What is left is float16's rounding, to 2^-11 or to 2^-25 below its normal numbers.
    left = 2**-11 * values.abs() + 2**-24 * largest / limit
    raised = 0.0 if signed else 2**-17 * largest / limit  # nothing becomes 0
    assert ((total / 128 - values).abs() <= 1.01 * left + raised).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1e38, 1e-33, 1e-36, 1e-38, 1e-41, 1e-43])
def test_codes_of_the_largest_and_the_smallest_values(size: float, signed: bool) -> None:
    values = size * values_of_many_sizes(1, signed)
    encode = code.encode_signed if signed else code.encode_unsigned
    decode = code.decode_signed if signed else code.decode_unsigned
    codes = torch.empty(values.shape, dtype=torch.int8 if signed else torch.uint8)
    scale = torch.empty(1)
    encode(values, torch.zeros(values.shape, dtype=torch.int16), codes, scale)
    largest = values.abs().max().double()
    grid = 2**-17 * max(largest / (code.SIGNED_LIMIT if signed else code.UNSIGNED_LIMIT), 2**-126)
    assert largest > 0
    error = (decode(codes, scale).double() - values.double()).abs()
    assert (error <= STEP * values.double().abs() + grid + 2**-149).all()


def test_zeros_stay_zeros_and_nothing_else_becomes_one() -> None:
    values = torch.zeros(2, code.BLOCK)
    values[1, 0] = 1e4
    codes, scale = torch.empty(2 * code.BLOCK, dtype=torch.uint8), torch.empty(2)
    code.encode_unsigned(values.view(-1), torch.zeros(512, dtype=torch.int16), codes, scale)
    decoded = code.decode_unsigned(codes, scale).view(2, -1)
    assert (decoded[0] == 0).all() and (decoded[1] > 0).all() and decoded[1, 0] == 1e4


def test_weights_of_24_bits() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    weights = torch.empty(4096, dtype=torch.bfloat16)
    remainder = torch.empty(4096, dtype=torch.int8)
    code.split(values, 128, weights, remainder)
    joined = code.join(weights, remainder)
    assert ((joined - values).abs() <= 2**-16 * values.abs()).all()
    assert ((weights - values).abs() <= 1.01 * (values.bfloat16() - values).abs() + 1e-7).all()
    noise = torch.arange(256, dtype=torch.int32).repeat(16)
    code.split(joined, noise, weights, remainder)  # what has 24 bits is not rounded
    assert torch.equal(code.join(weights, remainder), joined)


def steps(parameter: nn.Parameter, optimizer: Any, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("shape", [(1000, 700), (3,), (256,), (0,), ()])
def test_two_steps_are_adamws_to_what_rounding_moments_changes(shape: tuple[int, ...]) -> None:
    """The first has nothing to round yet; the second begins from moments a step off at most."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    first, second = (torch.randn(shape, generator=generator).double() for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.double())
    optimizer = AdamW8bit([ours], **options)
    exact = torch.optim.AdamW([theirs], **options)
    steps(ours, optimizer, [first])
    steps(theirs, exact, [first])
    torch.testing.assert_close(ours.double(), theirs.data, rtol=1e-6, atol=1e-6)
    steps(ours, optimizer, [second])
    steps(theirs, exact, [second])
    mean, square = (exact.state[theirs][name] for name in ("exp_avg", "exp_avg_sq"))
    largest = first.abs().max() if first.numel() else 0.0
    grid = 2**-17 * largest / code.SIGNED_LIMIT
    mean_error = 0.9 * (STEP * 0.1 * first.abs() + 0.1 * grid)
    grid = 2**-17 * largest**2 / code.UNSIGNED_LIMIT
    square_error = 0.99 * (STEP * 0.01 * first**2 + 0.01 * grid)
    correction = math.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    # |a/b - a'/b'| <= (|a - a'| + |a'| |1 - b/b'|) / b with b the smallest.
    smallest = (square - square_error).sqrt()
    change = (mean_error + mean.abs() * (square.sqrt() / smallest - 1)) / smallest
    change = torch.where(square > square_error, change, math.inf)
    assert ((ours - theirs).abs() <= 0.1 * correction * change + 1e-5).all()


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_regression_ends_where_adamw_ends(weights: str) -> None:
    """Noisy minibatches, 400 steps: the loss above the best one is at most a quarter more."""
    losses = {}
    for optimizer in ("adamw", "adamw_8bit"):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(512, 64, generator=generator)
        inputs *= torch.logspace(-2, 0, 64)  # gradients of sizes that differ inside a block
        target = inputs @ torch.randn(64, 8, generator=generator)
        target += 0.1 * torch.randn(target.shape, generator=generator)
        torch.manual_seed(0)
        model: Any = nn.Linear(64, 8)
        settings = config(optimizer=optimizer, weights=weights, learning_rate=0.02)
        engine = Engine(model, settings, 400)

        def loss(
            rows: Tensor, model: Any = model, x: Tensor = inputs, y: Tensor = target
        ) -> Tensor:
            return ((model(x[rows].to(model.weight.dtype)).float() - y[rows]) ** 2).mean()

        before = loss(torch.arange(512)).item()
        for _ in range(400):
            engine.backward(loss(torch.randint(0, 512, (32,), generator=generator)))
            engine.step()
        losses[optimizer] = loss(torch.arange(512)).item()
        assert losses[optimizer] < 0.2 * before
    assert losses["adamw_8bit"] < 1.25 * losses["adamw"]


def test_updates_far_below_a_bfloat16_weights_last_digit_are_not_lost() -> None:
    """Weights of 1 with a last digit of 2^-8, also far below that of 24 bits."""
    model: Any = nn.Linear(512, 8, bias=False)
    nn.init.ones_(model.weight)
    engine = Engine(model, config(weights="bfloat16", learning_rate=1e-6), 100)
    assert model.weight.dtype == torch.bfloat16
    for _ in range(100):
        engine.backward(model(torch.ones(1, 512, dtype=torch.bfloat16)).float().sum())
        engine.step()
    saved = engine.whole_weights()["weight"]
    assert saved.dtype == torch.float32
    moved = 1 - saved.double()
    # Rounded by chance 100 times to 2^-15: each within 6, their mean within 6 of its deviations.
    deviation = math.sqrt(100) * 2**-15 / 2
    assert moved.mean().item() == pytest.approx(1e-4, abs=6 * deviation / math.sqrt(4096))
    assert (moved - 1e-4).abs().max() < 6 * deviation


def test_bytes_of_the_state() -> None:
    parameters = [
        nn.Parameter(torch.zeros(256, 256).to(t)) for t in (torch.float32, torch.bfloat16)
    ]
    optimizer = AdamW8bit(parameters, lr=1.0)
    held = [
        sum(t.numel() * t.element_size() for t in optimizer.state[p].values() if t.dim()) / 2**16
        for p in parameters
    ]
    assert held == [2 + 8 / 256, 3 + 8 / 256]


def run(parameters: list[nn.Parameter], optimizer: AdamW8bit, first: int, last: int) -> None:
    for step in range(first, last):
        for index, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(1000 * step + index)
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def make() -> tuple[list[nn.Parameter], AdamW8bit]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(700, 500, generator=generator), torch.randn(77, generator=generator)]
    parameters = [nn.Parameter(values[0].bfloat16()), nn.Parameter(values[1])]
    return parameters, AdamW8bit(parameters, lr=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_state_dicts_go_on_bit_for_bit_in_any_number_of_threads(threads: int) -> None:
    whole, optimizer = make()
    run(whole, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save([[p.detach() for p in whole], optimizer.state_dict()], file)
    run(whole, optimizer, 3, 5)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(value) for value in values]
    other = AdamW8bit(resumed, lr=1e-3)
    other.load_state_dict(state)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        run(resumed, other, 3, 5)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(resumed, whole):
        assert torch.equal(other.float32(ours), optimizer.float32(theirs))
        for name, value in other.state[ours].items():
            assert torch.equal(value, optimizer.state[theirs][name])


def test_what_parameters_must_be() -> None:
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        AdamW8bit([nn.Parameter(torch.zeros(2).half())], lr=1.0)
    with pytest.raises(ValueError, match="must be contiguous"):
        AdamW8bit([nn.Parameter(torch.zeros(2, 3).T)], lr=1.0)


@pytest.mark.parametrize("parallel", ["fsdp", "hybrid"])
def test_what_it_cannot_do_is_refused(parallel: str) -> None:
    with pytest.raises(ValueError, match=rf"parallel='{parallel}' needs optimizer='adamw'"):
        config(parallel=parallel)
    with pytest.raises(ValueError, match=r"optimizer='sgd' must be one of 'adamw', 'adamw_8bit'"):
        config(optimizer="sgd")


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_bad_gradient_leaves_weights_and_state(weights: str) -> None:
    layer: Any = nn.Linear(2, 1)
    engine = Engine(layer, config(learning_rate=0.1, weights=weights), 5)

    def step(factor: float) -> float:
        engine.backward(factor * layer(torch.ones(1, 2, dtype=layer.weight.dtype)).float().sum())
        return engine.step()["skipped_step"]

    def held() -> list[Tensor]:
        states = engine.optimizer.state.values()
        return [t.clone() for s in states for t in s.values()] + [layer.weight.detach().clone()]

    assert step(1.0) == 0.0
    before = held()
    assert step(math.nan) == 1.0
    assert all(map(torch.equal, before, held()))
    assert step(1.0) == 0.0
    assert not all(map(torch.equal, before, held()))


def test_the_norm_of_bfloat16_gradients_is_exact_and_clips() -> None:
    layer: Any = nn.Linear(1000, 3, bias=False)
    engine = Engine(layer, config(weights="bfloat16", max_grad_norm=1.0), 1)
    layer.weight.grad = torch.full((3, 1000), 1.0, dtype=torch.bfloat16)
    norm = gradient_norm([layer.weight.grad])
    assert norm.item() == pytest.approx(math.sqrt(3000), rel=1e-6)
    engine._update_weights(norm, 0.0)
    assert layer.weight.grad.float().norm().item() == pytest.approx(1.0, rel=2**-8)


def test_sums_of_many_micro_batches_in_bfloat16() -> None:
    """64 of them: within 64 roundings of the largest sum, which is far below the moments' own."""
    ids = torch.arange(4, 68).view(64, 1).expand(64, 8) % 100
    gradients = []
    for weights in ("bfloat16", "float32"):
        model: Any = tiny_llama()
        engine = Engine(model, config(weights=weights), 1)
        for row in ids:
            engine.backward(model(input_ids=row[None], labels=row[None]).loss.float() / 64)
        gradients.append(torch.cat([p.grad.float().flatten() for p in engine.parameters]))
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < 64 * 2**-9


def interrupted_after_a_step(make: Callable[[], Any]) -> None:
    trainer = make()
    after_step = trainer._after_step

    def with_signal(**options: Any) -> None:
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(**options)

    trainer._after_step = with_signal
    with pytest.raises(Interrupted):
        trainer.train()


@pytest.mark.parametrize("settings", [{}, {"weights": "bfloat16"}, {"lora_rank": 2}])
def test_a_resumed_training_equals_the_whole_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    options = {**settings, "optimizer": "adamw_8bit"}
    ppo(tmp_path / "whole", **options).train()
    interrupted_after_a_step(lambda: ppo(tmp_path / "stopped", **options))
    resumed = ppo(tmp_path / "stopped", **options)
    resumed.resume()
    resumed.train()
    for part in ("model.safetensors", "critic/model.safetensors"):
        ours, theirs = load_file(tmp_path / "stopped" / part), load_file(tmp_path / "whole" / part)
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        assert {value.dtype for value in ours.values()} == {torch.float32}
