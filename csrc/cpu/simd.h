// Vectors of lanes in the compiler's own vector types: one source for SSE2, AVX2, AVX-512 and NEON.
// Only what the language lacks (half precision) is written by instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#include "cpu/kernels.h"
#include "math/host_device.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rk {
namespace RK_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInts __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
typedef double Doubles __attribute__((vector_size(kVectorBytes * 2)));

template <class To, class From>
RK_FORMULA To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
RK_FORMULA V load_as(const void* from) {
  V v;
  memcpy(&v, from, sizeof(v));
  return v;
}

RK_FORMULA Floats splat(float x) { return Floats{} + x; }

// The larger of both; x where one of them is NaN. As a comparison and a choice this would take two
// instructions.
RK_FORMULA Floats larger(Floats low, Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)low, (__m256)x);
#else
  return low > x ? low : x;
#endif
}

RK_FORMULA float largest_lane(Floats x) {
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

template <int kBy, int... kLane>
RK_FORMULA Floats shifted(Floats x, Floats behind, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, behind, (kLane + kBy)...);
#else
  return __builtin_shuffle(x, behind, Ints{(kLane + kBy)...});
#endif
}

// Lane i becomes lane i + kBy; the last ones become the first ones of `behind`.
template <int kBy>
RK_FORMULA Floats shifted(Floats x, Floats behind) {
  return shifted<kBy>(x, behind, std::make_integer_sequence<int, kLanes>());
}

RK_FORMULA bool any_above(Floats x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(bound), _CMP_GT_OQ) != 0;
#else
  return largest_lane(x) > bound;
#endif
}

RK_FORMULA double sum_of_lanes(Doubles x) {
  double result = x[0];
  for (int i = 1; i < kLanes; ++i) result += x[i];
  return result;
}

RK_FORMULA Floats root(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// GCC 12 makes two half-width conversions of these, or one a lane, where one instruction would do.
#if defined(__AVX512F__)
RK_FORMULA UInts widen_integers(Halves x) {
  return (UInts)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);
}
RK_FORMULA Halves narrow_integers(UInts x) {
  return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x);
}
RK_FORMULA Ints widen_bytes(Bytes x) {
  return (Ints)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)x);
}
RK_FORMULA Halves widen_to_halves(Bytes x) { return (Halves)_mm256_cvtepu8_epi16((__m128i)x); }
RK_FORMULA Bytes narrow_to_bytes(Ints x) {
  return (Bytes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)x);
}
#elif defined(__AVX2__)
RK_FORMULA UInts widen_integers(Halves x) { return (UInts)_mm256_cvtepu16_epi32((__m128i)x); }
RK_FORMULA Halves narrow_integers(UInts x) { return __builtin_convertvector(x, Halves); }
RK_FORMULA Ints widen_bytes(Bytes x) {
  return (Ints)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits_as<int64_t>(x)));
}
RK_FORMULA Halves widen_to_halves(Bytes x) {
  return (Halves)_mm_cvtepu8_epi16(_mm_cvtsi64_si128(bits_as<int64_t>(x)));
}
RK_FORMULA Bytes narrow_to_bytes(Ints x) {
  const __m256i lowest = _mm256_set1_epi32(0x0c080400);  // of the four in each half
  const __m256i four = _mm256_shuffle_epi8((__m256i)x, lowest);
  const __m128i all = _mm_unpacklo_epi32(_mm256_castsi256_si128(four),
                                         _mm256_extracti128_si256(four, 1));
  return bits_as<Bytes>(int64_t(_mm_cvtsi128_si64(all)));
}
#else
RK_FORMULA UInts widen_integers(Halves x) { return __builtin_convertvector(x, UInts); }
RK_FORMULA Ints widen_bytes(Bytes x) { return __builtin_convertvector(x, Ints); }
RK_FORMULA Halves widen_to_halves(Bytes x) { return __builtin_convertvector(x, Halves); }
RK_FORMULA Bytes narrow_to_bytes(Ints x) { return __builtin_convertvector(x, Bytes); }
RK_FORMULA Halves narrow_integers(UInts x) { return __builtin_convertvector(x, Halves); }
#endif

// How elements of each type are read as float32 lanes and written back, rounded to nearest even.
struct Float32 {
  typedef float Element;
  typedef Floats Raw;
  static RK_FORMULA Floats widen(Raw x) { return x; }
  static RK_FORMULA Raw narrow(Floats x) { return x; }
};

struct BFloat16 {
  typedef uint16_t Element;
  typedef Halves Raw;
  static RK_FORMULA Floats widen(Raw x) { return bits_as<Floats>(widen_integers(x) << 16); }
  // The upper 16 bits are the result. A NaN whose lower bits are 0 stays one; others could carry into
  // the sign.
  static RK_FORMULA UInts rounded(Floats x) {
    const UInts bits = bits_as<UInts>(x);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  static RK_FORMULA Raw narrow(Floats x) {
    const UInts quiet_nan = bits_as<UInts>(x) | 0x00400000u;
    return narrow_integers((x == x ? rounded(x) : quiet_nan) >> 16);
  }
};

struct Float16 {
  typedef uint16_t Element;
  typedef Halves Raw;
#if defined(__F16C__)
  static constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif
#if defined(__AVX512F__)
  // The maskz forms, as GCC 12 warns of the undefined vectors inside its plain ones.
  static RK_FORMULA Floats widen(Raw x) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)x); }
  static RK_FORMULA Raw narrow(Floats x) {
    return (Raw)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, kToNearest);
  }
#elif defined(__F16C__)
  static RK_FORMULA Floats widen(Raw x) { return (Floats)_mm256_cvtph_ps((__m128i)x); }
  static RK_FORMULA Raw narrow(Floats x) {
    return (Raw)_mm256_cvtps_ph((__m256)x, kToNearest);
  }
#else
  static RK_FORMULA Floats widen(Raw x) {
    const UInts h = __builtin_convertvector(x, UInts);
    const UInts magnitude = h & 0x7fffu;
    // Subnormals are multiples of 2^-24; normals move their exponent's bias from 15 to 127.
    const Floats small = __builtin_convertvector(magnitude, Floats) * 0x1p-24f;
    const UInts normal = (magnitude << 13) + (112u << 23);
    const UInts special = (magnitude << 13) | 0x7f800000u;
    UInts bits = magnitude < 0x0400u ? bits_as<UInts>(small) : normal;
    bits = magnitude >= 0x7c00u ? special : bits;
    return bits_as<Floats>(bits | ((h & 0x8000u) << 16));
  }
  static RK_FORMULA Raw narrow(Floats x) {
    const UInts bits = bits_as<UInts>(x);
    const UInts magnitude = bits & 0x7fffffffu;
    // Below 2^-14 the sum with 0.5 leaves the rounded multiple of 2^-24 in the lowest bits.
    const UInts small = bits_as<UInts>(bits_as<Floats>(magnitude) + 0.5f) - 0x3f000000u;
    const UInts normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    UInts half = magnitude < 0x38800000u ? small : normal;
    half = magnitude >= 0x477ff000u ? UInts{} + 0x7c00u : half;
    half = magnitude > 0x7f800000u ? UInts{} + 0x7e00u : half;
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Halves);
  }
#endif
};

template <class Type>
RK_FORMULA Floats load(const typename Type::Element* from) {
  return Type::widen(load_as<typename Type::Raw>(from));
}

struct Pair {
  Floats first, second;
};

// Two vectors of neighbours, in an order that suits the type; store_pair undoes it.
template <class Type>
RK_FORMULA Pair load_pair(const typename Type::Element* from) {
  return {load<Type>(from), load<Type>(from + kLanes)};
}

// The even and the odd elements: an instruction each.
template <>
RK_FORMULA Pair load_pair<BFloat16>(const BFloat16::Element* from) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even element has the lower bits");
  const UInts bits = load_as<UInts>(from);
  return {bits_as<Floats>(bits << 16), bits_as<Floats>(bits & 0xffff0000u)};
}

template <class Type>
RK_FORMULA void store(typename Type::Element* to, Floats x) {
  const typename Type::Raw raw = Type::narrow(x);
  memcpy(to, &raw, sizeof(raw));
}

// A NaN must be one of arithmetic on elements and numbers of this type: its other bits are 0.
template <class Type>
RK_FORMULA void store_pair(typename Type::Element* to, const Pair& x) {
  store<Type>(to, x.first);
  store<Type>(to + kLanes, x.second);
}

template <>
RK_FORMULA void store_pair<BFloat16>(BFloat16::Element* to, const Pair& x) {
  const UInts raw = (BFloat16::rounded(x.first) >> 16) | (BFloat16::rounded(x.second) & 0xffff0000u);
  memcpy(to, &raw, sizeof(raw));
}

// The first `count` lanes; the others hold `padding`.
template <class Type>
RK_FORMULA Floats load_first(const typename Type::Element* from, int64_t count, float padding) {
  typename Type::Raw raw = Type::narrow(splat(padding));
  memcpy(&raw, from, size_t(count) * sizeof(*from));
  return Type::widen(raw);
}

template <class Type>
RK_FORMULA void store_first(typename Type::Element* to, int64_t count, Floats x) {
  const typename Type::Raw raw = Type::narrow(x);
  memcpy(to, &raw, size_t(count) * sizeof(*to));
}

// The same, quicker where all lanes are asked for; the others hold 0.
template <class Type>
RK_FORMULA Floats load_up_to(const typename Type::Element* from, int64_t count) {
  return count == kLanes ? load<Type>(from) : load_first<Type>(from, count, 0.0f);
}

template <class Type>
RK_FORMULA void store_up_to(typename Type::Element* to, int64_t count, Floats x) {
  count == kLanes ? store<Type>(to, x) : store_first<Type>(to, count, x);
}

}  // namespace RK_ISA
}  // namespace rk
