// Rows of any element type as float32 tiles in scratch memory, as they are or transposed, and back.
#pragma once

#include "cpu/simd.h"

namespace rk {
namespace RK_ISA {

template <class Type>
RK_FORMULA Floats load_at_most(const typename Type::Element* from, int64_t count) {
  return count >= kLanes ? load<Type>(from) : load_first<Type>(from, count, 0.0f);
}

// Rows of one head lie apart, where the processor does not look ahead by itself. A prefetch past the
// end is harmless.
constexpr int64_t kRowsAhead = 16;

template <class Type>
void load_rows(const typename Type::Element* from, int64_t from_stride, int64_t rows,
               int64_t columns, float factor, float* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    for (int64_t i = 0; i < columns; i += kLanes) {
      __builtin_prefetch(from + kRowsAhead * from_stride + i);
      store<Float32>(to + i, factor * load_at_most<Type>(from + i, columns - i));
    }
  }
}

template <class Type>
void store_rows(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float factor,
                typename Type::Element* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    for (int64_t i = 0; i < columns; i += kLanes) {
      __builtin_prefetch(to + kRowsAhead * to_stride + i, 1);
      const Floats x = factor * load_as<Floats>(from + i);
      if (columns - i >= kLanes) {
        store<Type>(to + i, x);
      } else {
        store_first<Type>(to + i, columns - i, x);
      }
    }
  }
}

// Lane i of the results: its own of `low` where bit kStep of i is 0, else lane i - kStep of `high`;
// and lane i + kStep of `low` where that bit is 0, else its own of `high`.
template <int kStep, int... kLane>
RK_FORMULA void exchange(Floats& low, Floats& high, std::integer_sequence<int, kLane...>) {
  const Floats a = low, b = high;
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane - kStep : kLane)...);
  high = __builtin_shufflevector(a, b, ((kLane & kStep) ? kLanes + kLane : kLane + kStep)...);
#else
  low = __builtin_shuffle(a, b, Ints{((kLane & kStep) ? kLanes + kLane - kStep : kLane)...});
  high = __builtin_shuffle(a, b, Ints{((kLane & kStep) ? kLanes + kLane : kLane + kStep)...});
#endif
}

// Exchanges the two off-diagonal quarters of every square of 2·kStep, then those within.
template <int kStep>
RK_FORMULA void transpose(Floats (&x)[kLanes]) {
  if constexpr (kStep > 0) {
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & kStep)) {
        exchange<kStep>(x[i], x[i + kStep], std::make_integer_sequence<int, kLanes>());
      }
    }
    transpose<kStep / 2>(x);
  }
}

// to[column][row]; columns of `to` up to a whole vector of rows are written, with zeros.
template <class Type>
void load_transposed(const typename Type::Element* from, int64_t from_stride, int64_t rows,
                     int64_t columns, float* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      Floats square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const auto* place = from + (row + i) * from_stride + column;
        square[i] = row + i < rows ? load_at_most<Type>(place, columns - column) : Floats{};
      }
      transpose<kLanes / 2>(square);
      for (int i = 0; i < kLanes && column + i < columns; ++i) {
        store<Float32>(to + (column + i) * to_stride + row, square[i]);
      }
    }
  }
}

}  // namespace RK_ISA
}  // namespace rk
