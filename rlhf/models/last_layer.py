"""The last layer's feed-forward network at the positions that are read.

Behind a trunk's last attention nothing mixes positions any more, so of a response's prompt the last
feed-forward network, three quarters of a Llama-like layer's products, is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_kernels.fast_layers import is_gated_mlp
from rlhf_kernels.fast_rotary import runs_once_as_written
from rlhf_kernels.linear_layers import keeping_forwards


@contextmanager
def last_feed_forward_from(trunk: Any, tokens: Tensor, first: int) -> Iterator[None]:
    """Within it the last feed-forward network of Llama-like trunks on a CPU leaves out the tokens
    before the column ``first``, whose hidden states then lack what it adds.

    Nothing changes for other trunks, and for compiled, checkpointed or sharded ones.

    Args:
        trunk: A transformers model without a head.
        tokens: bool [B, L], where there is a token that it is to be called with, row after row.
        first: 0 leaves out none.
    """
    network = _last_feed_forward(trunk) if first > 0 else None
    if network is None:
        yield
        return
    read = tokens.clone()
    read[:, :first] = False
    places = read[tokens].nonzero().flatten()
    whole = network.forward

    def forward(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        part = whole(rows[places])
        return part.new_zeros(rows.shape).index_copy(0, places, part).view(x.shape)

    with keeping_forwards([network]):
        network.forward = forward  # type: ignore[method-assign]
        yield


def _last_feed_forward(trunk: Any) -> nn.Module | None:
    layers = getattr(trunk, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not runs_once_as_written(trunk):
        return None
    network = getattr(layers[-1], "mlp", None)
    if not isinstance(network, nn.Module) or not is_gated_mlp(network):
        return None
    on_cpu = all(
        weight.device.type == "cpu" and not isinstance(weight, DTensor)
        for weight in network.parameters()
    )
    return network if on_cpu else None
