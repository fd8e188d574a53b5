// The sum of squares of a tensor, for the norm of gradients: 16-bit numbers are widened on the way,
// without a copy, and the sum keeps its digits over any number of them.

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace rk {
namespace RK_ISA {
namespace {

// Float sums stay short; blocks add up in double, pieces in their order, whatever the threads.
constexpr int kUnroll = 4;
constexpr int64_t kBlock = 2048;
constexpr int64_t kPiece = kSquareSumPiece;

template <class Type>
double block_sum(const typename Type::Element* x, int64_t n) {
  Floats sums[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) {
      const Floats v = load<Type>(x + i + u * kLanes);
      sums[u] += v * v;
    }
  }
  for (; i < n; i += kLanes) {
    const Floats v = load_up_to<Type>(x + i, n - i < kLanes ? n - i : kLanes);
    sums[0] += v * v;
  }
  const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return sum_of_lanes(__builtin_convertvector(sum, Doubles));
}

template <class Type>
double square_sum_of(const SquareSum& args) {
  const auto* x = static_cast<const typename Type::Element*>(args.data);
  const int64_t pieces = (args.count + kPiece - 1) / kPiece;
#pragma omp parallel for schedule(static) num_threads(args.threads) if (pieces > 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t end = piece + 1 < pieces ? (piece + 1) * kPiece : args.count;
    double sum = 0.0;
    for (int64_t start = piece * kPiece; start < end; start += kBlock) {
      sum += block_sum<Type>(x + start, end - start < kBlock ? end - start : kBlock);
    }
    args.scratch[piece] = sum;
  }
  double total = 0.0;
  for (int64_t piece = 0; piece < pieces; ++piece) total += args.scratch[piece];
  return total;
}

}  // namespace

double square_sum(const SquareSum& args) {
  switch (args.type) {
    case ElementType::bfloat16:
      return square_sum_of<BFloat16>(args);
    case ElementType::float16:
      return square_sum_of<Float16>(args);
    default:
      return square_sum_of<Float32>(args);
  }
}

}  // namespace RK_ISA
}  // namespace rk
