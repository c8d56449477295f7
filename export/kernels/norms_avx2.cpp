#include "norms_loop.hpp"

namespace edgeqat {

#ifdef __AVX2__
static SumsOfCodes sums_avx2(const uint8_t* q, size_t count) { return sums_of_codes(q, count); }
static void normalize_avx2(const uint8_t* q, size_t count, uint32_t sum, float r, const NormOfCodes& norm, uint8_t* y) {
  normalize_codes(q, count, sum, r, norm, y);
}
NormFunctions norm_functions_avx2() { return {sums_avx2, normalize_avx2}; }
#endif

}  // namespace edgeqat
