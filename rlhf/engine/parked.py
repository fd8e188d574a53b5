"""Weights of a model that is only read, in a file, and in memory while they are read.

Of a transformer, a layer at a time: each is let go as soon as it has been run.
"""

from __future__ import annotations

import mmap
import tempfile
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from rlhf.engine.parallel import decoder_layers
from rlhf.files import OutputError

ALIGNMENT = 64  # bytes; a cache line, and more than any dtype needs


class ParkedWeights:
    """A model's weights, moved to a file of their own and mapped from there.

    The system reads them when they are used, and keeps them in its page cache as long as it has
    no better use for the memory. The file has no name, so that it is gone with the process.

    Args:
        model: On the CPU, and not trained: its weights are mapped privately, and a change to one
            would be in memory alone.
        folder: Where the file goes. A folder that is itself in memory gains nothing.

    Raises:
        OutputError: The file cannot be written; the model is as it was.
    """

    def __init__(self, model: nn.Module, folder: str | Path) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._mapping: mmap.mmap | None = None
        if not sum(tensor.numel() for tensor in tensors):
            return
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                places = [_append(file, tensor.detach()) for tensor in tensors]
                file.flush()
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise OutputError(
                f"cannot keep frozen weights in {folder}: {error.strerror or error}. Make room "
                "there, or train with frozen_on_disk off."
            ) from error
        for tensor, place in zip(tensors, places):
            if tensor.numel():
                flat = torch.frombuffer(
                    self._mapping, dtype=tensor.dtype, count=tensor.numel(), offset=place
                )
                tensor.data = flat.view(tensor.shape)
        self.release()
        place_of = dict(zip(map(id, tensors), places))
        for layer in decoder_layers(model):
            own = [*layer.parameters(), *layer.buffers()]
            start = min((place_of[id(tensor)] for tensor in own), default=0)
            end = max((place_of[id(tensor)] + tensor.nbytes for tensor in own), default=0)
            layer.register_forward_hook(partial(self._release_layer, start, end))

    def release(self) -> None:
        """Take the weights out of this process's memory, until they are read again."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def _release_layer(self, start: int, end: int, *of_hook: object) -> None:
        """The whole pages between two places in the file."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED") and length > 0:
            self._mapping.madvise(mmap.MADV_DONTNEED, first, length)


def _append(file: BinaryIO, tensor: Tensor) -> int:
    """Write the numbers at the next aligned place, which is returned."""
    place = -(-file.tell() // ALIGNMENT) * ALIGNMENT
    file.seek(place)
    if tensor.numel():
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return place
