#include "products.hpp"

#include <cstring>

#include "isa.hpp"
#include "products_loop.hpp"

namespace edgeqat {
namespace {

void multiply_portable(const uint8_t* a, const uint8_t* b, size_t count, const ProductOfCodes& p, uint8_t* y) {
  multiply_row(a, b, count, p, y);
}

}  // namespace

MultiplyFunction chosen_multiply() {
#ifdef __x86_64__
  if (!std::strncmp(chosen_isa().name, "avx", 3)) return multiply_avx2;
#endif
  return multiply_portable;
}

}  // namespace edgeqat
