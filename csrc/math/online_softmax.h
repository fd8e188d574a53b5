// Softmax statistics of one row from a single read of its logits (Milakov and Gimelshein 2018).
#pragma once

#include <math.h>

#include "math/host_device.h"

namespace rk {
namespace RK_ISA {

// With d_j = (x_j - max)/tau over the elements seen so far: sum = Σ e^{d_j}, weighted = Σ e^{d_j} d_j.
// Sums of shifted terms keep their digits where logits are large. F may be a vector of lanes.
template <class F>
struct SoftmaxSums {
  F sum;
  F weighted;
};

// Refers the sums to a new maximum that is `drop` = (new - old)/tau >= 0 higher.
template <class F, class Scalar>
RK_FORMULA void refer_to_higher_max(SoftmaxSums<F>& sums, Scalar drop) {
  const Scalar factor = ::exp(-drop);
  sums.weighted = (sums.weighted - sums.sum * drop) * factor;
  sums.sum = sums.sum * factor;
}

// The log-probability of the element with d = (x - max)/tau. Its error is that of d and of the
// logarithm alone, however large x and max are; the backward keeps both apart for that reason.
template <class F>
RK_FORMULA F logprob(F d, float log_sum) {
  return d - log_sum;
}

RK_FORMULA float entropy(float log_sum, float sum, float weighted) {
  return log_sum - weighted / sum;
}

// Exponents are taken to base 2, which costs nothing where 1/tau is a factor anyway: with
// t = log2 p = (x - max)/(tau·ln 2) - log2 of the sum, the gradient by a logit, upstream g of the
// target's log-probability and h of the entropy, is p·(t·slope + level), for all but the target.
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

struct GradientTerms {
  float slope;
  float level;
};

RK_FORMULA GradientTerms gradient_terms(float g, float h, float entropy, float inverse_tau) {
  return {-h * inverse_tau * kLn2, -(g + h * entropy) * inverse_tau};
}

template <class F>
RK_FORMULA F logit_gradient(F p, F t, const GradientTerms& terms) {
  return p * (t * terms.slope + terms.level);
}

// The target's gradient. 1 - p is formed without cancellation, and before any rounding.
RK_FORMULA float target_gradient(float logp, float g, float h, float entropy, float inverse_tau) {
  const float p = expf(logp);
  const float spread = p == 0.0f ? 0.0f : p * (logp + entropy);
  return (-expm1f(logp) * g - h * spread) * inverse_tau;
}

}  // namespace RK_ISA
}  // namespace rk
