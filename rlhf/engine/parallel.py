"""One model on many ranks: DDP, or FSDP2 with its weights sharded.

Losses here read the trunk and the head's weight by themselves and never call ``model.forward``,
which is where DDP and FSDP hook in. So the model is wrapped in a module whose forward is "call this
function with the model": inside it all weights are whole and gradients find their way back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from rlhf.engine.world import World

STRATEGIES = ("auto", "ddp", "fsdp", "hybrid")


class Calling(nn.Module):
    """A model whose forward calls a function with it: ``module(function) == function(model)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[Any], Any]) -> Any:
        return function(self.model)


def distribute(model: nn.Module, strategy: str, dtype: torch.dtype) -> nn.Module:
    """The model, on its rank's device, as a ``Calling`` spread over the ranks.

    Args:
        model: A transformers model. Under "fsdp" and "hybrid" its parameters become DTensors.
        strategy: "ddp" (also "auto"): a whole copy on every rank, gradients summed. "fsdp":
            weights, gradients and optimizer state split over all ranks (Zhao et al. 2023, arXiv
            2304.11277). "hybrid": split inside a machine, copied across machines.
        dtype: Type in which FSDP gathers weights to compute with; the shards keep theirs.

    Raises:
        ValueError: A sharding strategy was asked for outside ``torchrun``.
    """
    world = World()
    calling = Calling(model)
    if strategy in ("fsdp", "hybrid"):
        if not torch.distributed.is_initialized():
            raise ValueError(
                f"parallel={strategy!r} needs several processes; start them with torchrun: "
                "torchrun --nproc-per-node 8 -m rlhf.cli ppo ..."
            )
        return shard(calling, strategy, dtype, world)
    if world.size == 1:
        return calling
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return calling  # nothing to sum; DDP refuses such a model
    # Buffers here are constants (rotary frequencies). Newer versions of PyTorch renamed the option.
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(calling, **options)


def shard(calling: Calling, strategy: str, dtype: torch.dtype, world: World) -> nn.Module:
    """FSDP2: each decoder layer is gathered by itself, embeddings, norm and head together."""
    kind = world.device.type
    if strategy == "hybrid":
        inside = world.local_size
        mesh = init_device_mesh(
            kind, (world.size // inside, inside), mesh_dim_names=("copies", "shards")
        )
    else:
        mesh = init_device_mesh(kind, (world.size,))
    # Gradients are summed in float32 whatever they were computed in. Inputs are token ids.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in decoder_layers(calling.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(calling, mesh=mesh, mp_policy=policy)
    return calling


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The trunk's repeated layers: the longest list of modules in it."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


@contextmanager
def summing_gradients(module: nn.Module, last: bool) -> Iterator[None]:
    """Around the forward of a micro-batch, where DDP decides whether its backward will sum over
    ranks: after the last one only.

    FSDP sums after each, so that no rank ever holds a whole gradient for longer.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield


def call_gathered(module: nn.Module, function: Callable[[Any], Any]) -> Any:
    """``function(model)`` with all weights gathered once, before the call, and not again inside.

    For generation, which runs the layers once per token, and on each rank another number of times.
    """
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]

    def gathered(model: Any) -> Any:
        for part in sharded:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        return function(model)

    inner = module.module if isinstance(module, DistributedDataParallel) else module
    try:
        return inner(gathered)
    finally:
        for part in sharded:
            part.reshard()
            # FSDP's own default: the root's weights stay, since backward begins with them.
            part.set_reshard_after_forward(part is not inner, recurse=False)
