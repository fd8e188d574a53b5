// What the threads of a block do together. All blocks have kThreads of them.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

namespace rk {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;
constexpr int kItems = 4;                 // of a thread
constexpr int kTile = kThreads * kItems;  // what a block takes at once
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_index() { return int(threadIdx.x) % kLanes; }
__device__ inline int warp_index() { return int(threadIdx.x) / kLanes; }

// x of the lane `distance` further on, word by word.
template <class T>
__device__ inline T from_lane_after(const T& x, int distance) {
  static_assert(sizeof(T) % sizeof(int) == 0, "whole words");
  int words[sizeof(T) / sizeof(int)];
  memcpy(words, &x, sizeof(T));
#pragma unroll
  for (int& word : words) word = __shfl_down_sync(kAllLanes, word, distance);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

template <class T>
__device__ inline void add_lane_after(T& x, int distance) {
  x.add(from_lane_after(x, distance));
}

// All the threads' x added up, in a fixed order. Every thread of the block must call, and gets it.
template <class T>
__device__ inline T block_total(T x) {
  __shared__ T of_warps[kWarps];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) add_lane_after(x, distance);
  if (lane_index() == 0) of_warps[warp_index()] = x;
  __syncthreads();
  T total = of_warps[0];
  for (int warp = 1; warp < kWarps; ++warp) total.add(of_warps[warp]);
  __syncthreads();  // before another call writes
  return total;
}

struct Count {
  int64_t number;
  __device__ void add(const Count& other) { number += other.number; }
};

struct Largest {
  int number;
  __device__ void add(const Largest& other) { number = max(number, other.number); }
};

}  // namespace cuda
}  // namespace rk
