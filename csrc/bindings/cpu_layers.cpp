// The layers of transformers for Python; see cpu.cpp.

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/cpu.h"

namespace py = pybind11;
using namespace rk;

namespace {

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
typedef std::tuple<uintptr_t, int, int64_t, int64_t, int64_t> HeadsOfSteps;

HeadStrides head_strides(const HeadsOfSteps& in) {
  return {std::get<2>(in), std::get<3>(in), std::get<4>(in)};
}

// (sequences, heads, steps, width)
typedef std::tuple<int64_t, int64_t, int64_t, int64_t> HeadsShape;

void rotary(const HeadsShape& shape, const HeadsOfSteps& x, const HeadsOfSteps& cos,
            const HeadsOfSteps& sin, const HeadsOfSteps& out, bool adjoint, int threads) {
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
int useful_threads(double products, int64_t tasks, int threads) {
  return std::max(1, int(std::min({1 + products / 2e5, double(tasks), double(threads)})));
}

int attention_threads(const std::vector<RowAttentionTask>& tasks, int64_t group, int64_t size,
                      int threads) {
  double products = 0;
  for (const RowAttentionTask& task : tasks) {
    const int64_t queries = std::min(task.tokens, kAttentionTile);
    products += double(queries) * double(task.tokens) * double(group * size);
  }
  return useful_threads(products, int64_t(tasks.size()), threads);
}

// In floats, of the widest vectors.
int64_t whole_vectors(int64_t count) { return (count + 15) / 16 * 16; }

// Not initialised, and beginning at a whole vector.
float* new_floats(int64_t count, std::unique_ptr<float[]>& memory) {
  memory.reset(new float[size_t(count + 16)]);
  return pointer<float>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
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
  const int64_t padded = std::max(kAttentionTile, whole_vectors(size));
  Attention all = {attention_tasks(rows, kv_heads, !backward), nullptr, {}};
  threads = attention_threads(all.tasks, group, size, threads);
  int64_t tiles = kForwardTiles + kForwardTilesOfHead * group, longest = 0;
  if (backward) {
    tiles = kBackwardTiles + kBackwardTilesOfHead * group;
    for (const RowAttentionTask& task : all.tasks) longest = std::max(longest, task.tokens);
  }
  const int64_t of_thread = (tiles * kAttentionTile + 2 * longest) * padded;
  float* scratch = new_floats(threads * of_thread, all.memory);
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

// (rows, heads of keys and values, query heads of each, keys, size of a head)
typedef std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> CacheShape;

void cached_attention(const CacheShape& shape, const HeadsOfSteps& query, const HeadsOfSteps& key,
                      const HeadsOfSteps& value, const std::pair<uintptr_t, int64_t>& mask,
                      float scale, uintptr_t out, int threads) {
  const auto& [rows, kv_heads, group, keys, size] = shape;
  const int64_t padded = whole_vectors(size), padded_keys = whole_vectors(keys);
  const int64_t of_thread = (2 * group + 1) * padded + group * padded_keys;
  threads = useful_threads(double(rows * kv_heads * group) * double(keys * size), rows * kv_heads,
                           threads);
  std::unique_ptr<float[]> memory;
  active.cached_attention({
      rows,
      kv_heads,
      group,
      keys,
      size,
      pointer<const void>(std::get<0>(query)),
      head_strides(query),
      pointer<const void>(std::get<0>(key)),
      pointer<const void>(std::get<0>(value)),
      head_strides(key),
      head_strides(value),
      ElementType(std::get<1>(query)),
      {pointer<const uint8_t>(mask.first), mask.second},
      scale,
      pointer<void>(out),
      new_floats(threads * of_thread, memory),
      padded,
      padded_keys,
      of_thread,
      threads,
  });
}

}  // namespace

void rk::define_layers(py::module_& module) {
  typedef py::call_guard<py::gil_scoped_release> release_gil;
  module.def("swiglu_forward", &swiglu_forward, release_gil());
  module.def("swiglu_backward", &swiglu_backward, release_gil());
  module.def("rms_norm_forward", &rms_norm_forward, release_gil());
  module.def("rms_norm_backward", &rms_norm_backward, release_gil());
  module.def("rotary", &rotary, release_gil());
  module.def("row_attention_forward", &row_attention_forward, release_gil());
  module.def("row_attention_backward", &row_attention_backward, release_gil());
  module.def("cached_attention", &cached_attention, release_gil());
}
