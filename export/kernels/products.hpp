// Products and sums of two tensors of codes, products each element by element or spread over the other's axes, and
// products of codes with a constant for each channel.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace edgeqat {

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

using AddFunction = void (*)(const uint8_t* a, const uint8_t* b, size_t count, const SumOfTwo& s, uint8_t* y);

using MultiplyFunction = void (*)(const uint8_t* a, const uint8_t* b, size_t count, const ProductOfCodes& p,
                                  uint8_t* y);

using ScaleFunction = void (*)(const uint8_t* x, const float* gain, size_t count, const ScaledCodes& s, uint8_t* y);

void add_avx2(const uint8_t* a, const uint8_t* b, size_t count, const SumOfTwo& s, uint8_t* y);
void scale_avx2(const uint8_t* x, const float* gain, size_t count, const ScaledCodes& s, uint8_t* y);
void multiply_avx2(const uint8_t* a, const uint8_t* b, size_t count, const ProductOfCodes& p, uint8_t* y);

// For the instruction set that `chosen_isa` chose
AddFunction chosen_add();
MultiplyFunction chosen_multiply();
ScaleFunction chosen_scale();

}  // namespace edgeqat
