// Causal attention in rows of tokens that lie one behind the other, by tiles of queries and keys (Dao
// et al. 2022). Each task writes what no other does, so results do not depend on the number of
// threads. Of a tile on the diagonal only the blocks are computed that hold a key not after a query.

#include <math.h>
#include <omp.h>

#include "cpu/float_tiles.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/small_product.h"
#include "cpu/vector_exp.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int64_t kTile = kAttentionTile;
constexpr float kLog2OfE = 1.44269504f;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- sums and maxima over the lanes, in lane 0 ----

template <int kBy>
RK_FORMULA Floats highest_first(Floats x) {
  if constexpr (kBy == 0) {
    return x;
  } else {
    return highest_first<kBy / 2>(larger(shifted<kBy>(x, x), x));
  }
}

template <int kBy>
RK_FORMULA Floats sum_first(Floats x) {
  if constexpr (kBy == 0) {
    return x;
  } else {
    return sum_first<kBy / 2>(shifted<kBy>(x, x) + x);
  }
}

RK_FORMULA float highest_of(Floats x) { return highest_first<kLanes / 2>(x)[0]; }
RK_FORMULA float sum_of(Floats x) { return sum_first<kLanes / 2>(x)[0]; }

// ---- places ----

template <class Type>
const typename Type::Element* place(const HeadsIn& x, int64_t token, int64_t head) {
  return static_cast<const typename Type::Element*>(x.data) + token * x.token_stride +
         head * x.head_stride;
}

// In a contiguous [tokens, heads, size].
template <class T>
T* place(void* x, int64_t heads, int64_t size, int64_t token, int64_t head) {
  return static_cast<T*>(x) + (token * heads + head) * size;
}

// Tiles of one thread, one behind the other, then what does not fit into tiles.
struct Scratch {
  float* first;
  int64_t padded;

  float* tile(int64_t number) const { return first + number * kTile * padded; }
};

Scratch scratch_of_thread(const RowAttentionShared& shared) {
  return {shared.scratch + omp_get_thread_num() * shared.scratch_stride, shared.padded};
}

// ---- tiles ----

// Some queries against some keys of the same row. On the diagonal they are the same tokens.
struct TilePair {
  int64_t queries, keys;
  bool diagonal;

  // Keys that some query of the block beginning at `row` sees.
  int64_t keys_seen(int64_t row) const {
    return diagonal ? smaller(row + kBlockRows, keys) : keys;
  }
  // The first query that sees a key from `key` on.
  int64_t first_seeing(int64_t key) const { return diagonal ? key : 0; }
};

RK_FORMULA int block_rows(int64_t row, int64_t rows) {
  return int(smaller(kBlockRows, rows - row));
}

// scores[query][key] = left[query]·right[.][key], for the keys that are seen.
void products_of_pairs(const TilePair& pair, int64_t size, const float* left, int64_t left_stride,
                       const float* right, float* scores) {
  for (int64_t row = 0; row < pair.queries; row += kBlockRows) {
    multiply_rows(block_rows(row, pair.queries), size, pair.keys_seen(row),
                  {left + row * left_stride, left_stride, 1}, {right, kTile},
                  {scores + row * kTile, kTile, false});
  }
}

// sums[query] += Σ over keys of weights[query][key]·vectors[key].
void add_over_keys(const TilePair& pair, int64_t size, const float* weights, const float* vectors,
                   float* sums, int64_t stride, bool add) {
  for (int64_t row = 0; row < pair.queries; row += kBlockRows) {
    multiply_rows(block_rows(row, pair.queries), pair.keys_seen(row), size,
                  {weights + row * kTile, kTile, 1}, {vectors, stride},
                  {sums + row * stride, stride, add});
  }
}

// sums[key] += Σ over queries of weights[query][key]·vectors[query].
void add_over_queries(const TilePair& pair, int64_t size, const float* weights,
                      const float* vectors, float* sums, int64_t stride, bool add) {
  for (int64_t key = 0; key < pair.keys; key += kBlockRows) {
    const int64_t query = pair.first_seeing(key);
    multiply_rows(block_rows(key, pair.keys), pair.queries - query, size,
                  {weights + query * kTile + key, 1, kTile}, {vectors + query * stride, stride},
                  {sums + key * stride, stride, add});
  }
}

RK_FORMULA Ints lane_numbers() {
  Ints numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

// Lanes of the keys from `key` on that query `row` of a diagonal tile sees: all bits, or none.
RK_FORMULA Ints seen(int64_t row, int64_t key) { return lane_numbers() <= int32_t(row - key); }

RK_FORMULA Floats exp_bounded(Floats x) {  // for x <= 0
  return exp2_bounded(bounded_exponent(x * kLog2OfE));
}

// ---- forward ----

struct SoftmaxState {  // of each query of a tile
  float max[kTile];
  float sum[kTile];
};

// A row of scores becomes e^(score - max), 0 where the key is not seen. Returns by how much what was
// summed before shrinks.
template <bool kDiagonal>
float softmax_row(float* scores, int64_t row, int64_t keys, float& max, float& sum) {
  Floats highest = splat(max);
  for (int64_t key = 0; key < keys; key += kLanes) {
    Floats x = load_as<Floats>(scores + key);
    if (kDiagonal) {
      x = seen(row, key) ? x : splat(-INFINITY);
      store<Float32>(scores + key, x);
    }
    highest = larger(highest, x);
  }
  const float new_max = highest_of(highest);
  // While every score is -inf, 0 stands for the maximum: the terms are 0, and NaN stays NaN.
  const Floats reference = splat(new_max == -INFINITY ? 0.0f : new_max);
  Floats terms = {};
  for (int64_t key = 0; key < keys; key += kLanes) {
    const Floats e = exp_bounded(load_as<Floats>(scores + key) - reference);
    store<Float32>(scores + key, e);
    terms += e;
  }
  const float factor = exp_bounded(splat(max) - reference)[0];
  max = new_max;
  sum = sum * factor + sum_of(terms);
  return factor;
}

template <bool kDiagonal>
void softmax_tile(const TilePair& pair, float* scores, SoftmaxState& state, float* out,
                  int64_t padded) {
  for (int64_t row = 0; row < pair.queries; ++row) {
    const int64_t keys = pair.keys_seen(row - row % kBlockRows);
    const float factor = softmax_row<kDiagonal>(scores + row * kTile, row, keys, state.max[row],
                                                state.sum[row]);
    if (factor == 1.0f) continue;
    for (int64_t i = 0; i < padded; i += kLanes) {
      float* x = out + row * padded + i;
      store<Float32>(x, factor * load_as<Floats>(x));
    }
  }
}

// What a query head needs in the forward, by its number in the group.
struct ForwardHead {
  float *query, *out;
  SoftmaxState* state;
};

ForwardHead forward_head(const Scratch& scratch, int64_t head) {
  const int64_t tile = kForwardTiles + kForwardTilesOfHead * head;
  return {scratch.tile(tile), scratch.tile(tile + 1),
          reinterpret_cast<SoftmaxState*>(scratch.tile(tile + 2))};
}

template <class Type>
void begin_queries(const RowAttentionShared& shared, const RowAttentionTask& task, int64_t queries,
                   const Scratch& scratch) {
  for (int64_t g = 0; g < shared.group; ++g) {
    const ForwardHead head = forward_head(scratch, g);
    const auto* query = place<Type>(shared.query, task.first_token + task.first_query,
                                    task.kv_head * shared.group + g);
    load_rows<Type>(query, shared.query.token_stride, queries, shared.size, shared.scale,
                    head.query, shared.padded);
    for (int64_t i = 0; i < queries; ++i) {
      head.state->max[i] = -INFINITY;
      head.state->sum[i] = 0.0f;
    }
  }
}

void forward_pair(const RowAttentionShared& shared, const TilePair& pair, bool first,
                  const float* key, const float* value, float* scores, const ForwardHead& head) {
  products_of_pairs(pair, shared.size, head.query, shared.padded, key, scores);
  // Nothing has been summed before the first tile of keys.
  const int64_t shrinking = first ? 0 : shared.padded;
  if (pair.diagonal) {
    softmax_tile<true>(pair, scores, *head.state, head.out, shrinking);
  } else {
    softmax_tile<false>(pair, scores, *head.state, head.out, shrinking);
  }
  add_over_keys(pair, shared.size, scores, value, head.out, shared.padded, !first);
}

template <class Type>
void finish_query(const RowAttentionForward& args, const ForwardHead& head, int64_t i,
                  int64_t token, int64_t query_head) {
  const RowAttentionShared& shared = args.shared;
  const float sum = head.state->sum[i];
  const float* out = head.out + i * shared.padded;
  const int64_t heads = shared.heads, size = shared.size;
  store_rows<Type>(out, 0, 1, size, 1.0f / sum,
                   place<typename Type::Element>(args.out, heads, size, token, query_head), 0);
  if (args.exact) {
    store_rows<Float32>(out, 0, 1, size, 1.0f / sum,
                        place<float>(args.exact, heads, size, token, query_head), 0);
  }
  args.log_sums[token * heads + query_head] = head.state->max[i] + logf(sum);
}

template <class Type>
void forward_task(const RowAttentionForward& args, const RowAttentionTask& task) {
  const RowAttentionShared& shared = args.shared;
  const Scratch scratch = scratch_of_thread(shared);
  float *key = scratch.tile(0), *value = scratch.tile(1), *scores = scratch.tile(2);
  const int64_t queries = smaller(kTile, task.tokens - task.first_query);
  begin_queries<Type>(shared, task, queries, scratch);
  for (int64_t first = 0; first <= task.first_query; first += kTile) {
    const int64_t token = task.first_token + first;
    const TilePair pair = {queries, smaller(kTile, task.tokens - first), first == task.first_query};
    load_transposed<Type>(place<Type>(shared.key, token, task.kv_head), shared.key.token_stride,
                          pair.keys, shared.size, key, kTile);
    load_rows<Type>(place<Type>(shared.value, token, task.kv_head), shared.value.token_stride,
                    pair.keys, shared.size, 1.0f, value, shared.padded);
    for (int64_t g = 0; g < shared.group; ++g) {
      forward_pair(shared, pair, first == 0, key, value, scores, forward_head(scratch, g));
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t g = 0; g < shared.group; ++g) {
      finish_query<Type>(args, forward_head(scratch, g), i, task.first_token + task.first_query + i,
                         task.kv_head * shared.group + g);
    }
  }
}

// ---- backward ----

struct BackwardHead {
  float *query, *grad_out, *grad_query;
  float *log_sums, *dots;  // of each query; dots: of out and its gradient
};

BackwardHead backward_head(const Scratch& scratch, int64_t head) {
  const int64_t tile = kBackwardTiles + kBackwardTilesOfHead * head;
  float* numbers = scratch.tile(tile + 3);
  return {scratch.tile(tile), scratch.tile(tile + 1), scratch.tile(tile + 2), numbers,
          numbers + kTile};
}

float dot_product(const float* a, const float* b, int64_t size) {
  Floats sum = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    sum += load_at_most<Float32>(a + i, size - i) * load_at_most<Float32>(b + i, size - i);
  }
  return sum_of(sum);
}

template <class Type>
void load_queries(const RowAttentionBackward& args, int64_t token, int64_t queries,
                  int64_t query_head, const BackwardHead& head) {
  const RowAttentionShared& shared = args.shared;
  const int64_t size = shared.size, padded = shared.padded;
  load_rows<Type>(place<Type>(shared.query, token, query_head), shared.query.token_stride, queries,
                  size, shared.scale, head.query, padded);
  load_rows<Type>(place<Type>(args.grad_out, token, query_head), args.grad_out.token_stride,
                  queries, size, 1.0f, head.grad_out, padded);
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t at = (token + i) * shared.heads + query_head;
    head.log_sums[i] = args.log_sums[at];
    head.dots[i] = dot_product(args.exact + at * size, head.grad_out + i * padded, size);
  }
}

// From scores and products of grad_out with values: probabilities, and the gradients of the scores.
template <bool kDiagonal>
void score_gradients(const TilePair& pair, const BackwardHead& head, float* scores, float* grads) {
  for (int64_t row = 0; row < pair.queries; ++row) {
    const int64_t keys = pair.keys_seen(row - row % kBlockRows);
    const Floats log_sum = splat(head.log_sums[row]), dot = splat(head.dots[row]);
    for (int64_t key = 0; key < keys; key += kLanes) {
      float* score = scores + row * kTile + key;
      float* grad = grads + row * kTile + key;
      Floats p = exp_bounded(load_as<Floats>(score) - log_sum);
      Floats g = p * (load_as<Floats>(grad) - dot);
      if (kDiagonal) {
        p = seen(row, key) ? p : Floats{};
        g = seen(row, key) ? g : Floats{};
      }
      store<Float32>(score, p);
      store<Float32>(grad, g);
    }
  }
}

// Keys and values of a tile as the products need them, and scratch for the pairs.
struct BackwardTiles {
  float *key, *key_transposed, *value_transposed, *scores, *grads;
};

// first: of those that add to the gradients of these keys.
void backward_pair(const RowAttentionShared& shared, const TilePair& pair, bool first_keys,
                   bool first_queries, const BackwardTiles& tiles, const BackwardHead& head,
                   float* grad_key, float* grad_value) {
  const int64_t size = shared.size, padded = shared.padded;
  products_of_pairs(pair, size, head.query, padded, tiles.key_transposed, tiles.scores);
  products_of_pairs(pair, size, head.grad_out, padded, tiles.value_transposed, tiles.grads);
  if (pair.diagonal) {
    score_gradients<true>(pair, head, tiles.scores, tiles.grads);
  } else {
    score_gradients<false>(pair, head, tiles.scores, tiles.grads);
  }
  add_over_keys(pair, size, tiles.grads, tiles.key, head.grad_query, padded, !first_keys);
  add_over_queries(pair, size, tiles.grads, head.query, grad_key, padded, !first_queries);
  add_over_queries(pair, size, tiles.scores, head.grad_out, grad_value, padded, !first_queries);
}

template <class Type>
void load_keys(const RowAttentionShared& shared, int64_t token, int64_t keys, int64_t kv_head,
               const BackwardTiles& tiles) {
  const auto* key = place<Type>(shared.key, token, kv_head);
  const int64_t size = shared.size;
  load_rows<Type>(key, shared.key.token_stride, keys, size, 1.0f, tiles.key, shared.padded);
  load_transposed<Type>(key, shared.key.token_stride, keys, size, tiles.key_transposed, kTile);
  load_transposed<Type>(place<Type>(shared.value, token, kv_head), shared.value.token_stride, keys,
                        size, tiles.value_transposed, kTile);
}

// The queries of a tile against all keys that they see.
template <class Type>
void backward_queries(const RowAttentionBackward& args, const RowAttentionTask& task,
                      int64_t first_query, const Scratch& scratch, float* grad_key,
                      float* grad_value) {
  const RowAttentionShared& shared = args.shared;
  const BackwardTiles tiles = {scratch.tile(0), scratch.tile(1), scratch.tile(2), scratch.tile(3),
                               scratch.tile(4)};
  const int64_t queries = smaller(kTile, task.tokens - first_query);
  const int64_t first_head = task.kv_head * shared.group;
  const int64_t token = task.first_token + first_query;
  for (int64_t g = 0; g < shared.group; ++g) {
    load_queries<Type>(args, token, queries, first_head + g, backward_head(scratch, g));
  }
  for (int64_t first = 0; first <= first_query; first += kTile) {
    const TilePair pair = {queries, smaller(kTile, task.tokens - first), first == first_query};
    load_keys<Type>(shared, task.first_token + first, pair.keys, task.kv_head, tiles);
    for (int64_t g = 0; g < shared.group; ++g) {
      backward_pair(shared, pair, first == 0, pair.diagonal && g == 0, tiles,
                    backward_head(scratch, g), grad_key + first * shared.padded,
                    grad_value + first * shared.padded);
    }
  }
  for (int64_t g = 0; g < shared.group; ++g) {
    auto* grad_query = place<typename Type::Element>(args.grad_query, shared.heads, shared.size,
                                                     token, first_head + g);
    store_rows<Type>(backward_head(scratch, g).grad_query, shared.padded, queries, shared.size,
                     shared.scale, grad_query, shared.heads * shared.size);
  }
}

template <class Type>
void backward_task(const RowAttentionBackward& args, const RowAttentionTask& task) {
  const RowAttentionShared& shared = args.shared;
  const Scratch scratch = scratch_of_thread(shared);
  float* grad_key = scratch.tile(kBackwardTiles + kBackwardTilesOfHead * shared.group);
  float* grad_value = grad_key + task.tokens * shared.padded;
  for (int64_t query = 0; query < task.tokens; query += kTile) {
    backward_queries<Type>(args, task, query, scratch, grad_key, grad_value);
  }
  const int64_t heads = shared.heads / shared.group;
  const auto store_all = [&](const float* grad, void* to) {
    store_rows<Type>(grad, shared.padded, task.tokens, shared.size, 1.0f,
                     place<typename Type::Element>(to, heads, shared.size, task.first_token,
                                                   task.kv_head),
                     heads * shared.size);
  };
  store_all(grad_key, args.grad_key);
  store_all(grad_value, args.grad_value);
}

// ---- all tasks ----

template <class Type>
void forward(const RowAttentionForward& args) {
#pragma omp parallel for schedule(dynamic) num_threads(args.shared.threads)
  for (int64_t i = 0; i < args.shared.count; ++i) forward_task<Type>(args, args.shared.tasks[i]);
}

template <class Type>
void backward(const RowAttentionBackward& args) {
#pragma omp parallel for schedule(dynamic) num_threads(args.shared.threads)
  for (int64_t i = 0; i < args.shared.count; ++i) backward_task<Type>(args, args.shared.tasks[i]);
}

}  // namespace

void row_attention_forward(const RowAttentionForward& args) {
  switch (args.shared.type) {
    case ElementType::float32: return forward<Float32>(args);
    case ElementType::bfloat16: return forward<BFloat16>(args);
    case ElementType::float16: return forward<Float16>(args);
  }
}

void row_attention_backward(const RowAttentionBackward& args) {
  switch (args.shared.type) {
    case ElementType::float32: return backward<Float32>(args);
    case ElementType::bfloat16: return backward<BFloat16>(args);
    case ElementType::float16: return backward<Float16>(args);
  }
}

}  // namespace RK_ISA
}  // namespace rk
