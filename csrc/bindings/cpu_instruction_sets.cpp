// Which of the kernels, compiled once for every instruction set, this machine runs.

#include <stdexcept>

#include "bindings/cpu.h"

namespace rk {
namespace {

#define RK_KERNELS(isa)                                                                      \
  Kernels {                                                                                  \
    #isa, isa::token_logprobs_forward, isa::token_logprobs_backward, isa::gae, isa::rollout, \
        isa::moments, isa::whiten, isa::whitened_gae, isa::ppo_loss, isa::transpose,         \
        isa::square_sum, isa::adamw_8bit, isa::swiglu_forward, isa::swiglu_backward,         \
        isa::rms_norm_forward, isa::rms_norm_backward, isa::rotary,                          \
        isa::row_attention_forward, isa::row_attention_backward, isa::cached_attention       \
  }

std::vector<Kernels> runnable_kernels() {
  std::vector<Kernels> found;
#ifdef RK_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512) found.push_back(RK_KERNELS(avx512));
  if (avx2) found.push_back(RK_KERNELS(avx2));
#endif
  found.push_back(RK_KERNELS(baseline));
  return found;
}

}  // namespace

const std::vector<Kernels>& runnable() {
  static const std::vector<Kernels> found = runnable_kernels();
  return found;
}

Kernels active = runnable().front();

void use_isa(const std::string& name) {
  std::string names;
  for (const Kernels& kernels : runnable()) {
    if (name == kernels.name) {
      active = kernels;
      return;
    }
    names += std::string(names.empty() ? "" : ", ") + kernels.name;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not one that this machine runs (" +
                              names + ")");
}

}  // namespace rk
