// The loop of products.cpp, for each instruction set that the compiler is told of. Includes nothing of the standard
// library (isa.hpp says why).
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "products.hpp"

namespace edgeqat {

// Both factors are integers below 256, so their product is exact in a float; adding 1.5 · 2^23 rounds half to even.
static inline void multiply_row(const uint8_t* a, const uint8_t* b, size_t count, const ProductOfCodes& p, uint8_t* y) {
  constexpr float shift = 12582912.0f;
  const float low = float(p.low), high = float(p.high), zero = float(p.zero);
  for (size_t i = 0; i < count; ++i) {
    const int product = (int(a[i]) - p.zero_a) * (int(b[i]) - p.zero_b);
    float code = float(product) * p.ratio + zero;
    code = code > low ? code : low;
    code = code < high ? code : high;
    y[i] = uint8_t(int((code + shift) - shift));
  }
}

// Without an instruction for it, as before AVX2, the compiler calls the library's fmaf.
static inline void add_row(const uint8_t* a, const uint8_t* b, size_t count, const SumOfTwo& s, uint8_t* y) {
  constexpr float shift = 12582912.0f;
  const float low = float(s.low), high = float(s.high);
  for (size_t i = 0; i < count; ++i) {
    const float inner = __builtin_fmaf(float(b[i]), s.ratio_b, s.offset);
    float code = __builtin_fmaf(float(a[i]), s.ratio_a, inner);
    code = code > low ? code : low;
    code = code < high ? code : high;
    y[i] = uint8_t(int((code + shift) - shift));
  }
}

static inline void scale_row(const uint8_t* x, const float* gain, size_t count, const ScaledCodes& s, uint8_t* y) {
  constexpr float shift = 12582912.0f;
  const float low = float(s.low - s.zero), high = float(s.high - s.zero);
  for (size_t i = 0; i < count; ++i) {
    const float real = float(int(x[i]) - s.x_zero) * s.x_scale;
    const float scaled = real * gain[i];
    const bool is_scaled = !s.below_zero || real < 0;
    float code = (is_scaled ? scaled : real) / s.y_scale;
    code = code > low ? code : low;
    code = code < high ? code : high;
    y[i] = uint8_t(int((code + shift) - shift) + s.zero);
  }
}

}  // namespace edgeqat
