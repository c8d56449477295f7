#include "products_loop.hpp"

namespace edgeqat {

#if defined(__AVX2__) && defined(__FMA__)
void multiply_avx2(const uint8_t* a, const uint8_t* b, size_t count, const ProductOfCodes& p, uint8_t* y) {
  multiply_row(a, b, count, p, y);
}
void add_avx2(const uint8_t* a, const uint8_t* b, size_t count, const SumOfTwo& s, uint8_t* y) {
  add_row(a, b, count, s, y);
}
void scale_avx2(const uint8_t* x, const float* gain, size_t count, const ScaledCodes& s, uint8_t* y) {
  scale_row(x, gain, count, s, y);
}
#endif

}  // namespace edgeqat
