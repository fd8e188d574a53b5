// What the bindings and the CUDA kernels agree on. Plain data only; pointers are the device's.
#pragma once

#include <stdint.h>

#include "math/kl.h"
#include "sequences.h"

namespace rk {
namespace cuda {

constexpr int64_t kChunk = 1024;       // places of a sequence that a block takes at once
constexpr int64_t kMostBlocks = 1024;  // of a reduction, whatever the device: so are the bits

struct Stream {
  void* handle;
};

struct Advantages {
  Sequences sequences;
  Series values;
  Mask mask;
  const float* bootstrap_values;  // [count], or null
  GaeRates rates;
  MaskedStep masked;
  float* advantages;  // contiguous, like all outputs
  float* returns;
  int parts;           // blocks that share a sequence
  int* valid_counts;   // scratch of each sequence's tiles of kChunk places; null with one part
  float* chunk_sums;   // scratch, two for each of them; null with one part
};

struct Gae {
  Advantages all;
  Series rewards;
};

struct Rollout {
  Advantages all;
  const float* scores;  // [count]
  Series logprobs, ref_logprobs;
  float kl_coef;
  KlEstimator kl_estimator;
  float* rewards;
  float* kl;
  double* moments;  // [kMoments], of the advantages
  double* scratch;  // [count, parts, kMoments]
};

struct Grid {
  int64_t rows, columns;
};

struct MomentsOf {
  Series x;
  Mask mask;
  Grid grid;
  double* moments;
  double* scratch;  // [kMostBlocks, kMoments]
};

struct Whiten {
  Series x;
  Mask mask;
  Grid grid;
  const double* moments;
  bool shift_mean;
  double eps;
  float* out;
};

struct PpoLoss {
  Series logprobs, old_logprobs, advantages;
  Series values, old_values, returns;  // all or none
  Series entropy, ref_logprobs, importance_weights;  // or null
  Mask mask;
  Sequences sequences;
  Grid grid;  // of the tokens: one row where they are packed
  float clip_low, clip_high;  // the ratio's bounds
  float dual_clip;            // infinity: none
  float value_clip_range;     // infinity: none
  float value_coef, entropy_coef, kl_coef;
  KlEstimator kl_estimator;
  Aggregation aggregation;
  const float* normalizer;  // or null: derived from the mask
  float* loss;              // [1]
  float* stats;             // [12], in the order of PPO_STATS
  float* grad_logprobs;     // contiguous; the next two null where their input is
  float* grad_values;
  float* grad_entropy;
  int* valid_counts;  // scratch [count], or null where the mask need not be counted
  float* weights;     // scratch: [count], or [1] where all tokens weigh the same; null likewise
  double* partials;   // scratch [kMostBlocks, kPpoPartial]
};

constexpr int64_t kPpoPartial = 20;

void gae(const Gae& args, Stream stream);
void rollout(const Rollout& args, Stream stream);
void moments(const MomentsOf& args, Stream stream);
void whiten(const Whiten& args, Stream stream);
void ppo_loss(const PpoLoss& args, Stream stream);

// The moments of `count` parts, given one after the other, together.
void combine_moments(const double* parts, int64_t count, double* moments, Stream stream);

}  // namespace cuda
}  // namespace rk
