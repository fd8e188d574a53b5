// Everything that follows a rollout, backwards in time: KL penalty, rewards, advantages, returns.
//
// The steps of a sequence are ranked from its last valid token on, holes left out (or steps too,
// with decay), and taken in chunks of kTile ranks. So neither padding nor holes change a bit. Where
// few sequences would leave the device idle, blocks share one: the first kernel sums up every chunk
// on its own, the second knows from these sums what follows its chunks. Chunks are the same either
// way, and so are the bits. (No product and sum are fused unless it says so: see setup.py.)

#include <limits.h>
#include <math.h>

#include "cuda/block.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "math/gae.h"
#include "math/kl.h"
#include "math/moments.h"

namespace rk {
namespace cuda {
namespace {

static_assert(kTile == kChunk, "the caller allocates scratch for each chunk");
static_assert(kItems * kWarps == kLanes, "a warp adds up one count of each item and warp");

// Where a sequence begins in the inputs, by their strides, and in the outputs, and its length.
struct Place {
  int64_t index, begin, columns;
  bool packed;
  int n;

  __device__ Place(const Sequences& sequences, int64_t index)
      : index(index), columns(sequences.columns), packed(sequences.cu_seqlens != nullptr) {
    begin = packed ? sequences.cu_seqlens[index] : index * columns;
    n = int(packed ? sequences.cu_seqlens[index + 1] - begin : columns);
  }
  template <class T>
  __device__ auto in(const T& series) const {
    return series.data + (packed ? begin : index * series.row_stride);
  }
  template <class T>
  __device__ T* out(T* data) const {
    return data + begin;
  }
  // The first of its tiles among those of all sequences.
  __device__ int64_t first_tile() const {
    return packed ? begin / kTile + index : index * ((columns + kTile - 1) / kTile);
  }
};

// What a block does: the ranks [first, end_rank) of a sequence.
struct Task {
  Place place;
  int first, end_rank;
  int end;  // with decay: one past the last valid place
};

// How far a block has read: the places from `end` on, and how many steps there are among them.
struct Cursor {
  int end, steps;
};

// Steps that were read, by rank modulo the size; the last rank of the chunk before stays too.
struct Steps {
  float reward[2 * kTile];
  float value[2 * kTile];
  int place[2 * kTile];  // -1: masked
  float returns[kTile];

  static __device__ int slot(int rank) { return rank % (2 * kTile); }
};

struct GivenRewards {
  static constexpr bool kWantMoments = false;
  static constexpr int kBlocks = 3;  // of a multiprocessor, as far as registers go
  Series rewards;

  struct Inputs {
    float reward;
  };
  __device__ Inputs read(const Task& task, int place) const {
    return {task.place.in(rewards)[place]};
  }
  __device__ float operator()(const Inputs& in, const Task&, int, int, bool) const {
    return in.reward;
  }
  __device__ void mask_out(const Task&, int) const {}
};

struct ShapedRewards {
  static constexpr bool kWantMoments = true;
  static constexpr int kBlocks = 2;
  const float* scores;
  Series logprobs, ref_logprobs;
  float kl_coef;
  KlEstimator estimator;
  float* rewards;
  float* kl;

  struct Inputs {
    float logprob, ref_logprob;
  };
  __device__ Inputs read(const Task& task, int place) const {
    return {task.place.in(logprobs)[place], task.place.in(ref_logprobs)[place]};
  }
  __device__ float operator()(const Inputs& in, const Task& task, int place, int rank,
                              bool write) const {
    const float r = in.logprob - in.ref_logprob;
    const bool exponential = estimator == KlEstimator::k3;
    const float penalty = kl_estimate(r, exponential ? expf(-r) : 0.0f, estimator);
    float reward = penalty * -kl_coef;
    if (rank == 0) reward += scores[task.place.index];
    if (write) {
      task.place.out(kl)[place] = penalty;
      task.place.out(rewards)[place] = reward;
    }
    return reward;
  }
  __device__ void mask_out(const Task& task, int place) const {
    task.place.out(kl)[place] = 0.0f;
    task.place.out(rewards)[place] = 0.0f;
  }
};

// One past the last valid place; 0 where there is none.
__device__ inline int end_of_valid(const uint8_t* mask, int n) {
  constexpr int kEach = 16;
  for (int end = n; end > 0; end -= kEach * kThreads) {
    Largest found = {0};
    for (int i = 0; i < kEach; ++i) {
      const int place = end - 1 - i * kThreads - int(threadIdx.x);
      if (place >= 0 && mask[place]) found.add({place + 1});
    }
    if (__syncthreads_or(found.number)) return block_total(found).number;
  }
  return 0;
}

// Where to begin reading, so that the step of this rank is among the first kTile that are read.
__device__ inline Cursor cursor_at(const Advantages& args, const Task& task, int rank) {
  if (rank == 0) return {task.place.n, 0};
  if (args.masked == MaskedStep::decay) {
    return rank < task.end ? Cursor{task.end - rank, rank} : Cursor{0, 0};
  }
  const int* counts = args.valid_counts + task.place.first_tile();
  int steps = 0;
  for (int tile = (task.place.n - 1) / kTile; tile >= 0; --tile) {
    if (steps + counts[tile] > rank) return {min((tile + 1) * kTile, task.place.n), steps};
    steps += counts[tile];
  }
  return {0, 0};
}

// Takes in the kTile places before the cursor: steps that are needed, and 0 to masked outputs.
template <class Rewards, bool kWrite>
__device__ inline void read_tile(const Advantages& args, const Rewards& rewards, const Task& task,
                                 bool odd, Cursor& cursor, Steps& steps) {
  // Two, so that one can be written while a slow warp still reads the other.
  __shared__ int counts[2][kLanes];
  const int lane = lane_index(), warp = warp_index();
  const uint8_t* mask = task.place.in(args.mask);
  const int last = cursor.end - 1 - int(threadIdx.x);
  bool valid[kItems];
  unsigned taken[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int place = last - i * kThreads;
    valid[i] = place >= 0 && mask[place] != 0;
    const bool decay = args.masked == MaskedStep::decay;
    taken[i] = __ballot_sync(kAllLanes, decay ? place >= 0 && place < task.end : valid[i]);
    if (lane == 0) counts[odd][i * kWarps + warp] = __popc(taken[i]);
  }
  // All reads are under way before the first is waited for.
  float values[kItems];
  typename Rewards::Inputs inputs[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    values[i] = valid[i] ? task.place.in(args.values)[last - i * kThreads] : 0.0f;
    inputs[i] = valid[i] ? rewards.read(task, last - i * kThreads) : typename Rewards::Inputs{};
  }
  __syncthreads();
  const int own = counts[odd][lane];
  int up_to = own;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, up_to, distance);
    up_to += lane >= distance ? before : 0;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int before = __shfl_sync(kAllLanes, up_to - own, i * kWarps + warp);
    const int place = last - i * kThreads;
    const int rank = cursor.steps + before + __popc(taken[i] & ((1u << lane) - 1u));
    const bool step = (taken[i] >> lane) & 1u;
    if (place < 0 || rank + 1 < task.first) continue;
    const bool write = kWrite && rank >= task.first && rank < task.end_rank;
    if (step) {
      const int slot = Steps::slot(rank);
      steps.reward[slot] = valid[i] ? rewards(inputs[i], task, place, rank, write) : 0.0f;
      steps.value[slot] = values[i];
      steps.place[slot] = valid[i] ? place : -1;
    }
    if (write && !valid[i]) {
      task.place.out(args.advantages)[place] = 0.0f;
      task.place.out(args.returns)[place] = 0.0f;
      rewards.mask_out(task, place);
    }
  }
  cursor.steps += __shfl_sync(kAllLanes, up_to, kLanes - 1);
  cursor.end = max(cursor.end - kTile, 0);
}

// Powers of c = gamma·lambda: what an advantage counts for some steps earlier.
struct Decay {
  float step;                 // c
  float lanes[5];             // those of 1, 2, 4, 8, 16 lanes
  float own_lane, own_warp;   // as many lanes, or warps, as stand before this one
  float warp, chunk;

  __device__ explicit Decay(float c) : step(c), own_lane(1.0f), own_warp(1.0f) {
    float power = c * c;
    power *= power;
    static_assert(kItems == 4, "a lane takes four steps");
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      lanes[i] = power;
      if (lane_index() >> i & 1) own_lane *= power;
      power *= power;
    }
    warp = power;
    chunk = 1.0f;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp_index()) own_warp *= warp;
      chunk *= warp;
    }
  }
};

// What one scan of a chunk gives: the advantage that follows the thread's steps, were nothing to
// follow the chunk; and that of the chunk's last step likewise.
struct Scanned {
  float before_thread, of_chunk;
};

__device__ inline Scanned scan(const float (&delta)[kItems], const Decay& decay,
                               float (&of_warps)[kWarps]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) sum = fmaf(decay.step, sum, delta[i]);
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const float before = __shfl_up_sync(kAllLanes, sum, 1 << i);
    if (lane_index() >= 1 << i) sum = fmaf(decay.lanes[i], before, sum);
  }
  float before_lane = __shfl_up_sync(kAllLanes, sum, 1);
  if (lane_index() == 0) before_lane = 0.0f;
  if (lane_index() == kLanes - 1) of_warps[warp_index()] = sum;
  __syncthreads();
  float before_warp = 0.0f, of_chunk = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp == warp_index()) before_warp = of_chunk;
    of_chunk = fmaf(decay.warp, of_chunk, of_warps[warp]);
  }
  return {fmaf(decay.own_lane, before_warp, before_lane), of_chunk};
}

// The advantages from what follows the chunk, which this then becomes for the next one.
__device__ inline void advance(const float (&delta)[kItems], const Decay& decay,
                               const Scanned& scanned, float& following,
                               float (&advantages)[kItems]) {
  const float power = decay.own_lane * decay.own_warp;
  float advantage = fmaf(power, following, scanned.before_thread);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    advantages[i] = advantage = fmaf(decay.step, advantage, delta[i]);
  }
  following = fmaf(decay.chunk, following, scanned.of_chunk);
}

struct Rates {
  float gamma;
  Decay policy, value;
  bool same;

  __device__ Rates(float gamma, float lambda, float value_lambda)
      : gamma(gamma),
        policy(gamma * lambda),
        value(gamma * value_lambda),
        same(lambda == value_lambda) {}
};

__device__ inline Rates rates_of(const GaeRates& rates, int64_t sequence) {
  if (!rates.per_sequence) return {rates.gamma, rates.lambda, rates.value_lambda};
  const float* own = rates.per_sequence + 3 * sequence;
  return {own[0], own[1], own[2]};
}

// A warp's share of a chunk, from the steps to the outputs, where neighbours stand together.
__device__ inline void store_warp(const Advantages& args, const Task& task, int start, int n,
                                  const Steps& steps) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int j = (warp_index() * kItems + i) * kLanes + lane_index();
    const int slot = Steps::slot(start + j);
    if (j >= n || steps.place[slot] < 0) continue;
    task.place.out(args.advantages)[steps.place[slot]] = steps.reward[slot];
    task.place.out(args.returns)[steps.place[slot]] = steps.returns[j];
  }
}

// The deltas of the thread's steps in the chunk that begins at rank `start`; 0 past its end.
__device__ inline void deltas(const Steps& steps, int start, int n, float bootstrap, float gamma,
                              float (&delta)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int j = int(threadIdx.x) * kItems + i, slot = Steps::slot(start + j);
    const float next =
        start + j == 0 ? bootstrap : steps.value[Steps::slot(start + j + 2 * kTile - 1)];
    delta[i] = j < n ? gae_delta(steps.reward[slot], next, steps.value[slot], gamma) : 0.0f;
  }
}

// The task of this block.
__device__ inline Task task_of(const Advantages& args) {
  Task task = {{args.sequences, int64_t(blockIdx.x / args.parts)}, 0, INT_MAX, 0};
  if (args.parts > 1) {
    const int chunks = (task.place.n + kTile - 1) / kTile;
    const int own = (chunks + args.parts - 1) / args.parts;
    task.first = int(blockIdx.x % args.parts) * own * kTile;
    task.end_rank = task.first + own * kTile;
  }
  if (args.masked == MaskedStep::decay) {
    task.end = end_of_valid(task.place.in(args.mask), task.place.n);
  }
  return task;
}

// What follows the steps that come next: for the advantages, and for those of the returns.
struct Following {
  float policy, value;
};

// From the sums of all chunks of the sequence before this one, which the first pass left.
__device__ inline Following following_of(const Rates& rates, int chunk, const float* chunk_sums) {
  Following following = {0.0f, 0.0f};
  for (int i = 0; i < chunk; ++i) {
    following.policy = fmaf(rates.policy.chunk, following.policy, chunk_sums[2 * i]);
    following.value = fmaf(rates.value.chunk, following.value, chunk_sums[2 * i + 1]);
  }
  return following;
}

// The moments of what a thread has seen.
struct Seen {
  Deviations deviations;
  int count;
};

// Puts the thread's results in the place of its steps.
__device__ inline void keep(const float (&advantages)[kItems], const float (&of_returns)[kItems],
                            int start, int n, Steps& steps, Seen& seen) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int j = int(threadIdx.x) * kItems + i, slot = Steps::slot(start + j);
    if (j >= n) break;
    steps.reward[slot] = advantages[i];
    steps.returns[j] = of_returns[i] + steps.value[slot];
    if (steps.place[slot] < 0) continue;
    seen.deviations.add(advantages[i], seen.count == 0);
    ++seen.count;
  }
}

// Kernel of both passes. kWrite false: the first, which leaves the sum of every chunk alone.
template <class Rewards, bool kWrite>
__global__ void __launch_bounds__(kThreads, Rewards::kBlocks)
    advantages_kernel(const Advantages args, const Rewards rewards, double* part_moments) {
  __shared__ Steps steps;
  __shared__ float of_warps[2][kWarps];
  const Task task = task_of(args);
  const Rates rates = rates_of(args.rates, task.place.index);
  const float bootstrap = args.bootstrap_values ? args.bootstrap_values[task.place.index] : 0.0f;
  float* chunk_sums = args.parts > 1 ? args.chunk_sums + 2 * task.place.first_tile() : nullptr;
  Cursor cursor = cursor_at(args, task, max(task.first - 1, 0));
  Following following = {0.0f, 0.0f};
  if (kWrite && cursor.end > 0) following = following_of(rates, task.first / kTile, chunk_sums);
  Seen seen = {};
  bool odd = false;
  for (int start = task.first; start < task.end_rank; start += kTile) {
    for (; cursor.steps < start + kTile && cursor.end > 0; odd = !odd) {
      read_tile<Rewards, kWrite>(args, rewards, task, odd, cursor, steps);
    }
    __syncthreads();
    const int n = min(cursor.steps - start, kTile);
    if (n <= 0) break;
    float delta[kItems], advantages[kItems], of_returns[kItems];
    deltas(steps, start, n, bootstrap, rates.gamma, delta);
    const Scanned scanned = scan(delta, rates.policy, of_warps[0]);
    const Scanned of_value = rates.same ? scanned : scan(delta, rates.value, of_warps[1]);
    if (kWrite) {
      advance(delta, rates.policy, scanned, following.policy, advantages);
      advance(delta, rates.value, of_value, following.value, of_returns);
      keep(advantages, of_returns, start, n, steps, seen);
      store_warp(args, task, start, n, steps);
    } else if (threadIdx.x == 0) {
      chunk_sums[2 * (start / kTile)] = scanned.of_chunk;
      chunk_sums[2 * (start / kTile) + 1] = of_value.of_chunk;
    }
  }
  if (Rewards::kWantMoments && kWrite) {
    const Moments own = block_total(seen.deviations.moments(seen.count));
    double* out = part_moments + kMoments * blockIdx.x;
    if (threadIdx.x == 0) out[0] = own.count, out[1] = own.mean, out[2] = own.squares;
  }
}

// How many valid places each tile of a sequence has, so that a block can begin in its middle.
__global__ void __launch_bounds__(kThreads) count_kernel(const Advantages args) {
  const Place place(args.sequences, int64_t(blockIdx.x / args.parts));
  const uint8_t* mask = place.in(args.mask);
  for (int tile = int(blockIdx.x % args.parts); tile * kTile < place.n; tile += args.parts) {
    Count valid = {0};
    for (int i = 0; i < kItems; ++i) {
      const int at = tile * kTile + i * kThreads + int(threadIdx.x);
      valid.number += at < place.n && mask[at];
    }
    valid = block_total(valid);
    if (threadIdx.x == 0) args.valid_counts[place.first_tile() + tile] = int(valid.number);
  }
}

template <class Rewards>
void run(const char* name, const Advantages& args, const Rewards& rewards, double* part_moments,
         Stream stream) {
  const int64_t blocks = args.sequences.count * args.parts;
  if (args.parts > 1) {
    launch("count of valid places", count_kernel, blocks, stream.handle, args);
    launch("chunks of advantages", advantages_kernel<Rewards, false>, blocks, stream.handle, args,
           rewards, nullptr);
  }
  launch(name, advantages_kernel<Rewards, true>, blocks, stream.handle, args, rewards,
         part_moments);
}

}  // namespace

void gae(const Gae& args, Stream stream) {
  run("gae", args.all, GivenRewards{args.rewards}, nullptr, stream);
}

void rollout(const Rollout& args, Stream stream) {
  const ShapedRewards rewards = {args.scores,       args.logprobs, args.ref_logprobs, args.kl_coef,
                                 args.kl_estimator, args.rewards,  args.kl};
  run("rollout", args.all, rewards, args.scratch, stream);
  combine_moments(args.scratch, args.all.sequences.count * args.all.parts, args.moments, stream);
}

}  // namespace cuda
}  // namespace rk
