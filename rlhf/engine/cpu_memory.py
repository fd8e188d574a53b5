"""Memory that a CPU's training frees and soon wants again."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
INT_MAX = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed instead of giving it back to the system, for this process.

    Every new page has to be zeroed by the system first. A step that frees its gradients and
    allocates them anew pays so for all of them, some 10% of a backward pass.

    Returns:
        Whether it could: glibc has the setting, other C libraries do without.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, INT_MAX)
    )
