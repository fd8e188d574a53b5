// Log-probability and entropy of one token per row: one read of the logits forward, one read and one
// write backward. Rows are independent, so results do not depend on the number of threads.

#include <math.h>

#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "cpu/simd.h"
#include "cpu/vector_exp.h"
#include "math/online_softmax.h"

namespace rk {
namespace RK_ISA {
namespace {

// Terms are taken relative to the highest logit so far, so that one pass finds a block's sums and
// its maximum. A block that passes it is taken again, from the first-level cache: the highest logit's
// own term must be exactly 1, since a confident log-probability is little but the others' sum. The
// first look goes further, as most such blocks would come early. Float sums stay short; blocks add
// up in double.
constexpr int kUnroll = 4;
constexpr int64_t kBlock = 2048;
constexpr int64_t kFirstLook = 4 * kBlock;

struct RowSums {
  float max;
  double sum;
  double weighted;
};

template <class Type>
float block_max(const typename Type::Element* x, int64_t n) {
  Floats highest[kUnroll];
  for (int u = 0; u < kUnroll; ++u) highest[u] = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; u += 2) {
      const Pair v = load_pair<Type>(x + i + u * kLanes);
      highest[u] = larger(v.first, highest[u]);
      highest[u + 1] = larger(v.second, highest[u + 1]);
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    highest[0] = larger(load_first<Type>(x + i, count, -INFINITY), highest[0]);
  }
  for (int u = 1; u < kUnroll; ++u) highest[0] = larger(highest[u], highest[0]);
  return largest_lane(highest[0]);
}

// The next page is on its way while this one's arithmetic runs: the processor itself does not look
// across the end of a page. A prefetch past the end is harmless.
template <class Element>
RK_FORMULA void prefetch_ahead(const Element* x) {
  const char* ahead = reinterpret_cast<const char*>(x) + 4096;
  for (size_t i = 0; i < 2 * kLanes * sizeof(Element); i += 64) __builtin_prefetch(ahead + i);
}

struct BlockSums {
  SoftmaxSums<Floats> terms;
  Floats max;
};

// Sums of 2^t and 2^t·t, t = (x - reference)·scale.
template <bool kEntropy>
RK_FORMULA void add_term(BlockSums& sums, Floats x, float reference, float scale) {
  const Floats t = bounded_exponent((x - reference) * scale);
  const Floats e = exp2_bounded(t);
  sums.max = larger(x, sums.max);
  sums.terms.sum += e;
  if (kEntropy) sums.terms.weighted += e * t;
}

template <class Type, bool kEntropy>
BlockSums block_sums(const typename Type::Element* x, int64_t n, float reference, float scale) {
  BlockSums sums[kUnroll];
  for (int u = 0; u < kUnroll; ++u) sums[u] = {{Floats{}, Floats{}}, splat(-INFINITY)};
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; u += 2) {
      prefetch_ahead(x + i + u * kLanes);
      const Pair v = load_pair<Type>(x + i + u * kLanes);
      add_term<kEntropy>(sums[u], v.first, reference, scale);
      add_term<kEntropy>(sums[u + 1], v.second, reference, scale);
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    add_term<kEntropy>(sums[0], load_first<Type>(x + i, count, -INFINITY), reference, scale);
  }
  for (int u = 1; u < kUnroll; ++u) {
    sums[0].max = larger(sums[u].max, sums[0].max);
    sums[0].terms.sum += sums[u].terms.sum;
    sums[0].terms.weighted += sums[u].terms.weighted;
  }
  return sums[0];
}

template <class Type, bool kEntropy>
RowSums row_sums(const typename Type::Element* x, int64_t n, float inverse_tau) {
  const float scale = inverse_tau * kLog2E;
  float max = -INFINITY;
  SoftmaxSums<Doubles> total = {};
  for (int64_t start = 0; start < n; start += kBlock) {
    if (max == -INFINITY) {
      max = block_max<Type>(x + start, n - start < kFirstLook ? n - start : kFirstLook);
    }
    const int64_t count = n - start < kBlock ? n - start : kBlock;
    // While every logit is -inf, 0 stands for the maximum: the terms are 0, and NaN stays NaN.
    const float reference = max == -INFINITY ? 0.0f : max;
    BlockSums part = block_sums<Type, kEntropy>(x + start, count, reference, scale);
    if (any_above(part.max, max)) {
      const float highest = largest_lane(part.max);
      refer_to_higher_max(total, (double(highest) - max) * inverse_tau);
      max = highest;
      part = block_sums<Type, kEntropy>(x + start, count, max, scale);
    }
    total.sum += __builtin_convertvector(part.terms.sum, Doubles);
    if (kEntropy) {
      total.weighted += __builtin_convertvector(part.terms.weighted, Doubles) * double(kLn2);
    }
  }
  const double sum = sum_of_lanes(total.sum);
  // The maximum passed over NaN; whoever combines parts of a row must not.
  return {sum == sum ? max : NAN, sum, sum_of_lanes(total.weighted)};
}

template <class Type>
float element(const typename Type::Element* x) {
  return load_first<Type>(x, 1, 0.0f)[0];
}

float temperature_of(const Temperature& temperature, int64_t row) {
  return temperature.per_row ? temperature.per_row[row] : temperature.number;
}

template <class Type>
void forward_row(const TokenLogprobsForward& args, int64_t row) {
  const int64_t target = args.targets[row];
  if (target == args.ignore_index) {
    args.logprobs[row] = args.normalization[2 * row] = args.normalization[2 * row + 1] = 0.0f;
    if (args.entropy) args.entropy[row] = 0.0f;
    return;
  }
  const float inverse_tau = 1.0f / temperature_of(args.temperature, row);
  const auto* x = static_cast<const typename Type::Element*>(args.logits.data) +
                  row * args.logits.row_stride;
  const RowSums sums = args.entropy ? row_sums<Type, true>(x, args.logits.columns, inverse_tau)
                                    : row_sums<Type, false>(x, args.logits.columns, inverse_tau);
  const float log_sum = float(log(sums.sum));
  args.logprobs[row] =
      target == kElsewhere
          ? 0.0f
          : logprob((element<Type>(x + target) - sums.max) * inverse_tau, log_sum);
  args.normalization[2 * row] = sums.max;
  args.normalization[2 * row + 1] = log_sum;
  if (args.entropy) args.entropy[row] = entropy(log_sum, float(sums.sum), float(sums.weighted));
}

struct RowGradient {
  float max;
  float scale;
  float log2_sum;
  GradientTerms terms;
};

template <bool kEntropy>
RK_FORMULA Floats gradient(Floats x, const RowGradient& row) {
  const Floats t = bounded_exponent((x - row.max) * row.scale - row.log2_sum);
  const Floats p = exp2_bounded(t);
  return kEntropy ? logit_gradient(p, t, row.terms) : p * row.terms.level;
}

template <class Type, bool kEntropy>
void gradient_row(const typename Type::Element* x, typename Type::Element* out, int64_t n,
                  const RowGradient& row) {
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    Pair grad[kUnroll / 2];  // all loaded before the first is stored: their arithmetic overlaps
    for (int u = 0; u < kUnroll / 2; ++u) {
      prefetch_ahead(x + i + 2 * u * kLanes);
      const Pair v = load_pair<Type>(x + i + 2 * u * kLanes);
      grad[u] = {gradient<kEntropy>(v.first, row), gradient<kEntropy>(v.second, row)};
    }
    for (int u = 0; u < kUnroll / 2; ++u) store_pair<Type>(out + i + 2 * u * kLanes, grad[u]);
  }
  for (; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    const Floats grad = gradient<kEntropy>(load_first<Type>(x + i, count, 0.0f), row);
    store_first<Type>(out + i, count, grad);
  }
}

// Any NaN as the one that `store_pair` takes.
float plain_nan(float x) { return x == x ? x : NAN; }

template <class Type>
void backward_row(const TokenLogprobsBackward& args, int64_t row) {
  const int64_t n = args.logits.columns;
  const int64_t target = args.targets[row];
  const auto* x = static_cast<const typename Type::Element*>(args.logits.data) +
                  row * args.logits.row_stride;
  auto* out = static_cast<typename Type::Element*>(args.grad) + row * args.grad_row_stride;
  const float g = plain_nan(args.grad_logprobs[row]);
  const float h = args.grad_entropy ? plain_nan(args.grad_entropy[row]) : 0.0f;
  if (target == args.ignore_index) {
    memset(out, 0, size_t(n) * sizeof(*out));
    return;
  }
  const float inverse_tau = 1.0f / temperature_of(args.temperature, row);
  const float entropy = args.entropy ? plain_nan(args.entropy[row]) : 0.0f;
  const float max = args.normalization[2 * row];
  const float log_sum = plain_nan(args.normalization[2 * row + 1]);
  const RowGradient gradient = {max, inverse_tau * kLog2E, log_sum * kLog2E,
                                gradient_terms(g, h, entropy, inverse_tau)};
  // Read before the row is overwritten, which it is where the gradient takes the logits' place.
  const bool here = target != kElsewhere;
  const float x_target = here ? element<Type>(x + target) : 0.0f;
  if (args.grad_entropy) {
    gradient_row<Type, true>(x, out, n, gradient);
  } else {
    gradient_row<Type, false>(x, out, n, gradient);
  }
  if (here) {
    const float logp = logprob((x_target - max) * inverse_tau, log_sum);
    store_first<Type>(out + target, 1, splat(target_gradient(logp, g, h, entropy, inverse_tau)));
  }
}

// Threads are worth their start only from some amount of work on.
int threads_for(const RowsIn& logits, int threads) {
  const int64_t useful = 1 + logits.rows * logits.columns / 32768;
  return useful < threads ? int(useful) : threads;
}

template <class Type>
void forward(const TokenLogprobsForward& args) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads_for(args.logits, args.threads))
  for (int64_t row = 0; row < args.logits.rows; ++row) forward_row<Type>(args, row);
}

template <class Type>
void backward(const TokenLogprobsBackward& args) {
  const int threads = threads_for(args.logits, args.threads);
  const int64_t rows = args.logits.rows;
  const int64_t row_bytes = args.grad_row_stride * int64_t(sizeof(typename Type::Element));
  const FreshPages pages(args.grad, args.grad_is_fresh ? rows * row_bytes : 0);
  const int64_t together = args.grad_is_fresh ? 1 + kPage / row_bytes : 4;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t first = 0; first < rows; first += together) {
    const int64_t end = first + together < rows ? first + together : rows;
    pages.provide(first * row_bytes, end * row_bytes);
    for (int64_t row = first; row < end; ++row) backward_row<Type>(args, row);
  }
}

}  // namespace

void token_logprobs_forward(const TokenLogprobsForward& args) {
  switch (args.logits.type) {
    case ElementType::float32: return forward<Float32>(args);
    case ElementType::bfloat16: return forward<BFloat16>(args);
    case ElementType::float16: return forward<Float16>(args);
  }
}

void token_logprobs_backward(const TokenLogprobsBackward& args) {
  switch (args.logits.type) {
    case ElementType::float32: return backward<Float32>(args);
    case ElementType::bfloat16: return backward<BFloat16>(args);
    case ElementType::float16: return backward<Float16>(args);
  }
}

}  // namespace RK_ISA
}  // namespace rk
