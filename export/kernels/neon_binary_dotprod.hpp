// One-bit products for processors with the dot product, which adds the bytes in which differing bits are counted.
#pragma once
#include <arm_neon.h>

#include "isa.hpp"
#include "neon_tile.hpp"

namespace edgeqat {
namespace {

// Counts differing bits of kQuads quads of every pixel in bytes, which `udot` with ones adds to 32 bits.
template <int kQuads, int kPixels>
void count_quads(const Rows<kPixels>& rows, ptrdiff_t at, const int8_t*& w, uint32x4_t (&differing)[kPixels][2]) {
  const uint8x16_t ones = vdupq_n_u8(1);
  uint32x4_t codes[kPixels];
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m) codes[m] = vreinterpretq_u32_s8(load_quads<kQuads>(rows.x[m] + at));
#define COUNT_QUAD(lane)                                                                                \
  if (lane < kQuads) {                                                                                  \
    const uint8x16_t w0 = vreinterpretq_u8_s8(vld1q_s8(w)), w1 = vreinterpretq_u8_s8(vld1q_s8(w + 16)); \
    w += 4 * kTileChannels;                                                                             \
    _Pragma("GCC unroll 8") for (int m = 0; m < kPixels; ++m) {                                         \
      const uint8x16_t bits = vreinterpretq_u8_u32(vdupq_laneq_u32(codes[m], lane));                    \
      differing[m][0] = vdotq_u32(differing[m][0], vcntq_u8(veorq_u8(bits, w0)), ones);                 \
      differing[m][1] = vdotq_u32(differing[m][1], vcntq_u8(veorq_u8(bits, w1)), ones);                 \
    }                                                                                                   \
  }
  COUNT_QUAD(0)
  COUNT_QUAD(1)
  COUNT_QUAD(2)
  COUNT_QUAD(3)
#undef COUNT_QUAD
}

template <int kPixels>
void binary_tiles(const Product& p, const uint8_t* const* pixels, int32_t* to) {
  const ptrdiff_t bytes = 4 * ptrdiff_t(p.stretches.quads);
  const int8_t* w = p.weights;
  for (int channel = 0; channel < p.units * kLanes; channel += kTileChannels) {
    uint32x4_t differing[kPixels][2] = {};
    for (int r = 0; r < p.stretches.runs; ++r) {
      const Rows<kPixels> rows(pixels, p.stretches.offsets[r]);
      ptrdiff_t at = 0;
      for (; at + 16 <= bytes; at += 16) count_quads<4, kPixels>(rows, at, w, differing);
      if (bytes & 8) {
        count_quads<2, kPixels>(rows, at, w, differing);
        at += 8;
      }
      if (bytes & 4) count_quads<1, kPixels>(rows, at, w, differing);
    }
    store_agreement(p, differing, channel, to + channel);
  }
}

inline void binary(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  constexpr Tiles kTiles[kMaxPixels] = {binary_tiles<1>, binary_tiles<2>, binary_tiles<3>, binary_tiles<4>,
                                        binary_tiles<5>, binary_tiles<6>, binary_tiles<7>, binary_tiles<8>};
  kTiles[count - 1](p, pixels, sums);
}

}  // namespace
}  // namespace edgeqat
