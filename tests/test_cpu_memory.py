"""Freed memory that the process keeps, seen in its page faults and its resident size."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf_kernels import cpu_memory

# In a process of its own: the setting is the process's, and so are the counts.
PROGRAM = """
import ctypes
import resource
from rlhf_kernels.cpu_memory import keep_freed_memory, kept_freed_memory

BLOCKS, MIB = 64, 4
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def a_step():
    # The faults of a backward pass: gradients, all gone in the end. By malloc itself: a tensor's
    # other parts may come to lie at the heap's end, and nothing before them goes back.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gradients = [libc.malloc(ctypes.c_size_t(MIB << 20)) for _ in range(BLOCKS)]
    for gradient in gradients:
        ctypes.memset(gradient, 1, MIB << 20)
    for gradient in gradients:
        libc.free(ctypes.c_void_p(gradient))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmRSS"))
    return int(line.split()[1]) // 1024

before = resident()
freely = [a_step() for _ in range(3)][-1]
with kept_freed_memory():
    kept = [a_step() for _ in range(3)][-1]
    held = resident() - before
print(freely, kept, [a_step() for _ in range(3)][-1], held, resident() - before)
with kept_freed_memory():
    keep_freed_memory()  # for good, whatever ends since
    a_step()
print([a_step() for _ in range(3)][-1])
"""


@pytest.mark.skipif(cpu_memory._libc() is None, reason="another C library than glibc")
def test_freed_memory_is_kept_inside_and_goes_back_after() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    first, second = ended.stdout.splitlines()
    freely, kept, after, held, left = map(int, first.split())
    assert freely >= 64 and after > freely / 2
    assert kept < freely / 8
    assert held >= 250 and left < 100
    assert int(second) < freely / 8, "kept for good inside, kept after"
