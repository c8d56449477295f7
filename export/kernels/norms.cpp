#include "norms.hpp"

#include <cmath>
#include <cstring>

#include "isa.hpp"
#include "norms_loop.hpp"

namespace edgeqat {
namespace {

SumsOfCodes sums_portable(const uint8_t* q, size_t count) { return sums_of_codes(q, count); }
void normalize_portable(const uint8_t* q, size_t count, uint32_t sum, float r, const NormOfCodes& norm, uint8_t* y) {
  normalize_codes(q, count, sum, r, norm, y);
}

}  // namespace

NormFunctions chosen_norm_functions() {
#ifdef __x86_64__
  if (!std::strncmp(chosen_isa().name, "avx", 3)) return norm_functions_avx2();
#endif
  return {sums_portable, normalize_portable};
}

void normalize_row(const uint8_t* q, size_t count, const NormFunctions& functions, const NormOfCodes& norm,
                   uint8_t* y) {
  const SumsOfCodes found = functions.sums(q, count);
  const int64_t sum = found.sum;
  const int64_t variance = int64_t(count) * int64_t(found.squares) - sum * sum;
  const float r = float(1.0 / std::sqrt(double(variance) + double(norm.epsilon)));
  functions.normalize(q, count, found.sum, r, norm, y);
}

}  // namespace edgeqat
