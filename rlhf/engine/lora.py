"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), by peft, inside ordinary models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"
HEADS = ["lm_head", "score"]


def add_lora(model: Any, rank: int, alpha: int, *, seed: int) -> None:
    """Put adapters beside the linear layers of a model's trunk; from now on they alone are trained.

    They begin as nothing: the model computes what it did.

    Args:
        model: A transformers model, changed in place.
        rank: Of the adapters.
        alpha: They are scaled by alpha / rank.
        seed: Of their first weights.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(
            "lora_rank needs the package peft: pip install 'rlhf-kernels[lora]'"
        ) from error
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", exclude_modules=HEADS
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(config, ADAPTER)
    head = getattr(model, "score", None)
    if head is not None:
        head.requires_grad_(True)


def has_lora(model: Any) -> bool:
    """Whether ``add_lora`` was called on the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def without_lora(model: Any) -> Iterator[None]:
    """The model as it was before its adapters were trained."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def merged_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model with adapters as those of the same model without: the products added in.

    Args:
        model: The model, for the adapters' scale.
        weights: All of its weights, whole, by name.

    Returns:
        The weights that a model of its class without adapters has.
    """
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".lora_" not in name:
            merged[name.replace(".base_layer.", ".")] = weight
    for name, layer in model.named_modules():
        if f"{name}.lora_A.{ADAPTER}.weight" in weights:
            down = weights[f"{name}.lora_A.{ADAPTER}.weight"].float()
            up = weights[f"{name}.lora_B.{ADAPTER}.weight"].float()
            adapted: Any = layer
            product = adapted.scaling[ADAPTER] * up @ down
            if adapted.fan_in_fan_out:  # a Conv1D of GPT-2, whose weight is [in, out]
                product = product.T
            base = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = base + product.to(base.dtype)
    return merged


def without_adapters(model: Any) -> Any:
    """A model of the same class and config without adapters, and without weights: to save with."""
    with torch.device("meta"):
        plain = type(model)(model.config)
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = model.generation_config
    return plain
