// Attention of one query a row against its cached keys, as a step of sampling has it. A key is read
// once for all query heads that share it. Each task writes what no other does, so results do not
// depend on the number of threads.

#include <math.h>

#include "cpu/attention_tiles.h"

namespace rk {
namespace RK_ISA {
namespace {

// A row and one of its heads of keys and values, and what a thread works on, in `padded` floats a
// head: the query heads of the group, what they sum up, a key or a value; and their scores.
template <class Type>
struct Task {
  typedef typename Type::Element Element;
  const CachedAttention& args;
  int64_t row, kv_head;
  float *queries, *sums, *one, *scores;

  Task(const CachedAttention& args, int64_t number)
      : args(args), row(number / args.kv_heads), kv_head(number % args.kv_heads) {
    queries = args.scratch + omp_get_thread_num() * args.scratch_stride;
    sums = queries + args.group * args.padded;
    one = sums + args.group * args.padded;
    scores = one + args.padded;
  }

  bool hidden(int64_t key) const {
    return args.mask.data && !args.mask.data[row * args.mask.row_stride + key];
  }

  float* query_of(int64_t head) const { return queries + head * args.padded; }
  float* scores_of(int64_t head) const { return scores + head * args.padded_keys; }

  // Of key or value, into `one`.
  void load_step(const void* from, const HeadStrides& strides, int64_t step) const {
    const auto* first = static_cast<const Element*>(from) + row * strides.sequence +
                        kv_head * strides.head + step * strides.step;
    load_rows<Type>(first, strides.step, 1, args.size, 1.0f, one, args.padded);
  }
};

RK_FORMULA float dot(const float* a, const float* b, int64_t size) {
  Floats sum = {};
  for (int64_t i = 0; i < size; i += kLanes) sum += load_as<Floats>(a + i) * load_as<Floats>(b + i);
  return sum_of(sum)[0];
}

// -inf for keys that are not seen, and for none at all up to a whole vector.
template <class Type>
void score_keys(const Task<Type>& task) {
  const CachedAttention& args = task.args;
  for (int64_t key = 0; key < args.padded_keys; ++key) {
    const bool seen = key < args.keys && !task.hidden(key);
    if (seen) task.load_step(args.key, args.key_strides, key);
    for (int64_t head = 0; head < args.group; ++head) {
      task.scores_of(head)[key] =
          seen ? dot(task.query_of(head), task.one, args.size) : -INFINITY;
    }
  }
}

// Scores become probabilities; all 0 where no key is seen.
void softmax(float* scores, int64_t padded_keys) {
  Floats highest = splat(-INFINITY), terms = {};
  for (int64_t key = 0; key < padded_keys; key += kLanes) {
    highest = larger(highest, load_as<Floats>(scores + key));
  }
  highest = highest_of(highest);
  // While every score is -inf, 0 stands for the maximum: the terms are 0, and NaN stays NaN.
  const Floats reference = highest == -INFINITY ? Floats{} : highest;
  for (int64_t key = 0; key < padded_keys; key += kLanes) {
    const Floats e = exp_bounded(load_as<Floats>(scores + key) - reference);
    store<Float32>(scores + key, e);
    terms += e;
  }
  const float sum = sum_of(terms)[0];
  multiply_row(scores, sum == 0.0f ? 0.0f : 1.0f / sum, padded_keys);
}

template <class Type>
void add_values(const Task<Type>& task) {
  const CachedAttention& args = task.args;
  for (int64_t i = 0; i < args.group * args.padded; ++i) task.sums[i] = 0.0f;
  for (int64_t key = 0; key < args.keys; ++key) {
    if (task.hidden(key)) continue;
    task.load_step(args.value, args.value_strides, key);
    for (int64_t head = 0; head < args.group; ++head) {
      const float weight = task.scores_of(head)[key];
      float* sum = task.sums + head * args.padded;
      for (int64_t i = 0; i < args.size; i += kLanes) {
        store<Float32>(sum + i, load_as<Floats>(sum + i) + weight * load_as<Floats>(task.one + i));
      }
    }
  }
}

template <class Type>
void attend(const CachedAttention& args, int64_t number) {
  const Task<Type> task(args, number);
  const int64_t first_head = task.kv_head * args.group, heads = args.kv_heads * args.group;
  const auto* query = static_cast<const typename Type::Element*>(args.query) +
                      task.row * args.query_strides.sequence + first_head * args.query_strides.head;
  load_rows<Type>(query, args.query_strides.head, args.group, args.size, args.scale, task.queries,
                  args.padded);
  score_keys(task);
  for (int64_t head = 0; head < args.group; ++head) {
    softmax(task.scores_of(head), args.padded_keys);
  }
  add_values(task);
  auto* out = place<typename Type::Element>(args.out, heads, args.size, task.row, first_head);
  store_rows<Type>(task.sums, args.padded, args.group, args.size, 1.0f, out, args.size);
}

template <class Type>
void attend_all(const CachedAttention& args) {
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t i = 0; i < args.rows * args.kv_heads; ++i) attend<Type>(args, i);
}

}  // namespace

void cached_attention(const CachedAttention& args) {
  switch (args.type) {
    case ElementType::float32: return attend_all<Float32>(args);
    case ElementType::bfloat16: return attend_all<BFloat16>(args);
    case ElementType::float16: return attend_all<Float16>(args);
  }
}

}  // namespace RK_ISA
}  // namespace rk
