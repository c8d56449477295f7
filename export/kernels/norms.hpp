// Layer norm of codes, in an arithmetic that every processor computes alike.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace edgeqat {

// Over a row of n <= 65,536 codes q, with exact integer sums:
//   d = n · q - Σq,  V = n · Σq² - (Σq)²,  r = float(1 / sqrt(double(V) + epsilon))
//   code = clip(rint(float(d) · r · gain + shift) + zero, low, high), operation by operation in float32
struct NormOfCodes {
  float epsilon;
  const float* gain;
  const float* shift;
  int zero, low, high;
};

constexpr int64_t kMostNormed = 65536;  // |d| stays below 2^24, which a float holds exactly

struct SumsOfCodes {
  uint32_t sum, squares;
};

using SumFunction = SumsOfCodes (*)(const uint8_t* q, size_t count);
// `r` of the row, then the codes
using NormalizeFunction = void (*)(const uint8_t* q, size_t count, uint32_t sum, float r, const NormOfCodes& norm,
                                   uint8_t* y);

struct NormFunctions {
  SumFunction sums;
  NormalizeFunction normalize;
};

NormFunctions norm_functions_avx2();
NormFunctions chosen_norm_functions();  // for the instruction set that `chosen_isa` chose

void normalize_row(const uint8_t* q, size_t count, const NormFunctions& functions, const NormOfCodes& norm, uint8_t* y);

}  // namespace edgeqat
