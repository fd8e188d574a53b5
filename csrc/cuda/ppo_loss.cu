// Loss, statistics and gradients of clipped PPO in one pass over the tokens.
//
// Every block leaves the sums over its tokens, and a last kernel adds them in their order. How many
// blocks there are depends on the number of tokens alone, and so do the bits.

#include <math.h>

#include "cuda/block.h"
#include "cuda/cell.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "math/kl.h"
#include "math/moments.h"
#include "math/ppo_loss.h"

namespace rk {
namespace cuda {
namespace {

// What is added up over the valid tokens; weighted: by what the aggregation gives the token.
enum Sum {
  kPolicyLoss,  // weighted
  kValueLoss,   // weighted
  kWeightedEntropy,
  kWeightedRefKl,
  kEntropy,
  kRefKl,
  kLogRatio,
  kK3,
  kRatio,
  kNumSums
};

enum Counted { kValid, kClipped, kValueClipped, kDualClipped, kNumCounted };

__device__ inline float larger_or_nan(float a, float b) { return b > a || b != b ? b : a; }

// Of a thread.
struct TokenSums {
  double sums[kNumSums];
  int counts[kNumCounted];
  float ratio_max;
  Deviations returns, errors;
};

// Of a block, or of all.
struct Totals {
  double sums[kNumSums];
  double counts[kNumCounted];
  double ratio_max;
  Moments returns, errors;

  __device__ void add(const Totals& other) {
    for (int i = 0; i < kNumSums; ++i) sums[i] += other.sums[i];
    for (int i = 0; i < kNumCounted; ++i) counts[i] += other.counts[i];
    ratio_max = larger_or_nan(float(ratio_max), float(other.ratio_max));
    returns.add(other.returns);
    errors.add(other.errors);
  }
};
// One number after the other: a second copy of all would not fit in the registers.
__device__ inline void add_lane_after(Totals& x, int distance) {
#pragma unroll
  for (double& sum : x.sums) sum += from_lane_after(sum, distance);
#pragma unroll
  for (double& count : x.counts) count += from_lane_after(count, distance);
  x.ratio_max = larger_or_nan(float(x.ratio_max), float(from_lane_after(x.ratio_max, distance)));
  x.returns.add(from_lane_after(x.returns, distance));
  x.errors.add(from_lane_after(x.errors, distance));
}

static_assert(sizeof(Totals) == kPpoPartial * sizeof(double), "the caller allocates a block's");

__device__ inline Totals totals_of(const TokenSums& own) {
  Totals totals;
  for (int i = 0; i < kNumSums; ++i) totals.sums[i] = own.sums[i];
  for (int i = 0; i < kNumCounted; ++i) totals.counts[i] = own.counts[i];
  totals.ratio_max = own.ratio_max;
  totals.returns = own.returns.moments(own.counts[kValid]);
  totals.errors = own.errors.moments(own.counts[kValid]);
  return totals;
}

// What a valid token counts for in the loss.
__device__ inline float weight_of(const PpoLoss& args, const Cell& cell) {
  if (!args.weights) return float(1.0 / double(*args.normalizer));
  if (args.aggregation != Aggregation::seq_mean_token_mean) return *args.weights;
  const bool packed = args.sequences.cu_seqlens != nullptr;
  return args.weights[packed ? sequence_of(args.sequences, cell.column) : cell.row];
}

__device__ inline float add_policy(const PpoLoss& args, const Cell& cell, float weight,
                                   TokenSums& own) {
  const PpoClipping clip = {args.clip_low, args.clip_high, args.dual_clip, args.value_clip_range};
  const float log_ratio = cell.in(args.logprobs) - cell.in(args.old_logprobs);
  const float ratio = expf(log_ratio);
  if (args.importance_weights.data) weight *= cell.in(args.importance_weights);
  const auto policy = policy_term(ratio, cell.in(args.advantages), clip);
  own.sums[kPolicyLoss] += weight * policy.loss;
  own.sums[kLogRatio] += log_ratio;
  own.sums[kK3] += exp_minus_one_minus(log_ratio, ratio);
  own.sums[kRatio] += ratio;
  own.ratio_max = larger_or_nan(own.ratio_max, ratio);
  own.counts[kClipped] += policy.clipped;
  own.counts[kDualClipped] += policy.dual_clipped;
  return weight * policy.gradient;
}

__device__ inline float add_ref_kl(const PpoLoss& args, const Cell& cell, float weight,
                                   TokenSums& own) {
  const float r = cell.in(args.logprobs) - cell.in(args.ref_logprobs);
  const float exponential = args.kl_estimator == KlEstimator::k3 ? expf(-r) : 0.0f;
  const float kl = kl_estimate(r, exponential, args.kl_estimator);
  own.sums[kRefKl] += kl;
  own.sums[kWeightedRefKl] += weight * kl;
  return weight * args.kl_coef * kl_slope(r, exponential, kl, args.kl_estimator);
}

__device__ inline float add_value(const PpoLoss& args, const Cell& cell, float weight,
                                  TokenSums& own) {
  const PpoClipping clip = {args.clip_low, args.clip_high, args.dual_clip, args.value_clip_range};
  const float value = cell.in(args.values), ret = cell.in(args.returns);
  const auto term = value_term(value, cell.in(args.old_values), ret, clip);
  const bool first = own.counts[kValid] == 0;
  own.returns.add(ret, first);
  own.errors.add(ret - value, first);
  own.sums[kValueLoss] += weight * term.loss;
  own.counts[kValueClipped] += term.clipped;
  return weight * args.value_coef * term.gradient;
}

__device__ inline void add_token(const PpoLoss& args, int64_t token, TokenSums& own) {
  const Cell cell(token, args.grid.columns);
  float of_logprob = 0.0f, of_value = 0.0f, of_entropy = 0.0f;
  if (cell.in(args.mask)) {
    const float weight = weight_of(args, cell);
    of_logprob = add_policy(args, cell, weight, own);
    if (args.ref_logprobs.data) of_logprob += add_ref_kl(args, cell, weight, own);
    if (args.values.data) of_value = add_value(args, cell, weight, own);
    if (args.entropy.data) {
      const float entropy = cell.in(args.entropy);
      own.sums[kEntropy] += entropy;
      own.sums[kWeightedEntropy] += weight * entropy;
      of_entropy = weight * -args.entropy_coef;
    }
    own.counts[kValid] += 1;
  }
  args.grad_logprobs[token] = of_logprob;
  if (args.values.data) args.grad_values[token] = of_value;
  if (args.entropy.data) args.grad_entropy[token] = of_entropy;
}

__global__ void __launch_bounds__(kThreads, 2) ppo_loss_kernel(const PpoLoss args) {
  const int64_t all = args.grid.rows * args.grid.columns;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  TokenSums own = {};
  for (int64_t token = int64_t(blockIdx.x) * kThreads + threadIdx.x; token < all; token += step) {
    add_token(args, token, own);
  }
  const Totals totals = block_total(totals_of(own));
  if (threadIdx.x == 0) reinterpret_cast<Totals*>(args.partials)[blockIdx.x] = totals;
}

__global__ void __launch_bounds__(kThreads) count_kernel(const PpoLoss args) {
  const int64_t* starts = args.sequences.cu_seqlens;
  const int64_t sequence = blockIdx.x;
  const uint8_t* mask = args.mask.data;
  mask += starts ? starts[sequence] : sequence * args.mask.row_stride;
  const int64_t n = starts ? starts[sequence + 1] - starts[sequence] : args.sequences.columns;
  Count valid = {0};
  for (int64_t i = threadIdx.x; i < n; i += kThreads) valid.number += mask[i] != 0;
  valid = block_total(valid);
  if (threadIdx.x == 0) args.valid_counts[sequence] = int(valid.number);
}

// One block: from the counts of all sequences to what a token of each weighs.
__global__ void __launch_bounds__(kThreads) weights_kernel(const PpoLoss args) {
  const bool by_token = args.aggregation == Aggregation::token_mean;
  Count derived = {0};
  for (int64_t i = threadIdx.x; i < args.sequences.count; i += kThreads) {
    const int count = args.valid_counts[i];
    derived.number += by_token ? count : count > 0;
  }
  derived = block_total(derived);
  const double least_one = derived.number > 0 ? double(derived.number) : 1.0;
  const double normalizer = args.normalizer ? double(*args.normalizer) : least_one;
  if (args.aggregation != Aggregation::seq_mean_token_mean) {
    if (threadIdx.x == 0) *args.weights = float(1.0 / normalizer);
    return;
  }
  for (int64_t i = threadIdx.x; i < args.sequences.count; i += kThreads) {
    args.weights[i] = float(1.0 / (double(args.valid_counts[i]) * normalizer));
  }
}

__device__ inline void write_results(const PpoLoss& args, const Totals& all) {
  const double n = all.counts[kValid] > 0.0 ? all.counts[kValid] : 1.0;
  const double spread = all.returns.squares;
  const bool explains = args.values.data && spread != 0.0;
  *args.loss = float(all.sums[kPolicyLoss] + double(args.value_coef) * all.sums[kValueLoss] -
                     double(args.entropy_coef) * all.sums[kWeightedEntropy] +
                     double(args.kl_coef) * all.sums[kWeightedRefKl]);
  const double stats[] = {
      all.sums[kPolicyLoss],
      all.sums[kValueLoss],
      all.sums[kEntropy] / n,
      -all.sums[kLogRatio] / n,
      all.sums[kK3] / n,
      all.counts[kClipped] / n,
      all.counts[kValueClipped] / n,
      all.counts[kDualClipped] / n,
      all.sums[kRatio] / n,
      all.ratio_max,
      explains ? 1.0 - all.errors.squares / spread : 0.0,
      all.sums[kRefKl] / n,
  };
  for (int s = 0; s < int(sizeof(stats) / sizeof(*stats)); ++s) args.stats[s] = float(stats[s]);
}

__global__ void __launch_bounds__(kThreads) results_kernel(const PpoLoss args, int64_t blocks) {
  Totals totals = {};
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    totals.add(reinterpret_cast<const Totals*>(args.partials)[i]);
  }
  totals = block_total(totals);
  if (threadIdx.x == 0) write_results(args, totals);
}

}  // namespace

void ppo_loss(const PpoLoss& args, Stream stream) {
  const int64_t blocks = blocks_for(args.grid, kMostBlocks);
  if (args.weights) {
    launch("count of valid tokens", count_kernel, args.sequences.count, stream.handle, args);
    launch("weights of tokens", weights_kernel, 1, stream.handle, args);
  }
  launch("PPO loss", ppo_loss_kernel, blocks, stream.handle, args);
  launch("results of the PPO loss", results_kernel, 1, stream.handle, args, blocks);
}

}  // namespace cuda
}  // namespace rk
