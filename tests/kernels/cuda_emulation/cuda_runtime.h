// As much of CUDA as csrc/cuda uses, for a host's compiler: the kernels as they are, on the CPU.
//
// The threads of a block are fibers. Each runs until it must wait for others of its warp, and each
// warp until it must wait for the block: as far ahead of the others as the barriers let it. They do
// so in ascending order or, with RK_EMULATION_ORDER=descending, the other way round. A missing
// barrier shows as a wrong number. Threads that wait in different places, or for one that has
// ended, are an error.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 128 * 1024;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  jmp_buf where;
  bool ended;
  int waits_at;      // a line of the source; 0: it can run
  bool for_block;    // or for its warp
  int64_t given;     // to the others of its warp
};

inline std::vector<Fiber> fibers;
inline std::vector<int64_t> gathered;  // what the threads gave in the last exchange
inline unsigned current;
inline jmp_buf scheduler;
inline std::function<void()> body;

inline void leave() {
  if (_setjmp(fibers[current].where) == 0) _longjmp(scheduler, 1);
}

inline void wait(bool for_block, int64_t given, int line) {
  Fiber& own = fibers[current];
  own.waits_at = line, own.for_block = for_block, own.given = given;
  leave();
}

// Lets the threads [begin, end) go on where all wait for each other. False: some of them do not.
inline bool release(unsigned begin, unsigned end, bool for_block) {
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].waits_at == 0 || fibers[i].for_block != for_block) return false;
  }
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].waits_at != fibers[begin].waits_at) {
      throw std::runtime_error("threads wait for each other in lines " +
                               std::to_string(fibers[begin].waits_at) + " and " +
                               std::to_string(fibers[i].waits_at));
    }
    gathered[i] = fibers[i].given;
  }
  for (unsigned i = begin; i < end; ++i) fibers[i].waits_at = 0;
  return true;
}

inline void enter() {
  body();
  fibers[current].ended = true;
  _longjmp(scheduler, 1);
}

inline void resume(unsigned thread, bool fresh) {
  current = thread;
  threadIdx = dim3(thread);
  if (_setjmp(scheduler)) return;
  if (!fresh) _longjmp(fibers[thread].where, 1);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibers[thread].stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

inline bool descending() {
  const char* order = getenv("RK_EMULATION_ORDER");
  return order && strcmp(order, "descending") == 0;
}

// Lets a warp run until its threads have ended or wait for the block. False: none could run.
inline bool run_warp(unsigned first, bool fresh) {
  bool progress = false;
  do {
    for (unsigned i = 0; i < kLanes; ++i) {
      const unsigned thread = first + (descending() ? kLanes - 1 - i : i);
      if (fibers[thread].ended || fibers[thread].waits_at != 0) continue;
      resume(thread, fresh);
      progress = true;
    }
    fresh = false;
  } while (release(first, first + kLanes, false));
  return progress;
}

inline void run_block(unsigned threads) {
  for (Fiber& fiber : fibers) fiber.ended = false, fiber.waits_at = 0;
  for (bool fresh = true;; fresh = false) {
    bool progress = false;
    for (unsigned i = 0; i < threads; i += kLanes) {
      progress |= run_warp(descending() ? threads - kLanes - i : i, fresh);
    }
    unsigned ended = 0;
    for (unsigned i = 0; i < threads; ++i) ended += fibers[i].ended;
    if (ended == threads) return;
    if (!release(0, threads, true) && !progress) {
      throw std::runtime_error("threads wait for others that have ended");
    }
  }
}

inline void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  if (block.x % kLanes) throw std::runtime_error("the emulation takes whole warps");
  while (fibers.size() < block.x) fibers.emplace_back();
  gathered.resize(block.x);
  gridDim = grid, blockDim = block;
  body = kernel;
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx = dim3(descending() ? grid.x - 1 - i : i);
    run_block(block.x);
  }
}

// What the lane at this distance from the thread's warp's first gave.
inline int64_t exchange(int64_t own, unsigned from_lane, int line) {
  wait(false, own, line);
  return gathered[current / kLanes * kLanes + from_lane];
}

template <class T>
T from_lane(T x, unsigned lane, int line) {
  int64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  bits = exchange(bits, lane < kLanes ? lane : threadIdx.x % kLanes, line);
  memcpy(&x, &bits, sizeof(T));
  return x;
}

}  // namespace emulation

inline void __syncthreads(int line = __builtin_LINE()) { emulation::wait(true, 0, line); }
inline void __syncwarp(int line = __builtin_LINE()) { emulation::wait(false, 0, line); }

inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  emulation::wait(true, predicate, line);
  for (const int64_t given : emulation::gathered) {
    if (given) return 1;
  }
  return 0;
}

inline unsigned __ballot_sync(unsigned, int predicate, int line = __builtin_LINE()) {
  unsigned bits = 0;
  emulation::wait(false, predicate != 0, line);
  const unsigned first = emulation::current / emulation::kLanes * emulation::kLanes;
  for (unsigned i = 0; i < emulation::kLanes; ++i) {
    bits |= unsigned(emulation::gathered[first + i]) << i;
  }
  return bits;
}

template <class T>
T __shfl_sync(unsigned, T x, int lane, int line = __builtin_LINE()) {
  return emulation::from_lane(x, unsigned(lane), line);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int distance, int line = __builtin_LINE()) {
  return emulation::from_lane(x, threadIdx.x % emulation::kLanes - unsigned(distance), line);
}
template <class T>
T __shfl_down_sync(unsigned, T x, int distance, int line = __builtin_LINE()) {
  return emulation::from_lane(x, threadIdx.x % emulation::kLanes + unsigned(distance), line);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }

#define CUDART_VERSION 13000
typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  emulation::run(config->gridDim, config->blockDim, [&] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}
