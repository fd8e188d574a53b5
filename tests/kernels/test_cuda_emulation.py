"""The emulation that the CUDA kernels are tested in: what goes wrong on a GPU must show in it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from emulated_cuda import FLAGS, HERE

PROGRAM = """
#include <cuda_runtime.h>
#include <stdio.h>

constexpr int kThreads = 64;

// Each thread writes its number, and reads what stands at the other end of the block.
template <bool kWait>
__global__ void reversed(int* out) {
  __shared__ int numbers[kThreads];
  numbers[threadIdx.x] = int(threadIdx.x) + 1;
  if (kWait) __syncthreads();
  out[threadIdx.x] = numbers[kThreads - 1 - threadIdx.x];
}

__global__ void in_two_places(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void for_an_ended_one(int*) {
  if (threadIdx.x != 5) __syncthreads();
}

__global__ void exchanging(int* out) {
  const int lane = int(threadIdx.x) % 32;
  const int up = __shfl_up_sync(~0u, lane, 1), down = __shfl_down_sync(~0u, lane, 2);
  const int same = __shfl_sync(~0u, int(threadIdx.x), 7);
  const unsigned odd = __ballot_sync(~0u, lane % 2);
  const int any = __syncthreads_or(threadIdx.x == 40);
  const bool right = up == (lane ? lane - 1 : 0) && down == (lane < 30 ? lane + 2 : lane) &&
                     same == int(threadIdx.x) / 32 * 32 + 7 && odd == 0xaaaaaaaau && any == 1;
  out[threadIdx.x] = right ? kThreads - int(threadIdx.x) : -1;
}

void run(const char* name, void (*kernel)(int*)) {
  int out[kThreads] = {};
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kThreads);
  try {
    cudaLaunchKernelEx(&config, kernel, out);
  } catch (const std::runtime_error& error) {
    printf("%s: %s\\n", name, error.what());
    return;
  }
  bool right = true;
  for (int i = 0; i < kThreads; ++i) right = right && out[i] == kThreads - i;
  printf("%s: %s\\n", name, right ? "right" : "wrong");
}

int main() {
  run("waiting", reversed<true>);
  run("not waiting", reversed<false>);
  run("in two places", in_two_places);
  run("for an ended one", for_an_ended_one);
  run("exchanging", exchanging);
  run("waiting again", reversed<true>);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_mistakes_show(tmp_path: Path) -> None:
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    includes = f"-I{HERE / 'cuda_emulation'}"
    subprocess.run(["g++", *FLAGS, includes, str(source), "-o", str(program)], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")
    said = dict(line.split(": ") for line in lines if line)
    places = [i for i, line in enumerate(PROGRAM.split("\n"), 1) if "    __syncthreads();" in line]
    assert said == {
        "waiting": "right",
        "not waiting": "wrong",
        "in two places": f"threads wait for each other in lines {places[0]} and {places[1]}",
        "for an ended one": "threads wait for others that have ended",
        "exchanging": "right",
        "waiting again": "right",
    }
