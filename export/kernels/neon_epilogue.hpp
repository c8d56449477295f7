// The epilogue on NEON, 16 channels at a time: the portable one's floating-point operations in its order.
//
// The portable one clips, rounds and adds the zero point; here rounding comes first and every narrowing saturates.
// Bounds are bytes, so what saturation to 32 bits, to 16 bits or to a byte changes lies beyond the bounds before and
// after it.
#pragma once
#include <arm_neon.h>

#include "isa.hpp"
#include "neon_codes.hpp"

namespace edgeqat {
namespace {

// 16 floats.
struct Sixteen {
  float32x4_t part[4];
};

inline Sixteen load_floats(const float* from) {
  return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
}

inline Sixteen to_floats(const int32_t* sums) {
  Sixteen found;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) found.part[i] = vcvtq_f32_s32(vld1q_s32(sums + 4 * i));
  return found;
}

inline Sixteen to_floats(uint8x16_t codes) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(codes)), high = vmovl_high_u8(codes);
  return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
           vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))}};
}

// clip(rint(values), 0, 255); vcvtn rounds half to even.
inline uint8x16_t to_unsigned(const Sixteen& values) {
  uint16x8_t half[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const uint16x4_t first = vqmovn_u32(vcvtnq_u32_f32(values.part[2 * i]));
    half[i] = vqmovn_high_u32(first, vcvtnq_u32_f32(values.part[2 * i + 1]));
  }
  return vqmovn_high_u16(vqmovn_u16(half[0]), half[1]);
}

// clip(rint(values) + zero, 0, 255)
inline uint8x16_t to_codes(const Sixteen& values, int16x8_t zero) {
  int16x8_t half[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const int16x4_t first = vqmovn_s32(vcvtnq_s32_f32(values.part[2 * i]));
    half[i] = vqaddq_s16(vqmovn_high_s32(first, vcvtnq_s32_f32(values.part[2 * i + 1])), zero);
  }
  return vqmovun_high_s16(vqmovun_s16(half[0]), half[1]);
}

// An epilogue's scalars in vectors.
struct Constants {
  explicit Constants(const Epilogue& e)
      : zero(vdupq_n_s16(int16_t(e.zero))),
        lowest(vdupq_n_u8(uint8_t(e.low))),
        highest(vdupq_n_u8(uint8_t(e.high))),
        sum_lowest(vdupq_n_u8(uint8_t(e.sum_low))),
        sum_highest(vdupq_n_u8(uint8_t(e.sum_high))),
        offset(vdupq_n_f32(e.offset)),
        ratio_own(e.other_first ? e.ratio_second : e.ratio_first),
        ratio_other(e.other_first ? e.ratio_first : e.ratio_second) {}
  int16x8_t zero;
  uint8x16_t lowest, highest, sum_lowest, sum_highest;
  float32x4_t offset;
  float ratio_own, ratio_other;
};

// kFromZero: zero point and lowest code are 0, as after a ReLU.
template <bool kFromZero>
__attribute__((always_inline)) inline uint8x16_t own_codes(const int32_t* sums, const Sixteen& multiplier,
                                                           const Constants& k) {
  Sixteen values = to_floats(sums);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) values.part[i] = vmulq_f32(values.part[i], multiplier.part[i]);
  if (kFromZero) return vminq_u8(to_unsigned(values), k.highest);
  return vminq_u8(vmaxq_u8(to_codes(values, k.zero), k.lowest), k.highest);
}

// The second summand is multiplied and added first.
template <bool kOtherFirst>
__attribute__((always_inline)) inline uint8x16_t add_other(const Constants& k, uint8x16_t own_bytes,
                                                           uint8x16_t other_bytes) {
  const Sixteen own = to_floats(own_bytes), other = to_floats(other_bytes);
  Sixteen sum;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if (kOtherFirst)
      sum.part[i] = vfmaq_n_f32(vfmaq_n_f32(k.offset, own.part[i], k.ratio_own), other.part[i], k.ratio_other);
    else
      sum.part[i] = vfmaq_n_f32(vfmaq_n_f32(k.offset, other.part[i], k.ratio_other), own.part[i], k.ratio_own);
  }
  return vminq_u8(vmaxq_u8(to_unsigned(sum), k.sum_lowest), k.sum_highest);
}

enum class Adds { kNothing, kOtherFirst, kOtherSecond };

// Up to 16 channels, from `c` on, of `count` pixels. A full vector is read and written in place.
template <Adds kAdds, bool kFull>
void finish_channels(const Epilogue& e, const Constants& k, const int32_t* sums, int count, int c, int channels) {
  const Sixteen multiplier = load_floats(e.multiplier + c);
  const int largest_code = kAdds == Adds::kNothing ? e.high : e.sum_high;
  const int tables = e.tables;  // a store of codes might change e, for all that the compiler knows
  for (int m = 0; m < count; ++m) {
    const ptrdiff_t at = m * e.stride + c;
    uint8x16_t codes = own_codes<false>(sums + m * kBlock + c, multiplier, k);
    if (e.own) store_codes<kFull>(e.own + at, codes, channels);
    if (kAdds != Adds::kNothing) {
      const uint8x16_t other = load_codes<kFull>(e.other + at, channels);
      codes = add_other<kAdds == Adds::kOtherFirst>(k, codes, other);
      if (e.sum) store_codes<kFull>(e.sum + at, codes, channels);
    }
    for (int t = 0; t < tables; ++t)
      if (e.copy[t]) store_codes<kFull>(e.copy[t] + at, look_up(e.table[t], largest_code, codes), channels);
  }
}

template <Adds kAdds>
void finish_codes(const Epilogue& e, const int32_t* sums, int count, int width) {
  const Constants k(e);
  int c = 0;
  for (; c + kLanes <= width; c += kLanes) finish_channels<kAdds, true>(e, k, sums, count, c, kLanes);
  if (c < width) finish_channels<kAdds, false>(e, k, sums, count, c, width - c);
}

// The commonest: only a layer's own codes are wanted.
template <bool kFromZero>
void finish_own(const Epilogue& e, const int32_t* sums, int count, int width) {
  const Constants k(e);
  const ptrdiff_t stride = e.stride;
  int c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    const Sixteen multiplier = load_floats(e.multiplier + c);
    const int32_t* from = sums + c;
    uint8_t* to = e.own + c;
    for (int m = 0; m < count; ++m, from += kBlock, to += stride)
      vst1q_u8(to, own_codes<kFromZero>(from, multiplier, k));
  }
  if (c < width) finish_channels<Adds::kNothing, false>(e, k, sums, count, c, width - c);
}

inline void finish_real(const Epilogue& e, const int32_t* sums, int count, int width) {
  for (int m = 0; m < count; ++m) {
    const int32_t* row = sums + m * kBlock;
    float* to = e.real + m * e.stride;
    int c = 0;
    for (; c + 4 <= width; c += 4)
      vst1q_f32(to + c, vmulq_f32(vcvtq_f32_s32(vld1q_s32(row + c)), vld1q_f32(e.multiplier + c)));
    for (; c < width; ++c) to[c] = float(row[c]) * e.multiplier[c];
  }
}

inline void finish(const Epilogue& e, const int32_t* sums, int count, int width) {
  if (e.real)
    finish_real(e, sums, count, width);
  else if (!e.other && e.own && !e.tables && e.zero == 0 && e.low == 0)
    finish_own<true>(e, sums, count, width);
  else if (!e.other && e.own && !e.tables)
    finish_own<false>(e, sums, count, width);
  else if (!e.other)
    finish_codes<Adds::kNothing>(e, sums, count, width);
  else if (e.other_first)
    finish_codes<Adds::kOtherFirst>(e, sums, count, width);
  else
    finish_codes<Adds::kOtherSecond>(e, sums, count, width);
}

}  // namespace
}  // namespace edgeqat
