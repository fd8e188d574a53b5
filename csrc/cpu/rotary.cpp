// Rotary embedding of heads, out = x·cos + rotate_half(x)·sin, in one pass: the two halves of a head
// are read together. A position's cosines and sines serve all its heads from the cache.

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace rk {
namespace RK_ISA {
namespace {

// A step of one sequence: rows of its heads, and the factors of both halves.
template <class Type, class Table>
struct Step {
  const typename Type::Element* x;
  typename Type::Element* out;
  const typename Table::Element *cos, *sin;
  int64_t half;
};

// Forward each half is turned by its own sine; backward, in the adjoint, by the other half's with
// the opposite sign.
template <class Type, class Table, bool kAdjoint>
RK_FORMULA void rotate(const Step<Type, Table>& step, int64_t i, int64_t count) {
  const int64_t j = i + step.half;
  const Floats lower = load_up_to<Type>(step.x + i, count);
  const Floats upper = load_up_to<Type>(step.x + j, count);
  const Floats cos_lower = load_up_to<Table>(step.cos + i, count);
  const Floats cos_upper = load_up_to<Table>(step.cos + j, count);
  const Floats sin_lower = load_up_to<Table>(step.sin + i, count);
  const Floats sin_upper = load_up_to<Table>(step.sin + j, count);
  if (kAdjoint) {
    store_up_to<Type>(step.out + i, count, lower * cos_lower + upper * sin_upper);
    store_up_to<Type>(step.out + j, count, upper * cos_upper - lower * sin_lower);
  } else {
    store_up_to<Type>(step.out + i, count, lower * cos_lower - upper * sin_lower);
    store_up_to<Type>(step.out + j, count, upper * cos_upper + lower * sin_upper);
  }
}

template <class Type, class Table, bool kAdjoint>
void rotate_heads(Step<Type, Table> step, const Rotary& args) {
  for (int64_t head = 0; head < args.heads; ++head) {
    int64_t i = 0;
    for (; i + kLanes <= step.half; i += kLanes) {
      rotate<Type, Table, kAdjoint>(step, i, kLanes);
    }
    if (i < step.half) rotate<Type, Table, kAdjoint>(step, i, step.half - i);
    step.x += args.x_strides.head;
    step.out += args.out_strides.head;
  }
}

// Threads are worth their start only from some amount of work on.
int threads_for(const Rotary& args) {
  const int64_t useful = 1 + args.sequences * args.heads * args.steps * args.width / 32768;
  return useful < args.threads ? int(useful) : args.threads;
}

template <class Type, class Table, bool kAdjoint>
void rotate_all(const Rotary& args) {
  const auto* x = static_cast<const typename Type::Element*>(args.x);
  auto* out = static_cast<typename Type::Element*>(args.out);
  const auto* cos = static_cast<const typename Table::Element*>(args.cos);
  const auto* sin = static_cast<const typename Table::Element*>(args.sin);
#pragma omp parallel for schedule(static) num_threads(threads_for(args))
  for (int64_t i = 0; i < args.sequences * args.steps; ++i) {
    const int64_t sequence = i / args.steps, step = i % args.steps;
    const Step<Type, Table> at = {
        x + sequence * args.x_strides.sequence + step * args.x_strides.step,
        out + sequence * args.out_strides.sequence + step * args.out_strides.step,
        cos + sequence * args.cos_strides.sequence + step * args.cos_strides.step,
        sin + sequence * args.sin_strides.sequence + step * args.sin_strides.step,
        args.width / 2,
    };
    rotate_heads<Type, Table, kAdjoint>(at, args);
  }
}

template <class Type, class Table>
void rotate_either_way(const Rotary& args) {
  args.adjoint ? rotate_all<Type, Table, true>(args) : rotate_all<Type, Table, false>(args);
}

// The table is of float32 or of the type of x.
template <class Type>
void rotate_by(const Rotary& args) {
  args.table_type == ElementType::float32 ? rotate_either_way<Type, Float32>(args)
                                          : rotate_either_way<Type, Type>(args);
}

}  // namespace

void rotary(const Rotary& args) {
  switch (args.type) {
    case ElementType::float32: return rotate_by<Float32>(args);
    case ElementType::bfloat16: return rotate_by<BFloat16>(args);
    case ElementType::float16: return rotate_by<Float16>(args);
  }
}

}  // namespace RK_ISA
}  // namespace rk
