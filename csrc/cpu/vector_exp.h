// e^x for vectors of lanes, within 2 units in the last place.
#pragma once

#include "cpu/simd.h"

namespace rk {
namespace RK_ISA {

struct ExpParts {
  Floats fraction;  // e^r, r = x - n·ln 2, |r| <= ln(2)/2
  Ints power;       // n
};

RK_FORMULA ExpParts exp_parts(Floats x) {
  // Adding 1.5·2^23 leaves the nearest integer in the low bits.
  const Floats magic = splat(12582912.0f);
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  // ln 2 in two parts, the first short enough for n times it to be exact.
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // e^r = 1 + r + r²·q(r): minimax of degree 4 for the relative error, 3e-9.
  Floats q = r * 1.38144330e-3f + 8.36879685e-3f;
  q = q * r + 4.16683958e-2f;
  q = q * r + 1.66665200e-1f;
  q = q * r + 4.99999934e-1f;
  return {(q * r) * r + r + 1.0f, bits_as<Ints>(shifted) - 0x4b400000};
}

RK_FORMULA Floats power_of_two(Ints n) { return bits_as<Floats>((n + 127) << 23); }

// Below this e^x is under the smallest normal float: softmax terms count as 0 from here on.
constexpr float kExpUnderflow = -87.0f;

// For x <= 0, exactly 0 below kExpUnderflow (-inf included); NaN stays NaN.
RK_FORMULA Floats exp_nonpositive(Floats x) {
  const ExpParts parts = exp_parts(x);
  const Floats e = parts.fraction * power_of_two(parts.power);
  return x < kExpUnderflow ? Floats{} : e;
}

// For all x: infinity above the largest float, gradual underflow below.
RK_FORMULA Floats vector_exp(Floats x) {
  const Floats bound = splat(110.0f);
  Floats bounded = x > bound ? bound : x;
  bounded = bounded < -bound ? -bound : bounded;
  const ExpParts parts = exp_parts(bounded);
  const Ints half = parts.power >> 1;  // 2^n in two factors: n can pass 127
  return parts.fraction * power_of_two(half) * power_of_two(parts.power - half);
}

}  // namespace RK_ISA
}  // namespace rk
