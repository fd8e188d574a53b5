// Products of small float32 matrices that lie in a cache: C = A·B, or C += A·B.
#pragma once

#include "cpu/simd.h"

namespace rk {
namespace RK_ISA {

// The sums of a block stay in registers: of the 32 that AVX-512 has 24, of 16 otherwise 12. So each
// vector of B is used six times, each number of A for a whole panel of columns.
constexpr int kBlockRows = 6;
#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;
#else
constexpr int kPanelVectors = 2;
#endif

// A: any strides, as its numbers are taken one by one; so it may be a transposed view.
struct Left {
  const float* data;
  int64_t row_stride, inner_stride;
};

// B and C: rows of whole vectors.
struct Right {
  const float* data;
  int64_t row_stride;
};

struct Product {
  float* data;
  int64_t row_stride;
  bool add;  // to what is there
};

// Unlike 0 + x, x - 0 is x for every x: no instruction.
RK_FORMULA Floats broadcast(float x) { return x - Floats{}; }

// All loops over constants are unrolled early, else the sums would go through memory.
template <int kRows, int kVectors>
inline void multiply_block(int64_t inner, Left a, Right b, Product c) {
  Floats sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = Floats{};
      if (c.add) sums[r][v] = load_as<Floats>(c.data + r * c.row_stride + v * kLanes);
    }
  }
  for (int64_t k = 0; k < inner; ++k) {
    Floats right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = load_as<Floats>(b.data + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats left = broadcast(a.data[r * a.row_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
    }
    a.data += a.inner_stride;
    b.data += b.row_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      store<Float32>(c.data + r * c.row_stride + v * kLanes, sums[r][v]);
    }
  }
}

template <int kVectors>
inline void multiply_panel(int rows, int64_t inner, Left a, Right b, Product c) {
  switch (rows) {
    case 1: return multiply_block<1, kVectors>(inner, a, b, c);
    case 2: return multiply_block<2, kVectors>(inner, a, b, c);
    case 3: return multiply_block<3, kVectors>(inner, a, b, c);
    case 4: return multiply_block<4, kVectors>(inner, a, b, c);
    case 5: return multiply_block<5, kVectors>(inner, a, b, c);
    default: return multiply_block<kBlockRows, kVectors>(inner, a, b, c);
  }
}

// At most kBlockRows rows of C, and of its columns the vectors that hold the first `columns`.
inline void multiply_rows(int rows, int64_t inner, int64_t columns, Left a, Right b, Product c) {
  int64_t vectors = (columns + kLanes - 1) / kLanes;
  while (vectors > 0) {
    switch (vectors) {
      case 1: multiply_panel<1>(rows, inner, a, b, c); break;
#if defined(__AVX512F__)
      case 2: multiply_panel<2>(rows, inner, a, b, c); break;
      case 3: multiply_panel<3>(rows, inner, a, b, c); break;
#endif
      default: multiply_panel<kPanelVectors>(rows, inner, a, b, c);
    }
    vectors -= kPanelVectors;
    b.data += kPanelVectors * kLanes;
    c.data += kPanelVectors * kLanes;
  }
}

}  // namespace RK_ISA
}  // namespace rk
