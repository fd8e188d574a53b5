// What the two directions of `row_attention` share: tiles of queries against tiles of keys of a row.
// Of a tile on the diagonal only the blocks are computed that hold a key not after a query.
#pragma once

#include <omp.h>

#include "cpu/float_tiles.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/small_product.h"
#include "cpu/vector_exp.h"

namespace rk {
namespace RK_ISA {

constexpr int64_t kTile = kAttentionTile;
constexpr float kLog2OfE = 1.44269504f;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- maxima and sums over the lanes, in every lane ----

template <int kBy = kLanes / 2>
RK_FORMULA Floats highest_of(Floats x) {
  if constexpr (kBy == 0) {
    return x;
  } else {
    return highest_of<kBy / 2>(larger(shifted<kBy>(x, x), x));
  }
}

template <int kBy = kLanes / 2>
RK_FORMULA Floats sum_of(Floats x) {
  if constexpr (kBy == 0) {
    return x;
  } else {
    return sum_of<kBy / 2>(shifted<kBy>(x, x) + x);
  }
}

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

inline Scratch scratch_of_thread(const RowAttentionShared& shared) {
  return {shared.scratch + omp_get_thread_num() * shared.scratch_stride, shared.padded};
}

// Of the heads of a group that are taken through the tiles of keys together, so that these are loaded
// once. Where there is but one tile, it stays loaded, and the heads use the same scratch in turn.
inline int64_t heads_together(const RowAttentionShared& shared, int64_t first_query) {
  return first_query == 0 ? 1 : shared.group;
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
inline void products_of_pairs(const TilePair& pair, int64_t size, const float* left,
                              int64_t left_stride, const float* right, float* scores) {
  for (int64_t row = 0; row < pair.queries; row += kBlockRows) {
    multiply_rows(block_rows(row, pair.queries), size, pair.keys_seen(row),
                  {left + row * left_stride, left_stride, 1}, {right, kTile},
                  {scores + row * kTile, kTile, false});
  }
}

// sums[query] += Σ over keys of weights[query][key]·vectors[key].
inline void add_over_keys(const TilePair& pair, int64_t size, const float* weights,
                          const float* vectors, float* sums, int64_t stride, bool add) {
  for (int64_t row = 0; row < pair.queries; row += kBlockRows) {
    multiply_rows(block_rows(row, pair.queries), pair.keys_seen(row), size,
                  {weights + row * kTile, kTile, 1}, {vectors, stride},
                  {sums + row * stride, stride, add});
  }
}

// sums[key] += Σ over queries of weights[query][key]·vectors[query].
inline void add_over_queries(const TilePair& pair, int64_t size, const float* weights,
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

RK_FORMULA void multiply_row(float* x, float factor, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    store<Float32>(x + i, factor * load_as<Floats>(x + i));
  }
}

}  // namespace RK_ISA
}  // namespace rk
