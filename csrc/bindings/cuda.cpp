// rlhf_kernels._cuda: the CUDA kernels for Python, which passes the device's addresses, sizes,
// strides and the stream as integers. Nothing here knows torch, and importing it calls nothing of
// CUDA: checks and allocation are the caller's (rlhf_kernels/backends/cuda.py).

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/kernels.h"

namespace py = pybind11;
using namespace rk;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cuda::Stream stream_of(uintptr_t handle) { return {pointer<void>(handle)}; }

// Inputs come as (address, row stride); an absent one has address 0.
typedef std::pair<uintptr_t, int64_t> Input;

Series series(const Input& input) { return {pointer<const float>(input.first), input.second}; }

Mask mask_in(const Input& input) { return {pointer<const uint8_t>(input.first), input.second}; }

// (count, columns, address of cu_seqlens or 0)
typedef std::tuple<int64_t, int64_t, uintptr_t> SequencesIn;

Sequences sequences_in(const SequencesIn& in) {
  return {std::get<0>(in), std::get<1>(in), pointer<const int64_t>(std::get<2>(in))};
}

// (gamma, lambda, lambda of the returns, address of [count, 3] or 0)
typedef std::tuple<float, float, float, uintptr_t> RatesIn;

GaeRates rates_in(const RatesIn& in) {
  return {std::get<0>(in), std::get<1>(in), std::get<2>(in), pointer<const float>(std::get<3>(in))};
}

// (parts of a sequence, scratch for counts, scratch for sums; 0 with one part)
typedef std::tuple<int, uintptr_t, uintptr_t> PartsIn;

cuda::Advantages advantages_in(const SequencesIn& sequences, const Input& values, const Input& mask,
                               uintptr_t bootstrap_values, const RatesIn& rates, int masked,
                               uintptr_t advantages, uintptr_t returns, const PartsIn& parts) {
  if (std::get<0>(sequences) * std::get<0>(parts) > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("more than 2^31 sequences in one call; divide the batch");
  }
  return {
      sequences_in(sequences),
      series(values),
      mask_in(mask),
      pointer<const float>(bootstrap_values),
      rates_in(rates),
      MaskedStep(masked),
      pointer<float>(advantages),
      pointer<float>(returns),
      std::get<0>(parts),
      pointer<int>(std::get<1>(parts)),
      pointer<float>(std::get<2>(parts)),
  };
}

void gae(SequencesIn sequences, Input rewards, Input values, Input mask, uintptr_t bootstrap_values,
         RatesIn rates, int masked, uintptr_t advantages, uintptr_t returns, PartsIn parts,
         uintptr_t stream) {
  cuda::gae({advantages_in(sequences, values, mask, bootstrap_values, rates, masked, advantages,
                           returns, parts),
             series(rewards)},
            stream_of(stream));
}

void rollout(SequencesIn sequences, uintptr_t scores, Input logprobs, Input ref_logprobs,
             Input values, Input mask, uintptr_t bootstrap_values, float kl_coef, int kl_estimator,
             RatesIn rates, int masked, uintptr_t advantages, uintptr_t returns, uintptr_t rewards,
             uintptr_t kl, uintptr_t moments, uintptr_t scratch, PartsIn parts, uintptr_t stream) {
  const cuda::Rollout args = {
      advantages_in(sequences, values, mask, bootstrap_values, rates, masked, advantages, returns,
                    parts),
      pointer<const float>(scores),
      series(logprobs),
      series(ref_logprobs),
      kl_coef,
      KlEstimator(kl_estimator),
      pointer<float>(rewards),
      pointer<float>(kl),
      pointer<double>(moments),
      pointer<double>(scratch),
  };
  cuda::rollout(args, stream_of(stream));
}

void moments(Input x, Input mask, int64_t rows, int64_t columns, uintptr_t moments,
             uintptr_t scratch, uintptr_t stream) {
  cuda::moments({series(x), mask_in(mask), {rows, columns}, pointer<double>(moments),
                 pointer<double>(scratch)},
                stream_of(stream));
}

void whiten(Input x, Input mask, int64_t rows, int64_t columns, uintptr_t moments, bool shift_mean,
            double eps, uintptr_t out, uintptr_t stream) {
  cuda::whiten({series(x), mask_in(mask), {rows, columns}, pointer<const double>(moments),
                shift_mean, eps, pointer<float>(out)},
               stream_of(stream));
}

// (low, high, dual, value range; infinity where there is none)
typedef std::tuple<float, float, float, float> ClippingIn;

// Log-probabilities, old ones, advantages; values, old values, returns; entropy, those of the
// reference, importance weights; mask.
typedef std::vector<Input> PpoInputs;

// (value, entropy, KL coefficients, estimator of the KL, aggregation)
typedef std::tuple<float, float, float, int, int> PpoWeightsIn;

// (counts, weights; 0 where they are not needed; partial sums)
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t> PpoScratchIn;

void ppo_loss(SequencesIn sequences, int64_t tokens, const PpoInputs& in, ClippingIn clip,
              PpoWeightsIn weights, uintptr_t normalizer, uintptr_t loss, uintptr_t stats,
              uintptr_t grad_logprobs, uintptr_t grad_values, uintptr_t grad_entropy,
              PpoScratchIn scratch, uintptr_t stream) {
  const Sequences all = sequences_in(sequences);
  cuda::ppo_loss(
      {
          series(in.at(0)),
          series(in.at(1)),
          series(in.at(2)),
          series(in.at(3)),
          series(in.at(4)),
          series(in.at(5)),
          series(in.at(6)),
          series(in.at(7)),
          series(in.at(8)),
          mask_in(in.at(9)),
          all,
          all.cu_seqlens ? cuda::Grid{1, tokens} : cuda::Grid{all.count, all.columns},
          std::get<0>(clip),
          std::get<1>(clip),
          std::get<2>(clip),
          std::get<3>(clip),
          std::get<0>(weights),
          std::get<1>(weights),
          std::get<2>(weights),
          KlEstimator(std::get<3>(weights)),
          Aggregation(std::get<4>(weights)),
          pointer<const float>(normalizer),
          pointer<float>(loss),
          pointer<float>(stats),
          pointer<float>(grad_logprobs),
          pointer<float>(grad_values),
          pointer<float>(grad_entropy),
          pointer<int>(std::get<0>(scratch)),
          pointer<float>(std::get<1>(scratch)),
          pointer<double>(std::get<2>(scratch)),
      },
      stream_of(stream));
}

// What the driver supports, 1000·major + 10·minor; 0 without a driver.
int driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  typedef py::call_guard<py::gil_scoped_release> release_gil;
  module.doc() = "CUDA kernels of rlhf_kernels; called through backends/cuda.py.";
  module.attr("CHUNK") = cuda::kChunk;
  module.attr("MOST_BLOCKS") = cuda::kMostBlocks;
  module.attr("PPO_PARTIAL") = cuda::kPpoPartial;
  module.attr("RUNTIME_VERSION") = CUDART_VERSION;
  module.def("driver_version", &driver_version);
  module.def("gae", &gae, release_gil());
  module.def("rollout", &rollout, release_gil());
  module.def("moments", &moments, release_gil());
  module.def("whiten", &whiten, release_gil());
  module.def("ppo_loss", &ppo_loss, release_gil());
}
