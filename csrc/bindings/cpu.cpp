// rlhf_kernels._cpu: the kernels for Python, which passes addresses, sizes and strides as integers.
// Nothing here knows torch: checks and allocation are the caller's (rlhf_kernels/backends/cpu.py).

#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/cpu.h"
#include "cpu/pages.h"

namespace py = pybind11;
using namespace rk;

namespace {

// The first row whose target is neither in [0, columns) nor ignored nor elsewhere; -1 where there is none.
int64_t first_bad_target(const int64_t* targets, const RowsIn& logits, int64_t ignore_index) {
  for (int64_t row = 0; row < logits.rows; ++row) {
    const bool in_range = uint64_t(targets[row]) < uint64_t(logits.columns);
    if (!in_range && targets[row] != ignore_index && targets[row] != kElsewhere) return row;
  }
  return -1;
}

int64_t token_logprobs_forward(uintptr_t logits, int type, int64_t rows, int64_t columns,
                               int64_t row_stride, uintptr_t targets, uintptr_t temperatures,
                               float temperature, int64_t ignore_index, uintptr_t logprobs,
                               uintptr_t entropy, uintptr_t normalization, int threads) {
  const TokenLogprobsForward args = {
      rows_in(logits, type, rows, columns, row_stride),
      pointer<const int64_t>(targets),
      {pointer<const float>(temperatures), temperature},
      ignore_index,
      pointer<float>(logprobs),
      pointer<float>(entropy),
      pointer<float>(normalization),
      threads,
  };
  const int64_t bad = first_bad_target(args.targets, args.logits, ignore_index);
  if (bad < 0) active.token_logprobs_forward(args);
  return bad;
}

int64_t token_logprobs_backward(uintptr_t logits, int type, int64_t rows, int64_t columns,
                                int64_t row_stride, uintptr_t targets, uintptr_t temperatures,
                                float temperature, int64_t ignore_index, uintptr_t normalization,
                                uintptr_t entropy, uintptr_t grad_logprobs, uintptr_t grad_entropy,
                                uintptr_t grad, int64_t grad_row_stride, bool grad_is_fresh,
                                int threads) {
  const TokenLogprobsBackward args = {
      rows_in(logits, type, rows, columns, row_stride),
      pointer<const int64_t>(targets),
      {pointer<const float>(temperatures), temperature},
      ignore_index,
      pointer<const float>(normalization),
      pointer<const float>(entropy),
      pointer<const float>(grad_logprobs),
      pointer<const float>(grad_entropy),
      pointer<void>(grad),
      grad_row_stride,
      grad_is_fresh,
      threads,
  };
  const int64_t bad = first_bad_target(args.targets, args.logits, ignore_index);
  if (bad < 0) active.token_logprobs_backward(args);
  return bad;
}

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

void gae(SequencesIn sequences, Input rewards, Input values, Input mask, uintptr_t bootstrap_values,
         RatesIn rates, int masked, uintptr_t advantages, uintptr_t returns, int threads) {
  active.gae({
      sequences_in(sequences),
      series(rewards),
      series(values),
      mask_in(mask),
      pointer<const float>(bootstrap_values),
      rates_in(rates),
      MaskedStep(masked),
      pointer<float>(advantages),
      pointer<float>(returns),
      threads,
  });
}

void rollout(SequencesIn sequences, uintptr_t scores, Input logprobs, Input ref_logprobs,
             Input values, Input mask, uintptr_t bootstrap_values, float kl_coef, int kl_estimator,
             RatesIn rates, int masked, uintptr_t advantages, uintptr_t returns, uintptr_t rewards,
             uintptr_t kl, uintptr_t moments, int threads) {
  std::vector<double> scratch(size_t(std::get<0>(sequences) * kMoments));
  active.rollout({
      {
          sequences_in(sequences),
          {nullptr, 0},
          series(values),
          mask_in(mask),
          pointer<const float>(bootstrap_values),
          rates_in(rates),
          MaskedStep(masked),
          pointer<float>(advantages),
          pointer<float>(returns),
          threads,
      },
      pointer<const float>(scores),
      series(logprobs),
      series(ref_logprobs),
      kl_coef,
      KlEstimator(kl_estimator),
      pointer<float>(rewards),
      pointer<float>(kl),
      pointer<double>(moments),
      scratch.data(),
  });
}

void moments(Input x, Input mask, int64_t rows, int64_t columns, uintptr_t total, int threads) {
  std::vector<double> scratch(size_t(rows * kMoments));
  active.moments({series(x), mask_in(mask), rows, columns, pointer<double>(total), scratch.data(),
                  threads});
}

void whiten(Input x, Input mask, int64_t rows, int64_t columns, double mean, double scale,
            double shift, uintptr_t out, int threads) {
  active.whiten({series(x), mask_in(mask), rows, columns, mean, scale, shift, pointer<float>(out),
                 threads});
}

void whitened_gae(Input rewards, Input values, Input mask, bool mask_is_wide, int64_t rows,
                  int64_t columns, float gamma, float lambda, double eps, uintptr_t advantages,
                  uintptr_t returns, uintptr_t moments, int threads) {
  std::vector<double> scratch(size_t(rows * (kMoments + 1)));
  active.whitened_gae({
      series(rewards),
      series(values),
      mask_in(mask),
      mask_is_wide ? pointer<const int64_t>(mask.first) : nullptr,
      rows,
      columns,
      gamma,
      lambda,
      eps,
      pointer<float>(advantages),
      pointer<float>(returns),
      pointer<double>(moments),
      scratch.data(),
      threads,
  });
}

// (low, high, dual, value range; infinity where there is none)
typedef std::tuple<float, float, float, float> ClippingIn;

// Log-probabilities, old ones, advantages; values, old values, returns; entropy, those of the
// reference, importance weights; mask.
typedef std::vector<Input> PpoInputs;

// (value, entropy, KL coefficients, estimator of the KL, aggregation)
typedef std::tuple<float, float, float, int, int> PpoWeightsIn;

void ppo_loss(SequencesIn sequences, int64_t tokens, const PpoInputs& in, ClippingIn clip,
              PpoWeightsIn weights, uintptr_t normalizer, uintptr_t loss, uintptr_t stats,
              uintptr_t grad_logprobs, uintptr_t grad_values, uintptr_t grad_entropy,
              int threads) {
  const int64_t chunks = (tokens + kPpoChunk - 1) / kPpoChunk;
  std::vector<double> scratch(size_t(chunks * kPpoScratch));
  active.ppo_loss({
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
      sequences_in(sequences),
      std::get<0>(clip),
      std::get<1>(clip),
      std::get<2>(clip),
      std::get<3>(clip),
      std::get<0>(weights),
      std::get<1>(weights),
      Aggregation(std::get<4>(weights)),
      std::get<2>(weights),
      KlEstimator(std::get<3>(weights)),
      pointer<const float>(normalizer),
      pointer<float>(loss),
      pointer<float>(stats),
      pointer<float>(grad_logprobs),
      pointer<float>(grad_values),
      pointer<float>(grad_entropy),
      scratch.data(),
      threads,
  });
}

void transpose(uintptr_t from, int64_t rows, int64_t columns, int64_t row_stride, uintptr_t to,
               int threads) {
  active.transpose(
      {pointer<const float>(from), rows, columns, row_stride, pointer<float>(to), threads});
}

// (beta1, 1 - beta1, beta2, 1 - beta2, factor of the squares' root, eps, weight's decay, rate)
typedef std::tuple<float, float, float, float, float, float, float, float> AdamwSettingsIn;

double square_sum(uintptr_t data, int type, int64_t count, int threads) {
  std::vector<double> scratch((count + kSquareSumPiece - 1) / kSquareSumPiece);
  return active.square_sum(
      {pointer<const void>(data), ElementType(type), count, scratch.data(), threads});
}

void adamw_8bit(int64_t size, uintptr_t weights, uintptr_t remainder, uintptr_t gradient,
                uintptr_t mean, uintptr_t mean_scale, uintptr_t square, uintptr_t square_scale,
                uintptr_t noise, const AdamwSettingsIn& settings) {
  active.adamw_8bit({
      size,
      pointer<void>(weights),
      pointer<int8_t>(remainder),
      pointer<const void>(gradient),
      pointer<uint8_t>(mean),
      pointer<uint8_t>(square),
      pointer<float>(mean_scale),
      pointer<float>(square_scale),
      pointer<const int32_t>(noise),
      std::apply([](auto... number) { return Adamw8bitSettings{number...}; }, settings),
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  typedef py::call_guard<py::gil_scoped_release> release_gil;
  module.doc() = "C++ kernels of rlhf_kernels for the CPU; called through backends/cpu.py.";
  module.def("ask_for_huge_pages", [](uintptr_t memory, int64_t bytes) {
    baseline::ask_for_huge_pages(reinterpret_cast<void*>(memory), bytes);
  });
  module.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels& kernels : runnable()) names.push_back(kernels.name);
    return py::tuple(py::cast(names));
  });
  module.def("isa", [] { return active.name; });
  module.def("use_isa", &use_isa, py::arg("name"));
  module.def("token_logprobs_forward", &token_logprobs_forward, release_gil());
  module.def("token_logprobs_backward", &token_logprobs_backward, release_gil());
  module.def("gae", &gae, release_gil());
  module.def("rollout", &rollout, release_gil());
  module.def("moments", &moments, release_gil());
  module.def("whiten", &whiten, release_gil());
  module.def("whitened_gae", &whitened_gae, release_gil());
  module.def("ppo_loss", &ppo_loss, release_gil());
  module.def("transpose", &transpose, release_gil());
  module.def("square_sum", &square_sum, release_gil());
  module.def("adamw_8bit", &adamw_8bit, release_gil());
  define_layers(module);
}
