// Products of two tensors of codes, each element by element or spread over the other's axes.
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

using MultiplyFunction = void (*)(const uint8_t* a, const uint8_t* b, size_t count, const ProductOfCodes& p,
                                  uint8_t* y);

void multiply_avx2(const uint8_t* a, const uint8_t* b, size_t count, const ProductOfCodes& p, uint8_t* y);

MultiplyFunction chosen_multiply();  // for the instruction set that `chosen_isa` chose

}  // namespace edgeqat
