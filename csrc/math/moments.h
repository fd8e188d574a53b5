// Number, mean and sum of squared deviations, in a form that keeps the digits of small variances.
#pragma once

#include "math/host_device.h"

namespace rk {
namespace RK_ISA {

struct Moments {
  double count, mean, squares;

  // Those of both together (Chan et al. 1979).
  RK_FORMULA void add(const Moments& other) {
    if (other.count == 0.0) return;
    const double both = count + other.count;
    const double distance = other.mean - mean;
    mean += distance * other.count / both;
    squares += other.squares + distance * distance * count * other.count / both;
    count = both;
  }
};

// Sums relative to the first number. It is one of them, so squares lose few digits, and numbers that
// are all equal have no variance at all.
struct Deviations {
  float first;
  double sum, squares;

  RK_FORMULA void add(float x, bool is_first) {
    if (is_first) first = x;
    const double deviation = double(x) - double(first);
    sum += deviation;
    squares += deviation * deviation;
  }

  RK_FORMULA Moments moments(int count) const {
    if (count == 0) return {0.0, 0.0, 0.0};
    const double shift = sum / count;
    const double around_mean = squares - sum * shift;
    // Rounding can make it negative; NaN stays.
    return {double(count), double(first) + shift, around_mean < 0.0 ? 0.0 : around_mean};
  }
};

}  // namespace RK_ISA
}  // namespace rk
