// Everything that follows a rollout, backwards in time: KL penalty, rewards, advantages, returns.
//
// The valid tokens of a sequence are taken as one dense series, in vectors counted from its end. So
// neither padding nor holes change a bit of the result, and nothing masked is ever used.

#include <math.h>
#include <string.h>

#include "cpu/kernels.h"
#include "cpu/mask.h"
#include "cpu/place.h"
#include "cpu/simd.h"
#include "cpu/vector_exp.h"
#include "math/gae.h"
#include "math/kl.h"
#include "math/moments.h"

namespace rk {
namespace RK_ISA {
namespace {

// The lanes of a series from `start` on, which may lie before its beginning: 0 there.
RK_FORMULA Floats load_back(const float* x, int64_t start) {
  if (start >= 0) return load<Float32>(x + start);
  Floats lanes = {};
  memcpy(reinterpret_cast<float*>(&lanes) - start, x, size_t(kLanes + start) * sizeof(float));
  return lanes;
}

RK_FORMULA void store_back(float* x, int64_t start, Floats lanes) {
  if (start >= 0) return store<Float32>(x + start, lanes);
  memcpy(x, reinterpret_cast<float*>(&lanes) - start, size_t(kLanes + start) * sizeof(float));
}

// A_t = delta_t + c·A_{t+1} over the lanes and what follows them, in log2(kLanes) steps: after each,
// a lane holds the sum over twice as many.
class Scan {
 public:
  explicit Scan(float c) {
    float power = 1.0f;
    for (int lane = kLanes - 1; lane >= 0; --lane) following_[lane] = power *= c;
    for (int step = 0; step < 4; ++step, c *= c) factors_[step] = c;
  }

  RK_FORMULA Floats operator()(Floats x, float following) const {
    const Floats zero = {};
    x += shifted<1>(x, zero) * factors_[0];
    x += shifted<2>(x, zero) * factors_[1];
    if constexpr (kLanes > 4) x += shifted<4>(x, zero) * factors_[2];
    if constexpr (kLanes > 8) x += shifted<8>(x, zero) * factors_[3];
    return x + following_ * following;
  }

 private:
  float factors_[4];   // c, c², c⁴, c⁸
  Floats following_;   // what the next advantage counts for in each lane: c^kLanes ... c
};

struct Rates {
  float gamma;
  Scan policy, value;
  bool same;

  Rates(float gamma, float lambda, float value_lambda)
      : gamma(gamma),
        policy(gamma * lambda),
        value(gamma * value_lambda),
        same(lambda == value_lambda) {}
};

struct GivenRewards {
  const float* rewards;
  RK_FORMULA Floats operator()(int64_t start) const { return load_back(rewards, start); }
};

struct ShapedRewards {
  const float* logprobs;
  const float* ref_logprobs;
  float kl_coef;
  KlEstimator estimator;
  float score;
  int64_t n;
  float* rewards;
  float* kl;

  RK_FORMULA Floats operator()(int64_t start) const {
    const Floats r = load_back(logprobs, start) - load_back(ref_logprobs, start);
    const bool exponential = estimator == KlEstimator::k3;
    const Floats penalty = kl_estimate(r, exponential ? vector_exp(-r) : Floats{}, estimator);
    Floats reward = penalty * -kl_coef;
    if (start + kLanes == n) reward[kLanes - 1] += score;
    store_back(kl, start, penalty);
    store_back(rewards, start, reward);
    return reward;
  }
};

template <class Rewards>
void dense_advantages(const Rewards& rewards, const float* values, int64_t n, float bootstrap,
                      const Rates& rates, float* advantages, float* returns) {
  float next_value = bootstrap, next_advantage = 0.0f, next_of_return = 0.0f;
  for (int64_t start = n - kLanes; start > -kLanes; start -= kLanes) {
    const Floats value = load_back(values, start);
    const Floats next_values = shifted<1>(value, splat(next_value));
    const Floats delta = gae_delta(rewards(start), next_values, value, rates.gamma);
    const Floats advantage = rates.policy(delta, next_advantage);
    const Floats of_return = rates.same ? advantage : rates.value(delta, next_of_return);
    next_value = value[0], next_advantage = advantage[0], next_of_return = of_return[0];
    store_back(advantages, start, advantage);
    store_back(returns, start, of_return + value);
  }
}

constexpr int64_t kPiece = 4096;  // numbers whose deviations are taken from the same one

// In one pass, by deviations from the first number. It is one of them, so the squares around it are at
// most n times those around the mean: for so few, that leaves double's sums more digits than float has.
Moments moments_of_piece(const float* x, int64_t n) {
  const double first = double(x[0]);
  const int64_t whole = n / kLanes * kLanes;
  Doubles sums = {}, squares = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Doubles deviation = __builtin_convertvector(load<Float32>(x + i), Doubles) - first;
    sums += deviation;
    squares += deviation * deviation;
  }
  Deviations found = {x[0], sum_of_lanes(sums), sum_of_lanes(squares)};
  for (int64_t i = whole; i < n; ++i) found.add(x[i], false);
  return found.moments(int(n));
}

Moments moments_of(const float* x, int64_t n) {
  Moments total = {};
  for (int64_t start = 0; start < n; start += kPiece) {
    total.add(moments_of_piece(x + start, n - start < kPiece ? n - start : kPiece));
  }
  return total;
}

// The places of one sequence that take a step: from the first valid one to the last.
struct Span {
  const uint8_t* mask;
  int64_t first, end;
  int64_t valid;
  bool whole() const { return valid == end - first; }
};

Span span_of(const uint8_t* mask, int64_t n) {
  const int64_t end = end_of_valid(mask, n);
  const int64_t first = first_valid(mask, end);
  return {mask, first, end, count_valid(mask + first, end - first)};
}

// A series without its holes (skip), or with 0 in them (decay), beginning at the first valid place.
const float* dense_series(const float* x, const Span& span, MaskedStep masked, float* memory) {
  if (span.whole()) return x + span.first;
  int64_t n = 0;
  for (int64_t i = span.first; i < span.end; ++i) {
    if (span.mask[i]) {
      memory[n++] = x[i];
    } else if (masked == MaskedStep::decay) {
      memory[n++] = 0.0f;
    }
  }
  return memory;
}

// Back to the valid places, and 0 to the others, in a series of `n` places.
void spread(const float* from, const Span& span, MaskedStep masked, float* to, int64_t n) {
  memset(to, 0, size_t(span.first) * sizeof(float));
  memset(to + span.end, 0, size_t(n - span.end) * sizeof(float));
  if (from == to + span.first) return;
  for (int64_t i = span.first; i < span.end; ++i) {
    to[i] = span.mask[i] ? *from : 0.0f;
    from += span.mask[i] || masked == MaskedStep::decay;
  }
}

// Numbers of a sequence's own. (Not std::vector: its code would be shared between instruction sets.)
class Memory {
 public:
  explicit Memory(int64_t size) : data_(size ? new float[size_t(size)] : nullptr) {}
  ~Memory() { delete[] data_; }
  Memory(const Memory&) = delete;
  float* at(int64_t i) { return data_ ? data_ + i : nullptr; }

 private:
  float* data_;
};

// Memory for the dense series of a sequence with holes, and where they go otherwise.
class Dense {
 public:
  Dense(const Span& span, MaskedStep masked, int64_t n)
      : span_(span),
        masked_(masked),
        n_(n),
        length_(masked == MaskedStep::decay ? span.end - span.first : span.valid),
        memory_(span.whole() ? 0 : kMost * length_) {}

  int64_t length() const { return length_; }

  const float* in(const float* x) { return dense_series(x, span_, masked_, next()); }

  float* out(float* x) {
    outputs_[count_] = {span_.whole() ? x + span_.first : next(), x};
    return outputs_[count_++].dense;
  }

  void finish() {
    for (int i = 0; i < count_; ++i) {
      spread(outputs_[i].dense, span_, masked_, outputs_[i].series, n_);
    }
  }

 private:
  static constexpr int kMost = 7;  // three series in, four out

  struct Output {
    float* dense;
    float* series;
  };

  float* next() { return memory_.at(length_ * used_++); }

  const Span span_;
  const MaskedStep masked_;
  const int64_t n_;
  const int64_t length_;
  Memory memory_;
  int used_ = 0;
  Output outputs_[kMost];
  int count_ = 0;
};

Rates rates_of(const GaeRates& rates, int64_t sequence) {
  if (!rates.per_sequence) return {rates.gamma, rates.lambda, rates.value_lambda};
  const float* own = rates.per_sequence + 3 * sequence;
  return {own[0], own[1], own[2]};
}

float bootstrap_of(const Gae& args, int64_t sequence) {
  return args.bootstrap_values ? args.bootstrap_values[sequence] : 0.0f;
}

void gae_sequence(const Gae& args, int64_t sequence) {
  const Place place = {args.sequences, sequence};
  const int64_t n = place.length();
  Dense dense(span_of(place.in(args.mask), n), args.masked, n);
  const GivenRewards rewards = {dense.in(place.in(args.rewards))};
  const float* values = dense.in(place.in(args.values));
  float* advantages = dense.out(place.out(args.advantages));
  float* returns = dense.out(place.out(args.returns));
  dense_advantages(rewards, values, dense.length(), bootstrap_of(args, sequence),
                   rates_of(args.rates, sequence), advantages, returns);
  dense.finish();
}

Moments rollout_sequence(const Rollout& args, int64_t sequence) {
  const Place place = {args.gae.sequences, sequence};
  const int64_t n = place.length();
  const Span span = span_of(place.in(args.gae.mask), n);
  Dense dense(span, args.gae.masked, n);
  const float* logprobs = dense.in(place.in(args.logprobs));
  const float* ref_logprobs = dense.in(place.in(args.ref_logprobs));
  const float* values = dense.in(place.in(args.gae.values));
  float* rewards_out = dense.out(place.out(args.rewards));
  float* kl = dense.out(place.out(args.kl));
  float* advantages = dense.out(place.out(args.gae.advantages));
  float* returns = dense.out(place.out(args.gae.returns));
  const ShapedRewards rewards = {logprobs,          ref_logprobs,          args.kl_coef,
                                 args.kl_estimator, args.scores[sequence], dense.length(),
                                 rewards_out,       kl};
  dense_advantages(rewards, values, dense.length(), bootstrap_of(args.gae, sequence),
                   rates_of(args.gae.rates, sequence), advantages, returns);
  dense.finish();
  if (!span.whole() && args.gae.masked == MaskedStep::decay) {
    // The dense series has the steps of masked places too.
    const float* series = place.out(args.gae.advantages);
    Memory memory(span.valid);
    return moments_of(dense_series(series, span, MaskedStep::skip, memory.at(0)), span.valid);
  }
  return moments_of(advantages, span.valid);
}

// At masked places the advantage of the next valid one, and that plus the value. Behind the last one
// advantages are 0, which nobody reads before they are whitened: they are not written here.
void carry_back(const Span& span, const float* values, int64_t n, float* advantages,
                float* returns) {
  memcpy(returns + span.end, values + span.end, size_t(n - span.end) * sizeof(float));
  const int64_t first_hole = span.whole() ? span.end : span.first;
  float next = 0.0f;
  for (int64_t i = span.end - 1; i >= first_hole; --i) {
    if (span.mask[i]) {
      next = advantages[i];
    } else {
      advantages[i] = next;
      returns[i] = next + values[i];
    }
  }
  for (int64_t i = 0; i < span.first; ++i) {
    advantages[i] = advantages[span.first];
    returns[i] = advantages[span.first] + values[i];
  }
}

// Has the numbers fetched while the mask is read.
void prefetch(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(x + i);
}

struct Carried {
  Moments moments;
  int64_t end;  // one past the last valid place
};

Carried carried_sequence(const WhitenedGae& args, int64_t row) {
  const int64_t n = args.columns;
  prefetch(args.values.data + row * args.values.row_stride, n);  // the rewards only up to the last one
  Memory narrow(args.wide_mask ? (n + 3) / 4 : 0);
  const uint8_t* mask = args.mask.data + row * args.mask.row_stride;
  if (args.wide_mask) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(narrow.at(0));
    narrow_mask(args.wide_mask + row * args.mask.row_stride, n, bytes);
    mask = bytes;
  }
  const Span span = span_of(mask, n);
  prefetch(args.rewards.data + row * args.rewards.row_stride + span.first, span.end - span.first);
  Dense dense(span, MaskedStep::skip, n);
  const float* of_row = args.values.data + row * args.values.row_stride;
  const GivenRewards rewards = {dense.in(args.rewards.data + row * args.rewards.row_stride)};
  const float* values = dense.in(of_row);
  float* advantages = dense.out(args.advantages + row * n);
  float* returns = dense.out(args.returns + row * n);
  dense_advantages(rewards, values, span.valid, 0.0f, {args.gamma, args.lambda, args.lambda},
                   advantages, returns);
  if (!span.whole()) dense.finish();
  carry_back(span, of_row, n, args.advantages + row * n, args.returns + row * n);
  return {moments_of(advantages, span.valid), span.end};
}

void store_moments(double* out, const Moments& moments) {
  out[0] = moments.count, out[1] = moments.mean, out[2] = moments.squares;
}

// Of all rows together, always in the same order.
Moments total_of(const double* rows, int64_t count) {
  Moments total = {};
  for (const double* own = rows; own != rows + kMoments * count; own += kMoments) {
    total.add({own[0], own[1], own[2]});
  }
  return total;
}

// The advantages of a sequence, written up to `end`, and 0 from there on.
void whiten_carried(float* x, int64_t end, int64_t n, double mean, double scale) {
  const float upper = float(mean), rest = float(mean - double(upper)), factor = float(scale);
  for (int64_t i = 0; i < end; ++i) x[i] = (x[i] - upper - rest) * factor;
  for (int64_t i = end; i < n; ++i) x[i] = (0.0f - upper - rest) * factor;
}

// Below this many tokens, waiting for a second core may cost more than it saves.
int threads_for(int64_t tokens, int threads) { return tokens < 32768 ? 1 : threads; }

}  // namespace

void gae(const Gae& args) {
  const int threads = threads_for(tokens_of(args.sequences), args.threads);
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
  for (int64_t i = 0; i < args.sequences.count; ++i) gae_sequence(args, i);
}

void rollout(const Rollout& args) {
  const int threads = threads_for(tokens_of(args.gae.sequences), args.gae.threads);
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
  for (int64_t i = 0; i < args.gae.sequences.count; ++i) {
    store_moments(args.scratch + kMoments * i, rollout_sequence(args, i));
  }
  store_moments(args.moments, total_of(args.scratch, args.gae.sequences.count));
}

void moments(const MomentsOf& args) {
  const int threads = threads_for(args.rows * args.columns, args.threads);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < args.rows; ++row) {
    const Span span = span_of(args.mask.data + row * args.mask.row_stride, args.columns);
    Memory memory(span.whole() ? 0 : span.valid);
    const float* x = dense_series(args.x.data + row * args.x.row_stride, span, MaskedStep::skip,
                                  memory.at(0));
    store_moments(args.scratch + kMoments * row, moments_of(x, span.valid));
  }
  store_moments(args.moments, total_of(args.scratch, args.rows));
}

void whitened_gae(const WhitenedGae& args) {
  const int threads = threads_for(args.rows * args.columns, args.threads);
  double* moments = args.scratch;
  double* ends = args.scratch + kMoments * args.rows;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < args.rows; ++row) {
    const Carried carried = carried_sequence(args, row);
    store_moments(moments + kMoments * row, carried.moments);
    ends[row] = double(carried.end);
  }
  const Moments total = total_of(moments, args.rows);
  store_moments(args.moments, total);
  if (total.count < 2.0) return;
  const double scale = 1.0 / sqrt(total.squares / (total.count - 1.0) + args.eps);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < args.rows; ++row) {
    whiten_carried(args.advantages + row * args.columns, int64_t(ends[row]), args.columns, total.mean,
                   scale);
  }
}

void whiten(const Whiten& args) {
  // The mean in two parts, so that it costs a small deviation no digits.
  const float mean = float(args.mean), rest = float(args.mean - double(mean));
  const float scale = float(args.scale), shift = float(args.shift);
  const int threads = threads_for(args.rows * args.columns, args.threads);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < args.rows; ++row) {
    const float* x = args.x.data + row * args.x.row_stride;
    const uint8_t* mask = args.mask.data + row * args.mask.row_stride;
    float* out = args.out + row * args.columns;
    for (int64_t i = 0; i < args.columns; ++i) {
      out[i] = mask[i] ? (x[i] - mean - rest) * scale + shift : 0.0f;
    }
  }
}

}  // namespace RK_ISA
}  // namespace rk
