"""Llama-like layers of models on a CPU, run by this package's kernels.

A layer is replaced where its class computes what ours does: that is seen on a few numbers, once for
each class, not read off a list of names. Parameters and their names stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels.backends import unavailable_reason
from rlhf_kernels.fast_rotary import is_checkpointed
from rlhf_kernels.linear_layers import (
    keeping_forwards,
    linear_layers,
    runs_as_its_class,
    use_fast_products,
)
from rlhf_kernels.ops.gated_mlp import gated_mlp
from rlhf_kernels.ops.rms_norm import rms_norm
from rlhf_kernels.ops.swiglu import swiglu

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_agrees: dict[tuple[Any, ...], bool] = {}


def use_fast_layers(model: nn.Module) -> None:
    """Have a model's linear layers, gated feed-forward layers and RMS norms run faster on a CPU.

    Nothing changes on other devices, without the compiled kernels, and for layers that are not what
    they seem: adapters, quantized weights, other activations.
    """
    use_fast_products(model)
    for module, forward in _replaceable(model):
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]


@contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """The same for what is called inside, backward passes of it included.

    Not for checkpointed layers: they run again in the backward, outside, and would be others.
    """
    if is_checkpointed(model):
        yield
        return
    layers = [*linear_layers(model), *(module for module, _ in _replaceable(model))]
    with keeping_forwards(layers):
        use_fast_layers(model)
        yield


def _replaceable(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """Layers that ours can stand in for, and what stands in for them."""
    if unavailable_reason("cpu") is not None:
        return
    for module in model.modules():
        forward = replacement(module)
        if forward is not None:
            yield module, forward


def replacement(module: nn.Module) -> Callable[..., Tensor] | None:
    """The forward that computes what a gated feed-forward layer or an RMS norm does; of other
    layers, and where someone else's runs in its place, None.
    """
    for looks_alike, forward in KINDS:
        if looks_alike(module) and runs_as_its_class(module, forward) and _same(module, forward):
            return forward
    return None


def _gated_mlp_forward(self: Any, x: Tensor) -> Tensor:
    """`forward` of LlamaMLP and its like."""
    layers = [getattr(self, name) for name in PROJECTIONS]
    if x.device.type != "cpu":
        return type(self).forward(self, x)
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != x.dtype
    fusible = torch.is_grad_enabled() and not autocast
    if fusible and all(_is_plain(each) and each.weight.dtype == x.dtype for each in layers):
        return gated_mlp(x, *(each.weight for each in layers))
    # Sampling has its layers' weights packed, and adapters may have been put in their place.
    of_gate, of_up, of_down = layers
    return of_down(swiglu(of_gate(x), of_up(x)))


def _rms_norm_forward(self: Any, x: Tensor) -> Tensor:
    """`forward` of LlamaRMSNorm and its like."""
    if x.device.type != "cpu" or x.dtype != self.weight.dtype:
        return type(self).forward(self, x)
    return rms_norm(x, self.weight, self.variance_epsilon)


def is_gated_mlp(module: Any) -> bool:
    """Whether it has the three projections, plain ones, and an activation: not more."""
    children = dict(module.named_children())
    linear = [children.pop(name, None) for name in PROJECTIONS]
    return (
        list(children) == ["act_fn"]
        and all(map(_is_plain, linear))
        and linear_layers(module) == linear
    )


def _is_plain(layer: Any) -> bool:
    """Whether it is its weight alone: no bias, no adapter, nobody who watches it being called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if type(layer) is not nn.Linear:
        return False
    bias: Tensor | None = layer.bias
    return bias is None and not any(getattr(layer, name) for name in hooks)


def is_rms_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(getattr(module, "variance_epsilon", None), float)
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and weight.device.type == "cpu"
    )


def _same(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    """Whether modules of its class and settings compute `forward`, on numbers drawn for the
    question.
    """
    kind = (functions_of(module), settings_of(module))
    if kind not in _agrees:
        _agrees[kind] = _agrees_on_a_sample(module, forward)
    return _agrees[kind]


def functions_of(module: nn.Module) -> tuple[Any, ...]:
    """Classes of it and of its parts, and their forwards, which may be replaced at any time."""
    return tuple((type(each), type(each).forward) for each in module.modules())


def settings_of(thing: Any) -> tuple[Any, ...]:
    """Numbers and texts of a module or config that may decide over what is computed."""
    return tuple(
        (name, value)
        for name, value in sorted(vars(thing).items())
        if name not in ("training", "layer_idx") and isinstance(value, (bool, int, float, str))
    )


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers, float32 on the CPU whatever anyone's defaults are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Give a module weights that keep the size of what goes through it."""
    for parameter in module.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0
        parameter.copy_(draw(generator, *parameter.shape) * scale)


@torch.no_grad()
def _agrees_on_a_sample(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module).float()
    twin.__dict__.pop("forward", None)
    draw_weights(twin, generator)
    x = draw(generator, 3, next(twin.parameters()).shape[-1])
    # While training too: some have dropout of their own, which draws random numbers.
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        found = MethodType(forward, twin)(x)
        return all(_close(type(twin).forward(twin.train(mode), x), found) for mode in (True, False))


def _close(expected: Any, found: Tensor) -> bool:
    """Up to sums of other orders, a few roundings apart; another formula is off by far more."""
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    bound = 32 * torch.finfo(torch.float32).eps * (1 + float(expected.abs().max()))
    return bool(((found - expected).abs() <= bound).all())


KINDS = ((is_gated_mlp, _gated_mlp_forward), (is_rms_norm, _rms_norm_forward))
