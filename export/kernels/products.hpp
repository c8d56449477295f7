// Products of two tensors of codes, each element by element or spread over the other's axes, and of codes with a
// constant for each channel.
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
struct ScaledCodes {
  int x_zero;
  float x_scale, y_scale;
  int zero, low, high;
};

using MultiplyFunction = void (*)(const uint8_t* a, const uint8_t* b, size_t count, const ProductOfCodes& p,
                                  uint8_t* y);

using ScaleFunction = void (*)(const uint8_t* x, const float* gain, size_t count, const ScaledCodes& s, uint8_t* y);

void scale_avx2(const uint8_t* x, const float* gain, size_t count, const ScaledCodes& s, uint8_t* y);
void multiply_avx2(const uint8_t* a, const uint8_t* b, size_t count, const ProductOfCodes& p, uint8_t* y);

// For the instruction set that `chosen_isa` chose
MultiplyFunction chosen_multiply();
ScaleFunction chosen_scale();

}  // namespace edgeqat
