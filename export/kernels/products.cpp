#include "products.hpp"

#include <cstring>

#include "isa.hpp"
#include "products_loop.hpp"

namespace edgeqat {
namespace {

void multiply_portable(const uint8_t* a, const uint8_t* b, size_t count, const ProductOfCodes& p, uint8_t* y) {
  multiply_row(a, b, count, p, y);
}

void add_portable(const uint8_t* a, const uint8_t* b, size_t count, const SumOfTwo& s, uint8_t* y) {
  add_row(a, b, count, s, y);
}

void scale_portable(const uint8_t* x, const float* gain, size_t count, const ScaledCodes& s, uint8_t* y) {
  scale_row(x, gain, count, s, y);
}

}  // namespace

AddFunction chosen_add() {
#ifdef __x86_64__
  if (!std::strncmp(chosen_isa().name, "avx", 3)) return add_avx2;
#endif
  return add_portable;
}

MultiplyFunction chosen_multiply() {
#ifdef __x86_64__
  if (!std::strncmp(chosen_isa().name, "avx", 3)) return multiply_avx2;
#endif
  return multiply_portable;
}

ScaleFunction chosen_scale() {
#ifdef __x86_64__
  if (!std::strncmp(chosen_isa().name, "avx", 3)) return scale_avx2;
#endif
  return scale_portable;
}

}  // namespace edgeqat
