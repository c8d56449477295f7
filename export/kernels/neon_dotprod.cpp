// NEON with the dot product: four products a lane, added in 32 bits at once.
#include "isa.hpp"
#if defined(__aarch64__) && defined(__linux__) && defined(__ARM_FEATURE_DOTPROD)
#include <sys/auxv.h>

#include "neon.hpp"

namespace edgeqat {
namespace {

constexpr unsigned long kHasDotProduct = 1ul << 20;  // HWCAP_ASIMDDP

// Codes are unsigned and sdot is not: it multiplies x - 128, and 128 · Σ w = 2 · (w · 64) goes back, once for all
// pixels.
void product(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  const ptrdiff_t stride = 64 * ptrdiff_t(p.units);
  const int8x16_t half = vdupq_n_s8(64);
  const uint8x16_t top = vdupq_n_u8(128);
  for (int c = 0; c < p.units * kLanes; c += kQuarter) {
    int32x4_t sum[kMaxPixels], back = vdupq_n_s32(0);
    for (int m = 0; m < count; ++m) sum[m] = vdupq_n_s32(0);
    for (int r = 0; r < p.stretches.runs; ++r) {
      const int8_t* w = p.weights + ptrdiff_t(r) * p.stretches.quads * stride + 4 * c;
      for (ptrdiff_t q = 0; q < p.stretches.quads; ++q, w += stride) {
        const int8x16_t weights = vld1q_s8(w);
        back = vdotq_s32(back, weights, half);
        for (int m = 0; m < count; ++m) {
          const uint32_t four = four_bytes(pixels[m] + p.stretches.offsets[r] + 4 * q);
          const int8x16_t codes = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_u32(vdupq_n_u32(four)), top));
          sum[m] = vdotq_s32(sum[m], weights, codes);
        }
      }
    }
    for (int m = 0; m < count; ++m) store_sums(p, c, vaddq_s32(sum[m], vshlq_n_s32(back, 1)), sums + m * kBlock + c);
  }
}

}  // namespace

const Isa* neon_dotprod_isa() {
  static const Isa isa = neon_table("neon-dotprod", product);
  return getauxval(AT_HWCAP) & kHasDotProduct ? &isa : nullptr;
}

}  // namespace edgeqat
#else
namespace edgeqat {
const Isa* neon_dotprod_isa() { return nullptr; }
}  // namespace edgeqat
#endif
