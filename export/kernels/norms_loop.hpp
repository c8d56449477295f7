// The loops of norms.cpp, for each instruction set that the compiler is told of. Includes nothing of the standard
// library (isa.hpp says why).
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "norms.hpp"

namespace edgeqat {

static inline SumsOfCodes sums_of_codes(const uint8_t* q, size_t count) {
  uint32_t sum = 0, squares = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t code = q[i];
    sum += code;
    squares += code * code;
  }
  return {sum, squares};
}

// Adding 1.5 · 2^23 rounds half to even.
static inline void normalize_codes(const uint8_t* q, size_t count, uint32_t sum, float r, const NormOfCodes& norm,
                                   uint8_t* y) {
  constexpr float shift = 12582912.0f;
  const float low = float(norm.low - norm.zero), high = float(norm.high - norm.zero);
  const int n = int(count), total = int(sum);
  for (size_t i = 0; i < count; ++i) {
    const int d = n * int(q[i]) - total;
    float code = float(d) * r * norm.gain[i] + norm.shift[i];
    code = code > low ? code : low;
    code = code < high ? code : high;
    y[i] = uint8_t(int((code + shift) - shift) + norm.zero);
  }
}

}  // namespace edgeqat
