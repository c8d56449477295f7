// NEON with the dot product: `sdot` adds four products to each of four lanes, in 32 bits at once.
#include "isa.hpp"
#if defined(__aarch64__) && defined(__linux__) && defined(__ARM_FEATURE_DOTPROD)
#include <sys/auxv.h>

#include "neon.hpp"
#include "neon_binary_dotprod.hpp"

namespace edgeqat {
namespace {

constexpr unsigned long kHasDotProduct = 1ul << 20;  // HWCAP_ASIMDDP

// Adds kQuads quads of every pixel. A weight vector is loaded once for all pixels, a vector of codes once for all its
// quads. kCentred: codes reach 128, so that they are multiplied as x - 128; the bias has the rest (layer_pack.cpp).
template <int kQuads, int kPixels, bool kCentred>
void add_quads(const Rows<kPixels>& rows, ptrdiff_t at, const int8_t*& w, Sums<kPixels>& sums) {
  int8x16_t codes[kPixels];
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m) {
    codes[m] = load_quads<kQuads>(rows.x[m] + at);
    if (kCentred) codes[m] = veorq_s8(codes[m], vdupq_n_s8(-128));
  }
#define ADD_QUAD(lane)                                                        \
  if (lane < kQuads) {                                                        \
    const int8x16_t w0 = vld1q_s8(w), w1 = vld1q_s8(w + 16);                  \
    w += 4 * kTileChannels;                                                   \
    _Pragma("GCC unroll 8") for (int m = 0; m < kPixels; ++m) {               \
      sums.part[m][0] = vdotq_laneq_s32(sums.part[m][0], w0, codes[m], lane); \
      sums.part[m][1] = vdotq_laneq_s32(sums.part[m][1], w1, codes[m], lane); \
    }                                                                         \
  }
  ADD_QUAD(0)
  ADD_QUAD(1)
  ADD_QUAD(2)
  ADD_QUAD(3)
#undef ADD_QUAD
}

template <int kPixels, bool kCentred>
void product_tiles(const Product& p, const uint8_t* const* pixels, int32_t* to) {
  const ptrdiff_t bytes = 4 * ptrdiff_t(p.stretches.quads);
  const int8_t* w = p.weights;
  for (int channel = 0; channel < p.units * kLanes; channel += kTileChannels) {
    Sums<kPixels> sums(p.bias + channel);
    for (int r = 0; r < p.stretches.runs; ++r) {
      const Rows<kPixels> rows(pixels, p.stretches.offsets[r]);
      ptrdiff_t at = 0;
      for (; at + 16 <= bytes; at += 16) add_quads<4, kPixels, kCentred>(rows, at, w, sums);
      if (bytes & 8) {
        add_quads<2, kPixels, kCentred>(rows, at, w, sums);
        at += 8;
      }
      if (bytes & 4) add_quads<1, kPixels, kCentred>(rows, at, w, sums);
    }
    sums.store(to + channel);
  }
}

void product(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
#define TILES(centred)                                                                                             \
  {                                                                                                                \
    product_tiles<1, centred>, product_tiles<2, centred>, product_tiles<3, centred>, product_tiles<4, centred>,    \
        product_tiles<5, centred>, product_tiles<6, centred>, product_tiles<7, centred>, product_tiles<8, centred> \
  }
  constexpr Tiles kSigned[kMaxPixels] = TILES(false), kCentred[kMaxPixels] = TILES(true);
#undef TILES
  (p.codes_below_128 ? kSigned : kCentred)[count - 1](p, pixels, sums);
}

}  // namespace

const Isa* neon_dotprod_isa() {
  static const Isa isa = [] {
    Isa made = neon_table("neon-dotprod", product, binary);
    made.prescales = 1;
    return made;
  }();
  return getauxval(AT_HWCAP) & kHasDotProduct ? &isa : nullptr;
}

}  // namespace edgeqat
#else
namespace edgeqat {
const Isa* neon_dotprod_isa() { return nullptr; }
}  // namespace edgeqat
#endif
