// rlhf_kernels._cpu: the kernels for Python, which passes addresses, sizes and strides as integers.
// Nothing here knows torch: checks and allocation are the caller's (rlhf_kernels/backends/cpu.py).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/pages.h"

namespace py = pybind11;
using namespace rk;

namespace {

#define RK_KERNELS(isa)                                                                      \
  Kernels {                                                                                  \
    #isa, isa::token_logprobs_forward, isa::token_logprobs_backward, isa::gae, isa::rollout, \
        isa::moments, isa::whiten, isa::ppo_loss, isa::transpose, isa::square_sum,           \
        isa::adamw_8bit, isa::swiglu_forward, isa::swiglu_backward, isa::rms_norm_forward,   \
        isa::rms_norm_backward, isa::rotary, isa::row_attention_forward,                     \
        isa::row_attention_backward                                                          \
  }

// From the most capable on; what this machine cannot run is left out.
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

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

RowsIn rows_in(uintptr_t logits, int type, int64_t rows, int64_t columns, int64_t row_stride) {
  return {pointer<const void>(logits), ElementType(type), rows, columns, row_stride};
}

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

// (address, type, rows, columns, row stride)
typedef std::tuple<uintptr_t, int, int64_t, int64_t, int64_t> RowsTuple;

RowsIn rows_of(const RowsTuple& in) { return std::apply(rows_in, in); }

void swiglu_forward(const RowsTuple& gate, const RowsTuple& up, uintptr_t hidden, int threads) {
  active.swiglu_forward({rows_of(gate), rows_of(up), pointer<void>(hidden), threads});
}

void swiglu_backward(const RowsTuple& gate, const RowsTuple& up, const RowsTuple& grad_hidden,
                     uintptr_t grad_gate, uintptr_t grad_up, uintptr_t hidden, int threads) {
  active.swiglu_backward({
      rows_of(gate),
      rows_of(up),
      rows_of(grad_hidden),
      pointer<void>(grad_gate),
      pointer<void>(grad_up),
      pointer<void>(hidden),
      threads,
  });
}

void rms_norm_forward(const RowsTuple& x, uintptr_t weight, double eps, uintptr_t out,
                      uintptr_t rstd, int threads) {
  active.rms_norm_forward({
      rows_of(x),
      pointer<const float>(weight),
      eps,
      pointer<void>(out),
      pointer<float>(rstd),
      threads,
  });
}

void rms_norm_backward(const RowsTuple& grad, const RowsTuple& x, uintptr_t weight, uintptr_t rstd,
                       uintptr_t grad_x, uintptr_t grad_weight, int threads) {
  const RowsIn rows = rows_of(x);
  const int64_t chunks = (rows.rows + kRmsNormChunk - 1) / kRmsNormChunk;
  std::vector<float> scratch(grad_weight ? size_t(chunks * rows.columns) : 0);
  active.rms_norm_backward({
      rows_of(grad),
      rows,
      pointer<const float>(weight),
      pointer<const float>(rstd),
      pointer<void>(grad_x),
      pointer<float>(grad_weight),
      scratch.data(),
      threads,
  });
}

// (address, type, stride of the sequences, of the heads, of the steps)
typedef std::tuple<uintptr_t, int, int64_t, int64_t, int64_t> RotaryIn;

HeadStrides head_strides(const RotaryIn& in) {
  return {std::get<2>(in), std::get<3>(in), std::get<4>(in)};
}

// (sequences, heads, steps, width)
typedef std::tuple<int64_t, int64_t, int64_t, int64_t> HeadsShape;

void rotary(const HeadsShape& shape, const RotaryIn& x, const RotaryIn& cos, const RotaryIn& sin,
            const RotaryIn& out, bool adjoint, int threads) {
  active.rotary({
      std::get<0>(shape),
      std::get<1>(shape),
      std::get<2>(shape),
      std::get<3>(shape),
      pointer<const void>(std::get<0>(x)),
      ElementType(std::get<1>(x)),
      head_strides(x),
      pointer<const void>(std::get<0>(cos)),
      pointer<const void>(std::get<0>(sin)),
      ElementType(std::get<1>(cos)),
      head_strides(cos),
      head_strides(sin),
      pointer<void>(std::get<0>(out)),
      head_strides(out),
      adjoint,
      threads,
  });
}

// Address, strides of the tokens and of the heads.
typedef std::tuple<uintptr_t, int64_t, int64_t> HeadsOfTokens;

HeadsIn heads_in(const HeadsOfTokens& in) {
  return {pointer<const void>(std::get<0>(in)), std::get<1>(in), std::get<2>(in)};
}

// Query, key, value.
typedef std::tuple<HeadsOfTokens, HeadsOfTokens, HeadsOfTokens> AttentionInputs;

// (query heads, heads of keys and values, size of a head, type, scale)
typedef std::tuple<int64_t, int64_t, int64_t, int, float> AttentionSettings;

// (number of rows, address of where they begin and the end)
typedef std::pair<int64_t, uintptr_t> RowsOfTokens;

// Rows by heads of keys and values, and by tiles of queries if they are to be `tiled`; those with
// the most keys first, so that threads finish together.
std::vector<RowAttentionTask> attention_tasks(const RowsOfTokens& rows, int64_t kv_heads,
                                              bool tiled) {
  const int64_t* starts = pointer<const int64_t>(rows.second);
  std::vector<RowAttentionTask> tasks;
  for (int64_t row = 0; row < rows.first; ++row) {
    const int64_t tokens = starts[row + 1] - starts[row];
    for (int64_t head = 0; head < kv_heads; ++head) {
      for (int64_t query = 0; query < tokens; query += tiled ? kAttentionTile : tokens) {
        tasks.push_back({starts[row], tokens, query, head});
      }
    }
  }
  const auto keys = [&](const RowAttentionTask& task) {
    return tiled ? std::min(task.tokens, task.first_query + kAttentionTile) : task.tokens;
  };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const auto& a, const auto& b) {
    return keys(a) > keys(b);
  });
  return tasks;
}

// Threads are worth their start only from some number of multiplications on.
int attention_threads(const std::vector<RowAttentionTask>& tasks, int64_t group, int64_t size,
                      int threads) {
  double products = 0;
  for (const RowAttentionTask& task : tasks) {
    const int64_t queries = std::min(task.tokens, kAttentionTile);
    products += double(queries) * double(task.tokens) * double(group * size);
  }
  const double useful = std::min(1 + products / 2e5, double(tasks.size()));
  return std::max(1, int(std::min(useful, double(threads))));
}

// What both directions need, with the memory behind it.
struct Attention {
  std::vector<RowAttentionTask> tasks;
  std::unique_ptr<float[]> memory;
  RowAttentionShared shared;
};

Attention attention(const AttentionInputs& in, const AttentionSettings& settings,
                    const RowsOfTokens& rows, bool backward, int threads) {
  const auto& [heads, kv_heads, size, type, scale] = settings;
  const int64_t group = heads / kv_heads;
  constexpr int64_t kVector = 16;  // floats, of the widest vectors
  const int64_t padded = std::max(kAttentionTile, (size + kVector - 1) / kVector * kVector);
  Attention all = {attention_tasks(rows, kv_heads, !backward), nullptr, {}};
  threads = attention_threads(all.tasks, group, size, threads);
  int64_t tiles = kForwardTiles + kForwardTilesOfHead * group, longest = 0;
  if (backward) {
    tiles = kBackwardTiles + kBackwardTilesOfHead * group;
    for (const RowAttentionTask& task : all.tasks) longest = std::max(longest, task.tokens);
  }
  const int64_t of_thread = (tiles * kAttentionTile + 2 * longest) * padded;
  all.memory.reset(new float[size_t(threads * of_thread + kVector)]);  // not initialised
  const uintptr_t unaligned = reinterpret_cast<uintptr_t>(all.memory.get());
  float* scratch = pointer<float>((unaligned + 63) / 64 * 64);
  all.shared = {heads_in(std::get<0>(in)),
                heads_in(std::get<1>(in)),
                heads_in(std::get<2>(in)),
                ElementType(type),
                heads,
                group,
                size,
                scale,
                all.tasks.data(),
                int64_t(all.tasks.size()),
                scratch,
                padded,
                of_thread,
                threads};
  return all;
}

void row_attention_forward(const AttentionInputs& in, const AttentionSettings& settings,
                           const RowsOfTokens& rows, uintptr_t out, uintptr_t exact,
                           uintptr_t log_sums, int threads) {
  const Attention all = attention(in, settings, rows, false, threads);
  active.row_attention_forward(
      {all.shared, pointer<void>(out), pointer<float>(exact), pointer<float>(log_sums)});
}

void row_attention_backward(const AttentionInputs& in, const AttentionSettings& settings,
                            const RowsOfTokens& rows, const HeadsOfTokens& grad_out,
                            uintptr_t exact, uintptr_t log_sums, uintptr_t grad_query,
                            uintptr_t grad_key, uintptr_t grad_value, int threads) {
  const Attention all = attention(in, settings, rows, true, threads);
  active.row_attention_backward({all.shared, heads_in(grad_out), pointer<const float>(exact),
                                 pointer<const float>(log_sums), pointer<void>(grad_query),
                                 pointer<void>(grad_key), pointer<void>(grad_value)});
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
  module.def("ppo_loss", &ppo_loss, release_gil());
  module.def("transpose", &transpose, release_gil());
  module.def("square_sum", &square_sum, release_gil());
  module.def("adamw_8bit", &adamw_8bit, release_gil());
  module.def("swiglu_forward", &swiglu_forward, release_gil());
  module.def("swiglu_backward", &swiglu_backward, release_gil());
  module.def("rms_norm_forward", &rms_norm_forward, release_gil());
  module.def("rms_norm_backward", &rms_norm_backward, release_gil());
  module.def("rotary", &rotary, release_gil());
  module.def("row_attention_forward", &row_attention_forward, release_gil());
  module.def("row_attention_backward", &row_attention_backward, release_gil());
}
