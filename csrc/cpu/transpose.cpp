// A matrix's transpose. PyTorch's copy writes, or reads, a cache line for every number of it.

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int64_t kSide = 16;  // numbers in a cache line

struct Block {
  const float* from;
  float* to;
  int64_t rows, columns;
};

// Small enough for the first cache both as it is read and as it is written.
RK_FORMULA void transpose_block(const Block& block, int64_t from_stride, int64_t to_stride) {
  for (int64_t column = 0; column < block.columns; ++column) {
    float* to = block.to + column * to_stride;
    const float* from = block.from + column;
    for (int64_t row = 0; row < block.rows; ++row) to[row] = from[row * from_stride];
  }
}

}  // namespace

void transpose(const Transpose& args) {
  const int64_t bands = (args.columns + kSide - 1) / kSide;
#pragma omp parallel for schedule(static) num_threads(args.threads)
  for (int64_t band = 0; band < bands; ++band) {
    const int64_t column = band * kSide;
    const int64_t columns = args.columns - column < kSide ? args.columns - column : kSide;
    for (int64_t row = 0; row < args.rows; row += kSide) {
      const int64_t rows = args.rows - row < kSide ? args.rows - row : kSide;
      const float* from = args.from + row * args.row_stride + column;
      transpose_block({from, args.to + column * args.rows + row, rows, columns}, args.row_stride,
                      args.rows);
    }
  }
}

}  // namespace RK_ISA
}  // namespace rk
