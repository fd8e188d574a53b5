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

// At this exponent a softmax term is 0, as is 0·t then, where 0·(-inf) would be NaN.
constexpr float kLeastExponent = -127.0f;

// 2^t for kLeastExponent <= t <= 0, 0 where that is no normal float; NaN stays NaN.
RK_FORMULA Floats exp2_bounded(Floats t) {
  // Adding 1.5·2^23 + 127 leaves the nearest integer n in the low bits, with a float's bias: -127
  // becomes the exponent of 0.
  const Floats magic = splat(12583039.0f);
  const Floats shifted = t + magic;
  const Floats f = t - (shifted - magic);  // |f| <= 1/2
  // 2^f = 1 + f·q(f): minimax of degree 4 for the relative error, 9e-8.
  Floats q = f * 1.32647239e-3f + 9.67151287e-3f;
  q = q * f + 5.55073375e-2f;
  q = q * f + 2.40222421e-1f;
  q = q * f + 6.93146978e-1f;
  return (q * f + 1.0f) * bits_as<Floats>(bits_as<Ints>(shifted) << 23);
}

RK_FORMULA Floats bounded_exponent(Floats t) { return larger(splat(kLeastExponent), t); }

// For all x: infinity above the largest float, gradual underflow below.
RK_FORMULA Floats vector_exp(Floats x) {
  const Floats bound = splat(110.0f);
  Floats bounded = x > bound ? bound : x;
  bounded = bounded < -bound ? -bound : bounded;
  const ExpParts parts = exp_parts(bounded);
  const Ints half = parts.power >> 1;  // 2^n in two factors: n can pass 127
  return parts.fraction * power_of_two(half) * power_of_two(parts.power - half);
}

// For x <= 0, 0 where that is no normal float; NaN stays NaN. Half the instructions of the above.
RK_FORMULA Floats vector_exp_below_one(Floats x) {
  const ExpParts parts = exp_parts(larger(splat(-88.0f), x));
  return parts.fraction * power_of_two(parts.power);  // at the bound 2^-127, whose bits are those of 0
}

}  // namespace RK_ISA
}  // namespace rk
