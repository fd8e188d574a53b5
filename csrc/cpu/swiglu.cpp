// The gated unit of Llama-like feed-forward layers, silu(gate)·up, silu(x) = x·sigmoid(x): one read
// of the inputs and one write forward; backward, its gradients and the unit itself in one pass.

#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/vector_exp.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int64_t kPiece = 16384;  // numbers worth a thread's start

struct Sigmoid {
  Floats of_x, of_minus_x;  // they sum to 1; the difference would lose the smaller one's digits
};

// By e^{-|x|}, which cannot overflow.
RK_FORMULA Sigmoid sigmoid(Floats x) {
  const Floats below = bits_as<Floats>(bits_as<UInts>(x) | 0x80000000u);
  const Floats small = vector_exp_below_one(below);
  const Floats upper = 1.0f / (1.0f + small);
  const Floats lower = small * upper;
  return {x < 0.0f ? lower : upper, x < 0.0f ? upper : lower};
}

RK_FORMULA Floats hidden_of(Floats gate, Floats up) { return gate * sigmoid(gate).of_x * up; }

struct Gradients {
  Floats gate, up, hidden;
};

// silu'(x) = sigmoid(x)·(1 + x·sigmoid(-x))
RK_FORMULA Gradients gradients_of(Floats gate, Floats up, Floats grad) {
  const Sigmoid s = sigmoid(gate);
  const Floats silu = gate * s.of_x;
  const Floats slope = s.of_x * (1.0f + gate * s.of_minus_x);
  return {grad * up * slope, grad * silu, silu * up};
}

template <class Type>
void forward_piece(const typename Type::Element* gate, const typename Type::Element* up,
                   typename Type::Element* hidden, int64_t n) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair g = load_pair<Type>(gate + i), u = load_pair<Type>(up + i);
    store_pair<Type>(hidden + i, {hidden_of(g.first, u.first), hidden_of(g.second, u.second)});
  }
  for (; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    const Floats g = load_first<Type>(gate + i, count, 0.0f);
    const Floats u = load_first<Type>(up + i, count, 0.0f);
    store_first<Type>(hidden + i, count, hidden_of(g, u));
  }
}

template <class Type>
struct Outputs {
  typedef typename Type::Element Element;
  Element *gate, *up, *hidden;  // the last may be null

  RK_FORMULA void write(int64_t i, const Gradients& a, const Gradients& b) const {
    store_pair<Type>(gate + i, {a.gate, b.gate});
    store_pair<Type>(up + i, {a.up, b.up});
    if (hidden) store_pair<Type>(hidden + i, {a.hidden, b.hidden});
  }
  RK_FORMULA void write_first(int64_t i, int64_t count, const Gradients& a) const {
    store_first<Type>(gate + i, count, a.gate);
    store_first<Type>(up + i, count, a.up);
    if (hidden) store_first<Type>(hidden + i, count, a.hidden);
  }
};

template <class Type>
void backward_piece(const typename Type::Element* gate, const typename Type::Element* up,
                    const typename Type::Element* grad, const Outputs<Type>& out, int64_t n) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair g = load_pair<Type>(gate + i), u = load_pair<Type>(up + i);
    const Pair h = load_pair<Type>(grad + i);
    out.write(i, gradients_of(g.first, u.first, h.first),
              gradients_of(g.second, u.second, h.second));
  }
  for (; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    const Floats g = load_first<Type>(gate + i, count, 0.0f);
    const Floats u = load_first<Type>(up + i, count, 0.0f);
    const Floats h = load_first<Type>(grad + i, count, 0.0f);
    out.write_first(i, count, gradients_of(g, u, h));
  }
}

// Rows without gaps are one long row.
struct Grid {
  int64_t rows, columns;

  Grid(const RowsIn& like, bool gapless)
      : rows(gapless ? 1 : like.rows), columns(gapless ? like.rows * like.columns : like.columns) {}
};

bool has_gaps(const RowsIn& rows) { return rows.row_stride != rows.columns; }

template <class Work>
void in_pieces(const Grid& grid, int threads, const Work& work) {
  const int64_t useful = 1 + grid.rows * grid.columns / kPiece;
  const int64_t a_row = (grid.columns + kPiece - 1) / kPiece;
#pragma omp parallel for schedule(static) num_threads(useful < threads ? int(useful) : threads)
  for (int64_t piece = 0; piece < grid.rows * a_row; ++piece) {
    const int64_t start = piece % a_row * kPiece;
    const int64_t rest = grid.columns - start;
    work(piece / a_row, start, rest < kPiece ? rest : kPiece);
  }
}

template <class Type>
const typename Type::Element* place(const RowsIn& in, int64_t row, int64_t column) {
  return static_cast<const typename Type::Element*>(in.data) + row * in.row_stride + column;
}

template <class Type>
typename Type::Element* place(void* out, int64_t offset) {
  return out ? static_cast<typename Type::Element*>(out) + offset : nullptr;
}

template <class Type>
void forward(const SwigluForward& args) {
  const Grid grid(args.gate, !has_gaps(args.gate) && !has_gaps(args.up));
  in_pieces(grid, args.threads, [&](int64_t row, int64_t start, int64_t count) {
    forward_piece<Type>(place<Type>(args.gate, row, start), place<Type>(args.up, row, start),
                        place<Type>(args.hidden, row * grid.columns + start), count);
  });
}

template <class Type>
void backward(const SwigluBackward& args) {
  const bool gaps = has_gaps(args.gate) || has_gaps(args.up) || has_gaps(args.grad_hidden);
  const Grid grid(args.gate, !gaps);
  in_pieces(grid, args.threads, [&](int64_t row, int64_t start, int64_t count) {
    const int64_t offset = row * grid.columns + start;
    const Outputs<Type> out = {place<Type>(args.grad_gate, offset),
                               place<Type>(args.grad_up, offset),
                               place<Type>(args.hidden, offset)};
    backward_piece<Type>(place<Type>(args.gate, row, start), place<Type>(args.up, row, start),
                         place<Type>(args.grad_hidden, row, start), out, count);
  });
}

}  // namespace

void swiglu_forward(const SwigluForward& args) {
  switch (args.gate.type) {
    case ElementType::float32: return forward<Float32>(args);
    case ElementType::bfloat16: return forward<BFloat16>(args);
    case ElementType::float16: return forward<Float16>(args);
  }
}

void swiglu_backward(const SwigluBackward& args) {
  switch (args.gate.type) {
    case ElementType::float32: return backward<Float32>(args);
    case ElementType::bfloat16: return backward<BFloat16>(args);
    case ElementType::float16: return backward<Float16>(args);
  }
}

}  // namespace RK_ISA
}  // namespace rk
