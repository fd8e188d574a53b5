// The clipped PPO objective of one token (Schulman et al. 2017) and its gradients.
//
// F is float, or on the CPU a vector of lanes: comparisons then give lane masks, and `?:` selects by
// lane. Comparisons stand so that NaN in a valid place reaches the loss and the gradient.
#pragma once

#include "math/host_device.h"

namespace rk {
namespace RK_ISA {

struct PpoClipping {
  float ratio_low;         // 1 - epsilon_low
  float ratio_high;        // 1 + epsilon_high
  float dual_clip;         // c > 1; infinity: none
  float value_clip_range;  // epsilon_v; infinity: none
};

template <class F, class Mask>
struct PolicyTerm {
  F loss;
  F gradient;  // by the log-probability
  Mask clipped;
  Mask dual_clipped;
};

// ratio = exp(logprob - old logprob). Where both branches are equal, the gradient is the unclipped one.
template <class F>
RK_FORMULA auto policy_term(F ratio, F advantage, const PpoClipping& clip) {
  const F zero = F{};
  const F low = zero + clip.ratio_low;
  const F high = zero + clip.ratio_high;
  F bounded_ratio = ratio < low ? low : ratio;
  bounded_ratio = bounded_ratio > high ? high : bounded_ratio;
  const F surrogate = ratio * advantage;
  const F bounded = bounded_ratio * advantage;
  const auto clipped = bounded < surrogate;
  const F loss = clipped ? -bounded : -surrogate;
  const F ceiling = advantage * -clip.dual_clip;
  const decltype(advantage < zero) dual_clipped = (advantage < zero) & (ceiling < loss);
  const F slope = clipped | dual_clipped ? zero : -surrogate;
  return PolicyTerm<F, decltype(advantage < zero)>{dual_clipped ? ceiling : loss, slope, clipped,
                                                   dual_clipped};
}

template <class F, class Mask>
struct ValueTerm {
  F loss;
  F gradient;
  Mask clipped;
};

template <class F>
RK_FORMULA auto value_term(F value, F old_value, F ret, const PpoClipping& clip) {
  const F zero = F{};
  const F range = zero + clip.value_clip_range;
  const F step = value - old_value;
  const F error = value - ret;
  F bounded_step = step > range ? range : step;
  bounded_step = bounded_step < -range ? -range : bounded_step;
  const F bounded_error = old_value + bounded_step - ret;
  // Inside the range both errors are one; it takes no part there, so rounding cannot break the tie.
  // Where a NaN comes in, the old value's too, the bounded error is NaN and is chosen.
  const F squared = bounded_error * bounded_error;
  const auto outside = (step > range) | (step < -range) | (step != step);
  const decltype(step > range) clipped =
      outside & ((squared > error * error) | (squared != squared));
  const F chosen = clipped ? bounded_error : error;
  return ValueTerm<F, decltype(step > range)>{chosen * chosen * 0.5f,
                                              clipped ? bounded_error * 0.0f : error, clipped};
}

}  // namespace RK_ISA
}  // namespace rk
