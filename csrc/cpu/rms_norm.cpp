// x·rsqrt(mean(x²) + eps)·weight over rows, and its gradients: a row is read from memory once, and
// from the cache again.

#include <math.h>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace rk {
namespace RK_ISA {
namespace {

// Float sums stay short; blocks add up in double.
constexpr int kUnroll = 4;
constexpr int64_t kBlock = 2048;

// The sum over a row of what `term(column, count)` gives for a vector of columns; past the end it
// must give 0 for what it loads as 0.
template <class Term>
RK_FORMULA double sum_of_row(int64_t n, const Term& term) {
  double total = 0.0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = start + kBlock < n ? start + kBlock : n;
    Floats sums[kUnroll] = {};
    int64_t i = start;
    for (; i + kUnroll * kLanes <= end; i += kUnroll * kLanes) {
      for (int u = 0; u < kUnroll; ++u) sums[u] += term(i + u * kLanes, kLanes);
    }
    for (; i < end; i += kLanes) sums[0] += term(i, end - i < kLanes ? end - i : kLanes);
    const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    total += sum_of_lanes(__builtin_convertvector(sum, Doubles));
  }
  return total;
}

template <class Work>
RK_FORMULA void over_row(int64_t n, const Work& work) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) work(i, int64_t(kLanes));
  if (i < n) work(i, n - i);
}

template <class Type>
const typename Type::Element* row_of(const RowsIn& in, int64_t row) {
  return static_cast<const typename Type::Element*>(in.data) + row * in.row_stride;
}

template <class Type>
void forward_row(const RmsNormForward& args, int64_t row) {
  const int64_t n = args.x.columns;
  const auto* x = row_of<Type>(args.x, row);
  auto* out = static_cast<typename Type::Element*>(args.out) + row * n;
  const double squares = sum_of_row(n, [&](int64_t i, int64_t count) {
    const Floats v = load_up_to<Type>(x + i, count);
    return v * v;
  });
  const float rstd = float(1.0 / sqrt(squares / double(n) + args.eps));
  args.rstd[row] = rstd;
  over_row(n, [&](int64_t i, int64_t count) {
    const Floats weight = load_up_to<Float32>(args.weight + i, count);
    store_up_to<Type>(out + i, count, load_up_to<Type>(x + i, count) * rstd * weight);
  });
}

// With z = x·rstd: grad_x = rstd·(grad·weight - z·mean(grad·weight·z)), and this row's part of
// grad_weight, grad·z, is added to `sums`.
template <class Type, bool kWeight>
void backward_row(const RmsNormBackward& args, int64_t row, float* sums) {
  const int64_t n = args.x.columns;
  const auto* x = row_of<Type>(args.x, row);
  const auto* grad = row_of<Type>(args.grad, row);
  auto* grad_x = static_cast<typename Type::Element*>(args.grad_x) + row * n;
  const float rstd = args.rstd[row];
  const double dot = sum_of_row(n, [&](int64_t i, int64_t count) {
    const Floats weight = load_up_to<Float32>(args.weight + i, count);
    const Floats z = load_up_to<Type>(x + i, count) * rstd;
    return load_up_to<Type>(grad + i, count) * weight * z;
  });
  const float mean = float(dot / double(n));
  over_row(n, [&](int64_t i, int64_t count) {
    const Floats weight = load_up_to<Float32>(args.weight + i, count);
    const Floats z = load_up_to<Type>(x + i, count) * rstd;
    const Floats g = load_up_to<Type>(grad + i, count);
    store_up_to<Type>(grad_x + i, count, (g * weight - z * mean) * rstd);
    if (kWeight) {
      const Floats sum = load_up_to<Float32>(sums + i, count) + g * z;
      store_up_to<Float32>(sums + i, count, sum);
    }
  });
}

// Column by column, in the order of the chunks.
void add_chunks(const float* sums, int64_t chunks, int64_t n, float* total) {
  over_row(n, [&](int64_t i, int64_t count) {
    Doubles sum = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Floats part = load_up_to<Float32>(sums + chunk * n + i, count);
      sum += __builtin_convertvector(part, Doubles);
    }
    store_up_to<Float32>(total + i, count, __builtin_convertvector(sum, Floats));
  });
}

// Threads are worth their start only from some amount of work on.
int threads_for(const RowsIn& x, int threads) {
  const int64_t useful = 1 + x.rows * x.columns / 32768;
  return useful < threads ? int(useful) : threads;
}

template <class Type>
void forward(const RmsNormForward& args) {
#pragma omp parallel for schedule(static) num_threads(threads_for(args.x, args.threads))
  for (int64_t row = 0; row < args.x.rows; ++row) forward_row<Type>(args, row);
}

// A chunk's rows, and so its sums, do not depend on the number of threads.
template <class Type>
void backward(const RmsNormBackward& args) {
  const int64_t rows = args.x.rows, n = args.x.columns;
  const int64_t chunks = (rows + kRmsNormChunk - 1) / kRmsNormChunk;
#pragma omp parallel for schedule(static) num_threads(threads_for(args.x, args.threads))
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * kRmsNormChunk;
    const int64_t end = first + kRmsNormChunk < rows ? first + kRmsNormChunk : rows;
    for (int64_t row = first; row < end; ++row) {
      if (args.grad_weight) {
        backward_row<Type, true>(args, row, args.scratch + chunk * n);
      } else {
        backward_row<Type, false>(args, row, nullptr);
      }
    }
  }
  if (args.grad_weight) add_chunks(args.scratch, chunks, n, args.grad_weight);
}

}  // namespace

void rms_norm_forward(const RmsNormForward& args) {
  switch (args.x.type) {
    case ElementType::float32: return forward<Float32>(args);
    case ElementType::bfloat16: return forward<BFloat16>(args);
    case ElementType::float16: return forward<Float16>(args);
  }
}

void rms_norm_backward(const RmsNormBackward& args) {
  switch (args.x.type) {
    case ElementType::float32: return backward<Float32>(args);
    case ElementType::bfloat16: return backward<BFloat16>(args);
    case ElementType::float16: return backward<Float16>(args);
  }
}

}  // namespace RK_ISA
}  // namespace rk
