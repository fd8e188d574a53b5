"""Which backend runs what.

A backend is a module of row- and sequence-level primitives on detached, checked tensors; it is
imported when it is first used. The choice, in this order:

1. the `backend=` argument; 2. the environment variable `RLHF_KERNELS_BACKEND`;
3. the default: `cpu` for CPU tensors where it is built and implements the primitive for the
   dtype, else `reference`. `cuda` and `triton` run by name only: a GPU kernel becomes a default
   (`BackendSpec.default`) once a GPU has confirmed its results and its speed.

A backend that was asked for by name (1 or 2) and cannot do the work raises; it is never replaced.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

from rlhf_kernels.backends import reference

ENVIRONMENT_VARIABLE = "RLHF_KERNELS_BACKEND"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and does not exist, or cannot run on this machine."""


class UnsupportedOperationError(RuntimeError):
    """A backend was asked for by name and does not offer the operation for these tensors."""


class BackendSpec(NamedTuple):
    """What can be said about a backend without importing it. None: any."""

    module: str
    devices: frozenset[str] | None
    dtypes: frozenset[torch.dtype] | None
    default: bool = True  # False: runs only where it is asked for by name


def _triton_devices() -> frozenset[str]:
    """GPUs; CPU tensors too where Triton is told to interpret its kernels."""
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    return frozenset({"cuda", "cpu"} if interpreted else {"cuda"})


_ROW_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

# In the order of preference; `reference` runs everything everywhere and stands last.
BACKENDS: dict[str, BackendSpec] = {
    "cpu": BackendSpec("rlhf_kernels.backends.cpu", frozenset({"cpu"}), _ROW_DTYPES),
    "cuda": BackendSpec(
        "rlhf_kernels.backends.cuda", frozenset({"cuda"}), _ROW_DTYPES, default=False
    ),
    "triton": BackendSpec(
        "rlhf_kernels.backends.triton", _triton_devices(), _ROW_DTYPES, default=False
    ),
    "reference": BackendSpec("rlhf_kernels.backends.reference", None, None),
}


@functools.cache
def load(name: str) -> ModuleType:
    """The module of a backend, which need not be usable on this machine."""
    return importlib.import_module(BACKENDS[name].module)


@functools.cache
def unavailable_reason(name: str) -> str | None:
    """Why this machine cannot run the backend; None where it can."""
    try:
        return load(name).availability()
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"


def choose(primitive: str, tensor: torch.Tensor, requested: str | None) -> ModuleType:
    """The backend module that runs `primitive` on tensors like `tensor`.

    Raises `BackendUnavailableError` or `UnsupportedOperationError` where `requested`, or the
    environment, names a backend that cannot.
    """
    if requested is not None:
        return named(requested, primitive, tensor.device.type, tensor.dtype, "backend=")
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if from_environment:
        return named(from_environment, primitive, tensor.device.type, tensor.dtype)
    return default(primitive, tensor.device.type, tensor.dtype)


def choose_composed(operation: str, tensor: torch.Tensor, requested: str | None) -> ModuleType:
    """The same choice for operations of elementwise PyTorch, in a form that compilers can trace.

    They are the reference backend's alone; another one by name raises.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE) if requested is None else requested
    if not name or name == "reference":
        return reference
    return choose(operation, tensor, requested)


@functools.cache
def default(primitive: str, device: str, dtype: torch.dtype) -> ModuleType:
    """The backend that runs `primitive` where none is asked for."""
    for name in BACKENDS:
        if not BACKENDS[name].default or _mismatch(name, device, dtype) is not None:
            continue
        if unavailable_reason(name) is not None:
            _warn_missing(name)
        elif primitive in load(name).PRIMITIVES:
            return load(name)
    raise UnsupportedOperationError(f"no backend implements {primitive} on {device} for {dtype}")


@functools.cache
def named(
    name: str,
    primitive: str,
    device: str,
    dtype: torch.dtype,
    source: str = ENVIRONMENT_VARIABLE,
) -> ModuleType:
    """The backend that `source` asks for by name, or an error that says why it cannot be."""
    if name not in BACKENDS:
        raise BackendUnavailableError(
            f"{source} asks for the backend {name!r}, which does not exist; "
            f"choose one of {', '.join(sorted(BACKENDS))}"
        )
    reason = unavailable_reason(name)
    if reason is not None:
        raise BackendUnavailableError(
            f"{source} asks for the backend {name!r}, which cannot run here: {reason}"
        )
    objection = _mismatch(name, device, dtype)
    if objection is None and primitive not in load(name).PRIMITIVES:
        objection = f"does not implement {primitive}"
    if objection is not None:
        raise UnsupportedOperationError(
            f"{source} asks for the backend {name!r}, which {objection}; "
            f"use backend='reference' or leave the choice to the default"
        )
    return load(name)


def _mismatch(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend, available or not, is not made for such tensors; None where it is."""
    spec = BACKENDS[name]
    if spec.devices is not None and device not in spec.devices:
        return f"runs on {', '.join(sorted(spec.devices))} tensors, not on {device} ones"
    if spec.dtypes is not None and dtype not in spec.dtypes:
        names = ", ".join(sorted(str(known).removeprefix("torch.") for known in spec.dtypes))
        return f"takes {names}, not {str(dtype).removeprefix('torch.')}"
    return None


@functools.cache
def _warn_missing(name: str) -> None:
    """Say once that the default is a slower backend than this machine could have."""
    warnings.warn(
        f"rlhf_kernels: the {name} backend is not available, slower ones take its place: "
        f"{unavailable_reason(name)}",
        stacklevel=2,
    )
