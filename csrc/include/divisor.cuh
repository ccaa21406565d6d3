// Division by a number that a launch knows and the compiler does not: one multiplication and a shift.
#pragma once

#include "device.cuh"

namespace fastvit {

// n / d for 0 <= n < 2^31 by one multiplication, rounding down (Robison 2005): m = ceil(2^(32 + s) / d) - 1 with
// 2^s < d <= 2^(s + 1), or s = 0 for d = 1. Then (n + 1) m / 2^(32 + s) is below (n + 1) / d, so below the next
// integer, and, as n < 2^31, not below the integer part of n / d.
struct Divisor {
  uint32_t divisor, multiplier;
  int shift = 0;

  explicit Divisor(int64_t by) : divisor(static_cast<uint32_t>(by)) {
    while ((int64_t{2} << shift) < by) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (32 + shift)) + divisor - 1) / divisor - 1);
  }

  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>(static_cast<uint32_t>((n + 1ull) * multiplier >> 32) >> shift);
  }
};

}  // namespace fastvit
