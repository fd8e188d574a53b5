// Generalised advantage estimation (Schulman et al. 2016), one step back in time.
#pragma once

#include "math/host_device.h"

namespace rk {
namespace RK_ISA {

struct GaeState {
  float next_value;      // V of the next valid token, the bootstrap value, or 0
  float next_advantage;  // A of the next valid token, or 0
};

// The advantage at a position; 0 where it is masked, which leaves the state as it was. What stands
// at a masked position is read but never used: it may be NaN.
RK_FORMULA float gae_step(GaeState& state, bool valid, float reward, float value, float gamma,
                          float gamma_lambda) {
  const float delta = reward + gamma * state.next_value - value;
  const float advantage = delta + gamma_lambda * state.next_advantage;
  state.next_value = valid ? value : state.next_value;
  state.next_advantage = valid ? advantage : state.next_advantage;
  return valid ? advantage : 0.0f;
}

}  // namespace RK_ISA
}  // namespace rk
