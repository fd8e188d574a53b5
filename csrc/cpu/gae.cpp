// Advantages and returns, backwards in time. The recurrence is sequential in a row, so several rows
// run side by side to fill the pipeline; rows are independent, whatever the number of threads.

#include "cpu/kernels.h"
#include "math/gae.h"

namespace rk {
namespace RK_ISA {
namespace {

template <int kRows>
void gae_rows(const Gae& args, int64_t first) {
  GaeState states[kRows];
  for (int r = 0; r < kRows; ++r) {
    states[r] = {args.bootstrap_values ? args.bootstrap_values[first + r] : 0.0f, 0.0f};
  }
  const float* const rewards = args.rewards.data + first * args.rewards.row_stride;
  const float* const values = args.values.data + first * args.values.row_stride;
  const uint8_t* const mask = args.mask.data + first * args.mask.row_stride;
  float* const advantages = args.advantages + first * args.columns;
  float* const returns = args.returns + first * args.columns;
  const float gamma = args.gamma;
  const float gamma_lambda = args.gamma_lambda;
  const int64_t rewards_stride = args.rewards.row_stride;
  const int64_t values_stride = args.values.row_stride;
  const int64_t mask_stride = args.mask.row_stride;
  const int64_t columns = args.columns;
  for (int64_t t = columns - 1; t >= 0; --t) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const bool valid = mask[r * mask_stride + t] != 0;
      const float value = values[r * values_stride + t];
      const float reward = rewards[r * rewards_stride + t];
      const float advantage = gae_step(states[r], valid, reward, value, gamma, gamma_lambda);
      advantages[r * columns + t] = advantage;
      returns[r * columns + t] = valid ? advantage + value : 0.0f;
    }
  }
}

}  // namespace

void gae(const Gae& args) {
  constexpr int kTogether = 8;
  const int64_t groups = (args.rows + kTogether - 1) / kTogether;
  // 100 µs of work for one core: below it, waiting for a second one may cost more than it saves.
  const bool small = args.rows * args.columns < 100000;
#pragma omp parallel for schedule(static) num_threads(small ? 1 : args.threads)
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * kTogether;
    if (first + kTogether <= args.rows) {
      gae_rows<kTogether>(args, first);
    } else {
      for (int64_t row = first; row < args.rows; ++row) gae_rows<1>(args, row);
    }
  }
}

}  // namespace RK_ISA
}  // namespace rk
