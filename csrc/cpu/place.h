// Where the sequences of a batch stand.
#pragma once

#include "cpu/kernels.h"
#include "math/host_device.h"

namespace rk {
namespace RK_ISA {

// Where a sequence begins in the inputs, by their strides, and in the outputs, and its length.
struct Place {
  const Sequences& sequences;
  int64_t index;

  int64_t length() const {
    const int64_t* starts = sequences.cu_seqlens;
    return starts ? starts[index + 1] - starts[index] : sequences.columns;
  }
  int64_t begin(int64_t row_stride) const {
    return sequences.cu_seqlens ? sequences.cu_seqlens[index] : index * row_stride;
  }
  template <class T>
  auto in(const T& series) const {
    return series.data + begin(series.row_stride);
  }
  float* out(float* data) const { return data + begin(sequences.columns); }
};

RK_FORMULA int64_t tokens_of(const Sequences& sequences) {
  return sequences.cu_seqlens ? sequences.cu_seqlens[sequences.count]
                              : sequences.count * sequences.columns;
}

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
