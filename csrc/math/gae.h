// Generalised advantage estimation (Schulman et al. 2016): A_t = delta_t + c·A_{t+1}, c = gamma·lambda.
#pragma once

#include "math/host_device.h"

namespace rk {
namespace RK_ISA {

template <class F>
RK_FORMULA F gae_delta(F reward, F next_value, F value, float gamma) {
  return reward + next_value * gamma - value;
}

}  // namespace RK_ISA
}  // namespace rk
