// The loops of op_softmax.cpp, for each instruction set that the compiler is told of. Includes nothing of the standard
// library (isa.hpp says why).
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "softmax.hpp"

namespace edgeqat {

// 2^k for -126 <= k <= 127
static inline float power_of_two(int k) {
  const int32_t bits = (k + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return power;
}

// e^t for -86 <= t <= 0. Adding 1.5 · 2^23 rounds half to even.
static inline float exponential(float t) {
  constexpr float shift = 12582912.0f;
  constexpr float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  const float k = (t * log2_e + shift) - shift;
  const float r = (t - k * ln2_high) - k * ln2_low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return ((p * (r * r) + r) + 1.0f) * power_of_two(int(k));
}

static inline void softmax_row(const float* x, size_t n, const SoftmaxToCodes& to, float* place, uint8_t* y) {
  constexpr float shift = 12582912.0f, lowest = -86.0f;
  float largest = x[0];
  for (size_t i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  for (size_t i = 0; i < n; ++i) {
    const float t = x[i] - largest;
    place[i] = exponential(t > lowest ? t : lowest);  // also where t is not a number
  }
  float s[kSumLanes] = {};
  size_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
    for (size_t j = 0; j < kSumLanes; ++j) s[j] += place[i + j];
  for (size_t j = 0; i + j < n; ++j) s[j] += place[i + j];
  const float sum = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  const float factor = (1.0f / sum) / to.scale;
  const float low = float(to.low - to.zero), high = float(to.high - to.zero);
  for (i = 0; i < n; ++i) {
    float code = place[i] * factor;
    code = code > low ? code : low;
    code = code < high ? code : high;
    y[i] = uint8_t(int((code + shift) - shift) + to.zero);
  }
}

}  // namespace edgeqat
