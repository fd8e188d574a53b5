// Masks of one byte a place, eight at a time.
#pragma once

#include <stdint.h>

#include "cpu/simd.h"

namespace rk {
namespace RK_ISA {

// 1 in each byte that is not 0: a mask that was viewed as bool may hold any byte.
RK_FORMULA uint64_t ones_where_set(uint64_t bytes) {
  const uint64_t low = 0x7f7f7f7f7f7f7f7f;
  return ((((bytes & low) + low) | bytes) >> 7) & 0x0101010101010101;
}

RK_FORMULA int64_t count_valid(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  int64_t i = 0;
  while (i + 8 <= n) {
    // Eight counts side by side in the bytes of a word, for as long as none can overflow.
    const int64_t words = (n - i) / 8 < 255 ? (n - i) / 8 : 255;
    uint64_t sums = 0;
    for (int64_t w = 0; w < words; ++w) sums += ones_where_set(load_as<uint64_t>(mask + i + 8 * w));
    for (; sums; sums >>= 8) count += int64_t(sums & 255);
    i += 8 * words;
  }
  for (; i < n; ++i) count += mask[i] != 0;
  return count;
}

// The first valid place; n where there is none.
RK_FORMULA int64_t first_valid(const uint8_t* mask, int64_t n) {
  int64_t i = 0;
  while (i + 8 <= n && load_as<uint64_t>(mask + i) == 0) i += 8;
  while (i < n && !mask[i]) ++i;
  return i;
}

// One past the last valid place; 0 where there is none.
RK_FORMULA int64_t end_of_valid(const uint8_t* mask, int64_t n) {
  while (n >= 8 && load_as<uint64_t>(mask + n - 8) == 0) n -= 8;
  while (n > 0 && !mask[n - 1]) --n;
  return n;
}

}  // namespace RK_ISA
}  // namespace rk
