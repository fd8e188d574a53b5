// Series of numbers and the sequences they hold, as the CPU's and the CUDA kernels take them.
#pragma once

#include <stdint.h>

#include "math/host_device.h"

namespace rk {

struct Series {  // float32 [rows, columns], columns contiguous
  const float* data;  // or null where it is optional
  int64_t row_stride;
};

struct Mask {  // one byte an element: 0 where it is masked
  const uint8_t* data;
  int64_t row_stride;
};

// Sequences of one series: rows of equal length, or packed one behind the other.
struct Sequences {
  int64_t count;
  int64_t columns;            // of padded rows
  const int64_t* cu_seqlens;  // [count + 1], or null: padded
};

enum class MaskedStep : int { skip, decay };

struct GaeRates {
  float gamma, lambda, value_lambda;
  const float* per_sequence;  // [count, 3], or null
};

constexpr int64_t kMoments = 3;  // number, mean, sum of squared deviations

enum class Aggregation : int { token_mean, seq_mean_token_mean, seq_mean_token_sum };

namespace RK_ISA {

// The sequence in which the token stands, of all tokens counted one behind the other.
RK_FORMULA int64_t sequence_of(const Sequences& sequences, int64_t token) {
  const int64_t* starts = sequences.cu_seqlens;
  if (!starts) return token / sequences.columns;
  int64_t first = 0, after = sequences.count;  // starts[first] <= token < starts[after]
  while (after - first > 1) {
    const int64_t middle = (first + after) / 2;
    (starts[middle] <= token ? first : after) = middle;
  }
  return first;
}

}  // namespace RK_ISA
}  // namespace rk
