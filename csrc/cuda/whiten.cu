// Moments of the valid places, in two stages of fixed order, and whitening by them.

#include <math.h>

#include "cuda/block.h"
#include "cuda/cell.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "math/moments.h"

namespace rk {
namespace cuda {
namespace {

__device__ inline void store(double* out, const Moments& moments) {
  out[0] = moments.count, out[1] = moments.mean, out[2] = moments.squares;
}

__global__ void __launch_bounds__(kThreads) moments_kernel(const MomentsOf args) {
  const int64_t all = args.grid.rows * args.grid.columns;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  Deviations deviations = {};
  int count = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += step) {
    const Cell cell(i, args.grid.columns);
    if (!cell.in(args.mask)) continue;
    deviations.add(cell.in(args.x), count == 0);
    ++count;
  }
  const Moments own = block_total(deviations.moments(count));
  if (threadIdx.x == 0) store(args.scratch + kMoments * blockIdx.x, own);
}

__global__ void __launch_bounds__(kThreads)
    combine_moments_kernel(const double* parts, int64_t count, double* out) {
  Moments own = {0.0, 0.0, 0.0};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const double* part = parts + kMoments * i;
    own.add({part[0], part[1], part[2]});
  }
  own = block_total(own);
  if (threadIdx.x == 0) store(out, own);
}

// In double: the mean rounded to float may be a deviation away.
__global__ void __launch_bounds__(kThreads) whiten_kernel(const Whiten args) {
  const int64_t all = args.grid.rows * args.grid.columns;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  const double mean = args.moments[1];
  const double variance = args.moments[2] / fmax(args.moments[0], 1.0);
  const double scale = 1.0 / sqrt(variance + args.eps), shift = args.shift_mean ? 0.0 : mean;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += step) {
    const Cell cell(i, args.grid.columns);
    const bool valid = cell.in(args.mask);
    args.out[i] = valid ? float((double(cell.in(args.x)) - mean) * scale + shift) : 0.0f;
  }
}

}  // namespace

void combine_moments(const double* parts, int64_t count, double* moments, Stream stream) {
  launch("moments of all parts", combine_moments_kernel, 1, stream.handle, parts, count, moments);
}

void moments(const MomentsOf& args, Stream stream) {
  const int64_t blocks = blocks_for(args.grid, kMostBlocks);
  launch("moments", moments_kernel, blocks, stream.handle, args);
  combine_moments(args.scratch, blocks, args.moments, stream);
}

void whiten(const Whiten& args, Stream stream) {
  launch("whiten", whiten_kernel, blocks_for(args.grid, 1 << 20), stream.handle, args);
}

}  // namespace cuda
}  // namespace rk
