// Causal attention in rows of tokens that lie one behind the other, by tiles of queries and keys (Dao
// et al. 2022): the softmax of a query goes on from tile to tile of keys. Each task writes what no
// other does, so results do not depend on the number of threads.

#include <math.h>

#include "cpu/attention_tiles.h"

namespace rk {
namespace RK_ISA {
namespace {

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
  highest = highest_of(highest);
  // While every score is -inf, 0 stands for the maximum: the terms are 0, and NaN stays NaN.
  const Floats reference = highest == -INFINITY ? Floats{} : highest;
  Floats terms = {};
  for (int64_t key = 0; key < keys; key += kLanes) {
    const Floats e = exp_bounded(load_as<Floats>(scores + key) - reference);
    store<Float32>(scores + key, e);
    terms += e;
  }
  const float factor = max == -INFINITY ? 0.0f : exp_bounded(splat(max) - reference)[0];
  max = highest[0];
  sum = sum * factor + sum_of(terms)[0];
  return factor;
}

// first: of the tiles of keys, so nothing has been summed before.
template <bool kDiagonal>
void softmax_tile(const TilePair& pair, float* scores, SoftmaxState& state, float* out,
                  int64_t padded, bool first) {
  for (int64_t row = 0; row < pair.queries; ++row) {
    const int64_t keys = pair.keys_seen(row - row % kBlockRows);
    const float factor = softmax_row<kDiagonal>(scores + row * kTile, row, keys, state.max[row],
                                                state.sum[row]);
    if (!first && factor != 1.0f) multiply_row(out + row * padded, factor, padded);
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
void begin_queries(const RowAttentionShared& shared, int64_t token, int64_t queries,
                   int64_t query_head, const ForwardHead& head) {
  load_rows<Type>(place<Type>(shared.query, token, query_head), shared.query.token_stride, queries,
                  shared.size, shared.scale, head.query, shared.padded);
  for (int64_t i = 0; i < queries; ++i) {
    head.state->max[i] = -INFINITY;
    head.state->sum[i] = 0.0f;
  }
}

void forward_pair(const RowAttentionShared& shared, const TilePair& pair, bool first,
                  const float* key, const float* value, float* scores, const ForwardHead& head) {
  products_of_pairs(pair, shared.size, head.query, shared.padded, key, scores);
  if (pair.diagonal) {
    softmax_tile<true>(pair, scores, *head.state, head.out, shared.padded, first);
  } else {
    softmax_tile<false>(pair, scores, *head.state, head.out, shared.padded, first);
  }
  add_over_keys(pair, shared.size, scores, value, head.out, shared.padded, !first);
}

template <class Type>
void load_keys(const RowAttentionShared& shared, int64_t token, int64_t keys, int64_t kv_head,
               float* key, float* value) {
  load_transposed<Type>(place<Type>(shared.key, token, kv_head), shared.key.token_stride, keys,
                        shared.size, key, kTile);
  load_rows<Type>(place<Type>(shared.value, token, kv_head), shared.value.token_stride, keys,
                  shared.size, 1.0f, value, shared.padded);
}

template <class Type>
void finish_queries(const RowAttentionForward& args, int64_t token, int64_t queries,
                    int64_t query_head, const ForwardHead& head) {
  const RowAttentionShared& shared = args.shared;
  const int64_t heads = shared.heads, size = shared.size, padded = shared.padded;
  for (int64_t i = 0; i < queries; ++i) {
    const float sum = head.state->sum[i];
    multiply_row(head.out + i * padded, 1.0f / sum, size);
    args.log_sums[(token + i) * heads + query_head] = head.state->max[i] + logf(sum);
  }
  auto* out = place<typename Type::Element>(args.out, heads, size, token, query_head);
  store_rows<Type>(head.out, padded, queries, size, 1.0f, out, heads * size);
  if (args.exact) {
    float* exact = place<float>(args.exact, heads, size, token, query_head);
    store_rows<Float32>(head.out, padded, queries, size, 1.0f, exact, heads * size);
  }
}

template <class Type>
void forward_task(const RowAttentionForward& args, const RowAttentionTask& task) {
  const RowAttentionShared& shared = args.shared;
  const Scratch scratch = scratch_of_thread(shared);
  float *key = scratch.tile(0), *value = scratch.tile(1), *scores = scratch.tile(2);
  const int64_t queries = smaller(kTile, task.tokens - task.first_query);
  const int64_t token = task.first_token + task.first_query;
  const int64_t first_head = task.kv_head * shared.group;
  const int64_t together = heads_together(shared, task.first_query);
  int64_t loaded = -1;
  for (int64_t head = first_head; head < first_head + shared.group; head += together) {
    for (int64_t i = 0; i < together; ++i) {
      begin_queries<Type>(shared, token, queries, head + i, forward_head(scratch, i));
    }
    for (int64_t first = 0; first <= task.first_query; first += kTile) {
      const bool diagonal = first == task.first_query;
      const TilePair pair = {queries, smaller(kTile, task.tokens - first), diagonal};
      if (first != loaded) {
        load_keys<Type>(shared, task.first_token + first, pair.keys, task.kv_head, key, value);
      }
      loaded = first;
      for (int64_t i = 0; i < together; ++i) {
        forward_pair(shared, pair, first == 0, key, value, scores, forward_head(scratch, i));
      }
    }
    for (int64_t i = 0; i < together; ++i) {
      finish_queries<Type>(args, token, queries, head + i, forward_head(scratch, i));
    }
  }
}

template <class Type>
void forward(const RowAttentionForward& args) {
#pragma omp parallel for schedule(dynamic) num_threads(args.shared.threads)
  for (int64_t i = 0; i < args.shared.count; ++i) forward_task<Type>(args, args.shared.tasks[i]);
}

}  // namespace

void row_attention_forward(const RowAttentionForward& args) {
  switch (args.shared.type) {
    case ElementType::float32: return forward<Float32>(args);
    case ElementType::bfloat16: return forward<BFloat16>(args);
    case ElementType::float16: return forward<Float16>(args);
  }
}

}  // namespace RK_ISA
}  // namespace rk
