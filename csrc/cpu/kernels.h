// What the bindings and the kernels agree on. Plain data only: this header is compiled for every
// instruction set, and nothing in it may generate code.
#pragma once

#include <stdint.h>

#include "math/kl.h"
#include "sequences.h"

namespace rk {

enum class ElementType : int { float32, bfloat16, float16 };

struct RowsIn {  // [rows, columns], columns contiguous, any row stride (in elements)
  const void* data;
  ElementType type;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
};

struct Temperature {
  const float* per_row;  // or null
  float number;          // used where per_row is null
};

// The target of a row whose target stands in another rank's part of the vocabulary.
constexpr int64_t kElsewhere = -(int64_t(1) << 62);

struct TokenLogprobsForward {
  RowsIn logits;
  const int64_t* targets;
  Temperature temperature;
  int64_t ignore_index;
  float* logprobs;
  float* entropy;  // or null
  float* normalization;  // [rows, 2]: max, and log of the sum of e^{(x - max)/tau}
  int threads;
};

struct TokenLogprobsBackward {
  RowsIn logits;
  const int64_t* targets;
  Temperature temperature;
  int64_t ignore_index;
  const float* normalization;  // as the forward left it
  const float* entropy;        // or null
  const float* grad_logprobs;  // [rows]
  const float* grad_entropy;   // or null
  void* grad;                  // the type of the logits; may be the logits themselves
  int64_t grad_row_stride;
  bool grad_is_fresh;          // large, and its memory has not been touched yet
  int threads;
};

struct Gae {
  Sequences sequences;
  Series rewards;
  Series values;
  Mask mask;
  const float* bootstrap_values;  // [count], or null
  GaeRates rates;
  MaskedStep masked;
  float* advantages;  // contiguous, like all outputs
  float* returns;
  int threads;
};

struct Rollout {
  Gae gae;              // its rewards are not read
  const float* scores;  // [count]
  Series logprobs;
  Series ref_logprobs;
  float kl_coef;
  KlEstimator kl_estimator;
  float* rewards;
  float* kl;
  double* moments;  // [kMoments], of the advantages
  double* scratch;  // [count, kMoments]
};

// Number, mean and sum of squared deviations of the valid places.
struct MomentsOf {
  Series x;
  Mask mask;
  int64_t rows, columns;
  double* moments;  // [kMoments]
  double* scratch;  // [rows, kMoments]
  int threads;
};

// GAE over the valid tokens of [rows, columns]; masked places get the next valid advantage (0 behind
// the last), and that plus the value as return. Then the advantages are whitened, all of them, by
// mean and variance (over n - 1) of the valid ones, if there are two at least.
struct WhitenedGae {
  Series rewards;
  Series values;
  Mask mask;                 // its data is not read where there is a wide one
  const int64_t* wide_mask;  // the same in eight bytes an element, or null
  int64_t rows, columns;
  float gamma, lambda;
  double eps;  // added to the variance
  float* advantages;  // contiguous, like the returns
  float* returns;
  double* moments;  // [kMoments], of the advantages
  double* scratch;  // [rows, kMoments + 1]
  int threads;
};

// (x - mean)·scale + shift at the valid places, 0 elsewhere.
struct Whiten {
  Series x;
  Mask mask;
  int64_t rows, columns;
  double mean, scale, shift;
  float* out;  // contiguous
  int threads;
};

constexpr int64_t kPpoChunk = 4096;  // tokens whose sums are taken together
constexpr int64_t kPpoScratch = 17;  // doubles that a chunk leaves for the final sum

struct PpoLoss {
  Series logprobs, old_logprobs, advantages;
  Series values, old_values, returns;  // all or none
  Series entropy;                      // or null, like the next two
  Series ref_logprobs;
  Series importance_weights;
  Mask mask;
  Sequences sequences;
  float clip_low, clip_high;  // the ratio's bounds
  float dual_clip;            // infinity: none
  float value_clip_range;     // infinity: none
  float value_coef;
  float entropy_coef;
  Aggregation aggregation;
  float kl_loss_coef;
  KlEstimator kl_loss_estimator;
  const float* normalizer;  // or null: derived from the mask
  float* loss;              // [1]
  float* stats;             // [12], in the order of PPO_STATS
  float* grad_logprobs;     // contiguous; the next two null where their input is
  float* grad_values;
  float* grad_entropy;
  double* scratch;  // kPpoScratch for every started chunk of tokens
  int threads;
};

struct Transpose {  // of [rows, columns], columns contiguous, to [columns, rows] without gaps
  const float* from;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  float* to;
  int threads;
};

constexpr int64_t kSquareSumPiece = 65536;  // numbers worth a thread's start

struct SquareSum {  // of numbers without gaps
  const void* data;
  ElementType type;
  int64_t count;
  double* scratch;  // one for every started piece
  int threads;
};

constexpr int64_t kAdamw8bitBlock = 256;  // numbers with a scale of their own

struct Adamw8bitSettings {
  float beta1, rest1;  // and 1 - beta1
  float beta2, rest2;
  float square_factor;  // of the squares' root: their correction
  float eps;
  float decay;  // of the weight
  float rate;   // of the change, with its sign and the mean's correction
};

// Numbers of a parameter from the beginning of a block on.
struct Adamw8bit {
  int64_t size;
  void* weights;         // bfloat16 with a remainder, else float32
  int8_t* remainder;     // or null
  const void* gradient;  // the type of the weights
  uint8_t *mean, *square;  // codes
  float *mean_scale, *square_scale;
  const int32_t* noise;  // 7, 7 and 8 bits in each
  Adamw8bitSettings settings;
};

// Outputs are [rows, columns] without gaps, of the inputs' type, as everywhere below.
struct SwigluForward {
  RowsIn gate, up;
  void* hidden;
  int threads;
};

struct SwigluBackward {
  RowsIn gate, up, grad_hidden;
  void *grad_gate, *grad_up;
  void* hidden;  // or null
  int threads;
};

constexpr int64_t kRmsNormChunk = 32;  // rows whose parts of the weight's gradient add up first

struct RmsNormForward {
  RowsIn x;
  const float* weight;
  double eps;
  void* out;
  float* rstd;  // [rows]: rsqrt(mean(x^2) + eps)
  int threads;
};

struct RmsNormBackward {
  RowsIn grad, x;
  const float* weight;
  const float* rstd;  // as the forward left it
  void* grad_x;
  float* grad_weight;  // or null
  float* scratch;      // zeros: a row for every started chunk; unused without grad_weight
  int threads;
};

struct HeadStrides {  // in elements
  int64_t sequence, head, step;
};

struct Rotary {
  int64_t sequences, heads, steps, width;
  const void* x;
  ElementType type;
  HeadStrides x_strides;
  const void *cos, *sin;
  ElementType table_type;  // float32, or that of x
  HeadStrides cos_strides, sin_strides;  // those of the heads are not read
  void* out;  // the type of x
  HeadStrides out_strides;
  bool adjoint;  // as the gradient needs it
  int threads;
};

constexpr int64_t kAttentionTile = 64;  // queries and keys that are taken together

// [tokens, heads, size], the numbers of a head contiguous; strides in elements.
struct HeadsIn {
  const void* data;
  int64_t token_stride, head_stride;
};

// The query heads that share a head of keys and values, in a row of tokens: all of its queries, or
// those of a tile.
struct RowAttentionTask {
  int64_t first_token, tokens;  // of the row
  int64_t first_query;          // of the tile, within the row; forward only
  int64_t kv_head;
};

// A tile of scratch is kAttentionTile rows of `padded` floats: whole vectors for every instruction
// set, and no fewer than kAttentionTile.
struct RowAttentionShared {
  HeadsIn query, key, value;
  ElementType type;  // of all inputs and outputs
  int64_t heads;     // of the queries
  int64_t group;     // query heads with the same keys and values
  int64_t size;      // of a head
  float scale;
  const RowAttentionTask* tasks;
  int64_t count;
  float* scratch;
  int64_t padded;
  int64_t scratch_stride;  // floats of a thread
  int threads;
};

constexpr int64_t kForwardTiles = 3;        // of scratch,
constexpr int64_t kForwardTilesOfHead = 3;  // and for each head of a group

struct RowAttentionForward {
  RowAttentionShared shared;
  void* out;        // [tokens, heads, size], contiguous, as the next two
  float* exact;     // out before it is rounded to 16 bits, or null
  float* log_sums;  // [tokens, heads]: of the exponentials of the scores
};

// Besides the tiles, two of `padded` floats for every token of the longest row.
constexpr int64_t kBackwardTiles = 5;
constexpr int64_t kBackwardTilesOfHead = 4;

struct RowAttentionBackward {
  RowAttentionShared shared;
  HeadsIn grad_out;
  const float* exact;  // float32 out, contiguous
  const float* log_sums;
  void *grad_query, *grad_key, *grad_value;  // contiguous
};

// One query a row, [rows, kv_heads · group, size], against its own keys, [rows, kv_heads, keys, size];
// the numbers of a head contiguous.
struct CachedAttention {
  int64_t rows, kv_heads, group, keys, size;
  const void* query;
  HeadStrides query_strides;  // that of the steps is not read
  const void *key, *value;
  HeadStrides key_strides, value_strides;
  ElementType type;  // of all inputs and the output
  Mask mask;         // [rows, keys], or null
  float scale;
  void* out;  // as the query, contiguous
  float* scratch;
  int64_t padded, padded_keys;  // size and keys in whole vectors of every instruction set
  int64_t scratch_stride;       // floats of a thread
  int threads;
};

struct Kernels {
  const char* name;
  void (*token_logprobs_forward)(const TokenLogprobsForward&);
  void (*token_logprobs_backward)(const TokenLogprobsBackward&);
  void (*gae)(const Gae&);
  void (*rollout)(const Rollout&);
  void (*moments)(const MomentsOf&);
  void (*whiten)(const Whiten&);
  void (*whitened_gae)(const WhitenedGae&);
  void (*ppo_loss)(const PpoLoss&);
  void (*transpose)(const Transpose&);
  double (*square_sum)(const SquareSum&);
  void (*adamw_8bit)(const Adamw8bit&);
  void (*swiglu_forward)(const SwigluForward&);
  void (*swiglu_backward)(const SwigluBackward&);
  void (*rms_norm_forward)(const RmsNormForward&);
  void (*rms_norm_backward)(const RmsNormBackward&);
  void (*rotary)(const Rotary&);
  void (*row_attention_forward)(const RowAttentionForward&);
  void (*row_attention_backward)(const RowAttentionBackward&);
  void (*cached_attention)(const CachedAttention&);
};

#define RK_DECLARE_KERNELS(isa)                                    \
  namespace isa {                                                  \
  void token_logprobs_forward(const TokenLogprobsForward& args);   \
  void token_logprobs_backward(const TokenLogprobsBackward& args); \
  void gae(const Gae& args);                                       \
  void rollout(const Rollout& args);                               \
  void moments(const MomentsOf& args);                             \
  void whiten(const Whiten& args);                                 \
  void whitened_gae(const WhitenedGae& args);                      \
  void ppo_loss(const PpoLoss& args);                              \
  void transpose(const Transpose& args);                           \
  double square_sum(const SquareSum& args);                        \
  void adamw_8bit(const Adamw8bit& args);                          \
  void swiglu_forward(const SwigluForward& args);                  \
  void swiglu_backward(const SwigluBackward& args);                \
  void rms_norm_forward(const RmsNormForward& args);               \
  void rms_norm_backward(const RmsNormBackward& args);             \
  void rotary(const Rotary& args);                                 \
  void row_attention_forward(const RowAttentionForward& args);     \
  void row_attention_backward(const RowAttentionBackward& args);   \
  void cached_attention(const CachedAttention& args);              \
  }

RK_DECLARE_KERNELS(baseline)
#ifdef RK_X86
RK_DECLARE_KERNELS(avx2)
RK_DECLARE_KERNELS(avx512)
#endif

}  // namespace rk
