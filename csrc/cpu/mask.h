// Masks of one byte a place.
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

#if defined(__AVX512F__)
RK_FORMULA int64_t count_in_vector(const uint8_t* mask) {
  const __m512i bytes = load_as<__m512i>(mask);
  return __builtin_popcountll(_mm512_test_epi8_mask(bytes, bytes));
}
#elif defined(__AVX2__)
RK_FORMULA int64_t count_in_vector(const uint8_t* mask) {
  const __m256i masked = _mm256_cmpeq_epi8(load_as<__m256i>(mask), _mm256_setzero_si256());
  return kVectorBytes - __builtin_popcount(unsigned(_mm256_movemask_epi8(masked)));
}
#else
RK_FORMULA int64_t count_in_vector(const uint8_t* mask) {
  // The sum of eight bytes comes out in the highest one of the product.
  const uint64_t both = ones_where_set(load_as<uint64_t>(mask)) +
                        ones_where_set(load_as<uint64_t>(mask + 8));
  return int64_t(both * 0x0101010101010101 >> 56);
}
#endif

// 1 in each byte whose number is not 0.
RK_FORMULA void narrow_mask(const int64_t* wide, int64_t n, uint8_t* bytes) {
  int64_t i = 0;
#if defined(__AVX512F__)
  // GCC 12 narrows such a comparison a lane at a time.
  for (; i + 64 <= n; i += 64) {
    uint64_t set = 0;
    for (int part = 0; part < 8; ++part) {
      const __m512i numbers = load_as<__m512i>(wide + i + 8 * part);
      set |= uint64_t(_mm512_test_epi64_mask(numbers, numbers)) << 8 * part;
    }
    const __m512i ones = _mm512_maskz_set1_epi8(set, 1);
    memcpy(bytes + i, &ones, sizeof(ones));
  }
#endif
  for (; i < n; ++i) bytes[i] = wide[i] != 0;
}

RK_FORMULA int64_t count_valid(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  int64_t i = 0;
  for (; i + kVectorBytes <= n; i += kVectorBytes) count += count_in_vector(mask + i);
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
