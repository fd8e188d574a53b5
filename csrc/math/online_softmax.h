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

// Gradient by a logit whose log-probability is logp, upstream g of the target's log-probability and
// h of the entropy, divided by tau; for every element but the target.
template <class F>
RK_FORMULA F logit_gradient(F p, F logp, float g, float h, float entropy, float inverse_tau) {
  return p * ((logp + entropy) * h + g) * -inverse_tau;
}

// The same for the target. 1 - p is formed without cancellation, and before any rounding.
RK_FORMULA float target_gradient(float logp, float g, float h, float entropy, float inverse_tau) {
  const float p = expf(logp);
  const float spread = p == 0.0f ? 0.0f : p * (logp + entropy);
  return (-expm1f(logp) * g - h * spread) * inverse_tau;
}

}  // namespace RK_ISA
}  // namespace rk
