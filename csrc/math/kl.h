// Estimates of a KL divergence per token (Schulman, "Approximating KL divergence", 2020).
#pragma once

#include "math/host_device.h"

namespace rk {

enum class KlEstimator : int { k1, k2, k3, abs };

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

// Estimates from r = logprob - reference logprob, with e^-r where k3 needs it.
template <class F>
RK_FORMULA F kl_estimate(F r, F exp_minus_r, KlEstimator estimator) {
  switch (estimator) {
    case KlEstimator::k1: return r;
    case KlEstimator::k2: return r * r * 0.5f;
    case KlEstimator::k3: return exp_minus_one_minus(-r, exp_minus_r);
    case KlEstimator::abs: return r < F{} ? -r : r;
  }
  return r;
}

// The derivative by the log-probability, of the estimators that serve as a loss.
template <class F>
RK_FORMULA F kl_slope(F r, F exp_minus_r, F estimate, KlEstimator estimator) {
  if (estimator == KlEstimator::k1) return F{} + 1.0f;
  if (estimator == KlEstimator::k2) return r;
  // 1 - e^-r; near 0 from the estimate, which is exact there.
  const F bound = F{} + 0.5f;
  return (r < bound) & (r > -bound) ? r - estimate : 1.0f - exp_minus_r;
}

}  // namespace RK_ISA
}  // namespace rk
