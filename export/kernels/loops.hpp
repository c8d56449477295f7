// What an instruction set implements beside layers: loops over codes, and over rows of floats that become codes. Each
// arithmetic is written down here, operation by operation in float32, and computed alike by every processor. Includes
// nothing of the standard library (isa.hpp says why).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace edgeqat {

// What reals become, where an arithmetic says clip, and how they are read from codes.
struct Grid {
  float scale = 1.0f;
  int zero = 0, low = 0, high = 255;
};

// How a product becomes a code: clip(rint(float((a - zero_a) · (b - zero_b)) · ratio + zero), low, high)
struct ProductOfCodes {
  int zero_a, zero_b;
  float ratio;
  int zero, low, high;
};

// How codes times a constant become codes, as DequantizeLinear, Mul and QuantizeLinear compute it, in float32:
//   clip(rint(((q - x_zero) · x_scale) · gain / y_scale) + zero, low, high)
// With `below_zero` only what is below zero is multiplied, as a PReLU does.
struct ScaledCodes {
  int x_zero;
  float x_scale, y_scale;
  int zero, low, high;
  bool below_zero;
};

// How a sum becomes a code: clip(rint(fma(a, ratio_a, fma(b, ratio_b, offset))), low, high)
struct SumOfTwo {
  float ratio_a, ratio_b, offset;
  int low, high;
};

// Layer norm, over a row of n <= 65,536 codes q, with exact integer sums:
//   d = n · q - Σq,  V = n · Σq² - (Σq)²,  r = float(1 / sqrt(double(V) + epsilon))
//   code = clip(rint(float(d) · r · gain + shift) + zero, low, high)
struct NormOfCodes {
  const float* gain;
  const float* shift;
  int zero, low, high;
};
constexpr int64_t kMostNormed = 65536;  // |d| stays below 2^24, which a float holds exactly
struct SumsOfCodes {
  uint32_t sum, squares;
};

// Softmax over a row x of n floats (export/arithmetic.py states the same):
//   t = max(x - largest x, -86),  k = rint(t · log2 e),  r = (t - k · kLn2High) - k · kLn2Low
//   e = (1 + r + r² · p(r)) · 2^k, p a polynomial of degree 4 in Horner's form
//   sum = ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7)), sj = e[j] + e[j + 8] + e[j + 16] + ...
//   code = clip(rint(e · ((1 / sum) / scale)) + zero, low, high)
constexpr size_t kPlaceUnit = 8;          // a softmax's place holds its n floats, rounded up to a multiple of this
constexpr int64_t kMostRowsSummed = 257;  // of 255 each, 16 bits hold them

struct Loops {
  void (*add)(const uint8_t* a, const uint8_t* b, size_t count, const SumOfTwo& s, uint8_t* y);
  void (*multiply)(const uint8_t* a, const uint8_t* b, size_t count, const ProductOfCodes& p, uint8_t* y);
  void (*scale)(const uint8_t* x, const float* gain, size_t count, const ScaledCodes& s, uint8_t* y);
  SumsOfCodes (*sums)(const uint8_t* q, size_t count);
  // r: of the row, as NormOfCodes has it
  void (*normalize)(const uint8_t* q, size_t count, uint32_t sum, float r, const NormOfCodes& norm, uint8_t* y);
  void (*softmax)(const float* x, size_t count, const Grid& to, float* place, uint8_t* y);
  // total[i] += float(x[i] - zero) · scale
  void (*sum_reals)(const uint8_t* x, size_t count, int zero, float scale, float* total);
  // clip(rint(total / count / scale + zero), low, high)
  void (*mean_to_codes)(const float* total, size_t length, float count, const Grid& to, uint8_t* y);
  // Over rows of `length` codes, at most kMostRowsSummed: total[i] += x[i]
  void (*sum_rows)(const uint8_t* x, size_t rows, size_t length, uint16_t* total);
  // y[column · y_stride + row] = x[row · x_stride + column]
  void (*transpose)(const uint8_t* x, size_t rows, size_t columns, size_t x_stride, uint8_t* y, size_t y_stride);
};

const Loops* portable_loops();
const Loops* avx2_loops();
const Loops* avx512_loops();

}  // namespace edgeqat
