// Kernels that go over all places of a grid, whatever sequence they stand in.
#pragma once

#include <stdint.h>

#include "cuda/block.h"
#include "cuda/kernels.h"

namespace rk {
namespace cuda {

// One place of a [rows, columns] grid.
struct Cell {
  int64_t row, column;

  // A division of 64 bits takes tens of instructions more than one of 32.
  __device__ Cell(int64_t place, int64_t columns) {
    const bool small = ((place | columns) >> 32) == 0;
    row = small ? int64_t(uint32_t(place) / uint32_t(columns)) : place / columns;
    column = place - row * columns;
  }
  template <class T>
  __device__ auto in(const T& series) const {
    return series.data[row * series.row_stride + column];
  }
};

inline int64_t blocks_for(const Grid& grid, int64_t most) {
  const int64_t blocks = (grid.rows * grid.columns + kTile - 1) / kTile;
  return blocks < most ? blocks : most;
}

}  // namespace cuda
}  // namespace rk
