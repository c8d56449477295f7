// Depthwise layers on NEON, 16 channels at a time. Where all products of a channel fit 16 bits (layer_pack.cpp has
// shown it) they are added there, widened once at the end; kernels of three rows keep their weights in registers.
#pragma once
#include <arm_neon.h>

#include "isa.hpp"

namespace edgeqat {
namespace {

constexpr int kRows = 3, kColumns = 3;

// 16 channels' sums.
struct Narrow {
  int16x8_t low, high;

  void add(int8x16_t x, int8x16_t w) {
    low = vmlal_s8(low, vget_low_s8(x), vget_low_s8(w));
    high = vmlal_high_s8(high, x, w);
  }
};

inline int8x16_t load_signed(const uint8_t* codes) { return vreinterpretq_s8_u8(vld1q_u8(codes)); }

struct Bias {
  int32x4_t part[4];

  explicit Bias(const int32_t* from) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) part[i] = vld1q_s32(from + 4 * i);
  }
};

inline void store_widened(const Narrow& sum, const Bias& bias, int32_t* to) {
  vst1q_s32(to, vaddw_s16(bias.part[0], vget_low_s16(sum.low)));
  vst1q_s32(to + 4, vaddw_high_s16(bias.part[1], sum.low));
  vst1q_s32(to + 8, vaddw_s16(bias.part[2], vget_low_s16(sum.high)));
  vst1q_s32(to + 12, vaddw_high_s16(bias.part[3], sum.high));
}

// Weights of 16 channels of a 3×3 kernel, column by column.
struct Kernel {
  int8x16_t w[kColumns][kRows];

  explicit Kernel(const int8_t* weights) {
#pragma GCC unroll 3
    for (int x = 0; x < kColumns; ++x)
#pragma GCC unroll 3
      for (int y = 0; y < kRows; ++y) w[x][y] = vld1q_s8(weights + (4 * x + y) * kBlock);
  }
};

// Neighbouring pixels, each window one column right of the one before: a column is loaded once for up to three of them.
template <int kPixels>
void neighbours(const Depthwise& d, const Kernel& kernel, const Bias& bias, const uint8_t* const* pixels, int c,
                int32_t* sums) {
  Narrow sum[kPixels] = {};
#pragma GCC unroll 8
  for (int column = 0; column < kPixels + kColumns - 1; ++column) {
    // The kernel's column x of pixel m is column m + x of the image.
    const int m = column < kPixels ? column : kPixels - 1;
    const ptrdiff_t* offsets = d.offsets + 4 * (column - m);
#pragma GCC unroll 3
    for (int y = 0; y < kRows; ++y) {
      const int8x16_t x = load_signed(pixels[m] + offsets[y] + c);
#pragma GCC unroll 8
      for (int to = 0; to < kPixels; ++to)
        if (column - to >= 0 && column - to < kColumns) sum[to].add(x, kernel.w[column - to][y]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kPixels; ++m) store_widened(sum[m], bias, sums + m * kBlock + c);
}

inline void one_pixel(const Depthwise& d, const Kernel& kernel, const Bias& bias, const uint8_t* pixel, int c,
                      int32_t* sums) {
  Narrow sum = {};
#pragma GCC unroll 3
  for (int x = 0; x < kColumns; ++x)
#pragma GCC unroll 3
    for (int y = 0; y < kRows; ++y) sum.add(load_signed(pixel + d.offsets[4 * x + y] + c), kernel.w[x][y]);
  store_widened(sum, bias, sums + c);
}

inline void three_by_three(const Depthwise& d, const uint8_t* const* pixels, int count, int32_t* sums) {
  for (int c = 0; c < d.channels; c += kLanes) {
    const Kernel kernel(d.weights + c);
    const Bias bias(d.bias + c);
    int m = 0;
    if (d.shares)
      for (; m + 4 <= count; m += 4) neighbours<4>(d, kernel, bias, pixels + m, c, sums + m * kBlock);
    for (; m < count; ++m) one_pixel(d, kernel, bias, pixels[m], c, sums + m * kBlock);
  }
}

inline void any_narrow(const Depthwise& d, const uint8_t* const* pixels, int count, int32_t* sums) {
  for (int m = 0; m < count; ++m)
    for (int c = 0; c < d.channels; c += kLanes) {
      Narrow sum = {};
      for (int t = 0; t < 4 * d.groups; ++t)
        sum.add(load_signed(pixels[m] + d.offsets[t] + c), vld1q_s8(d.weights + t * kBlock + c));
      store_widened(sum, Bias(d.bias + c), sums + m * kBlock + c);
    }
}

// A byte times a code fits 16 bits signed only up to 127, so both are widened first; sums have 32 bits.
inline void any_wide(const Depthwise& d, const uint8_t* const* pixels, int count, int32_t* sums) {
  for (int m = 0; m < count; ++m)
    for (int c = 0; c < d.channels; c += 8) {
      int32x4_t low = vld1q_s32(d.bias + c), high = vld1q_s32(d.bias + c + 4);
      for (int t = 0; t < 4 * d.groups; ++t) {
        const int16x8_t x = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(pixels[m] + d.offsets[t] + c)));
        const int16x8_t w = vmovl_s8(vld1_s8(d.weights + t * kBlock + c));
        low = vmlal_s16(low, vget_low_s16(x), vget_low_s16(w));
        high = vmlal_high_s16(high, x, w);
      }
      vst1q_s32(sums + m * kBlock + c, low);
      vst1q_s32(sums + m * kBlock + c + 4, high);
    }
}

inline void depthwise(const Depthwise& d, const uint8_t* const* pixels, int count, int32_t* sums) {
  if (!d.narrow) return any_wide(d, pixels, count, sums);
  if (d.rows == kRows && d.groups == kColumns) return three_by_three(d, pixels, count, sums);
  any_narrow(d, pixels, count, sums);
}

}  // namespace
}  // namespace edgeqat
