// Softmax of rows of floats, written as codes, in an arithmetic that every processor computes alike.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace edgeqat {

// Over a row x of n floats, operation by operation in float32 (export/arithmetic.py states the same):
//   t = max(x - largest x, -86),  k = rint(t · log2 e),  r = (t - k · kLn2High) - k · kLn2Low
//   e = (1 + r + r² · p(r)) · 2^k, p a polynomial of degree 4 in Horner's form
//   sum = ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7)), sj = e[j] + e[j + 8] + e[j + 16] + ...
//   code = clip(rint(e · ((1 / sum) / scale)) + zero, low, high)
struct SoftmaxToCodes {
  float scale;
  int zero, low, high;
};

constexpr size_t kSumLanes = 8;

// `place` holds n floats.
using SoftmaxFunction = void (*)(const float* x, size_t n, const SoftmaxToCodes& to, float* place, uint8_t* y);

void softmax_avx2(const float* x, size_t n, const SoftmaxToCodes& to, float* place, uint8_t* y);
SoftmaxFunction chosen_softmax();  // for the instruction set that `chosen_isa` chose

}  // namespace edgeqat
