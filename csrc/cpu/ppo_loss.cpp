// Loss, statistics and gradients of clipped PPO in one pass over the tokens.
//
// Sums are taken in double, first within chunks of fixed size, then over the chunks in their order:
// the result has the same bits whatever the number of threads.

#include <math.h>

#include "cpu/kernels.h"
#include "cpu/mask.h"
#include "cpu/place.h"
#include "cpu/simd.h"
#include "cpu/vector_exp.h"
#include "math/kl.h"
#include "math/ppo_loss.h"

namespace rk {
namespace RK_ISA {
namespace {

// What is added up over the valid tokens; weighted: by what the aggregation gives the row. The first
// group adds up in float over kShort vectors, then in double.
enum Sum {
  kPolicyLoss,       // weighted
  kValueLoss,        // weighted
  kWeightedEntropy,
  kWeightedRefKl,
  kEntropy,
  kRefKl,
  kLogRatio,
  kK3,
  kRatio,
  kNumShortSums,
  // For variances, which cancel. Returns are taken relative to one of them, so that equal ones have
  // no variance at all.
  kReturn = kNumShortSums,
  kReturnSquared,
  kError,
  kErrorSquared,
  kNumSums
};

constexpr int kShort = 16;

enum Count { kClipped, kValueClipped, kDualClipped, kNumCounts };

// The larger of the two, or NaN once either is: a NaN must not be hidden by a maximum.
template <class F>
RK_FORMULA F larger_or_nan(F a, F b) {
  return (b > a) | (b != b) ? b : a;
}

// A chunk's scratch: the sums, the counts, the largest ratio.
constexpr int kFirstCount = kNumSums;
constexpr int kRatioMax = kNumSums + kNumCounts;
static_assert(kRatioMax + 1 == kPpoScratch, "the bindings allocate as much as a chunk writes");

struct Lanes {
  Floats short_sums[kNumShortSums];
  Doubles sums[kNumSums];
  Ints counts[kNumCounts];  // negative: a lane mask is -1 where it holds
  Floats ratio_max;
};

struct MaskSummary {
  int64_t tokens;
  int64_t sequences;
  float some_return;  // the first valid one
};

MaskSummary summarize(const PpoLoss& args) {
  MaskSummary summary = {0, 0, 0.0f};
  for (int64_t i = 0; i < args.sequences.count; ++i) {
    const Place place = {args.sequences, i};
    const uint8_t* mask = place.in(args.mask);
    const int64_t count = count_valid(mask, place.length());
    if (count == 0) continue;
    if (summary.tokens == 0 && args.returns.data) {
      summary.some_return = place.in(args.returns)[first_valid(mask, place.length())];
    }
    summary.tokens += count;
    summary.sequences += 1;
  }
  return summary;
}

// What one token of the sequence counts for in the loss.
double token_weight(const PpoLoss& args, const MaskSummary& summary, const Place& place) {
  const bool by_token = args.aggregation == Aggregation::token_mean;
  const double derived = double(by_token ? summary.tokens : summary.sequences);
  const double normalizer = args.normalizer ? double(*args.normalizer) : derived;
  if (args.aggregation != Aggregation::seq_mean_token_mean) return 1.0 / normalizer;
  const int64_t count = count_valid(place.in(args.mask), place.length());
  return count == 0 ? 0.0 : 1.0 / (double(count) * normalizer);
}

// A piece of one sequence: `n` tokens, at the first of which all pointers stand.
struct Piece {
  PpoLoss args;
  int64_t n;
  float weight;
  float some_return;
};

Series moved(Series series, const Place& place, int64_t start) {
  return {series.data ? place.in(series) + start : nullptr, series.row_stride};
}

float* moved(float* out, const Place& place, int64_t start) {
  return out ? place.out(out) + start : nullptr;
}

PpoLoss moved(PpoLoss args, const Place& place, int64_t start) {
  for (Series* series : {&args.logprobs, &args.old_logprobs, &args.advantages, &args.values,
                         &args.old_values, &args.returns, &args.entropy, &args.ref_logprobs,
                         &args.importance_weights}) {
    *series = moved(*series, place, start);
  }
  args.mask.data = place.in(args.mask) + start;
  for (float** out : {&args.grad_logprobs, &args.grad_values, &args.grad_entropy}) {
    *out = moved(*out, place, start);
  }
  return args;
}

struct Whole {  // all lanes
  static RK_FORMULA Floats read(const float* from, int64_t) { return load<Float32>(from); }
  static RK_FORMULA void write(float* to, int64_t, Floats x) { store<Float32>(to, x); }
  static RK_FORMULA Bytes read_mask(const uint8_t* from, int64_t) { return load_as<Bytes>(from); }
};

struct First {  // the first `count` lanes; the others are masked
  static RK_FORMULA Floats read(const float* from, int64_t count) {
    return load_first<Float32>(from, count, 0.0f);
  }
  static RK_FORMULA void write(float* to, int64_t count, Floats x) {
    store_first<Float32>(to, count, x);
  }
  static RK_FORMULA Bytes read_mask(const uint8_t* from, int64_t count) {
    Bytes bytes = {};
    memcpy(&bytes, from, size_t(count));
    return bytes;
  }
};

// The valid lanes of one place in a piece; 0 where masked, whatever stands there.
template <class Access>
struct PartialRead {
  const Piece& piece;
  int64_t i;
  int64_t count;
  Ints valid;

  RK_FORMULA Floats operator()(const Series& series) const {
    const Floats all = Access::read(series.data + i, count);
    return valid ? all : Floats{};
  }
};

// The KL divergence from the reference: its gradient by the log-probability, to be weighed.
template <class Access>
RK_FORMULA Floats add_ref_kl(const PartialRead<Access>& read, Floats weight, Lanes& lanes) {
  const PpoLoss& args = read.piece.args;
  const Floats r = read(args.logprobs) - read(args.ref_logprobs);
  const bool exponential = args.kl_loss_estimator == KlEstimator::k3;
  const Floats exp_minus_r = exponential ? vector_exp(-r) : Floats{};
  const Floats kl = kl_estimate(r, exp_minus_r, args.kl_loss_estimator);
  lanes.short_sums[kRefKl] += kl;
  lanes.short_sums[kWeightedRefKl] += weight * kl;
  return kl_slope(r, exp_minus_r, kl, args.kl_loss_estimator) * args.kl_loss_coef;
}

template <class Access>
RK_FORMULA void add_policy(const Piece& piece, int64_t i, int64_t count, Ints valid, Floats weight,
                           const PpoClipping& clip, Lanes& lanes) {
  const PpoLoss& args = piece.args;
  const PartialRead<Access> read = {piece, i, count, valid};
  const Floats log_ratio = read(args.logprobs) - read(args.old_logprobs);
  const Floats ratio = vector_exp(log_ratio);
  const auto term = policy_term(ratio, read(args.advantages), clip);
  Floats of_policy = weight;
  if (args.importance_weights.data) of_policy *= read(args.importance_weights);
  Floats gradient = of_policy * term.gradient;
  if (args.ref_logprobs.data) gradient += weight * add_ref_kl(read, weight, lanes);
  Access::write(args.grad_logprobs + i, count, gradient);
  // Masked lanes hold log ratio 0 and advantage 0: every term below is 0 there but the ratio.
  lanes.short_sums[kPolicyLoss] += of_policy * term.loss;
  lanes.short_sums[kLogRatio] += log_ratio;
  // The k3 estimate of KL(old || new).
  lanes.short_sums[kK3] += exp_minus_one_minus(log_ratio, ratio);
  lanes.counts[kClipped] += term.clipped;
  lanes.counts[kDualClipped] += term.dual_clipped;
  const Floats valid_ratio = valid ? ratio : Floats{};
  lanes.short_sums[kRatio] += valid_ratio;
  lanes.ratio_max = larger_or_nan(lanes.ratio_max, valid_ratio);
}

template <class Access>
RK_FORMULA void add_values(const Piece& piece, int64_t i, int64_t count, Ints valid, Floats weight,
                           const PpoClipping& clip, Lanes& lanes) {
  const PpoLoss& args = piece.args;
  const PartialRead<Access> read = {piece, i, count, valid};
  const Floats value = read(args.values);
  const Floats ret = read(args.returns);
  const auto term = value_term(value, read(args.old_values), ret, clip);
  Access::write(args.grad_values + i, count, weight * args.value_coef * term.gradient);
  lanes.short_sums[kValueLoss] += weight * term.loss;
  lanes.counts[kValueClipped] += term.clipped;
  const Floats error = ret - value;
  const Floats centred = valid ? ret - piece.some_return : Floats{};
  const Doubles wide_error = __builtin_convertvector(error, Doubles);
  const Doubles wide_centred = __builtin_convertvector(centred, Doubles);
  lanes.sums[kError] += wide_error;
  lanes.sums[kErrorSquared] += wide_error * wide_error;
  lanes.sums[kReturn] += wide_centred;
  lanes.sums[kReturnSquared] += wide_centred * wide_centred;
}

template <class Access>
RK_FORMULA void add_tokens(const Piece& piece, int64_t i, int64_t count, const PpoClipping& clip,
                           Lanes& lanes) {
  const PpoLoss& args = piece.args;
  const uint8_t* mask = args.mask.data + i;
  const Ints valid = widen_bytes(Access::read_mask(mask, count)) != 0;
  const Floats weight = valid ? splat(piece.weight) : Floats{};
  add_policy<Access>(piece, i, count, valid, weight, clip, lanes);
  if (args.values.data) add_values<Access>(piece, i, count, valid, weight, clip, lanes);
  if (args.entropy.data) {
    const Floats entropy = PartialRead<Access>{piece, i, count, valid}(args.entropy);
    lanes.short_sums[kEntropy] += entropy;
    lanes.short_sums[kWeightedEntropy] += weight * entropy;
    Access::write(args.grad_entropy + i, count, weight * -args.entropy_coef);
  }
}

RK_FORMULA void flush_short_sums(Lanes& lanes) {
  for (int s = 0; s < kNumShortSums; ++s) {
    lanes.sums[s] += __builtin_convertvector(lanes.short_sums[s], Doubles);
    lanes.short_sums[s] = Floats{};
  }
}

// All by value: the compiler knows then that no store to an output changes it.
Lanes add_piece(const Piece piece, const PpoClipping clip, Lanes lanes) {
  const int64_t whole = piece.n / kLanes * kLanes;
  for (int64_t i = 0; i < whole;) {
    const int64_t end = i + kShort * kLanes < whole ? i + kShort * kLanes : whole;
    for (; i < end; i += kLanes) add_tokens<Whole>(piece, i, kLanes, clip, lanes);
    flush_short_sums(lanes);
  }
  if (whole < piece.n) {
    add_tokens<First>(piece, whole, piece.n - whole, clip, lanes);
    flush_short_sums(lanes);
  }
  return lanes;
}

void add_chunk(const PpoLoss& args, const MaskSummary& summary, const PpoClipping& clip,
               int64_t chunk, double* out) {
  Lanes lanes = {};
  const int64_t all = tokens_of(args.sequences);
  const int64_t end = (chunk + 1) * kPpoChunk < all ? (chunk + 1) * kPpoChunk : all;
  int64_t token = chunk * kPpoChunk;
  for (int64_t i = sequence_of(args.sequences, token); token < end; ++i) {
    const Place place = {args.sequences, i};
    const int64_t start = token - place.begin(args.sequences.columns);
    const int64_t left = place.length() - start;
    const int64_t n = left < end - token ? left : end - token;
    const float weight = float(token_weight(args, summary, place));
    const Piece piece = {moved(args, place, start), n, weight, summary.some_return};
    lanes = add_piece(piece, clip, lanes);
    token += n;
  }
  for (int s = 0; s < kNumSums; ++s) out[s] = sum_of_lanes(lanes.sums[s]);
  for (int c = 0; c < kNumCounts; ++c) {
    out[kFirstCount + c] = -sum_of_lanes(__builtin_convertvector(lanes.counts[c], Doubles));
  }
  float ratio_max = lanes.ratio_max[0];
  for (int i = 1; i < kLanes; ++i) ratio_max = larger_or_nan(ratio_max, float(lanes.ratio_max[i]));
  out[kRatioMax] = ratio_max;
}

double variance(double sum, double sum_squared, double n) {
  const double mean = sum / n;
  const double difference = sum_squared / n - mean * mean;
  return difference < 0 ? 0.0 : difference;  // which rounding can make it; NaN stays
}

void write_results(const PpoLoss& args, const MaskSummary& summary, const double* total) {
  const double* sums = total;
  const double* counts = total + kFirstCount;
  const double n = summary.tokens ? double(summary.tokens) : 1.0;
  const double spread = variance(sums[kReturn], sums[kReturnSquared], n);
  const double unexplained = variance(sums[kError], sums[kErrorSquared], n);
  *args.loss = float(sums[kPolicyLoss] + double(args.value_coef) * sums[kValueLoss] -
                     double(args.entropy_coef) * sums[kWeightedEntropy] +
                     double(args.kl_loss_coef) * sums[kWeightedRefKl]);
  const double stats[] = {
      sums[kPolicyLoss],
      sums[kValueLoss],
      sums[kEntropy] / n,
      -sums[kLogRatio] / n,
      sums[kK3] / n,
      counts[kClipped] / n,
      counts[kValueClipped] / n,
      counts[kDualClipped] / n,
      sums[kRatio] / n,
      total[kRatioMax],
      args.values.data && spread != 0 ? 1.0 - unexplained / spread : 0.0,
      sums[kRefKl] / n,
  };
  for (int s = 0; s < int(sizeof(stats) / sizeof(*stats)); ++s) args.stats[s] = float(stats[s]);
}

}  // namespace

void ppo_loss(const PpoLoss& args) {
  const MaskSummary summary = summarize(args);
  const PpoClipping clip = {args.clip_low, args.clip_high, args.dual_clip, args.value_clip_range};
  const int64_t chunks = (tokens_of(args.sequences) + kPpoChunk - 1) / kPpoChunk;
  const int threads = chunks < 2 ? 1 : chunks < args.threads ? int(chunks) : args.threads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    add_chunk(args, summary, clip, chunk, args.scratch + chunk * kPpoScratch);
  }
  double total[kPpoScratch] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const double* part = args.scratch + chunk * kPpoScratch;
    for (int s = 0; s < kRatioMax; ++s) total[s] += part[s];
    total[kRatioMax] = larger_or_nan(total[kRatioMax], part[kRatioMax]);
  }
  write_results(args, summary, total);
}

}  // namespace RK_ISA
}  // namespace rk
