// Estimates of a KL divergence per token (Schulman, "Approximating KL divergence", 2020).
#pragma once

#include "math/host_device.h"

namespace rk {
namespace RK_ISA {

// e^d - 1 - d. The plain form loses all digits near 0, where training lives: a Taylor polynomial
// stands in there.
template <class F>
RK_FORMULA F exp_minus_one_minus(F d, F exp_d) {
  F q = d * (1.0f / 362880) + 1.0f / 40320;
  q = q * d + 1.0f / 5040;
  q = q * d + 1.0f / 720;
  q = q * d + 1.0f / 120;
  q = q * d + 1.0f / 24;
  q = q * d + 1.0f / 6;
  q = q * d + 0.5f;
  const F bound = F{} + 0.5f;
  return (d < bound) & (d > -bound) ? q * d * d : exp_d - 1.0f - d;
}

}  // namespace RK_ISA
}  // namespace rk
