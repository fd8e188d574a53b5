// Where the sequences of a batch stand.
#pragma once

#include "cpu/kernels.h"
#include "math/host_device.h"
#include "sequences.h"

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

}  // namespace RK_ISA
}  // namespace rk
