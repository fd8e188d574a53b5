// The gradients of `row_attention`: probabilities are computed again, tile by tile (Dao et al. 2022).
// A task has all query heads of a group and all tokens of a row, so it alone adds to the gradients of
// its keys and values, always in the same order.

#include "cpu/attention_tiles.h"

namespace rk {
namespace RK_ISA {
namespace {

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
  return sum_of(sum)[0];
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

template <class Type>
void store_query_gradients(const RowAttentionBackward& args, int64_t token, int64_t queries,
                           int64_t query_head, const BackwardHead& head) {
  const RowAttentionShared& shared = args.shared;
  store_rows<Type>(head.grad_query, shared.padded, queries, shared.size, shared.scale,
                   place<typename Type::Element>(args.grad_query, shared.heads, shared.size, token,
                                                 query_head),
                   shared.heads * shared.size);
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
  const int64_t together = heads_together(shared, first_query);
  int64_t loaded = -1;
  for (int64_t head = first_head; head < first_head + shared.group; head += together) {
    for (int64_t i = 0; i < together; ++i) {
      load_queries<Type>(args, token, queries, head + i, backward_head(scratch, i));
    }
    for (int64_t first = 0; first <= first_query; first += kTile) {
      const TilePair pair = {queries, smaller(kTile, task.tokens - first), first == first_query};
      if (first != loaded) {
        load_keys<Type>(shared, task.first_token + first, pair.keys, task.kv_head, tiles);
      }
      loaded = first;
      for (int64_t i = 0; i < together; ++i) {
        const bool first_queries = pair.diagonal && head + i == first_head;
        backward_pair(shared, pair, first == 0, first_queries, tiles, backward_head(scratch, i),
                      grad_key + first * shared.padded, grad_value + first * shared.padded);
      }
    }
    for (int64_t i = 0; i < together; ++i) {
      store_query_gradients<Type>(args, token, queries, head + i, backward_head(scratch, i));
    }
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

template <class Type>
void backward(const RowAttentionBackward& args) {
#pragma omp parallel for schedule(dynamic) num_threads(args.shared.threads)
  for (int64_t i = 0; i < args.shared.count; ++i) backward_task<Type>(args, args.shared.tasks[i]);
}

}  // namespace

void row_attention_backward(const RowAttentionBackward& args) {
  switch (args.shared.type) {
    case ElementType::float32: return backward<Float32>(args);
    case ElementType::bfloat16: return backward<BFloat16>(args);
    case ElementType::float16: return backward<Float16>(args);
  }
}

}  // namespace RK_ISA
}  // namespace rk
