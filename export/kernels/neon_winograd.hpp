// Winograd's transforms on NEON (winograd.cpp has the equations), for products that take signed codes.
//
// Codes 0 <= d <= h: the transforms lie within [-2h, 2h], and at position (1,1), less 2h, too: signed bytes for h
// <= 63.
#pragma once
#include <arm_neon.h>

#include "isa.hpp"

namespace edgeqat {
namespace {

constexpr int kMiddle = 5;  // position (1,1)

struct Four {
  uint8x16_t v[4];
};

// Rows of Bᵀ, in bytes modulo 256.
inline Four transform(uint8x16_t d0, uint8x16_t d1, uint8x16_t d2, uint8x16_t d3) {
  return {{vsubq_u8(d0, d2), vaddq_u8(d1, d2), vsubq_u8(d2, d1), vsubq_u8(d1, d3)}};
}

inline void transform_sixteen(const uint8_t* const* tile, size_t c, uint8x16_t offset, uint8_t* to, ptrdiff_t plane) {
  Four column[4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x)
    column[x] = transform(vld1q_u8(tile[x] + c), vld1q_u8(tile[4 + x] + c), vld1q_u8(tile[8 + x] + c),
                          vld1q_u8(tile[12 + x] + c));
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) {
    const Four row = transform(column[0].v[y], column[1].v[y], column[2].v[y], column[3].v[y]);
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const int position = 4 * y + x;
      const uint8x16_t code = position == kMiddle ? vsubq_u8(row.v[x], offset) : row.v[x];
      vst1q_u8(to + position * plane, code);
    }
  }
}

// There are at least 16 channels; the last 16 may have some in common with those before.
inline void winograd_input(const uint8_t* const* tile, size_t channels, int offset, uint8_t* to, ptrdiff_t plane) {
  const uint8x16_t offsets = vdupq_n_u8(uint8_t(offset));
  size_t c = 0;
  for (; c + 16 <= channels; c += 16) transform_sixteen(tile, c, offsets, to + c, plane);
  if (c < channels) transform_sixteen(tile, channels - 16, offsets, to + channels - 16, plane);
}

// A pixel's four sums: (y >> 2) · weight_multiplier + bias; y is a multiple of 4.
inline void store_pixel(int32_t* to, int32x4_t y, int32x4_t weight_multiplier, int32x4_t bias) {
  vst1q_s32(to, vmlaq_s32(bias, vshrq_n_s32(y, 2), weight_multiplier));
}

inline void winograd_output(const int32_t* sums, int units, int weight_multiplier, const int32_t* bias,
                            int32_t* const* pixels) {
  constexpr ptrdiff_t plane = kWinogradTiles * kBlock;
  const int32x4_t factor = vdupq_n_s32(weight_multiplier);
  for (int o = 0; o < units * kLanes; o += 4) {
    const int32x4_t start = vld1q_s32(bias + o);
    int32x4_t rows[2][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const int32_t* m = sums + x * plane + o;
      const int32x4_t m0 = vld1q_s32(m), m1 = vld1q_s32(m + 4 * plane);
      const int32x4_t m2 = vld1q_s32(m + 8 * plane), m3 = vld1q_s32(m + 12 * plane);
      rows[0][x] = vaddq_s32(vaddq_s32(m0, m1), m2);
      rows[1][x] = vsubq_s32(vsubq_s32(m1, m2), m3);
    }
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      const int32x4_t* m = rows[y];
      store_pixel(pixels[2 * y] + o, vaddq_s32(vaddq_s32(m[0], m[1]), m[2]), factor, start);
      store_pixel(pixels[2 * y + 1] + o, vsubq_s32(vsubq_s32(m[1], m[2]), m[3]), factor, start);
    }
  }
}

}  // namespace
}  // namespace edgeqat
