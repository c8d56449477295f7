#include "softmax_loop.hpp"

namespace edgeqat {

#ifdef __AVX2__
void softmax_avx2(const float* x, size_t n, const SoftmaxToCodes& to, float* place, uint8_t* y) {
  softmax_row(x, n, to, place, y);
}
#endif

}  // namespace edgeqat
