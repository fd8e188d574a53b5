"""Memory that a CPU's training frees and soon wants again.

Every page that a process gets from the system has to be zeroed and mapped first: 4 us on a virtual
machine, 3.4 s for the 850,000 of a backward pass of two models of 135M. glibc gives a large block
back the moment it is freed; a step that frees its gradients and allocates them anew pays for all of
them again.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
NEVER = -1  # mallopt(3): no memory goes back, however much lies free at the top
# What glibc arrives at by itself in a process that frees large blocks.
MMAP_MAX, MMAP_THRESHOLD = 65536, 32 * 2**20

_for_good = False


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed instead of giving it back to the system, for this process.

    Returns:
        Whether it could: glibc has the setting, other C libraries do without.
    """
    global _for_good
    _for_good = _keep()
    return _for_good


@contextmanager
def kept_freed_memory() -> Iterator[None]:
    """The same for what is done inside; afterwards it goes back, unless it is kept for good."""
    _keep()
    try:
        yield
    finally:
        if not _for_good:
            _give_back()


def _keep() -> bool:
    libc = _libc()
    return libc is not None and bool(
        libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    )


def _give_back() -> None:
    libc = _libc()
    if libc is not None:
        libc.mallopt(M_MMAP_MAX, MMAP_MAX)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * MMAP_THRESHOLD)
        libc.malloc_trim(0)


def _libc() -> Any:
    """glibc, where that is the C library."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
