// What both ARM instruction sets share; included by neon.cpp and neon_dotprod.cpp, each with its own product.
#pragma once
#include <arm_neon.h>

#include "isa.hpp"

namespace edgeqat {
namespace {

constexpr int kQuarter = 4;  // channels of a vector: 16 channels are four

inline int8x16_t weights_of(const int8_t* w, int quarter) { return vld1q_s8(w + 16 * quarter); }

inline uint32_t four_bytes(const uint8_t* x) {
  uint32_t four;
  __builtin_memcpy(&four, x, 4);
  return four;
}

// sums = sum · weight_multiplier + bias for one quarter.
inline void store_sums(const Product& p, int channel, int32x4_t sum, int32_t* to) {
  vst1q_s32(to, vmlaq_n_s32(vld1q_s32(p.bias + channel), sum, p.weight_multiplier));
}

// Differing bits, counted in bytes: a step adds at most 8, so 31 steps stay within 255.
inline void binary(const Product& p, const uint8_t* const* pixels, int count, int32_t* sums) {
  constexpr int kSteps = 31;
  for (int m = 0; m < count; ++m)
    for (int c = 0; c < p.units * kLanes; c += kQuarter) {
      uint32x4_t total = vdupq_n_u32(0);
      for (int r = 0; r < p.stretches.runs; ++r) {
        const uint8_t* x = pixels[m] + p.stretches.offsets[r];
        const int8_t* w = p.weights + ptrdiff_t(r) * p.stretches.quads * 64 * p.units + 4 * c;
        for (int q = 0; q < p.stretches.quads;) {
          const int end = p.stretches.quads - q < kSteps ? p.stretches.quads : q + kSteps;
          uint8x16_t bytes = vdupq_n_u8(0);
          for (; q < end; ++q, w += 64 * p.units) {
            const uint8x16_t codes = vreinterpretq_u8_u32(vdupq_n_u32(four_bytes(x + 4 * ptrdiff_t(q))));
            bytes = vaddq_u8(bytes, vcntq_u8(veorq_u8(codes, vreinterpretq_u8_s8(vld1q_s8(w)))));
          }
          total = vpadalq_u16(total, vpaddlq_u8(bytes));
        }
      }
      const int32x4_t agreed = vmulq_n_s32(vreinterpretq_s32_u32(total), -2 * p.binary_gain);
      vst1q_s32(sums + m * kBlock + c, vaddq_s32(agreed, vld1q_s32(p.bias + c)));
    }
}

// A byte times a code fits 16 bits signed only up to 127, so both are widened first; sums have 32 bits.
inline void depthwise(const Depthwise& d, const uint8_t* const* pixels, int count, int32_t* sums) {
  for (int m = 0; m < count; ++m)
    for (int c = 0; c < kBlock; c += 8) {
      int32x4_t low = vld1q_s32(d.bias + c), high = vld1q_s32(d.bias + c + 4);
      for (int t = 0; t < 4 * d.groups; ++t) {
        const int16x8_t x = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(pixels[m] + d.offsets[t] + c)));
        const int16x8_t w = vmovl_s8(vld1_s8(d.weights + t * kBlock + c));
        low = vmlal_s16(low, vget_low_s16(x), vget_low_s16(w));
        high = vmlal_s16(high, vget_high_s16(x), vget_high_s16(w));
      }
      vst1q_s32(sums + m * kBlock + c, low);
      vst1q_s32(sums + m * kBlock + c + 4, high);
    }
}

inline float32x4_t clamp(float32x4_t x, float low, float high) {
  return vminq_f32(vmaxq_f32(x, vdupq_n_f32(low)), vdupq_n_f32(high));
}

// Bounds are integers, so clipping before rounding is clipping after it; vcvtnq rounds half to even.
inline void finish(const Epilogue& e, const int32_t* sums, int count, int width) {
  const float32x4_t zero = vdupq_n_f32(float(e.zero));
  for (int m = 0; m < count; ++m) {
    const ptrdiff_t at = m * e.stride;
    for (int c = 0; c < width; c += 4) {
      const int some = width - c < 4 ? width - c : 4;
      const float32x4_t value = vmulq_f32(vcvtq_f32_s32(vld1q_s32(sums + m * kBlock + c)), vld1q_f32(e.multiplier + c));
      float reals[4];
      vst1q_f32(reals, value);
      if (e.real) {
        __builtin_memcpy(e.real + at + c, reals, size_t(some) * 4);
        continue;
      }
      const float32x4_t own = vaddq_f32(vrndnq_f32(clamp(value, float(e.low - e.zero), float(e.high - e.zero))), zero);
      int32_t codes[4];
      vst1q_s32(codes, vcvtnq_s32_f32(own));
      for (int i = 0; e.own && i < some; ++i) e.own[at + c + i] = uint8_t(codes[i]);
      if (e.other) {
        float others[4] = {};
        for (int i = 0; i < some; ++i) others[i] = float(e.other[at + c + i]);
        const float32x4_t other = vld1q_f32(others);
        const float32x4_t first = e.other_first ? other : own, second = e.other_first ? own : other;
        const float32x4_t inner = vfmaq_n_f32(vdupq_n_f32(e.offset), second, e.ratio_second);
        const float32x4_t sum = vfmaq_n_f32(inner, first, e.ratio_first);
        vst1q_s32(codes, vcvtnq_s32_f32(clamp(sum, float(e.sum_low), float(e.sum_high))));
        for (int i = 0; e.sum && i < some; ++i) e.sum[at + c + i] = uint8_t(codes[i]);
      }
      for (int t = 0; t < e.tables; ++t)
        for (int i = 0; e.copy[t] && i < some; ++i) e.copy[t][at + c + i] = e.table[t][codes[i]];
    }
  }
}

inline void largest(const uint8_t* const* from, size_t vectors, size_t count, uint8_t* to) {
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    uint8x16_t best = vdupq_n_u8(0);
    for (size_t v = 0; v < vectors; ++v) best = vmaxq_u8(best, vld1q_u8(from[v] + i));
    vst1q_u8(to + i, best);
  }
  for (; i < count; ++i) {
    to[i] = 0;
    for (size_t v = 0; v < vectors; ++v) to[i] = to[i] > from[v][i] ? to[i] : from[v][i];
  }
}

inline Isa neon_table(const char* name, ProductFunction product) {
  Isa isa = *portable_isa();  // what is not named here runs as portable code, compiled for the whole architecture
  isa.name = name;
  isa.product = product;
  isa.binary = binary;
  isa.depthwise = depthwise;
  isa.finish = finish;
  isa.largest = largest;
  isa.winograd_input = nullptr;
  isa.winograd_output = nullptr;
  return isa;
}

}  // namespace
}  // namespace edgeqat
