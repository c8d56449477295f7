// Tiles of a product, up to 8 pixels × 8 channels, whose sums stay in registers; shared by the ARM products.
// Weights stand tile by tile (Isa::tile_channels), so that one pointer runs over those of all tiles.
#pragma once
#include <arm_neon.h>

#include "isa.hpp"

namespace edgeqat {
namespace {

constexpr int kTileChannels = 8;

// Codes of kQuads quads of a pixel, as signed bytes.
template <int kQuads>
int8x16_t load_quads(const uint8_t* x) {
  if (kQuads == 4) return vreinterpretq_s8_u8(vld1q_u8(x));
  if (kQuads == 2) return vreinterpretq_s8_u8(vcombine_u8(vld1_u8(x), vdup_n_u8(0)));
  uint32_t quad;
  __builtin_memcpy(&quad, x, sizeof quad);
  return vreinterpretq_s8_u32(vdupq_n_u32(quad));
}

// Sums of kPixels × 8 channels, each pixel's in two vectors.
template <int kPixels>
struct Sums {
  int32x4_t part[kPixels][2];

  Sums() : part{} {}

  // Every pixel's begin with the bias.
  explicit Sums(const int32_t* bias) {
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) {
      part[m][0] = vld1q_s32(bias);
      part[m][1] = vld1q_s32(bias + 4);
    }
  }

  void store(int32_t* to) const {
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) {
      vst1q_s32(to + m * kBlock, part[m][0]);
      vst1q_s32(to + m * kBlock + 4, part[m][1]);
    }
  }
};

// Sums of one-bit products, of which `differing` counts the bits in which codes and weights are not the same.
template <int kPixels>
void store_agreement(const Product& p, const uint32x4_t (&differing)[kPixels][2], int channel, int32_t* to) {
  const int32x4_t gain = vdupq_n_s32(2 * p.binary_gain);
  Sums<kPixels> sums(p.bias + channel);
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      sums.part[m][i] = vmlsq_s32(sums.part[m][i], vreinterpretq_s32_u32(differing[m][i]), gain);
  sums.store(to);
}

// Where a stretch of every pixel begins.
template <int kPixels>
struct Rows {
  const uint8_t* x[kPixels];

  Rows(const uint8_t* const* pixels, ptrdiff_t offset) {
#pragma GCC unroll 8
    for (int m = 0; m < kPixels; ++m) x[m] = pixels[m] + offset;
  }
};

// All channels of some pixels, 8 at a time.
using Tiles = void (*)(const Product& p, const uint8_t* const* pixels, int32_t* sums);

}  // namespace
}  // namespace edgeqat
